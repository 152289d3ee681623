"""The orthogonal factor of a tall matrix by a quintic Newton-Schulz iteration (Jordan et al., Muon, 2024).

    X_0 = M / (||M||_F + 1e-7),   X_{k+1} = X_k (a_k I + b_k G_k + c_k G_k^2),   G_k = X_k^T X_k

Every factor is a polynomial of G_0, so X_5 = X_0 P with P of (r, r): after one product for G_0 the iteration needs the
small matrices alone, G_{k+1} = G_k (a I + b G_k + c G_k^2)^2. That takes a fifth of the arithmetic on the rows, and
when the rows are spread over processes one sum of an (r, r) matrix is all that they exchange. The small matrices are
float64: a rounding error of G_0 grows by up to 3.44^10, about 2e5.

In bfloat16 the iteration runs on X itself, as published: its Gram matrices are too coarse to iterate on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Coefficients = Sequence[tuple[float, float, float]]

CONSTANT: Coefficients = ((3.4445, -4.7750, 2.0315),) * 5
"""Muon's: steepest at zero."""
SCHEDULED: Coefficients = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
"""One triple a step, of the Trion authors' fused kernel: singular values end nearer to 1."""


def orthogonalize(
    matrix: Tensor,
    coefficients: Coefficients = CONSTANT,
    *,
    dtype: torch.dtype | None = None,
    total: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Replaces the singular values of a matrix by numbers near 1, keeping its singular vectors.

    Args:
        matrix: (rows, r).
        coefficients: One (a, b, c) a step.
        dtype: ``torch.bfloat16`` iterates in bfloat16; otherwise what the matrix is in is used.
        total: Sums a tensor over the processes among which the rows are split; not with bfloat16.

    Returns:
        (rows, r) in the matrix's dtype, a new tensor.
    """
    if total is not None:
        return _by_gram(matrix, coefficients, total)
    if matrix.shape[0] < matrix.shape[1]:
        return orthogonalize(matrix.mT, coefficients, dtype=dtype).mT
    if dtype == torch.bfloat16:
        return _direct(matrix.to(dtype), coefficients).to(matrix.dtype)
    # The small products are float64: they pay from about eight times as many rows as columns on.
    tall = matrix.shape[0] >= 8 * matrix.shape[1]
    return _by_gram(matrix, coefficients, lambda gram: gram) if tall else _direct(matrix, coefficients)


def _by_gram(matrix: Tensor, coefficients: Coefficients, total: Callable[[Tensor], Tensor]) -> Tensor:
    wide = matrix.double()
    gram = total(wide.mT @ wide)
    scale = gram.diagonal().sum().sqrt() + 1e-7
    gram = gram / scale**2
    factor = step = torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    for number, (a, b, c) in enumerate(coefficients):
        if number:
            gram = gram @ step @ step
        step = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        step.diagonal().add_(a)
        factor = factor @ step
    return matrix @ (factor / scale).to(matrix.dtype)


def _direct(matrix: Tensor, coefficients: Coefficients) -> Tensor:
    x: Tensor = matrix / (matrix.norm() + 1e-7)
    for a, b, c in coefficients:
        gram = x.mT @ x
        x = torch.addmm(x, x, torch.addmm(gram, gram, gram, beta=b, alpha=c), beta=a)
    return x

"""Small helpers on tensors: local shards, matrices out of any shape, and rounding to bfloat16 without bias."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds.

    Args:
        tensor: Plain, or a DTensor.

    Returns:
        A DTensor's local shard, sharing its memory; a plain tensor as it is.
    """
    where: Any = tensor
    part: Tensor = where.to_local() if _is_sharded_type(tensor) else tensor
    return part


def sharded(tensor: Tensor) -> bool:
    """Whether a tensor is split over processes by its first dimension (FSDP2).

    Args:
        tensor: Plain, or a DTensor.

    Returns:
        False for plain tensors and for copies of the whole.

    Raises:
        ValueError: It is split in another way.
    """
    if not _is_sharded_type(tensor):
        return False
    where: Any = tensor
    placements = where.placements
    for placement in placements:
        if not (placement.is_replicate() or placement.is_shard(0)):
            raise ValueError(f"parameters may be replicated or sharded by dimension 0, not {placement}")
    return any(placement.is_shard(0) for placement in placements)


def like(tensor: Tensor, part: Tensor) -> Tensor:
    """Wraps a state tensor the way its parameter is, so that sharded checkpoints know what to do with it.

    Args:
        tensor: The parameter.
        part: This process's rows of the state, (rows of the local shard, k).

    Returns:
        A DTensor over the same mesh for a sharded parameter, else ``part`` itself.
    """
    if not _is_sharded_type(tensor):
        return part
    from torch.distributed.tensor import DTensor

    where: Any = tensor
    shape = torch.Size((tensor.shape[0], *part.shape[1:]))
    wrapped: Tensor = DTensor.from_local(
        part, where.device_mesh, where.placements, run_check=False, shape=shape, stride=_strides(shape)
    )
    return wrapped


def sum_over_shards(tensor: Tensor, value: Tensor) -> Tensor:
    """Adds a value up over the processes that hold the shards of a parameter.

    Args:
        tensor: The parameter; plain ones need no communication.
        value: Each process's own share, any shape.

    Returns:
        The sum.
    """
    if not sharded(tensor):
        return value
    import torch.distributed as dist

    where: Any = tensor
    total = value.clone()
    for dimension, placement in enumerate(where.placements):
        if placement.is_shard(0):
            dist.all_reduce(total, group=where.device_mesh.get_group(dimension))
    return total


def as_matrix(shape: Sequence[int]) -> tuple[int, int, int] | None:
    """Reads a shape as a stack of matrices.

    Args:
        shape: Of a parameter.

    Returns:
        (matrices, rows, columns): (1, m, n) for a matrix; (E, m, n) for a stack of E experts; (1, out, in * kernel)
        for the weight of a convolution in two or more dimensions; None for vectors and scalars.
    """
    if len(shape) < 2:
        return None
    if len(shape) == 3:
        return int(shape[0]), int(shape[1]), int(shape[2])
    return 1, int(shape[0]), math.prod(int(size) for size in shape[1:])


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What moments are kept and updates computed in: float64 for float64, float32 for all else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def round_to(target: Tensor, value: Tensor, generator: torch.Generator | None) -> None:
    """Writes a float32 result into weights of a narrower type.

    Adding 16 random bits below bfloat16's last place and cutting them off rounds up as often as the cut part asks for:
    the mean over draws is the value itself, so that updates smaller than a weight's last place are not lost.

    Args:
        target: Written to; any floating dtype.
        value: Of the same shape, float32 (or the target's own dtype).
        generator: Draws the bits; None rounds to nearest, as does every target that is not bfloat16.
    """
    if generator is None or target.dtype != torch.bfloat16:
        target.copy_(value)
        return
    bits = torch.empty_like(value, dtype=torch.int32).random_(0, 1 << 16, generator=generator)
    bits.add_(value.view(torch.int32)).bitwise_and_(-(1 << 16))
    target.copy_(torch.where(value.isfinite(), bits.view(torch.float32), value))


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[place + 1 :]) for place in range(len(shape)))


def _is_sharded_type(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, without importing torch.distributed where there is none."""
    return hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")

"""Update rules: AdamW, Lion and SGD with momentum where state is kept; sign, gradient or nothing where none is.

A rule works on whatever it is given: a whole parameter, or the compact part of one that has state. ``Adam`` on float32
and float64 tensors in main memory goes through torch's fused kernel; everywhere else the same formula is written out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Age = int | Tensor
"""Steps since the moments began, this one included: one number, or one for each column (k,) or row (k, 1)."""

Free = Literal["sign", "sgd", "none"]


@dataclass(frozen=True)
class Rule(ABC):
    """How a tensor with state is updated."""

    @abstractmethod
    def moments(self) -> tuple[str, ...]:
        """Names of its state tensors, each of the shape that it is used on."""

    @abstractmethod
    def delta(self, g: Tensor, moments: Sequence[Tensor], age: Age, rate: float) -> Tensor:
        """Updates the moments in place and says what to add to the weights.

        Args:
            g: Gradient, of the moments' shape and dtype; not changed.
            moments: In the order of ``moments()``.
            age: Steps since the moments began.
            rate: Learning rate; a negative one turns the update.

        Returns:
            The update, to be added.
        """

    def delta_into(self, out: Tensor, g: Tensor, moments: Sequence[Tensor], age: Age, rate: float) -> None:
        """Does as ``delta`` does, and writes the update into a buffer of the same shape and dtype."""
        out.copy_(self.delta(g, moments, age, rate))

    def apply(self, p: Tensor, g: Tensor, moments: Sequence[Tensor], age: Age, rate: float, decay: float) -> None:
        """Decays and updates weights in place.

        Args:
            p: Weights; float32 or float64.
            g: Gradient, of the same shape and dtype; not changed.
            moments: In the order of ``moments()``.
            age: Steps since the moments began.
            rate: Learning rate.
            decay: What is taken off the weights first: ``p *= 1 - decay``.
        """
        if decay:
            p.mul_(1 - decay)
        p.add_(self.delta(g, moments, age, rate))


@dataclass(frozen=True)
class Adam(Rule):
    """AdamW (arXiv 1711.05101): u = -rate / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)."""

    beta1: float
    beta2: float
    eps: float
    plain: bool = False
    """Never use the fused kernel, whose rounding differs from the formula's as it is written."""

    def moments(self) -> tuple[str, ...]:
        """Mean of the gradient, mean of its square."""
        return ("exp_avg", "exp_avg_sq")

    def delta(self, g: Tensor, moments: Sequence[Tensor], age: Age, rate: float) -> Tensor:
        """See ``Rule``."""
        mean, square = moments
        mean.mul_(self.beta1).add_(g, alpha=1 - self.beta1)
        square.mul_(self.beta2).addcmul_(g, g, value=1 - self.beta2)
        if isinstance(age, Tensor):
            old = age.to(g.dtype)
            root = square.sqrt().div_((1 - self.beta2**old).sqrt_()).add_(self.eps)
            return mean.div(root).mul_(-rate / (1 - self.beta1**old))
        root = square.sqrt().div_((1 - self.beta2**age) ** 0.5).add_(self.eps)
        return mean.div(root).mul_(-rate / (1 - self.beta1**age))

    def delta_into(self, out: Tensor, g: Tensor, moments: Sequence[Tensor], age: Age, rate: float) -> None:
        """See ``Rule``. The fused kernel has no form that gives the update alone: weights of zero show it."""
        if self.plain or isinstance(age, Tensor) or not fusable(out, g, *moments):
            super().delta_into(out, g, moments, age, rate)
        elif out.numel():
            mean, square = moments
            fused(out.zero_(), g, mean, square, torch.tensor(float(age), device="cpu"), self, rate, 0.0)

    def apply(self, p: Tensor, g: Tensor, moments: Sequence[Tensor], age: Age, rate: float, decay: float) -> None:
        """See ``Rule``."""
        if self.plain or isinstance(age, Tensor) or rate == 0 or not fusable(p, g, *moments):
            super().apply(p, g, moments, age, rate, decay)
            return
        if p.numel():
            mean, square = moments
            fused(p, g, mean, square, torch.tensor(float(age), device="cpu"), self, rate, decay / rate)


@dataclass(frozen=True)
class Lion(Rule):
    """Lion (arXiv 2302.06675): u = -rate * sign(b1 m + (1 - b1) g), then m = b2 m + (1 - b2) g."""

    beta1: float
    beta2: float

    def moments(self) -> tuple[str, ...]:
        """Mean of the gradient."""
        return ("exp_avg",)

    def delta(self, g: Tensor, moments: Sequence[Tensor], age: Age, rate: float) -> Tensor:  # noqa: ARG002
        """See ``Rule``."""
        (mean,) = moments
        sign = mean.mul(self.beta1).add_(g, alpha=1 - self.beta1).sign_()
        mean.mul_(self.beta2).add_(g, alpha=1 - self.beta2)
        return sign.mul_(-rate)


@dataclass(frozen=True)
class Momentum(Rule):
    """SGD with heavy-ball momentum: b = mu b + g, starting from b = g; u = -rate * b."""

    momentum: float

    def moments(self) -> tuple[str, ...]:
        """Sum of the gradients, fading."""
        return ("momentum_buffer",)

    def delta(self, g: Tensor, moments: Sequence[Tensor], age: Age, rate: float) -> Tensor:  # noqa: ARG002
        """See ``Rule``."""
        (buffer,) = moments
        buffer.mul_(self.momentum).add_(g)
        return buffer.mul(-rate)


def rule_of(group: dict[str, Any]) -> Rule:
    """The rule that a group's settings ask for.

    Args:
        group: With ``full``, ``betas``, ``eps`` and ``momentum``.

    Returns:
        The rule.

    Raises:
        ValueError: There is no such rule.
    """
    beta1, beta2 = group["betas"]
    match group["full"]:
        case "adamw":
            return Adam(beta1, beta2, group["eps"], plain=group["compat"] == "official")
        case "lion":
            return Lion(beta1, beta2)
        case "sgdm":
            return Momentum(group["momentum"])
    raise ValueError(f"full must be adamw, lion or sgdm, not {group['full']!r}")


def add_(w: Tensor, change: Tensor, rate: float, decay: float) -> None:
    """``w <- (1 - decay) w - rate change`` in one pass, by torch's fused SGD.

    Args:
        w: Weights that ``fusable`` takes.
        change: Of the same shape and dtype; not changed.
        rate: Positive.
        decay: What is taken off the weights first.
    """
    torch._fused_sgd_(
        [w],
        [change],
        [],
        weight_decay=decay / rate,
        momentum=0.0,
        lr=rate,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=False,
    )


def fusable(*tensors: Tensor) -> bool:
    """Whether torch's fused kernel takes these: in main memory, dense, of one shape, all float32 or
    all float64. It reads and writes as many numbers of each as the first has."""
    dtype, shape = tensors[0].dtype, tensors[0].shape
    return dtype in (torch.float32, torch.float64) and all(
        t.device.type == "cpu" and t.dtype == dtype and t.shape == shape and t.is_contiguous() for t in tensors
    )


def fused(
    p: Tensor, g: Tensor, mean: Tensor, square: Tensor, age: Tensor, rule: Adam, rate: float, weight_decay: float
) -> None:
    """Calls torch's fused AdamW on one tensor.

    Args:
        p: Weights.
        g: Gradient.
        mean: First moment.
        square: Second moment.
        age: float32 scalar, steps since the moments began.
        rule: Its betas and eps.
        rate: Learning rate.
        weight_decay: The kernel takes ``rate * weight_decay`` of the weights off.
    """
    torch._fused_adamw_(
        [p],
        [g],
        [mean],
        [square],
        [],
        [age],
        lr=rate,
        beta1=rule.beta1,
        beta2=rule.beta2,
        weight_decay=weight_decay,
        eps=rule.eps,
        amsgrad=False,
        maximize=False,
    )

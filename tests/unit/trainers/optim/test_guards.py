"""What the optimizers refuse rather than step wrongly: settings, state and weights that do not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainers.optim import DctAdamW, Frugal, GaLore, Trion
from trainers.optim.rules import fusable

ALL: list[Any] = [Frugal, GaLore, DctAdamW, Trion]
OTHER_SHAPES: list[tuple[Any, dict[str, Any], tuple[int, ...]]] = [
    # (optimizer, settings, a shape whose state does not fit a parameter of (12, 20))
    (Frugal, {"role": "full"}, (6, 20)),
    (Frugal, {"split": "columns"}, (6, 20)),
    (Frugal, {"split": "columns", "select": "top"}, (12, 10)),
    (Frugal, {"split": "column_blocks", "block_columns": 2}, (24, 20)),
    (Frugal, {"split": "rows"}, (12, 10)),
    (Frugal, {"split": "randk"}, (60, 60)),
    (Frugal, {"split": "block", "density": 1.0}, (12, 40)),
    (Frugal, {"split": "svd"}, (12, 40)),
    (Frugal, {"split": "random", "side": "full"}, (12, 40)),
    (Frugal, {"split": "columns"}, (2, 12, 20)),
    (GaLore, {"rank": 3}, (12, 40)),
    (GaLore, {"role": "full"}, (6, 20)),
    (DctAdamW, {"rank": 4}, (12, 40)),
    (DctAdamW, {"rank": 4, "feedback": "8bit"}, (6, 20)),
    (DctAdamW, {"role": "full"}, (6, 20)),
    (Trion, {"rank": 4}, (6, 20)),
    (Trion, {"role": "full"}, (6, 20)),
]


def _made(kind: Any, shape: tuple[int, ...], **settings: Any) -> tuple[nn.Parameter, Any]:
    weight = nn.Parameter(torch.ones(shape))
    return weight, kind([{"params": [weight], **settings}])


def _step(weight: Tensor, optimizer: Any) -> None:
    weight.grad = torch.ones_like(weight)
    optimizer.step()


@pytest.mark.parametrize(("kind", "settings", "shape"), OTHER_SHAPES, ids=str)
def test_state_of_another_shape_is_refused_and_changes_nothing(
    kind: Any, settings: dict[str, Any], shape: tuple[int, ...]
) -> None:
    other, source = _made(kind, shape, **settings)
    _step(other, source)
    weight, optimizer = _made(kind, (12, 20), **settings)
    _step(weight, optimizer)
    optimizer.param_groups[0]["lr"] = 0.125
    before = {name: value.clone() for name, value in optimizer.state[weight].items()}
    with pytest.raises(ValueError, match="load a state of the same model and settings"):
        optimizer.load_state_dict(source.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.125
    assert optimizer.state[weight].keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in optimizer.state[weight].items())
    # The same state put there by hand must not reach a kernel that trusts it.
    optimizer.state[weight] = dict(source.state[other])
    held = weight.detach().clone()
    with pytest.raises(ValueError, match="which does not fit the parameter"):
        _step(weight, optimizer)
    assert torch.equal(weight, held)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("roles", [("projected", "full"), ("full", "projected")])
def test_a_role_that_changes_late_is_refused_until_the_state_is_dropped(kind: Any, roles: tuple[str, str]) -> None:
    weight, optimizer = _made(kind, (12, 20), role=roles[0], **({"rank": 4} if kind is not Frugal else {}))
    _step(weight, optimizer)
    optimizer.param_groups[0]["role"] = roles[1]
    with pytest.raises(ValueError, match=r"begin anew by optimizer\.state\.pop\(parameter, None\)"):
        _step(weight, optimizer)
    optimizer.state.pop(weight, None)
    _step(weight, optimizer)
    assert weight.isfinite().all()


def test_feedback_that_changes_late_is_refused() -> None:
    weight, optimizer = _made(DctAdamW, (12, 20), rank=4)
    _step(weight, optimizer)
    for feedback in ("full", "8bit"):
        optimizer.param_groups[0]["feedback"] = feedback
        with pytest.raises(ValueError, match="has no error"):
            _step(weight, optimizer)
    for feedback, other in (("full", "none"), ("8bit", "none"), ("full", "4bit"), ("4bit", "full")):
        weight, optimizer = _made(DctAdamW, (12, 20), rank=4, feedback=feedback)
        _step(weight, optimizer)
        optimizer.param_groups[0]["feedback"] = other
        with pytest.raises(ValueError, match="which does not fit the parameter"):
            _step(weight, optimizer)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("role", ["projected", "full"])
def test_state_of_another_dtype_is_refused(kind: Any, role: str) -> None:
    settings = {"role": role} | ({"rank": 4} if kind is not Frugal else {})
    double = nn.Parameter(torch.ones(12, 20, dtype=torch.float64))
    source = kind([{"params": [double], **settings}])
    _step(double, source)
    _, optimizer = _made(kind, (12, 20), **settings)
    with pytest.raises(ValueError, match=r"in torch\.float64 instead of torch\.float32"):
        optimizer.load_state_dict(source.state_dict())
    assert not optimizer.state


@pytest.mark.parametrize("kind", ALL)
def test_a_full_bfloat16_weight_is_stepped_in_tiles(kind: Any) -> None:
    """No tensor of its size is made beside its state: an embedding is the largest weight of all."""
    weight = nn.Parameter(torch.ones(4096, 2560, dtype=torch.bfloat16))
    optimizer = kind([{"params": [weight], "role": "full"}])
    _step(weight, optimizer)
    weight.grad = torch.ones_like(weight)
    with _Largest() as largest:
        optimizer.step()
    assert 0 < largest.numel <= weight.numel() // 8


class _Largest(TorchDispatchMode):
    """The most elements of any tensor that is made while this is on."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in given]
        self.numel = max([self.numel, *(x.numel() for x in made)])
        return out


def test_the_fused_kernel_is_for_tensors_of_one_shape() -> None:
    assert fusable(torch.ones(4, 6), torch.ones(4, 6))
    assert not fusable(torch.ones(4, 6), torch.ones(4, 3))
    assert not fusable(torch.ones(4, 6), torch.ones(6, 4))


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("role", ["projected", "full"])
def test_complex_weights_are_refused_and_stay(kind: Any, role: str) -> None:
    weight = nn.Parameter(torch.full((4, 6), 1 + 2j))
    optimizer = kind([{"params": [weight], "role": role}])
    with pytest.raises(ValueError, match="takes no complex weights"):
        _step(weight, optimizer)
    assert torch.equal(weight, torch.full((4, 6), 1 + 2j))


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (DctAdamW, {"feedback": "16bit"}, "feedback must be"),
        (DctAdamW, {"rank": 0}, "rank must be"),
        (DctAdamW, {"rank": 2.5}, "rank must be a whole number"),
        (DctAdamW, {"update_gap": 2.5}, "update_gap must be a whole number"),
        (DctAdamW, {"basis": "learned", "learn_steps": 1.5}, "learn_steps must be a whole number"),
        (Frugal, {"update_gap": 2.5}, "update_gap must be a whole number"),
        (Frugal, {"density_end": 0.1, "decay_steps": True}, "decay_steps must be a whole number"),
        (DctAdamW, {"compat": "official", "transform": "fft", "norm": 2}, "scores by norm 1"),
        (DctAdamW, {"ages": True, "rotate": False}, "ages needs rotate"),
        (Trion, {"rank": 0}, "rank must be"),
        (Trion, {"steps": 9}, "steps must be"),
        (Trion, {"adam_lr": -1.0}, "adam_lr must be"),
        (Frugal, {"density": 2}, "density must be"),
        (GaLore, {"rank": 0}, "rank must be"),
        *((kind, {"learning_rates": 1}, "has no setting 'learning_rates'") for kind in ALL),
        *((kind, {"densty": 0.5}, "no setting 'densty' for a group; did you mean density") for kind in ALL),
    ],
)
def test_a_late_group_is_checked_and_left_out(kind: Any, settings: dict[str, Any], message: str) -> None:
    _, optimizer = _made(kind, (12, 20))
    late = nn.Parameter(torch.ones(8, 6))
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [late, nn.Parameter(torch.ones(3))], **settings})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match=message):
        kind([{"params": [late], **settings}])


@pytest.mark.parametrize("kind", ALL)
def test_a_late_group_is_stepped_and_groups_of_another_optimizer_are_taken(kind: Any) -> None:
    weight, optimizer = _made(kind, (12, 20))
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=5, cycle_momentum=False)
    again = kind(optimizer.param_groups)
    late = nn.Parameter(torch.ones(8, 6))
    again.add_param_group({"params": [late], "names": ["late"]})
    late.grad = torch.ones_like(late)
    _step(weight, again)
    assert not torch.equal(late, torch.ones(8, 6))
    assert again.group(late) is again.param_groups[1]


@pytest.mark.parametrize("kind", ALL)
def test_loading_tells_counters_from_the_moments_of_a_scalar(kind: Any) -> None:
    weight, optimizer = _made(kind, ())
    _step(weight, optimizer)
    elsewhere = nn.Parameter(torch.ones((), device="meta"))
    other = kind([elsewhere])
    other.load_state_dict(optimizer.state_dict())
    devices = {name: value.device.type for name, value in other.state[elsewhere].items()}
    assert devices == {"step": "cpu", "exp_avg": "meta", "exp_avg_sq": "meta"}

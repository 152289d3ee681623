"""What zeroth-order steps promise besides their numbers: exact returns, resumes and replays, and what is refused."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from core.checkpoint import flatten_optimizer, unflatten_optimizer
from trainers.optim import Qzo, walk
from trainers.optim.noise import noise
from trainers.optim.record import Record

SHAPES = ((5, 8), (3,), (40,))
VARIANTS: list[dict[str, Any]] = [
    {},
    {"per": "element", "scales": True, "normalise": True, "window": 7},
    {"per": "tensor", "samples": 3, "noise": "rademacher"},
    {"sides": 1, "samples": 2, "clip": 4.0, "weight_decay": 0.1},
    {"restore": "additive", "samples": 2, "clip_quantile": 0.6},
    {"compat": "official", "scales": True},
    {"compat": "official", "restore": "additive", "weight_decay": 0.1, "eps": 1e-3},
]


def _parameters(seed: int = 0) -> list[torch.nn.Parameter]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.rand(shape, generator=draw) + 0.1) for shape in SHAPES]


def _bowl(p: Tensor) -> float:
    return float(((p - 0.4) ** 2).sum() + p.sin().sum())


def _loss(parameters: list[Any]) -> Callable[[], float]:
    return lambda: sum(_bowl(p.detach().double()) for p in parameters)


def _make(
    variant: dict[str, Any], *, lr: float = 1e-2, seed: int = 3
) -> tuple[list[torch.nn.Parameter], Qzo, list[Record]]:
    parameters, records = _parameters(), []
    optimizer = Qzo(parameters, lr, seed=seed, **variant)
    optimizer.on_step = records.append
    return parameters, optimizer, records


def _go(optimizer: Qzo, loss: Callable[[], float], steps: int) -> None:
    """Steps at rates that fall and, in every fifth step, with a loss that is no number."""
    for _ in range(steps):
        number = optimizer.steps
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + number)
        values = [math.nan] if number % 5 == 4 else []
        optimizer.step(lambda values=values: values.pop() if values else loss())


def _same(one: Qzo, other: Qzo) -> bool:
    pairs = [*zip(one.parameters, other.parameters, strict=True)]
    ours, theirs = one.state[one.parameters[0]], other.state[other.parameters[0]]
    pairs += [(ours[name], theirs[name]) for name in ours]
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_same_run_twice_is_the_same_to_the_last_bit(variant: dict[str, Any]) -> None:
    runs = []
    for seed in (3, 3, 4):
        parameters, optimizer, records = _make(variant, seed=seed)
        _go(optimizer, _loss(parameters), 12)
        runs.append((optimizer, records))
    assert _same(runs[0][0], runs[1][0])
    assert str(runs[0][1]) == str(runs[1][1])
    assert not torch.equal(runs[0][0].parameters[0], runs[2][0].parameters[0])


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_replay_of_the_records_is_the_run_bit_for_bit(variant: dict[str, Any]) -> None:
    parameters, optimizer, records = _make(variant)
    _go(optimizer, _loss(parameters), 14)
    assert optimizer.skipped >= 2
    fresh, again, copied = _make(variant)
    samples = variant.get("samples", 1)
    assert again.replay(records[: 4 * samples]) == 4
    assert again.replay(iter(records[4 * samples :])) == 10
    assert _same(optimizer, again)
    assert not copied, "a replay is not written down again"
    # From here both runs go on alike.
    _go(optimizer, _loss(parameters), 3)
    _go(again, _loss(fresh), 3)
    assert _same(optimizer, again)


def test_records_out_of_place_are_refused() -> None:
    parameters, optimizer, records = _make({"samples": 2})
    _go(optimizer, _loss(parameters), 4)
    for broken, what in (
        (records[2:], "step 2 comes where that of step 1"),
        (records[:2] + records[4:], "step 3 comes where that of step 2"),
        (records[:3], "step 2 needs a record for each of 2 directions"),
        ([records[1], records[0]], "step 1 needs a record for each"),
    ):
        again = _make({"samples": 2})[1]
        with pytest.raises(ValueError, match=what):
            again.replay(broken)
        assert again.steps == (1 if broken[0] is records[0] else 0)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_resume_in_the_middle_changes_nothing(variant: dict[str, Any]) -> None:
    parameters, straight, _ = _make(variant)
    _go(straight, _loss(parameters), 13)
    through: list[Callable[[dict[str, Any]], dict[str, Any]]] = [
        lambda state: unflatten_optimizer(*flatten_optimizer(state)),
        _saved,
    ]
    for carry in through:
        half, first, _ = _make(variant)
        _go(first, _loss(half), 7)
        resumed, second, _ = _make(variant)
        with torch.no_grad():
            for p, saved in zip(resumed, half, strict=True):
                p.copy_(saved)
        second.load_state_dict(carry(first.state_dict()))
        _go(first, _loss(half), 1)  # What was saved does not follow the run that goes on.
        _go(second, _loss(resumed), 6)
        assert _same(straight, second)


def _saved(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded: dict[str, Any] = torch.load(buffer, weights_only=True)
    return loaded


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.get("restore") != "additive"], ids=str)
def test_a_closure_that_raises_leaves_everything_as_it_was(variant: dict[str, Any]) -> None:
    parameters, straight, _ = _make(variant)
    _go(straight, _loss(parameters), 6)
    stopped, optimizer, _ = _make(variant)
    _go(optimizer, _loss(stopped), 3)
    before = [p.detach().clone() for p in stopped]
    calls = variant.get("samples", 1) * variant.get("sides", 2) + (2 - variant.get("sides", 2))
    for stop in range(1, calls + 1):
        count = 0

        def closure(stop: int = stop) -> float:
            nonlocal count
            count += 1
            if count == stop:
                raise KeyboardInterrupt
            return _loss(stopped)()

        with pytest.raises(KeyboardInterrupt):
            optimizer.step(closure)
        assert count == stop
        assert all(torch.equal(p, saved) for p, saved in zip(stopped, before, strict=True))
        assert optimizer.steps == 3
    _go(optimizer, _loss(stopped), 3)
    assert _same(straight, optimizer)


def test_an_additive_return_drifts_by_rounding_and_no_more() -> None:
    parameters, optimizer, _ = _make({"restore": "additive"}, lr=0.0)
    before = [p.detach().clone() for p in parameters]
    with pytest.raises(RuntimeError):
        optimizer.step(_raise)
    optimizer.step(lambda: 1.0)
    drift = max(float((p.detach() - start).abs().max()) for p, start in zip(parameters, before, strict=True))
    assert 0 < drift < 1e-6


def _raise() -> float:
    raise RuntimeError


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_closure_sees_the_two_points_and_no_gradient(dtype: torch.dtype) -> None:
    p = torch.nn.Parameter(torch.linspace(0.5, 2.0, 300, dtype=dtype))
    start, seen = p.detach().clone(), []

    def closure() -> Tensor:
        assert not torch.is_grad_enabled()
        seen.append(p.detach().clone())
        return (p.double() ** 2).sum()

    optimizer = Qzo([p], 1e-3, seed=5)
    records: list[Record] = []
    optimizer.on_step = records.append
    returned = optimizer.step(closure)
    z = noise(5, 1, 0, 0, 300).to(dtype)
    epsilon = 1e-3 * float(start.sort().values[149])
    assert optimizer.epsilon == pytest.approx(epsilon, rel=1e-6)
    assert torch.equal(seen[0], start + z * optimizer.epsilon)
    assert torch.equal(seen[1], start - z * optimizer.epsilon)
    ahead, behind = (float((point.double() ** 2).sum()) for point in seen)
    (record,) = records
    assert record == Record(1, 5, record.d_raw, record.d_raw, 1e-3, ahead, behind, False)
    assert record.d_raw == (ahead - behind) / (2 * optimizer.epsilon)
    assert record.d_raw == pytest.approx(float(2 * (start.double() * z.double()).sum()), rel=1e-3)
    assert returned == pytest.approx((ahead + behind) / 2, rel=1e-12)
    assert torch.equal(p.detach(), start - z * (1e-3 * record.d_applied))


@pytest.mark.parametrize(("sides", "samples", "calls"), [(2, 1, 2), (2, 3, 6), (1, 1, 2), (1, 4, 5)])
def test_losses_a_step(sides: int, samples: int, calls: int) -> None:
    parameters, optimizer, records = _make({"sides": sides, "samples": samples})
    losses: list[float] = []

    def closure() -> float:
        losses.append(_loss(parameters)())
        return losses[-1]

    middle = _loss(parameters)()
    returned = optimizer.step(closure)
    assert len(losses) == calls
    assert [record.direction for record in records] == list(range(samples))
    if sides == 1:
        assert returned == middle == records[0].loss_minus
    else:
        assert returned == pytest.approx(sum(losses) / calls)


@pytest.mark.parametrize("variant", [{}, {"per": "element"}, {"compat": "official"}], ids=str)
def test_the_size_of_a_tile_changes_nothing(variant: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    for size in (walk.TILE, 7):
        monkeypatch.setattr(walk, "TILE", size)
        parameters, optimizer, _ = _make(variant)
        _go(optimizer, _loss(parameters), 4)
        runs.append(optimizer)
    assert _same(*runs)


def test_more_directions_estimate_the_gradient_better() -> None:
    def error(samples: int) -> float:
        errors = []
        for seed in range(20):
            p = torch.nn.Parameter(torch.linspace(0.5, 2.0, 50, dtype=torch.float64))
            before = p.detach().clone()
            gradient = 2 * before
            Qzo([p], 1e-6, seed=seed, samples=samples, clip_quantile=1.0).step(lambda p=p: (p**2).sum())
            errors.append(float((((before - p.detach()) / 1e-6) - gradient).norm() / gradient.norm()))
        return sum(errors) / len(errors)

    # For N elements the variance of the estimate is (N + 1) / n times the gradient's square.
    assert error(1) == pytest.approx(51**0.5, rel=0.3)
    assert error(16) == pytest.approx((51 / 16) ** 0.5, rel=0.3)


@pytest.mark.parametrize(
    "variant", [{}, {"normalise": True, "clip": 3.0}, {"noise": "rademacher", "sides": 1}], ids=str
)
def test_goes_down_a_bowl(variant: dict[str, Any]) -> None:
    p = torch.nn.Parameter(torch.linspace(-1.0, 1.0, 20))
    optimizer = Qzo([p], 0.05 if variant.get("normalise") else 0.02, **variant)
    start = float((p.detach() ** 2).sum())
    for _ in range(400):
        optimizer.step(lambda: (p.double() ** 2).sum())
    assert float((p.detach() ** 2).sum()) < 0.05 * start


class TestNotANumber:
    def test_the_step_is_skipped_counted_and_does_not_decay(self) -> None:
        parameters, optimizer, records = _make({"weight_decay": 0.5})
        before = [p.detach().clone() for p in parameters]
        for values in ([math.nan, 1.0], [1.0, math.inf], [-math.inf, 2.0], [math.inf, math.inf]):
            left = iter(values)
            returned = optimizer.step(lambda left=left: next(left))
            finite = [value for value in values if math.isfinite(value)]
            assert returned == finite[0] if finite else math.isnan(returned)
        assert all(torch.equal(p, start) for p, start in zip(parameters, before, strict=True))
        assert (optimizer.steps, optimizer.skipped, optimizer.clipped) == (4, 4, 0)
        assert all(record.skipped and record.d_applied == 0 for record in records)
        optimizer.step(_loss(parameters))
        assert (optimizer.steps, optimizer.skipped) == (5, 4)

    def test_one_direction_of_three_is_left_out(self) -> None:
        parameters, optimizer, records = _make({"samples": 3})
        values = iter([math.nan])
        optimizer.step(lambda: next(values, None) or _loss(parameters)())
        assert [record.skipped for record in records] == [True, False, False]
        start = _parameters()[0].detach()
        total = sum(noise(3, 1, 0, 0, 40, direction=r).mul_(1e-2 * records[r].d_applied / 3) for r in (1, 2))
        assert torch.allclose(parameters[0].detach(), start - total.view(5, 8), rtol=1e-6)

    def test_too_many_in_a_row_end_the_run(self) -> None:
        parameters, optimizer, _ = _make({"patience": 3})
        for _ in range(2):
            optimizer.step(lambda: math.nan)
        optimizer.step(_loss(parameters))
        for _ in range(2):
            optimizer.step(lambda: math.nan)
        with pytest.raises(ValueError, match="3 steps in a row had no finite loss"):
            optimizer.step(lambda: math.nan)


class TestClipping:
    @staticmethod
    def _derivatives(settings: dict[str, Any], wanted: list[float]) -> list[Record]:
        p, records = torch.nn.Parameter(torch.ones(1)), []
        optimizer = Qzo([p], 0.0, eps=0.5, **settings)
        optimizer.on_step = records.append
        for d in wanted:
            left = iter([d, 0.0])
            optimizer.step(lambda left=left: next(left))
        return records

    def test_the_runs_own_quantile_from_the_twentieth_on(self) -> None:
        wanted = [-100.0, *(float(k) for k in range(2, 21)), 500.0, -500.0, 3.0, 19.5]
        records = self._derivatives({"clip_quantile": 0.9, "window": 20}, wanted)
        assert [record.d_raw for record in records] == wanted
        # After twenty: the 18th smallest of 2..20 and 100 is 19; then 100 has left the window for 500.
        assert [record.d_applied for record in records] == [*wanted[:20], 19.0, -19.0, 3.0, 19.0 + 0.5]
        assert [record.clipped for record in records] == [False] * 20 + [True, True, False, False]

    def test_fixed(self) -> None:
        records = self._derivatives({"clip": 4.0}, [5.0, -7.0, 4.0, 1.0])
        assert [record.d_applied for record in records] == [4.0, -4.0, 4.0, 1.0]
        assert [record.clipped for record in records] == [True, True, False, False]

    def test_over_the_mean(self) -> None:
        # The unit is 1 here. Means: 2, then (2 + 4) / 2, then (2 + 4 + 30) / 3.
        records = self._derivatives({"clip": 2.0, "normalise": True}, [2.0, -4.0, 30.0])
        assert [record.d_applied for record in records] == [1.0, -4 / 3, 2.0]
        assert [record.clipped for record in records] == [False, False, True]

    def test_a_flat_loss_moves_nothing(self) -> None:
        assert [r.d_applied for r in self._derivatives({"normalise": True}, [0.0, 0.0])] == [0.0, 0.0]


class TestScales:
    def test_zero_stays_and_no_other_reaches_or_crosses_it(self) -> None:
        start = torch.tensor([0.0, 1e-3, -1e-3, 2e-9, -2e-9, 0.5] * 20)
        p = torch.nn.Parameter(start.clone())
        optimizer = Qzo([p], 1.0, scales=True, clip_quantile=1.0)
        seen = []

        def closure() -> Tensor:
            seen.append(p.detach().clone())
            return p.double().sum() * 100

        optimizer.step(closure)
        after = p.detach()
        assert all(torch.equal(point[start == 0], start[start == 0]) for point in seen)
        assert not torch.equal(seen[0][start != 0], start[start != 0])
        assert torch.equal(after.sign(), start.sign())
        assert torch.equal(after[start == 0], start[start == 0])
        floor = start.abs().clamp(max=1e-7)
        assert bool((after.abs() >= floor).all())
        assert int((after.abs() == floor).sum()) > 60, "a rate this large drives many to the floor"

    def test_weights_do_cross_zero(self) -> None:
        p = torch.nn.Parameter(torch.full((50,), 1e-4))
        Qzo([p], 1.0, clip_quantile=1.0).step(lambda: p.double().sum() * 100)
        assert bool((p < 0).any())


class TestDistance:
    def test_fixed_for_the_run_and_kept_in_the_state(self) -> None:
        parameters, optimizer, _ = _make({})
        assert optimizer.epsilon == 0
        epsilon = optimizer.prepare()
        expected = torch.cat([p.detach().flatten() for p in parameters]).median()
        assert optimizer.unit == float(expected)
        assert epsilon == 1e-3 * float(expected)
        with torch.no_grad():
            for p in parameters:
                p.mul_(10)
        _go(optimizer, _loss(parameters), 3)
        assert optimizer.prepare() == optimizer.epsilon == epsilon
        _, other, _ = _make({})
        other.load_state_dict(optimizer.state_dict())
        assert other.epsilon == epsilon

    def test_every_tensor_in_its_own_size(self) -> None:
        parameters = [torch.nn.Parameter(torch.full((400,), size)) for size in (1.0, 100.0, 0.0)]
        seen = []
        optimizer = Qzo(parameters, 0.0, per="tensor")
        optimizer.step(lambda: seen.append([p.detach().clone() for p in parameters]) or 1.0)
        shifts = [float((point - size).abs().mean()) for point, size in zip(seen[0], (1.0, 100.0, 0.0), strict=True)]
        # E|z| is 0.8; the unit is the median of 1 and 100, the lower one.
        assert shifts[0] == pytest.approx(0.8e-3, rel=0.15)
        assert shifts[1] == pytest.approx(0.8e-1, rel=0.15)
        assert shifts[2] == 0

    def test_absolute(self) -> None:
        _, optimizer, _ = _make({"eps": 0.25})
        assert optimizer.prepare() == 0.25
        assert optimizer.unit == 0, "nothing needs it"

    def test_nothing_to_be_relative_to(self) -> None:
        with pytest.raises(ValueError, match="every number is zero"):
            Qzo([torch.nn.Parameter(torch.zeros(3))]).prepare()


class TestRefuses:
    def test_groups_of_two_rates(self) -> None:
        one, two = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
        optimizer = Qzo([{"params": [one], "lr": 1e-3}, {"params": [two], "lr": 1e-2}])
        with pytest.raises(ValueError, match="one learning rate"):
            optimizer.step(lambda: 1.0)

    def test_no_closure(self) -> None:
        _, optimizer, _ = _make({})
        with pytest.raises(ValueError, match=r"step\(closure\)"):
            optimizer.step()

    @pytest.mark.parametrize(
        ("parameter", "settings", "message"),
        [
            (torch.ones(2, dtype=torch.bfloat16), {}, "would be lost in torch.bfloat16"),
            (torch.ones(2, dtype=torch.float16), {"normalise": True}, "hold what is tuned in float32"),
            (torch.ones(2, 3).T, {}, "not contiguous"),
            (torch.ones(2), {"lr": -1.0}, "lr must be at least 0"),
            (torch.ones(2), {"weight_decay": -1.0}, "weight_decay must be"),
            (torch.ones(2), {"weight_decay": 0.1, "scales": True}, "weight_decay on scales"),
            (torch.ones(2), {"seeds": lambda: 3}, "seeds is for compat official"),
            (torch.ones(2), {"samples": 0}, "samples must be a whole number"),
        ],
    )
    def test_settings_and_parameters(self, parameter: Tensor, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Qzo([torch.nn.Parameter(parameter)], **settings)

    def test_a_late_group(self) -> None:
        _, optimizer, _ = _make({})
        with pytest.raises(ValueError, match="all at once"):
            optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})

    def test_the_state_of_another_optimizer(self) -> None:
        parameters, optimizer, _ = _make({})
        _go(optimizer, _loss(parameters), 3)
        before = {name: value.clone() for name, value in optimizer.state[parameters[0]].items()}
        others: list[torch.optim.Optimizer] = [
            Qzo(_parameters(), window=7),
            Qzo(_parameters()[:2]),
            torch.optim.SGD(_parameters()),
        ]
        for other in others:
            with pytest.raises(ValueError):
                optimizer.load_state_dict(other.state_dict())
        after = optimizer.state[parameters[0]]
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_state_is_a_kilobyte_and_the_copy_is_one_of_the_parameters() -> None:
    parameters, optimizer, _ = _make({})
    assert optimizer.copied_bytes == 4 * sum(p.numel() for p in parameters)
    assert Qzo(_parameters(), restore="additive").copied_bytes == 0
    state = [value for values in optimizer.state.values() for value in values.values()]
    _go(optimizer, _loss(parameters), 2)
    assert sum(value.numel() * value.element_size() for value in state) == 8 * (100 + 5 + 2 + 3)
    assert all(value.device.type == "cpu" for value in state)

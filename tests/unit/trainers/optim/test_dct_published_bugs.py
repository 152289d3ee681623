"""What published DCT-AdamW and Trion (ISTA-DASLab-Optimizers 1.1.15) get wrong, one test each, with what is wrong.

Where a published *choice* is meant rather than a mistake, ``compat="official"`` makes it; it is tested here too.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.unit.trainers.optim.oracles import bases, dct_adamw, trion
from tests.unit.trainers.optim.projected_helpers import follow, gradients, start
from trainers.optim import DctAdamW, Trion
from trainers.optim.bases import build, get_basis
from trainers.optim.feedback import decode, encode
from trainers.optim.transform import plain_rows


def _transposed(n: int) -> np.ndarray:
    """The published matmul multiplies by the cosine matrix itself, so its basis vectors are that matrix's columns."""
    return bases.cosines(n).T


def test_trion_runs_without_a_process_group() -> None:
    # Published: NameError on device, dtype and get_dct_matrix; then a process group is required on one device too.
    assert not torch.distributed.is_initialized()
    weight = start((20, 12))
    before = weight.detach().clone()
    follow(Trion([weight], rank=4), [{weight: g} for g in gradients((20, 12), steps=2)])
    assert not torch.equal(weight, before)


def test_rotation_on_the_cpu_keeps_the_moments() -> None:
    # Published: matmul(w, R, out=w) returns zeros on the CPU, so both moments are wiped at each refresh.
    weight = start((20, 12))
    optimizer = DctAdamW([weight], rank=8)
    follow(optimizer, [{weight: g} for g in gradients((20, 12), steps=5)])
    before = {k: v.clone() for k, v in optimizer.state[weight].items()}
    follow(optimizer, [{weight: torch.zeros(20, 12)}])
    after = optimizer.state[weight]
    stayed = before["index"] == after["index"]
    assert stayed.any()
    for name, beta in (("exp_avg", 0.9), ("exp_avg_sq", 0.999)):
        assert torch.equal(after[name][:, stayed], before[name][:, stayed] * beta)


def test_models_with_grouped_queries_and_any_other_sizes() -> None:
    # Published: one global basis of the first parameter's size, so that (64, 64) and (16, 64) fail together.
    shapes = [(64, 64), (16, 64), (192, 576), (50, 64), (64, 3, 3, 3)]
    weights = [start(shape, torch.float32) for shape in shapes]
    for kind in (DctAdamW, Trion):
        before = [weight.detach().clone() for weight in weights]
        optimizer = kind(weights, rank=8)
        follow(optimizer, [dict(zip(weights, [gradients(s, steps=1)[0] for s in shapes], strict=True))])
        assert all(not torch.equal(weight, old) for weight, old in zip(weights, before, strict=True))


def test_a_small_vocabulary_is_full_by_role_and_not_by_size() -> None:
    # Published: embeddings escape only if they have 32,000 rows or more.
    embedding = start((100, 16))
    optimizer = DctAdamW([{"params": [embedding], "role": "full"}], rank=4)
    follow(optimizer, [{embedding: gradients((100, 16), steps=1)[0]}])
    assert optimizer.state[embedding]["exp_avg"].shape == (100, 16)


def test_stacks_and_convolutions_are_updated() -> None:
    # Published: parameters of three and more dimensions are silently never updated; scalars neither.
    for shape in ((), (7,), (3, 8, 6), (8, 3, 2, 2), (4, 2, 2, 2, 2)):
        weight = nn.Parameter(torch.ones(shape))
        follow(DctAdamW([weight], rank=2), [{weight: torch.full(shape, 0.5)}])
        assert (weight < 1).all()


def test_eight_bit_feedback_is_off_by_less_than_one_percent() -> None:
    # Published: 16 levels in 8 bits too, 13.9 % of a 4,096-wide row.
    x = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
    assert float((decode(encode(x, 8), 4096) - x).norm() / x.norm()) <= 0.01


def test_four_bit_feedback_puts_values_back_in_their_places() -> None:
    # Published: the two halves of a byte are told apart wrongly, 131 %.
    x = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
    assert float((decode(encode(x, 4), 4096) - x).norm() / x.norm()) <= 0.12


@pytest.mark.parametrize("feedback", ["8bit", "4bit"])
def test_quantised_feedback_is_usable(feedback: Any) -> None:
    # Published: q_ef=True is a KeyError.
    weight = start((20, 300), torch.float32)
    optimizer = DctAdamW([weight], rank=4, feedback=feedback)
    follow(optimizer, [{weight: g} for g in gradients((20, 300), steps=3)])
    assert optimizer.state[weight]["error_code"].dtype == torch.uint8
    assert optimizer.state[weight]["error_code"].any()


def test_fft_takes_bfloat16() -> None:
    # Published: "Unsupported dtype BFloat16".
    weight = start((48, 32), torch.bfloat16)
    before = weight.detach().clone()
    follow(DctAdamW([weight], rank=4, transform="fft"), [{weight: g} for g in gradients((48, 32), steps=2)])
    assert not torch.equal(weight, before)


def test_fft_heeds_the_norm() -> None:
    # Published: the FFT always scores by l1.
    x = torch.zeros(4, 8, dtype=torch.float64)
    vectors = build("dct", 8)
    x += 1.1 * vectors[3] + torch.tensor([4.0, 0, 0, 0], dtype=torch.float64)[:, None] * vectors[5]
    basis = get_basis("dct", 8, torch.float64, torch.device("cpu"), transform="fft")
    rows = plain_rows(x, torch.float64)
    assert int(basis.spectrum(rows, 1).scores.argmax()) == 3
    assert int(basis.spectrum(rows, 2).scores.argmax()) == 5


def test_resumes_in_the_middle_of_an_interval() -> None:
    # Published: steps, basis and a flag live outside the state, a TypeError on the first step after loading.
    shape = (20, 12)
    grads = gradients(shape)
    weight = start(shape)
    optimizer = DctAdamW([weight], rank=4, update_gap=5)
    follow(optimizer, [{weight: g} for g in grads[:7]])
    other = nn.Parameter(weight.detach().clone())
    resumed = DctAdamW([other], rank=4, update_gap=5)
    resumed.load_state_dict(optimizer.state_dict())
    for parameter, own in ((weight, optimizer), (other, resumed)):
        follow(own, [{parameter: g} for g in grads[7:]])
    assert torch.equal(weight, other)


@pytest.mark.parametrize("feedback", ["none", "8bit"])
def test_a_first_gradient_may_come_late(feedback: Any) -> None:
    # Published: a KeyError. Here each parameter has a clock of its own.
    shape = (20, 12)
    grads = gradients(shape)
    early, late = start(shape), start(shape)
    optimizer = DctAdamW([early, late], rank=4, update_gap=2, lr=1e-2, feedback=feedback)
    follow(optimizer, [{early: g, late: g if t >= 3 and t != 6 else None} for t, g in enumerate(grads)])
    own = [g.numpy() for t, g in enumerate(grads) if t >= 3 and t != 6]
    wanted, _ = dct_adamw.run(
        start(shape).detach().numpy(), own, basis=bases.cosines, rank=4, update_gap=2, lr=1e-2, feedback=feedback
    )
    assert np.abs(late.detach().numpy() - wanted).max() <= 1e-9


def test_a_frozen_first_parameter_changes_nothing_for_the_others() -> None:
    shape = (20, 12)
    frozen, alone, weight = start(shape), start(shape), start(shape)
    frozen.requires_grad_(False)
    for optimizer, parameter in ((DctAdamW([frozen, weight], rank=4), weight), (DctAdamW([alone], rank=4), alone)):
        follow(optimizer, [{parameter: g} for g in gradients(shape)])
    assert torch.equal(weight, alone)


def test_the_state_turns_by_default() -> None:
    # Published: rotation is off by default, which mixes moments of different vectors when the choice is made anew.
    assert DctAdamW([start((4, 4))]).defaults["rotate"] is True


def test_settings_belong_to_groups() -> None:
    # Published: betas, eps and rank are the optimizer's.
    one, other = start((20, 12)), start((20, 12))
    optimizer = DctAdamW([{"params": [one], "rank": 2}, {"params": [other], "rank": 5, "betas": (0.5, 0.6)}])
    follow(optimizer, [{one: gradients((20, 12))[0], other: gradients((20, 12))[0]}])
    assert [optimizer.state[p]["index"].numel() for p in (one, other)] == [2, 5]


def test_gradients_are_not_used_as_scratch() -> None:
    # Published: p.grad is overwritten.
    for kind in (DctAdamW, Trion):
        weight = start((20, 12))
        gradient = gradients((20, 12))[0]
        weight.grad = gradient.clone()
        kind([weight], rank=4).step()
        assert torch.equal(weight.grad, gradient)


def test_importing_needs_torch_alone_and_prints_nothing() -> None:
    # Published: importing needs CUDA extensions, and each parameter is printed.
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "from trainers.optim import DctAdamW, Trion\n"
        "p = torch.nn.Parameter(torch.ones(6, 4)); p.grad = torch.ones(6, 4)\n"
        "DctAdamW([p], rank=2).step(); Trion([p], rank=2).step()\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "assert not new & {'transformers', 'accelerate', 'peft', 'scipy', 'safetensors'}, new\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("shape", [(20, 12), (12, 20)])
@pytest.mark.parametrize("transform", ["matmul", "fft"])
def test_official_bases_of_dct_adamw_are_two(shape: tuple[int, int], transform: Any) -> None:
    weight, grads = start(shape), gradients(shape)
    # By FFT the published code scores by l1 whatever is asked for: asking for l2 is refused.
    basis, norm = (_transposed, 2) if transform == "matmul" else (bases.cosines, 1)
    optimizer = DctAdamW([weight], rank=4, lr=1e-2, transform=transform, norm=norm, compat="official")
    follow(optimizer, [{weight: g} for g in grads])
    start_at, own = start(shape).detach().numpy(), [g.numpy() for g in grads]
    wanted, _ = dct_adamw.run(start_at, own, basis=basis, rank=4, lr=1e-2, norm=norm)
    assert np.abs(weight.detach().numpy() - wanted).max() <= 1e-9


@pytest.mark.parametrize("shape", [(20, 12), (12, 20)])
def test_official_trion_has_a_basis_for_each_side(shape: tuple[int, int]) -> None:
    weight, grads = start(shape), gradients(shape)
    follow(Trion([weight], rank=4, compat="official"), [{weight: g} for g in grads])
    basis = _transposed if shape[0] >= shape[1] else bases.cosines
    wanted, _, _ = trion.run(start(shape).detach().numpy(), [g.numpy() for g in grads], basis=basis, rank=4)
    assert np.abs(weight.detach().numpy() - wanted).max() <= 1e-9


def test_official_slots_without_rotation_are_in_the_order_of_the_scores() -> None:
    shape = (20, 12)
    weight, grads = start(shape), gradients(shape)
    follow(DctAdamW([weight], rank=4, lr=1e-2, rotate=False, compat="official"), [{weight: g} for g in grads])
    start_at, own = start(shape).detach().numpy(), [g.numpy() for g in grads]
    wanted, _ = dct_adamw.run(start_at, own, basis=_transposed, rank=4, lr=1e-2, rotate=False, by_score=True)
    assert np.abs(weight.detach().numpy() - wanted).max() <= 1e-9


def test_official_sides_and_sizes() -> None:
    with torch.device("meta"):
        weights = {shape: nn.Parameter(torch.empty(shape)) for shape in ((512, 3584), (32000, 64), (512, 3000))}
    optimizer = DctAdamW(list(weights.values()), rank=8, compat="official")
    for weight in weights.values():
        weight.grad = torch.empty_like(weight)
    optimizer.step()
    sizes = {shape: tuple(optimizer.state[weight]["exp_avg"].shape) for shape, weight in weights.items()}
    assert sizes == {(512, 3584): (512, 8), (32000, 64): (32000, 64), (512, 3000): (3000, 8)}

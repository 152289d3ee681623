"""Ratios and bytes of a step: the worst counts, and formulas are those of the papers' tables."""

from __future__ import annotations

import pytest
import torch

from benchmarks import optimizer_step
from benchmarks.optimizers import formulas
from benchmarks.optimizers.steps import no_svd
from benchmarks.optimizers.variants import state_rows
from benchmarks.report import Report


def timed(arm: str, against: float, threads: int = 1, state: int = 100, formula: float = 100) -> dict[str, object]:
    return {
        "shape": "4x4",
        "threads": threads,
        "arm": arm,
        "ms": 1.0,
        "against_adamw-fused": against,
        "against_forward-backward": against,
        "state_bytes": state,
        "formula_bytes": formula,
        "matrix_bytes": 64,
    }


def test_a_claim_takes_the_worst_shape_and_thread_count() -> None:
    report = Report("optimizer_step", [0])
    report.rows = [timed(arm, 1.0) for arm, _, _ in optimizer_step.LIMITS.values()]
    report.rows += [timed("frugal-rows", 1.6, threads=2), timed("frugal-rows", 1.2)]
    optimizer_step.state_claims(report)
    claims = {claim.id: claim for claim in report.claims}
    assert claims["frugal-rows-step-vs-fused-adamw"].value == 1.6
    assert not claims["frugal-rows-step-vs-fused-adamw"].holds
    assert claims["frugal-columns-step-vs-fused-adamw"].holds
    by_threads = {row["threads"]: row["frugal-rows-step-vs-fused-adamw"] for row in report.rows if "worst" in row}
    assert by_threads == {1: 1.2, 2: 1.6}


def test_state_is_held_against_its_formula_and_nothing_against_the_matrix() -> None:
    assert optimizer_step.misfit([timed("a", 1, state=102), timed("b", 1, state=99)]) == pytest.approx(0.02)
    assert optimizer_step.misfit([timed("signsgd", 1, state=8, formula=0)]) == 8 / 64
    assert optimizer_step.misfit([{"arm": "a peer", "threads": 1, "ms": 1.0}]) is None


def test_formulas_give_the_published_sizes_of_a_7b_llama() -> None:
    """Linear layers of LLaMA-7B, bfloat16 states, rank 256: GiB of the comparison tables."""
    layers = 32 * ([(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)])

    def gib(formula: object, *rest: float) -> float:
        return sum(formula(m, n, *rest, b=2) for m, n in layers) / 2**30  # type: ignore[operator]

    assert gib(formulas.adamw) == pytest.approx(24.12, abs=0.01)
    assert gib(formulas.muon) == pytest.approx(12.06, abs=0.01)
    assert gib(formulas.galore, 1 / 16) == pytest.approx(1.95, abs=0.01)
    assert gib(formulas.dct_adamw, 256) == pytest.approx(1.51, abs=0.01)
    assert sum(formulas.frugal(m, n, 1 / 16, n, b=2) for m, n in layers) / 2**30 == pytest.approx(1.51, abs=0.01)


def test_extrapolated_svds_are_marked_and_scale_as_said() -> None:
    small, large = optimizer_step.svd_rows(((8, 16), (32, 16)), (8, 16), threads=1)
    assert not small["extrapolated"] and large["extrapolated"]
    assert large["ms"] / small["ms"] == pytest.approx(32 * 16 * 16 / (8 * 16 * 8))


def test_the_stand_in_for_svd_has_its_shapes_and_leaves_with_the_block() -> None:
    real = torch.linalg.svd
    with no_svd():
        u, s, vh = torch.linalg.svd(torch.eye(6, 4), full_matrices=False)
        assert (u.shape, s.shape, vh.shape) == ((6, 4), (4,), (4, 4))
    assert torch.linalg.svd is real


@pytest.mark.parametrize("shape", [(1024, 512), (512, 1024), (512, 512)])
def test_variants_keep_what_is_said(shape: tuple[int, int]) -> None:
    rows = state_rows(*shape, 64)
    assert {"frugal-columns moments int8", "dct-adamw feedback 4bit"} <= {row["arm"] for row in rows}
    for row in rows:
        assert row["state_bytes"] == pytest.approx(row["formula_bytes"], rel=0.01), row["arm"]

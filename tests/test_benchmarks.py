"""Every benchmark runs with ``--quick``, prints each of its claims and writes nothing; the results' format is sound."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import data
from benchmarks.report import RESULTS, Claim, command, interleaved, ratio

ROOT = Path(__file__).parents[1]
CLAIMS = {
    "service_speed": {"job-submit-p95-ms", "job-list-p95-ms", "idle-mib"},
    "engine_speed": {
        "steered-vs-unsteered-tokens-per-second",
        "concurrent-8-vs-serial",
        "engine-vs-transformers-generate",
        "chat-while-training",
    },
    "sft_vs_trl": {"sft-tokens-per-second-vs-trl", "sft-tokens-per-second-vs-trl-grouped"},
    "optimizer_step": {
        "frugal-rows-step-vs-fused-adamw",
        "frugal-column-blocks-step-vs-fused-adamw",
        "frugal-columns-step-vs-fused-adamw",
        "frugal-signsgd-step-vs-fused-adamw",
        "dct-adamw-step-vs-forward-backward",
        "trion-step-vs-forward-backward",
        "state-bytes-vs-formula",
    },
    "pretrain_optimizers": {
        "frugal-ppl-gap-closed",
        "frugal-beats-galore-ppl",
        "dct-adamw-vs-random-basis-ppl-percent",
        "beyond-beats-parent",
    },
    "finetune_optimizers": set[str](),
}


@pytest.mark.slow  # starts servers, engines and runs: a minute each
@pytest.mark.parametrize("script", CLAIMS)
def test_quick(script: str) -> None:
    if script == "sft_vs_trl" and importlib.util.find_spec("trl") is None:
        pytest.skip("trl is not installed; `make bench` has it in its own environment")
    if (reason := data.missing(script)) is not None:
        pytest.skip(reason)
    before = {path: path.read_bytes() for path in RESULTS.glob("*.json")}
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{script}", "--quick"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert all(f"  {claim}: " in done.stdout for claim in CLAIMS[script])
    assert {path: path.read_bytes() for path in RESULTS.glob("*.json")} == before


def test_a_claim_holds_only_when_measured_and_met() -> None:
    assert Claim("a", ">= 1.3", 1.3).holds and not Claim("a", ">= 1.3", 1.29).holds
    assert Claim("a", "<= 30", 30.0).holds and not Claim("a", "<= 30", 30.1).holds
    assert Claim("a", "< 0", -0.1).holds and not Claim("a", "< 0", 0.0).holds
    assert not Claim("a", "<= 30", None).holds


def test_throughout_is_a_matter_of_the_whole_interval() -> None:
    assert Claim("a", "< 0 throughout", -2.0, (-3.0, -0.1)).holds
    assert not Claim("a", "< 0 throughout", -2.0, (-3.0, 0.1)).holds
    assert not Claim("a", "< 0 throughout", -2.0).holds
    assert Claim("a", ">= 0.35", 0.4, (0.1, 0.7)).holds
    assert Claim("a", "< 0", -2.0, (-3.0, 0.1)).as_json()["interval"] == [-3.0, 0.1]
    assert "interval" not in Claim("a", "< 0", -2.0).as_json()


def test_arms_take_turns_and_ratios_are_taken_within_a_repetition() -> None:
    order: list[str] = []

    def arm(name: str, value: float) -> float:
        order.append(name)
        return value

    found = interleaved({"a": lambda: arm("a", 2.0), "b": lambda: arm("b", 1.0)}, 2)
    assert order == ["a", "b", "a", "b"] and found == {"a": [2.0, 2.0], "b": [1.0, 1.0]}
    assert ratio([2.0, 9.0, 6.0], [1.0, 1.0, 3.0]) == 2.0


def test_the_recorded_command_has_no_folders_of_this_machine() -> None:
    given = ["--data-dir", "/home/me/data", "--hours", "3", "--work=/tmp/runs.jsonl", "--workers", "2"]
    assert command("x", given) == "python -m benchmarks.x --hours 3 --workers 2"
    assert command("x", []) == "python -m benchmarks.x"


def test_results_name_every_claim_that_was_set() -> None:
    for path in RESULTS.glob("*.json"):
        result = json.loads(path.read_text(encoding="utf-8"))
        assert {claim["id"] for claim in result["claims"]} == CLAIMS[path.stem]
        assert all(c == Claim(c["id"], c["target"], c["value"], _interval(c)).as_json() for c in result["claims"])
        assert result["seeds"] and result["versions"]["torch"] and result["machine"]["cores"]


def _interval(claim: dict[str, Any]) -> tuple[float, float] | None:
    return tuple(claim["interval"]) if "interval" in claim else None

"""One optimizer step of one matrix, on one thread and on two, against torch's fused AdamW and against the layer itself.

FRUGAL at density .25 with weight decay, between refreshes; steps that refresh are rows of their own. DCT-AdamW and
Trion at rank 256, refreshed at every step, against the forward and backward pass of the layer at 4,096 tokens; rank n/4
beside it. A ratio is the median over repetitions, within which the arms take turns; a claim's value is the worst over
all shapes and both thread counts (rows marked ``worst`` have them apart). State is compared with the published
formulas, and that of variants with what the docs say of it, on matrices without data. GaLore between refreshes is timed
with a stand-in for its SVD; an SVD is run where the shorter side is at most 1,024 and extrapolated (by m n min(m, n))
elsewhere, marked so. Each thread count has a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import nn

from benchmarks.optimizers.held import state_bytes
from benchmarks.optimizers.peers import peers
from benchmarks.optimizers.steps import TOKENS, Arm, layer, matrix, no_svd, optimizers, stepper, svd_seconds
from benchmarks.optimizers.variants import state_rows
from benchmarks.report import Report, interleaved, ratio

NAME = "optimizer_step"
SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (1024, 4096))
SVD = (1024, 4096)
RANK = 256
LIMITS = {
    "frugal-rows-step-vs-fused-adamw": ("frugal-rows", "adamw-fused", 1.5),
    "frugal-column-blocks-step-vs-fused-adamw": ("frugal-column-blocks", "adamw-fused", 1.5),
    "frugal-columns-step-vs-fused-adamw": ("frugal-columns", "adamw-fused", 4),
    "frugal-signsgd-step-vs-fused-adamw": ("frugal-signsgd", "adamw-fused", 1.0),
    "dct-adamw-step-vs-forward-backward": ("dct-adamw", "forward-backward", 0.15),
    "trion-step-vs-forward-backward": ("trion", "forward-backward", 0.15),
}
"""Claim -> arm, what it is measured against, and the most that the ratio may be."""


def shape_rows(m: int, n: int, threads: int, *, quick: bool) -> list[dict[str, Any]]:
    """Everything about one shape: light arms beside fused AdamW, heavy ones beside the layer."""
    rank, tokens = (8, 64) if quick else (RANK, TOKENS)
    arms = [*optimizers(m, n, rank), *peers(min(m, n) // 4)]
    weight = matrix(m, n)
    rows = []
    for reference, repetitions, group in (
        ("adamw-fused", 3 if quick else 15, [arm for arm in arms if not arm.heavy]),
        ("forward-backward", 1 if quick else 5, [arm for arm in arms if arm.heavy and not arm.once]),
        (None, 1, [arm for arm in arms if arm.once]),
    ):
        layers = {"forward-backward": layer(weight, tokens)} if reference == "forward-backward" else {}
        seconds, held = times(group, weight, layers, repetitions)
        bytes_ = {arm.name: arm.bytes for arm in group}
        for name, each in seconds.items():
            row = {
                "shape": f"{m}x{n}",
                "threads": threads,
                "arm": name,
                "ms": 1000 * median(each),
                "least_ms": 1000 * min(each),
                "repetitions": repetitions,
            }
            if reference is not None:
                row[f"against_{reference}"] = ratio(each, seconds[reference])
            if bytes_.get(name) is not None:
                row |= {"state_bytes": held[name], "formula_bytes": bytes_[name], "matrix_bytes": 4 * m * n}
            rows.append(row)
    return rows


def times(
    arms: list[Arm], weight: nn.Parameter, others: dict[str, Callable[[], float]], repetitions: int
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of every repetition of each arm (and of ``others``), and bytes of each arm's state."""
    with no_svd():
        made = {arm.name: arm.make(weight) for arm in arms}
        calls = {name: stepper(optimizer) for name, optimizer in made.items()} | others
        for call in calls.values():
            call()  # state is made, code is loaded
        held = {name: state_bytes([optimizer]) for name, optimizer in made.items()}
        return interleaved(calls, repetitions), held


def svd_rows(shapes: tuple[tuple[int, int], ...], measured: tuple[int, int], threads: int) -> list[dict[str, Any]]:
    """What GaLore's refresh adds: one SVD, run at the small shape and extrapolated elsewhere."""
    seconds = svd_seconds(*measured)
    unit = seconds / (measured[0] * measured[1] * min(measured))
    return [
        {
            "shape": f"{m}x{n}",
            "threads": threads,
            "arm": "galore refresh: its SVD",
            "ms": 1000 * unit * m * n * min(m, n),
            "repetitions": 1,
            "extrapolated": (m, n) != measured,
        }
        for m, n in shapes
    ]


def worst(rows: list[dict[str, Any]], arm: str, against: str) -> float | None:
    """The highest ratio of an arm."""
    return max((row[f"against_{against}"] for row in rows if row["arm"] == arm), default=None)


def misfit(rows: list[dict[str, Any]]) -> float | None:
    """The largest difference of state from its formula, relative to it, or to the matrix where it should be nothing."""
    known = [row for row in rows if "formula_bytes" in row]
    differences = (
        abs(row["state_bytes"] - row["formula_bytes"]) / (row["formula_bytes"] or row["matrix_bytes"]) for row in known
    )
    return max(differences, default=None)


def state_claims(report: Report) -> None:
    """Claims from all rows, and for each thread count what its worst was."""
    timed = [row for row in report.rows if "ms" in row]
    for threads in sorted({row["threads"] for row in timed}):
        mine = [row for row in timed if row["threads"] == threads]
        values = {claim: worst(mine, arm, against) for claim, (arm, against, _) in LIMITS.items()}
        report.row(worst=True, threads=threads, **values)
    for claim, (arm, against, limit) in LIMITS.items():
        report.claim(claim, f"<= {limit}", worst(timed, arm, against))
    report.claim("state-bytes-vs-formula", "<= 0.01", misfit(report.rows))


def measured(threads: int, *, quick: bool) -> list[dict[str, Any]]:
    """All rows of one thread count, from a process of its own."""
    argv = [sys.executable, "-m", f"benchmarks.{NAME}", "--threads", str(threads)] + ["--quick"] * quick
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(argv, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def main() -> None:
    """Measure, print, and write the results (not with ``--quick``)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small matrices, few repetitions; writes nothing")
    parser.add_argument("--threads", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    shapes = ((256, 256), (384, 256), (256, 384), (64, 256)) if options.quick else SHAPES
    if options.threads:
        torch.set_num_threads(options.threads)
        for m, n in shapes:
            for row in shape_rows(m, n, options.threads, quick=options.quick):
                print(json.dumps(row), flush=True)
        for row in svd_rows(shapes, shapes[-1] if options.quick else SVD, options.threads):
            print(json.dumps(row), flush=True)
        return
    report = Report(NAME, seeds=[0])
    for threads in (1, 2):
        report.row(threads=threads, load_average=os.getloadavg()[0])
        for row in measured(threads, quick=options.quick):
            report.row(**row)
    for m, n in shapes:
        for row in state_rows(m, n, 8 if options.quick else RANK):
            report.row(**row)
    state_claims(report)
    if not options.quick:
        report.write()


if __name__ == "__main__":
    main()

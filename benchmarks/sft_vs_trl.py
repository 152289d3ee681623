"""Fine-tuning speed against ``trl.SFTTrainer``: real (unpadded) tokens per second, LoRA r 8, fp32, the same rows.

Each arm runs in a fresh process on the same rows and batch size; repetitions are interleaved, one seed each. A claim
about CPUs: on GPUs TRL's fused loss has the same advantage. Needs the ``bench`` extra.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from benchmarks import sft_rows
from benchmarks.report import Report, ratio

ARMS = ("gradhelm", "trl", "trl-grouped")


def run(arm: str, model: str, rows: int, seed: int) -> dict[str, float]:
    """One arm, once."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        sft_rows.write(data, rows, seed)
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.sft_arm", arm, model, str(data), str(seed), f"{folder}/out"],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"{arm} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        measured: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
        return measured


def main() -> None:
    """Measure, print, and write the results (not with ``--quick``)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tiny model, once; writes nothing")
    options = parser.parse_args()
    seeds = [0] if options.quick else [0, 1, 2]
    model, rows = ("tiny-llama", 32) if options.quick else ("smollm2-135m-instruct", 32)
    report = Report("sft_vs_trl", seeds)
    speeds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for seed in seeds:
        for arm in ARMS:
            measured = run(arm, model, rows, seed)
            speed = measured["real_tokens"] / measured["seconds"]
            speeds[arm].append(speed)
            padded = measured["tokens_with_padding"]
            report.row(
                arm=arm,
                model=model,
                seed=seed,
                real_tokens_per_second=round(speed, 1),
                real_tokens=measured["real_tokens"],
                labelled_share=round(measured["labelled_tokens"] / measured["real_tokens"], 3),
                padding_share=None if padded is None else round(1 - measured["real_tokens"] / padded, 3),
                threads=measured["threads"],
            )
    report.row(**{f"median_{arm}": round(median(values), 1) for arm, values in speeds.items()})
    report.claim("sft-tokens-per-second-vs-trl", ">= 1.3", ratio(speeds["gradhelm"], speeds["trl"]))
    report.claim("sft-tokens-per-second-vs-trl-grouped", ">= 1.0", ratio(speeds["gradhelm"], speeds["trl-grouped"]))
    if not options.quick:
        report.write()


if __name__ == "__main__":
    main()

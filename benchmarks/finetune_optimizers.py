"""SmolLM2-135M-Instruct on GSM8K rows: FRUGAL by columns and DCT-AdamW against full AdamW and LoRA.

Reported is the loss of held-out answers (accuracy is near 0 at this size), peak memory and speed. Three rates, a factor
3 apart, around each method's usual value, widened where the best is at an edge, are compared on dev with seed 0; then
test with other seeds, the same rows in the same order across arms for a seed. Intervals are of the difference from full
AdamW, by paired bootstrap over seeds and rows. Finished runs are kept in a work file; run the script again to go on.
Speeds are by processor time of one thread, of runs one after another. Needs public data (``--data-dir``).
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import median

import torch

from benchmarks import data
from benchmarks.optimizers import command, tables
from benchmarks.optimizers.bootstrap import paired
from benchmarks.optimizers.plan import Plan
from benchmarks.optimizers.runs import TUNING_SEED, Record, Result, Run
from benchmarks.optimizers.tuning import ARMS, Task, run, untrained
from benchmarks.optimizers.workers import in_turn, study
from benchmarks.report import Report

NAME = "finetune_optimizers"
BASELINE = "adamw"
PLAN = Plan(ARMS, count=3, factor=3.0, seeds=(1, 2))
QUICK = Task(model="tiny-llama", length=512, batch=2, steps=2, gap=1, train=8, dev=2, test=2)


def report_of(
    done: dict[Run, Result], plan: Plan, task: Task, before: dict[str, float], commits: dict[str, int]
) -> Report:
    """Rows of what is finished, and how many runs each commit did; no claim was set."""
    report = Report(NAME, sorted({run.seed for run in done} | {TUNING_SEED}))
    report.row(arm="untrained", **{f"{part}_nats_per_answer_token": loss for part, loss in before.items()})
    for each in ARMS:
        mine = [result for run, result in done.items() if run.arm == each.name]
        costs = {name: round(median(r.more[name] for r in mine), 1) for name in _COSTS if mine}
        report.row(**tables.row(plan, each, done), **costs, runs=len(mine), source=each.source)
    for each in ARMS:
        if each.name != BASELINE:
            _against(report, plan, done, each.name)
    left = len(plan.next_runs(done))
    report.row(steps=task.steps, finished_runs=len(done), runs_left_at_least=left, runs_by_commit=commits)
    return report


_COSTS = ("peak_mib", "real_tokens_per_second")


def _against(report: Report, plan: Plan, done: dict[Run, Result], name: str) -> None:
    mine, base = plan.rate(name, done), plan.rate(BASELINE, done)
    if mine is None or base is None:
        return
    found = tables.paired_units(done, {"it": (name, mine), "base": (BASELINE, base)})
    if found is not None:
        nats, tokens, seeds = found
        difference = paired(lambda losses: losses["it"] - losses["base"], nats, tokens)
        report.row(
            arm=name,
            against=BASELINE,
            nats_per_answer_token=difference.value,
            low=difference.low,
            high=difference.high,
            test_seeds=seeds,
        )


def main() -> int:
    """Train what is not trained yet, print, and write the results (not with ``--quick``)."""
    options = command.parser(NAME, __doc__).parse_args()
    folder: Path = data.folder(NAME, options.data_dir)
    task = QUICK if options.quick else replace(Task(), steps=options.steps or Task.steps)
    digest = data.digest(NAME, folder)
    if options.one:
        assert options.digest == digest, "the rows changed while the study ran"
        print(json.dumps(run(options.one, folder, task).as_json()))
        return 0
    if options.quick:
        plan = Plan(ARMS, count=1, factor=3.0, seeds=(1,))
        report_of(in_turn(plan, partial(run, folder=folder, task=task)), plan, task, untrained(folder, task), {})
        return 0
    record = Record(options.work, {"task": asdict(task), "data": digest, "torch": torch.__version__})
    arguments = command.passed_on(options, task.steps, digest)
    done, failed = study(PLAN, record, f"benchmarks.{NAME}", arguments, workers=options.workers, hours=options.hours)
    if record.foreign:
        print(f"  {record.foreign} runs of other settings in {options.work} were left aside", flush=True)
    if done:
        record.read()
        report_of(done, PLAN, task, untrained(folder, task), record.commits).write()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

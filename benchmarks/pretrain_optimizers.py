"""Perplexity against optimizer bytes: a 4.2 M-parameter Llama trained from nothing by each optimizer.

Rates: four, a factor 2 apart, around each method's published value, widened where the best is at an edge; chosen on dev
with seed 0. Reported: test with other seeds, the same start and order of data across arms for a seed, 95 % intervals by
paired bootstrap over seeds and articles. Finished runs are kept in a work file; run the script again to go on. Needs
public text (``--data-dir``) and, for the plot, the ``bench`` extra.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from functools import partial

import torch

from benchmarks import data
from benchmarks.optimizers import command, plot, pretrain_claims, tables
from benchmarks.optimizers.arms import ARMS, arm
from benchmarks.optimizers.llama import Size, run
from benchmarks.optimizers.plan import Plan
from benchmarks.optimizers.runs import TUNING_SEED, Record, Result, Run
from benchmarks.optimizers.text import Corpus
from benchmarks.optimizers.workers import in_turn, study
from benchmarks.report import RESULTS, Report

NAME = "pretrain_optimizers"
PLAN = Plan(ARMS, count=4, factor=2.0, seeds=(1, 2), more_seeds=(3, 4, 5))
QUICK = Size(width=64, layers=1, mlp=96, vocabulary=384, length=16, batch=2, steps=3, gap=2)


def do(what: Run, corpus: Corpus, size: Size) -> Result:
    """One run."""
    return run(what, lambda model: arm(what.arm).build(model, what.rate, what.seed, size), corpus, size)


def report_of(done: dict[Run, Result], plan: Plan, size: Size, commits: dict[str, int]) -> Report:
    """Rows and claims of what is finished, and how many runs each commit did."""
    seeds = sorted({run.seed for run in done} | {TUNING_SEED})
    report = Report(NAME, seeds)
    for each in ARMS:
        report.row(**tables.row(plan, each, done), runs=sum(run.arm == each.name for run in done), source=each.source)
    pretrain_claims.state(report, plan, done)
    left = plan.next_runs(done)
    report.row(steps=size.steps, finished_runs=len(done), runs_left_at_least=len(left), runs_by_commit=commits)
    return report


def main() -> int:
    """Train what is not trained yet, print, and write the results (not with ``--quick``)."""
    options = command.parser(NAME, __doc__).parse_args()
    folder = data.folder(NAME, options.data_dir)
    size = QUICK if options.quick else replace(Size(), steps=options.steps or Size.steps)
    characters = 60_000 if options.quick else None
    corpus = Corpus.read(folder, vocabulary=size.vocabulary, length=size.length, characters=characters)
    if options.quick:
        plan = Plan(ARMS, count=1, factor=2.0, seeds=(1,))
        report_of(in_turn(plan, partial(do, corpus=corpus, size=size)), plan, size, {})
        return 0
    if options.one:
        assert options.digest == corpus.digest, "the text or its tokens changed while the study ran"
        print(json.dumps(do(options.one, corpus, size).as_json()))
        return 0
    record = Record(options.work, {"size": asdict(size), "data": corpus.digest, "torch": torch.__version__})
    arguments = command.passed_on(options, size.steps, corpus.digest)
    done, failed = study(PLAN, record, f"benchmarks.{NAME}", arguments, workers=options.workers, hours=options.hours)
    if record.foreign:
        print(f"  {record.foreign} runs of other settings in {options.work} were left aside", flush=True)
    if done:
        record.read()
        report = report_of(done, PLAN, size, record.commits)
        report.write()
        plot.save(report.rows, RESULTS / f"{NAME}.svg")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

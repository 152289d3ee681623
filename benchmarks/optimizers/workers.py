"""Runs in processes of their own, one thread each, pinned to a core each, as long as the hours allow."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import IO

from benchmarks.optimizers.plan import Plan
from benchmarks.optimizers.runs import Record, Result, Run

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}


@dataclass
class Worker:
    """One process at one run."""

    run: Run
    core: int
    process: subprocess.Popen[str]
    output: IO[str]
    errors: IO[str]

    @classmethod
    def start(cls, script: str, arguments: Sequence[str], run: Run, core: int) -> Worker:
        """Start ``python -m SCRIPT ARGUMENTS --one RUN``; its last line of output is the result."""
        output = tempfile.TemporaryFile("w+", encoding="utf-8")
        errors = tempfile.TemporaryFile("w+", encoding="utf-8")
        argv = [sys.executable, "-m", script, *arguments, "--one", json.dumps(vars(run))]
        process = subprocess.Popen(argv, stdout=output, stderr=errors, text=True, env=os.environ | ENVIRONMENT)
        os.sched_setaffinity(process.pid, {core})
        return cls(run, core, process, output, errors)

    def result(self) -> Result | None:
        """What an ended process found; None, and the end of what it said, where it failed."""
        for file in (self.output, self.errors):
            file.seek(0)
        said, complained = self.output.read(), self.errors.read()
        self.output.close()
        self.errors.close()
        if self.process.returncode == 0:
            return Result.from_json(json.loads(said.strip().splitlines()[-1]))
        print(f"FAILED {self.run}, exit {self.process.returncode}:\n{complained[-2000:]}", flush=True)
        return None


def study(
    plan: Plan, record: Record, script: str, arguments: Sequence[str], *, workers: int, hours: float
) -> tuple[dict[Run, Result], set[Run]]:
    """Run what the plan wants next, until it wants nothing or no run would end within the hours.

    Args:
        plan: Says what comes next.
        record: Where finished runs are kept; those in it already are not run again.
        script: Module whose ``--one RUN`` does a run.
        arguments: Its other arguments.
        workers: Processes at a time.
        hours: No run starts that, by the median of those before, would end later than this from now.

    Returns:
        All finished runs, and those that failed now (the rest of their arm was left out).
    """
    cores = sorted(os.sched_getaffinity(0))
    assert 1 <= workers <= len(cores), f"{workers} workers on {len(cores)} cores"
    end, started = time.monotonic() + 3600 * hours, time.monotonic()
    done, failed, busy = record.read(), set[Run](), list[Worker]()
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the runs under way are ended too
    try:
        while True:
            for worker in [w for w in busy if w.process.poll() is not None]:
                busy.remove(worker)
                if (result := worker.result()) is None:
                    failed.add(worker.run)
                    continue
                record.add(worker.run, result)
                done[worker.run] = result
                _tell(worker.run, result, len(done), time.monotonic() - started)
            taken = {worker.run for worker in busy}
            broken = {run.arm for run in failed}
            waiting = [run for run in plan.next_runs(done) if run not in taken and run.arm not in broken]
            late = time.monotonic() + (median(r.seconds for r in done.values()) if done else 0) > end
            while waiting and len(busy) < workers and not late:
                core = next(core for core in cores if core not in {worker.core for worker in busy})
                busy.append(Worker.start(script, arguments, waiting.pop(0), core))
            if not busy:
                return done, failed
            time.sleep(0.2)
    finally:
        signal.signal(signal.SIGTERM, before)
        for worker in busy:
            worker.process.terminate()


def in_turn(plan: Plan, one: Callable[[Run], Result]) -> dict[Run, Result]:
    """The whole plan in this process; for small ones."""
    done: dict[Run, Result] = {}
    while waiting := plan.next_runs(done):
        done[waiting[0]] = one(waiting[0])
    return done


def _tell(run: Run, result: Result, count: int, elapsed: float) -> None:
    print(
        f"  {elapsed / 60:.0f} min: run {count} {run.arm} rate={run.rate:.3g} seed={run.seed} "
        f"loss={result.loss:.4f} {result.seconds:.0f} s",
        flush=True,
    )


def default_file(script: str) -> Path:
    """Where finished runs are kept unless told otherwise: beside Gradhelm's other data, outside the repository."""
    from core.home import home

    return home() / "benchmarks" / f"{script}.jsonl"

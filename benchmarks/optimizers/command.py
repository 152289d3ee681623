"""The command line that both studies share."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from benchmarks.optimizers.runs import Run
from benchmarks.optimizers.workers import default_file


def parser(script: str, about: str | None) -> argparse.ArgumentParser:
    """Options of a study that is resumed by running it again."""
    made = argparse.ArgumentParser(description=about)
    made.add_argument("--quick", action="store_true", help="a tiny model, once, in this process; writes nothing")
    made.add_argument("--data-dir", help="folder of the public data; default: $GRADHELM_EVAL_DATA")
    made.add_argument("--work", type=Path, default=default_file(script), help="finished runs; default: %(default)s")
    cores = len(os.sched_getaffinity(0))
    made.add_argument("--workers", type=int, default=min(2, cores), help="processes, one core each (%(default)s)")
    made.add_argument("--hours", type=float, default=3.0, help="start no run that would end later; 0: report only")
    made.add_argument("--steps", type=int, help="optimizer steps of a run; another number is another study")
    made.add_argument("--one", type=one, help=argparse.SUPPRESS)
    made.add_argument("--digest", help=argparse.SUPPRESS)
    return made


def one(text: str) -> Run:
    """The run that a worker is to do."""
    values: dict[str, Any] = json.loads(text)
    return Run(**values)


def passed_on(options: argparse.Namespace, steps: int, digest: str) -> list[str]:
    """Arguments for a worker. By the digest it checks that it reads the same data."""
    given = ["--data-dir", options.data_dir] if options.data_dir else []
    return [*given, "--steps", str(steps), "--digest", digest]

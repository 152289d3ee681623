"""``python -m trainers RUN.yaml key=value``, ``accelerate launch -m trainers RUN.yaml key=value``, ``... replay``."""

from __future__ import annotations

import argparse
import errno
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from core.config import ConfigError
from core.config_yaml import read_yaml
from core.events import EventLog
from trainers.config import Run, load_run
from trainers.errors import CRASHED, STOPPED, SUCCEEDED, USER_ERROR, RunError
from trainers.report import Reporter
from trainers.signals import StopSignals
from trainers.terminal import describe
from trainers.view import Lines, View, make_view

EPILOG = """\
Exit codes: 0 succeeded, 2 the run cannot succeed as configured (an error event says why), 3 stopped at a checkpoint
on SIGTERM or SIGINT, anything else a crash. The same command always goes on from the newest checkpoint in output_dir.
`python -m trainers replay --help`: make the model of a zeroth-order run from its journal.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: Without the program's name; by default those of this process.

    Returns:
        The exit code.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["replay"]:
        return _replay(given[1:])
    parser = argparse.ArgumentParser(prog="python -m trainers", description="Fine-tune a model.", epilog=EPILOG)
    parser.add_argument("run", type=Path, metavar="RUN.yaml", help="the run file")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="settings that win over the run file"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the resolved settings and a memory plan, and end")
    options = parser.parse_args(given)
    with StopSignals() as stop:
        try:
            run = load_run(options.run, options.overrides)
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr)
            _record_refusal(options.run, options.overrides, error)
            return USER_ERROR
        if options.dry_run:
            return _guarded(lambda: _dry_run(run), Reporter(None))
        main_process = int(os.environ.get("RANK", "0")) == 0
        output = Path(run.config.output_dir)
        output.mkdir(parents=True, exist_ok=True)
        log = EventLog(output / "events.jsonl") if main_process else None
        # The other processes of a launch are silent: only this one has a log, and draws.
        view: View = make_view(sys.stdout, sys.stderr) if main_process else Lines(sys.stdout)
        reporter = Reporter(log, view)
        if main_process:
            (output / "resolved.yaml").write_text(describe(run), encoding="utf-8")
        try:
            with view, reporter.heartbeat(run.config.heartbeat_seconds):
                return _guarded(lambda: _train(run, reporter, stop), reporter)
        finally:
            if log is not None:
                log.close()


def _replay(arguments: Sequence[str]) -> int:
    from trainers.journal.command import run

    try:
        print(run(arguments))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    return SUCCEEDED


def _train(run: Run, reporter: Reporter, stop: StopSignals) -> int:
    if stop.requested:
        return STOPPED
    from trainers.train import train

    return train(run, reporter, stop)


def _dry_run(run: Run) -> int:
    from trainers.memory import plan

    print(describe(run), end="")
    for warning in run.warnings():
        print(f"# warning: {warning}")
    print(plan(run).describe(), end="")
    return 0


def _guarded(work: Callable[[], int], reporter: Reporter) -> int:
    """Turns what goes wrong into an ``error`` event and an exit code."""
    try:
        return work()
    except RunError as error:
        return _fail(reporter, str(error), code=error.code, param=error.param)
    except ConfigError as error:
        return _fail(reporter, str(error), code="invalid_config", param=error.key or None)
    except ValueError as error:
        return _fail(reporter, str(error), code="invalid_value", param=None)
    except MemoryError as error:
        return _crash(reporter, f"out of memory: {error}", code="out_of_memory", retryable=True)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return _crash(reporter, str(error), code="disk_full" if full else "io_error", retryable=True)
    except RuntimeError as error:
        # torch has no exception class of its own for a failed allocation on the CPU.
        memory = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
        return _crash(reporter, str(error), code="out_of_memory" if memory else "internal_error", retryable=memory)
    except Exception as error:
        return _crash(reporter, f"{type(error).__name__}: {error}", code="internal_error", retryable=False)


def _fail(reporter: Reporter, message: str, *, code: str, param: str | None) -> int:
    reporter.emit("error", code=code, message=message[:8000], param=param, retryable=False)
    return USER_ERROR


def _crash(reporter: Reporter, message: str, *, code: str, retryable: bool) -> int:
    traceback.print_exc()
    reporter.emit("error", code=code, message=message[:8000], param=None, retryable=retryable)
    return CRASHED


def _record_refusal(file: Path, overrides: Sequence[str], error: ConfigError) -> None:
    """Leaves an ``error`` event where the run file says that its output goes, if it says so."""
    try:
        content: Any = read_yaml(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    given = [text.removeprefix("output_dir=") for text in overrides if text.startswith("output_dir=")]
    output = given[-1] if given else content.get("output_dir") if isinstance(content, dict) else None
    if isinstance(output, str) and output and int(os.environ.get("RANK", "0")) == 0:
        with EventLog(Path(output) / "events.jsonl") as log:
            log.emit("error", code="invalid_config", message=str(error), param=error.key or None, retryable=False)


if __name__ == "__main__":
    sys.exit(main())

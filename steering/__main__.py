"""`python -m steering fit FIT.yaml [key=value ...]` and `python -m steering apply --model REF --vector FILE ...`."""

from __future__ import annotations

import argparse
import errno
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from core.config import ConfigError, resolve
from core.config_yaml import read_yaml
from core.data.source import DataError
from core.events import EventLog
from steering.config import FitConfig
from steering.fit import ModelError, fit
from steering.registry import METHODS
from steering.stop import CRASHED, STOPPED, SUCCEEDED, USER_ERROR, StoppedError, every, stop_signals

EPILOG = """\
Exit codes of fit: 0 succeeded, 2 the fit cannot succeed as configured (an error event says why), 3 stopped by SIGTERM
or SIGINT, anything else a crash. A fit that was stopped starts from scratch: it takes one pass over its pairs.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Without the program's name; by default those of this process.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(prog="python -m steering", description="Fit and try steering vectors.")
    commands = parser.add_subparsers(dest="command", required=True)
    methods = "; ".join(f"{method.name}: {method.summary}" for method in METHODS.values())
    fitting = commands.add_parser("fit", help="fit a vector", description=f"Fit a vector. {methods}", epilog=EPILOG)
    fitting.add_argument("file", type=Path, metavar="FIT.yaml", help="the fit file")
    fitting.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the fit file")
    trying = commands.add_parser("apply", help="continue a prompt with and without a vector")
    trying.add_argument("--model", required=True, help="catalog name, org/name@revision, or directory")
    trying.add_argument("--vector", required=True, type=Path, help="file of the vector")
    trying.add_argument("--strength", required=True, type=float, help="multiplies the stored direction")
    trying.add_argument("--prompt", required=True, help="what the user says")
    trying.add_argument("--layers", type=_layers, help="blocks to steer, such as 3,8-11; default: all of the vector's")
    trying.add_argument("--positions", default="all", choices=("all", "prompt", "generated"), help="tokens to steer")
    trying.add_argument("--preserve-norm", action="store_true", help="keep each token's norm as it was")
    trying.add_argument("--max-tokens", type=int, default=64, help="most tokens to generate")
    options = parser.parse_args(arguments)
    return _fit(options.file, options.overrides) if options.command == "fit" else _apply(options)


def _layers(text: str) -> tuple[int, ...]:
    """Read "3,8-11"."""
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        layers += range(int(first), int(last if dash else first) + 1)
    return tuple(layers)


def _fit(file: Path, overrides: Sequence[str]) -> int:
    with stop_signals() as stop:
        try:
            resolved = resolve(FitConfig, file=file, overrides=overrides)
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr)
            _record_refusal(file, overrides, error)
            return USER_ERROR
        config = resolved.value
        with EventLog(Path(config.output_dir) / "events.jsonl") as log:
            with every(config.heartbeat_seconds, lambda: log.emit("heartbeat")):
                return _guarded(lambda: print(fit(config, log, stop, origin=resolved.origin)), log)


def _guarded(work: Callable[[], None], log: EventLog) -> int:
    """Turn what goes wrong into an `error` event and an exit code."""
    try:
        work()
        return SUCCEEDED
    except StoppedError:
        log.emit("message", level="info", message="stopped; the fit starts from scratch when it is run again")
        return STOPPED
    except DataError as error:
        rows = [{"line": p.line, "code": p.code, "message": p.message[:300]} for p in error.problems]
        return _fail(log, str(error), code=error.problems[0].code, param="data_file", problems=rows)
    except ModelError as error:
        return _fail(log, str(error), code="model_not_usable", param="model")
    except FileNotFoundError as error:
        return _fail(log, f"{error.filename} does not exist", code="file_not_found", param=None)
    except ValueError as error:
        return _fail(log, str(error), code="invalid_value", param=None)
    except MemoryError as error:
        return _crash(log, f"out of memory: {error}", code="out_of_memory", retryable=True)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return _crash(log, str(error), code="disk_full" if full else "io_error", retryable=True)
    except RuntimeError as error:
        # torch has no exception class of its own for a failed allocation on the CPU.
        memory = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
        return _crash(log, str(error), code="out_of_memory" if memory else "internal_error", retryable=memory)
    except Exception as error:
        return _crash(log, f"{type(error).__name__}: {error}", code="internal_error", retryable=False)


def _fail(log: EventLog, message: str, *, code: str, param: str | None, **more: Any) -> int:
    print(f"error: {message}", file=sys.stderr)
    log.emit("error", code=code, message=message[:8000], param=param, retryable=False, **more)
    return USER_ERROR


def _crash(log: EventLog, message: str, *, code: str, retryable: bool) -> int:
    traceback.print_exc()
    log.emit("error", code=code, message=message[:8000], param=None, retryable=retryable)
    return CRASHED


def _record_refusal(file: Path, overrides: Sequence[str], error: ConfigError) -> None:
    """Leave an `error` event where the fit file says that its output goes, if it says so."""
    try:
        content: Any = read_yaml(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    given = [text.removeprefix("output_dir=") for text in overrides if text.startswith("output_dir=")]
    output = given[-1] if given else content.get("output_dir") if isinstance(content, dict) else None
    if isinstance(output, str) and output:
        with EventLog(Path(output) / "events.jsonl") as log:
            log.emit("error", code="invalid_config", message=str(error), param=error.key or None, retryable=False)


def _apply(options: argparse.Namespace) -> int:
    from core.data.chat import end_of_turn_id, prompt_ids
    from core.data.source import Message
    from core.models.load import load
    from steering.apply import RowSpec, Term
    from steering.preview import preview
    from steering.vector import SteeringVector

    try:
        vector = SteeringVector.load(options.vector)
        loaded = load(options.model)
        spec = RowSpec(
            (Term(vector, options.strength, options.layers, options.positions),), preserve_norm=options.preserve_norm
        )
        prompt = prompt_ids([Message("user", options.prompt)], loaded.tokenizer)
        stop = [end_of_turn_id(loaded.tokenizer)]
        plain, steered = preview(loaded, [(prompt, None), (prompt, spec)], max_tokens=options.max_tokens, stop=stop)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    assert steered.receipt is not None
    layers = ", ".join(map(str, steered.receipt.layers))
    print(f"default: {plain.text}\nsteered: {steered.text}")
    print(f"touched: {steered.receipt.tokens} tokens at layers {layers}; ", end="")
    print(f"mean |dh|/|h| {steered.receipt.mean_relative_shift:.4f}")
    return SUCCEEDED


if __name__ == "__main__":
    sys.exit(main())

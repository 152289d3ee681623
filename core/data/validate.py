"""`python -m core.data.validate`: the short process that judges a job's files before it may queue.

A process of its own, since it needs the tokenizer and the API process must not; and since a hostile file can then
take down nothing else. Exit code 0: all in order; 2: the user has to change something, as validation.json says;
anything else: our own fault.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from core.data import source
from core.data.rules import RowProblem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_PROBLEMS = 100
"""How many problems, and how many warnings, are named; all are counted."""
GONE = "the file is not there any more; upload it again and create the job anew"
"""What is said of a file that is missing."""


@dataclass(slots=True)
class FileReport:
    """What planning needs to know of one file."""

    rows: int = 0
    """Rows that are in order."""
    tokens: int = 0
    """Tokens of one epoch after truncation, padding not counted."""
    trained_tokens: int = 0
    """Tokens of one epoch that are trained on."""
    longest_row: int = 0
    """Tokens of the longest row after truncation."""
    longest_row_untruncated: int = 0
    """Tokens of the longest row before truncation."""
    truncated: int = 0
    """Rows that lose tokens to truncation."""
    kind: str | None = None
    """chat or completion."""


def check_tokens(
    path: Path, scan: source.Scan, tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> tuple[FileReport, source.Scan]:
    """Judge by its tokens a file whose text is in order.

    Args:
        path: a JSONL file.
        scan: what scanning it found; its warnings are kept.
        tokenizer: the model's.
        max_length: most tokens of a row.

    Returns:
        Counts, and the problems and warnings with their lines.
    """
    from core.data.chat import encode

    report = FileReport(rows=scan.rows, kind=scan.kind)
    problems, warnings = [], list(scan.warnings)
    problem_count, warning_count = 0, scan.warning_count
    for row in source.rows(path):
        problem: RowProblem | None = None
        try:
            example = encode(row, tokenizer, max_length=max_length)
        except ValueError as error:
            problem = RowProblem(row.line, "not_encodable", str(error))
        else:
            report.tokens += len(example.input_ids)
            report.trained_tokens += example.trained
            report.longest_row = max(report.longest_row, len(example.input_ids))
            report.longest_row_untruncated = max(report.longest_row_untruncated, example.total)
            report.truncated += example.truncated
            if example.trained == 0:
                text = (
                    f"none of the row's trained tokens is within the first {max_length} of its {example.total} tokens"
                )
                problem = RowProblem(row.line, "all_tokens_truncated", text)
            elif example.truncated:
                warning_count += 1
                text = f"the row has {example.total} tokens and is cut to the first {max_length}"
                warnings.append(RowProblem(row.line, "truncated", text))
        if problem is not None:
            problem_count += 1
            problems.append(problem)
        del problems[MAX_PROBLEMS:], warnings[MAX_PROBLEMS:]
    return report, source.Scan(scan.rows, problems, warnings, problem_count, warning_count, scan.kind)


def validate(model: str, train: Path, eval_file: Path | None, *, max_length: int, min_rows: int = 1) -> dict[str, Any]:
    """Judge a job's files: first all their text, which takes no model, then their tokens.

    Args:
        model: reference of the base model; its tokenizer must be on this machine or loadable.
        train: the training file.
        eval_file: the validation file, if there is one.
        max_length: most tokens of a row.
        min_rows: least number of rows in the training file.

    Returns:
        What validation.json holds: `ok`; `param`, `code` and `message` of the first fault (else null); the
        training file's counts (`rows`, `tokens`, `trained_tokens`, `longest_row`, `truncated`...; tokens are counted
        only where all text is in order); `eval` with those of the validation file (else null); `problems` and
        `warnings` as {file, line, code, message}, at most 100 each, and `problem_count`, `warning_count`.
    """
    files = [("training_file", train, min_rows)] + ([("validation_file", eval_file, 1)] if eval_file else [])
    scans = {param: _scan(path, least) for param, path, least in files}
    found = {param: (FileReport(rows=scan.rows, kind=scan.kind), scan) for param, scan in scans.items()}
    result: dict[str, Any] = {"ok": True, "param": None, "code": None, "message": None}
    result |= {"model": model, "max_length": max_length}
    if all(scan.ok for scan in scans.values()):
        from core.models.load import load_tokenizer

        try:
            tokenizer = load_tokenizer(model)
        except ValueError as error:
            fault = {"file": None, "line": None, "code": "model_not_usable", "message": str(error)}
            return (
                _verdict(result, found)
                | {"ok": False, "problems": [fault], "problem_count": 1}
                | _fault("model", fault)
            )
        for param, path, _ in files:
            try:
                found[param] = check_tokens(path, scans[param], tokenizer, max_length=max_length)
            except FileNotFoundError:
                found[param] = FileReport(), _gone()
    return _verdict(result, found)


def _scan(path: Path, min_rows: int) -> source.Scan:
    try:
        return source.scan(path, max_problems=MAX_PROBLEMS, min_rows=min_rows)
    except FileNotFoundError:
        return _gone()


def _gone() -> source.Scan:
    """Trying again would not bring the file back, so its absence is a verdict."""
    return source.Scan(0, [RowProblem(None, "file_not_found", GONE)], problem_count=1)


def _verdict(result: dict[str, Any], found: Mapping[str, tuple[FileReport, source.Scan]]) -> dict[str, Any]:
    problems = [{"file": param, **asdict(item)} for param, (_, scan) in found.items() for item in scan.problems]
    warnings = [{"file": param, **asdict(item)} for param, (_, scan) in found.items() for item in scan.warnings]
    result |= asdict(found["training_file"][0])
    result["eval"] = asdict(found["validation_file"][0]) if "validation_file" in found else None
    result |= {"problems": problems[:MAX_PROBLEMS], "warnings": warnings[:MAX_PROBLEMS]}
    result["problem_count"] = sum(scan.problem_count for _, scan in found.values())
    result["warning_count"] = sum(scan.warning_count for _, scan in found.values())
    if problems:
        result |= {"ok": False} | _fault(problems[0]["file"], problems[0])
    return result


def _fault(param: str, problem: dict[str, Any]) -> dict[str, Any]:
    where = f"line {problem['line']}: " if problem["line"] is not None else ""
    return {"param": param, "code": problem["code"], "message": f"{where}{problem['message']}"}


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file whole or not at all.

    Args:
        path: where to; an existing file is replaced.
        data: what to write.

    Raises:
        OSError: the disk is full or not writable; an existing file is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(fd, "w", encoding="utf-8") as file:
            json.dump(data, file, indent=1, allow_nan=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


class _Parser(argparse.ArgumentParser):
    """Exits with 64 on wrong usage: argparse's own 2 would read as a verdict on the files."""

    def error(self, message: str) -> NoReturn:
        self.exit(64, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Judge the files named on the command line and write the verdict.

    Args:
        argv: arguments, without the program's name.

    Returns:
        The exit code, 0 or 2.
    """
    parser = _Parser(prog="python -m core.data.validate", description="Judge training files.")
    parser.add_argument("--model", required=True, help="reference of the base model")
    parser.add_argument("--train", required=True, type=Path, help="the training file, JSONL")
    parser.add_argument("--eval", type=Path, help="the validation file, JSONL")
    parser.add_argument("--max-length", required=True, type=int, help="most tokens of a row")
    parser.add_argument("--min-rows", type=int, default=1, help="least number of training rows")
    parser.add_argument("--out", required=True, type=Path, help="where the verdict goes")
    options = parser.parse_args(argv)
    if options.max_length < 2:
        parser.error("--max-length must be at least 2")
    result = validate(
        options.model, options.train, options.eval, max_length=options.max_length, min_rows=options.min_rows
    )
    write_json(options.out, result)
    return 0 if result["ok"] else 2


if __name__ == "__main__":
    sys.exit(main())

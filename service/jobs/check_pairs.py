"""``python -m service.jobs.check_pairs``: the short process that judges a steering job's file before it may queue.

Same command line, verdict and exit codes as ``python -m core.data.validate``. It knows no tokenizer: pairs that are too
long for the model are found by the fit itself, with the same codes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from core.data.rules import RowProblem
from core.data.source import DataError
from core.data.validate import GONE
from service.jobs.supervisor import write_json
from steering.pairs import read_pairs

_PARAM = "training_file"


def judge(path: Path) -> dict[str, Any]:
    """Read the pairs and write down what is wrong with them.

    Args:
        path: a JSONL file of pairs.

    Returns:
        Content of validation.json.
    """
    verdict: dict[str, Any] = {"ok": True, "param": None, "code": None, "message": None, "rows": 0}
    try:
        pairs = read_pairs(path)
    except (DataError, FileNotFoundError) as error:
        found = error.problems if isinstance(error, DataError) else [RowProblem(None, "file_not_found", GONE)]
        problems = [{"file": _PARAM, **asdict(problem)} for problem in found]
        first = problems[0]
        verdict |= {"ok": False, "param": _PARAM, "code": first["code"], "message": first["message"]}
        return verdict | _lists(problems, [])
    warnings = [{"file": _PARAM, **asdict(warning)} for warning in pairs.warnings]
    return verdict | {"rows": len(pairs.rows)} | _lists([], warnings)


def _lists(problems: list[dict[str, Any]], warnings: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "problems": problems,
        "problem_count": len(problems),
        "warnings": warnings,
        "warning_count": len(warnings),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Judge the file named on the command line.

    Args:
        arguments: without the program's name.

    Returns:
        0: in order; 2: the user has to change something.
    """
    parser = argparse.ArgumentParser(prog="python -m service.jobs.check_pairs")
    parser.add_argument("--model")
    parser.add_argument("--train", required=True, type=Path)
    parser.add_argument("--max-length", type=int)
    parser.add_argument("--out", required=True, type=Path)
    options = parser.parse_args(arguments)
    verdict = judge(options.train)
    write_json(options.out, verdict)
    return 0 if verdict["ok"] else 2


if __name__ == "__main__":
    sys.exit(main())

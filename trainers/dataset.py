"""Rows of a file as token sequences ready to train on."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from core.data.chat import encode
from core.data.example import Example
from core.data.source import DataError, rows, scan
from trainers.errors import RunError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


NAMED = 20
"""Bad rows that an error names; all are counted."""


def read_examples(path: Path, tokenizer: PreTrainedTokenizerBase, *, max_length: int, param: str) -> list[Example]:
    """Encodes every row of a JSON lines file.

    Args:
        path: The file.
        tokenizer: The base model's.
        max_length: Longest row in tokens; the rest is cut on the right.
        param: Setting that named the file, for error messages.

    Returns:
        One example a row, in the file's order.

    Raises:
        RunError: The file is missing or empty, a row is malformed (the message names its line), or one trains no token
            within ``max_length``.
    """
    if not path.is_file():
        raise RunError(f"{param}: there is no file {path}", code="file_not_found", param=param)
    try:
        examples = [encode(row, tokenizer, max_length=max_length) for row in rows(path)]
    except DataError as error:
        raise RunError(f"{param}: {_told(path)}", code=error.problems[0].code, param=param) from error
    except ValueError as error:
        raise RunError(f"{param}: {error}", code="invalid_row", param=param) from error
    if not examples:
        raise RunError(f"{param}: {path} holds no rows", code="file_empty", param=param)
    silent = [example.line for example in examples if not example.trained]
    if silent:
        lines = ", ".join(str(line) for line in silent[:20])
        raise RunError(
            f"{param}: no token would be trained within max_length {max_length} on line(s) {lines}"
            f"{' and more' if len(silent) > 20 else ''}; shorten the prompts or raise max_length",
            code="no_trained_tokens",
            param=param,
        )
    return examples


def _told(path: Path) -> str:
    """All that is wrong with a file, a line for each row up to ``NAMED``; the code of the first is the error's own."""
    found = scan(path, max_problems=NAMED)
    told = [f"{'' if one.line is None else f'line {one.line}: '}{one.message}" for one in found.problems]
    if len(told) == 1 and found.problem_count == 1:
        return told[0]
    more = [f"and {found.problem_count - len(told)} more"] if found.problem_count > len(told) else []
    return "\n  ".join([f"{found.problem_count} problems", *told, *more])


def file_digest(path: Path) -> str:
    """``sha256:<hex>`` of a file's bytes."""
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"

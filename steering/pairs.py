"""Pairs of contrasting texts from a JSONL file, every fault with its line. No tokenizer and no torch here.

A row is {"prompt": text or list of messages, "positive": text, "negative": text}. A text prompt is one user message;
`messages` is another name for `prompt`; without either, the two texts stand alone.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.data.lines import MAX_LINE_BYTES, read_lines
from core.data.rules import Message, RowProblem
from core.data.source import DataError
from core.text import clean

KEYS = ("prompt", "messages", "positive", "negative")
ROLES = ("system", "developer", "user", "assistant")
MAX_PROBLEMS = 100
"""How many problems are named."""

CODES = {
    "invalid_json": "the line is not JSON (or not UTF-8)",
    "duplicate_key": "an object names the same key twice",
    "data_type": "the line, or a message in it, is not an object",
    "line_too_long": "the line is longer than is read",
    "invalid_text": "text with a NUL or half of a surrogate pair",
    "missing_positive": "`positive` is missing, empty or no text",
    "missing_negative": "`negative` is missing, empty or no text",
    "missing_prompt": "`prompt` is there, but empty, or neither a text nor a list of messages",
    "mixed_row_kinds": "a row with both `prompt` and `messages`",
    "message_missing_key": "a message has no `role` or no `content`",
    "message_unrecognized_key": "a message has a key besides role and content",
    "unrecognized_role": "a role besides system, developer, user and assistant",
    "missing_content": "`content` is empty or no text",
    "last_message_not_user": "the prompt does not end with a user message",
    "identical_pair": "`positive` and `negative` are the same text",
    "empty_file": "no rows at all",
    "not_encodable": "the model's chat template refuses the row",
    "row_too_long": "a prompt with its answer has more tokens than max_length",
    "row_too_short": "a text of which no token counts",
}
"""Every code that a row or file can be refused with, and what it means."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One row."""

    line: int
    """Line of the file, from 1."""
    prompt: tuple[Message, ...]
    """The conversation that both texts answer; empty: they stand alone."""
    positive: str
    """Text that shows what is wanted more of."""
    negative: str
    """Text that shows what is wanted less of."""


@dataclass(frozen=True, slots=True)
class Pairs:
    """A file that is in order."""

    rows: list[Pair]
    warnings: list[RowProblem] = field(default_factory=list)
    """Keys without effect, blank lines; at most `MAX_PROBLEMS`."""


class _RowError(ValueError):
    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def read_pairs(path: Path) -> Pairs:
    """Read and check a whole file.

    Args:
        path: A JSONL file, UTF-8.

    Returns:
        Its pairs in the order of the file.

    Raises:
        DataError: With up to `MAX_PROBLEMS` problems.
        OSError: The file cannot be read.
    """
    found = Pairs([])
    problems: list[RowProblem] = []
    for line in read_lines(path):
        if len(problems) == MAX_PROBLEMS:
            break
        if line.data is None:
            problems.append(RowProblem(line.number, "line_too_long", f"the line is longer than {MAX_LINE_BYTES} bytes"))
        elif not line.data.strip(b" \t\r"):
            _warn(found, line.number, "blank_line", "the line is blank and is skipped")
        else:
            try:
                found.rows.append(_pair(line.number, _decode(line.data), found))
            except _RowError as error:
                problems.append(RowProblem(line.number, error.code, str(error)))
    if not found.rows and not problems:
        problems.append(RowProblem(None, "empty_file", "the file holds no rows; write one JSON object per line"))
    if problems:
        raise DataError(problems)
    return found


def _warn(found: Pairs, line: int, code: str, message: str) -> None:
    if len(found.warnings) < MAX_PROBLEMS:
        found.warnings.append(RowProblem(line, code, message))


def _object(items: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(items)
    if len(made) != len(items):
        raise _RowError("duplicate_key", "an object names the same key twice")
    return made


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _decode(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data.decode(), object_pairs_hook=_object, parse_constant=_constant)
    except _RowError:
        raise
    except (ValueError, RecursionError) as error:
        raise _RowError("invalid_json", str(error)[:200]) from None
    if not isinstance(value, dict):
        raise _RowError("data_type", f"expected a JSON object, found a {type(value).__name__}")
    return value


def _pair(line: int, value: dict[str, Any], found: Pairs) -> Pair:
    for key in value.keys() - set(KEYS):
        _warn(found, line, "row_unrecognized_key", f"{key[:80]!r} has no effect; rows hold {', '.join(KEYS)}")
    if "prompt" in value and "messages" in value:
        raise _RowError("mixed_row_kinds", "the row has both prompt and messages; keep one of them")
    if value.keys().isdisjoint({"positive", "negative"}) and ("messages" in value or "completion" in value):
        raise _RowError(
            "missing_positive",
            "`positive` and `negative` are missing; this looks like a row to train a model on: `gradhelm jobs create`",
        )
    positive, negative = (_text(value.get(key), key, f"missing_{key}") for key in ("positive", "negative"))
    if positive == negative:
        raise _RowError("identical_pair", "positive and negative are the same text, so the row says nothing")
    prompt: tuple[Message, ...] = ()
    for key in ("prompt", "messages"):
        if key in value:
            prompt = _prompt(value[key], key)
    return Pair(line, prompt, positive, negative)


def _prompt(value: Any, key: str) -> tuple[Message, ...]:
    if isinstance(value, str):
        return (Message("user", _text(value, key, "missing_prompt")),)
    if not isinstance(value, list) or not value:
        raise _RowError("missing_prompt", f"`{key}` must be a text or a list of messages, and not empty")
    messages = tuple(_message(item, f"{key}[{index}]") for index, item in enumerate(value))
    if messages[-1].role != "user":
        raise _RowError("last_message_not_user", f"`{key}` must end with a user message, which the two texts answer")
    return messages


def _message(item: Any, where: str) -> Message:
    if not isinstance(item, dict):
        raise _RowError("data_type", f"{where} must be an object with role and content")
    if missing := [key for key in ("role", "content") if key not in item]:
        raise _RowError("message_missing_key", f"{where} has no {' and no '.join(missing)}")
    if extra := sorted(item.keys() - {"role", "content"}):
        raise _RowError("message_unrecognized_key", f"{where}.{clean(extra[0][:80])}: allowed are role and content")
    role = item["role"]
    if role not in ROLES:
        raise _RowError("unrecognized_role", f"{where}.role is {str(role)[:80]!r}; allowed are {', '.join(ROLES)}")
    content = _text(item["content"], f"{where}.content", "missing_content")
    return Message(role, content, weight=0 if role == "assistant" else None)


def _text(value: Any, where: str, code: str) -> str:
    if not isinstance(value, str) or not value:
        raise _RowError(code, f"`{where}` must be a text that is not empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _RowError("invalid_text", f"`{where}` has half of a surrogate pair") from None
    if "\x00" in value:
        raise _RowError("invalid_text", f"`{where}` has a NUL")
    return value

"""Rows of pairs: what is read, and every fault with its line and code."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import steering.mean_difference
import steering.pairs
from core.data.source import DataError, Message
from steering.pairs import CODES, MAX_PROBLEMS, Pair, read_pairs

GOOD: dict[str, Any] = {"positive": "a b", "negative": "c d"}


def write(tmp_path: Path, *lines: Any) -> Path:
    path = tmp_path / "pairs.jsonl"
    data = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"".join(line + b"\n" for line in data))
    return path


def test_the_three_kinds_of_rows(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    path = write(tmp_path, GOOD, {**GOOD, "prompt": "p"}, {**GOOD, "prompt": messages}, {**GOOD, "messages": messages})
    turns = (Message("system", "s"), Message("user", "u"))
    assert read_pairs(path).rows == [
        Pair(1, (), "a b", "c d"),
        Pair(2, (Message("user", "p"),), "a b", "c d"),
        Pair(3, turns, "a b", "c d"),
        Pair(4, turns, "a b", "c d"),
    ]


def test_earlier_answers_are_context_only(tmp_path: Path) -> None:
    messages = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
    (row,) = read_pairs(write(tmp_path, {**GOOD, "prompt": messages})).rows
    assert [m.weight for m in row.prompt] == [None, 0, None]


def test_blank_lines_and_keys_without_effect_are_warned_about(tmp_path: Path) -> None:
    found = read_pairs(write(tmp_path, b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), b"  ", {**GOOD, "label": 3}))
    assert [row.line for row in found.rows] == [1, 3]
    assert [(w.line, w.code) for w in found.warnings] == [(2, "blank_line"), (3, "row_unrecognized_key")]


def user(**change: Any) -> dict[str, Any]:
    return {**GOOD, "prompt": [{"role": "user", "content": "u", **change}]}


BAD: dict[str, tuple[str, Any]] = {
    "not JSON": ("invalid_json", b"{"),
    "NaN": ("invalid_json", b'{"positive": NaN}'),
    "not UTF-8": ("invalid_json", b'{"positive": "\xff"}'),
    "deep": ("invalid_json", b"[" * 100_000),
    "repeated key": ("duplicate_key", b'{"positive": "a", "positive": "b", "negative": "c"}'),
    "a list": ("data_type", []),
    "no positive": ("missing_positive", {"negative": "a"}),
    "empty positive": ("missing_positive", {**GOOD, "positive": ""}),
    "number": ("missing_negative", {**GOOD, "negative": 3}),
    "same": ("identical_pair", {"positive": "a", "negative": "a"}),
    "NUL": ("invalid_text", {**GOOD, "positive": "a\0b"}),
    "half a pair": ("invalid_text", {**GOOD, "positive": "\ud800"}),
    "both prompts": ("mixed_row_kinds", {**GOOD, "prompt": "a", "messages": []}),
    "empty prompt": ("missing_prompt", {**GOOD, "prompt": ""}),
    "no messages": ("missing_prompt", {**GOOD, "messages": []}),
    "null prompt": ("missing_prompt", {**GOOD, "prompt": None}),
    "message text": ("data_type", {**GOOD, "prompt": ["hello"]}),
    "no content": ("message_missing_key", {**GOOD, "prompt": [{"role": "user"}]}),
    "weight": ("message_unrecognized_key", user(weight=1)),
    "half a pair as a key": ("message_unrecognized_key", user(**{"\ud800": 1})),
    "role": ("unrecognized_role", user(role="tool")),
    "half a pair as a role": ("unrecognized_role", user(role="\ud800")),
    "role list": ("unrecognized_role", user(role=["user"])),
    "content list": ("missing_content", user(content=["u"])),
    "assistant last": ("last_message_not_user", user(role="assistant")),
}


@pytest.mark.parametrize("name", BAD)
def test_faults_carry_line_and_code(tmp_path: Path, name: str) -> None:
    code, line = BAD[name]
    with pytest.raises(DataError, match=r"^line 2: ") as caught:
        read_pairs(write(tmp_path, GOOD, line, GOOD))
    (problem,) = caught.value.problems
    assert (problem.line, problem.code) == (2, code)
    assert problem.message.encode()


def test_an_empty_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no rows"):
        read_pairs(write(tmp_path))


def test_a_line_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.data.lines.MAX_LINE_BYTES", 64)
    with pytest.raises(DataError, match="longer than") as caught:
        read_pairs(write(tmp_path, {"positive": "a" * 99, "negative": "b"}))
    assert caught.value.problems[0].code == "line_too_long"


def test_as_many_problems_as_are_useful(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_pairs(write(tmp_path, *([[]] * (MAX_PROBLEMS + 50))))
    assert len(caught.value.problems) == MAX_PROBLEMS


def test_every_code_is_documented_and_every_documented_one_is_used() -> None:
    source = "".join(Path(str(module.__file__)).read_text() for module in (steering.pairs, steering.mean_difference))
    used = set(re.findall(r'(?:_RowError|RowProblem)\((?:[\w.]+, )?"(\w+)"', source))
    used |= {f"missing_{key}" for key in ("positive", "negative")} | {"missing_prompt", "missing_content"}
    assert used == set(CODES)

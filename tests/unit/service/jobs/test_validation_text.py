"""What is said of a file that cannot be used: each problem once, and the right command for a file of the other kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from core.data.lines import looks_like_json_lines
from core.data.source import DataError, scan
from demo import mood, tickets
from service.jobs.validation import SHOWN, _invalid, summary
from steering.pairs import read_pairs


def verdict(problems: list[Any], count: int) -> dict[str, Any]:
    rows = [{"file": "training_file", "line": one.line, "code": one.code, "message": one.message} for one in problems]
    return {"problems": rows, "problem_count": count, "code": rows[0]["code"], "param": "training_file"}


def test_pairs_given_to_a_training_job_are_told_of_once_with_the_right_command() -> None:
    found = scan(mood.PAIRS)
    text = str(_invalid(verdict(found.problems, found.problem_count)).values["error_message"])
    assert text.startswith(
        "24 problems in training_file: 24 rows (lines 1, 2, 3, ...): this looks like a steering pair"
    )
    assert text.count("gradhelm vectors fit") == 1
    assert len(text) < 300


def test_chat_rows_given_to_a_fit_are_told_of_once_with_the_right_command() -> None:
    with pytest.raises(DataError) as refused:
        read_pairs(tickets.TRAIN)
    text = str(_invalid(verdict(refused.value.problems, len(refused.value.problems))).values["error_message"])
    assert text.count("gradhelm jobs create") == 1
    assert len(text) < 300


def test_different_problems_keep_their_lines_and_end_somewhere() -> None:
    one = [{"file": "training_file", "line": 7, "code": "c", "message": "m"}]
    assert summary(one) == ["line 7: m (c)"]
    assert summary([{**one[0], "line": None}]) == ["m (c)"]
    assert summary([*one, {**one[0], "line": 9}]) == ["2 rows (lines 7, 9): m (c)"]
    many = [{**one[0], "line": number, "message": f"m{number}"} for number in range(30)]
    assert summary(many)[SHOWN:] == ["and 20 other problems"]


def test_a_pair_with_a_text_missing_is_still_a_pair(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"prompt": "p", "positive": "x"}\n')
    with pytest.raises(DataError, match="`negative` must be a text"):
        read_pairs(file)


def test_what_is_no_json_lines_is_said_once() -> None:
    assert looks_like_json_lines(b"name,text\n") == 'the file is not JSON lines: its first line does not begin with "{"'

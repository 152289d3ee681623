"""Every bad row of a file is named at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trainers.dataset import NAMED, read_examples
from trainers.errors import RunError


def refused(path: Path) -> RunError:
    tokenizer: Any = None  # text is judged before tokens
    with pytest.raises(RunError) as caught:
        read_examples(path, tokenizer, max_length=8, param="train_file")
    return caught.value


def test_all_bad_rows_are_named_a_line_each(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("x\n[]\n")
    error = refused(path)
    first, *rest = str(error).splitlines()
    assert first == "train_file: 2 problems" and error.code == "invalid_json"
    assert [line.strip().partition(":")[0] for line in rest] == ["line 1", "line 2"]
    path.write_text("x\n" * (NAMED + 3))
    assert str(refused(path)).splitlines()[-1].strip() == "and 3 more"


def test_one_is_told_in_one_line_without_its_code(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("[1]\n")
    assert str(refused(path)) == "train_file: line 1: expected a JSON object, found a list"

"""GSM8K rows: enough answer in each, and dev, test and training apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.optimizers.questions import LEAST, Questions, fitting
from core.models.load import load_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "gsm8k").mkdir()
    for name, count in (("train", 12), ("test", 4)):
        rows = [
            {"question": f"{name} {number} plus one?", "answer": "One more is " + "so " * 60 + "#### 1"}
            for number in range(count)
        ]
        long = {"question": "why " * 400, "answer": "so"}
        lines = [json.dumps(row) for row in [long, *rows]]
        (tmp_path / "gsm8k" / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_parts_do_not_meet_and_every_row_has_enough_to_score(folder: Path, tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_llama))
    length = 160
    found = Questions.read(folder, tokenizer, length=length, train=9, dev=3, test=2)
    assert [row.line for row in found.dev] == [2, 3, 4], "line 1 is too long"
    assert [row.line for row in found.train] == list(range(5, 14))
    assert [row.line for row in found.test] == [2, 3]
    for row in [*found.train, *found.dev, *found.test]:
        assert row.trained >= LEAST and len(row.input_ids) <= length
    texts = {tokenizer.decode(row.input_ids) for row in found.train}
    assert not texts & {tokenizer.decode(row.input_ids) for row in found.dev}


def test_too_few_rows_are_an_error(folder: Path, tiny_llama: Path) -> None:
    with pytest.raises(ValueError, match="12 rows that are short enough for 160 tokens; 13 are wanted"):
        Questions.read(folder, load_tokenizer(str(tiny_llama)), length=160, train=10, dev=3, test=2)


def test_a_short_answer_counts_when_it_is_whole(tmp_path: Path, tiny_llama: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "1?", "answer": "1"}) + "\n")
    [row] = fitting(path, load_tokenizer(str(tiny_llama)), length=64, count=1)
    assert row.trained < LEAST and not row.truncated


def test_batches_depend_on_the_seed_alone(folder: Path, tiny_llama: Path) -> None:
    found = Questions.read(folder, load_tokenizer(str(tiny_llama)), length=160, train=9, dev=3, test=2)

    def lines(seed: int) -> list[list[int]]:
        return [[row.line for row in batch] for batch, _ in zip(found.batches(seed, 3), range(6), strict=False)]

    assert lines(1) == lines(1) != lines(2)
    assert sorted(line for batch in lines(1)[:3] for line in batch) == list(range(5, 14)), (
        "an epoch shows every row once"
    )

"""GSM8K rows with short questions, cut to a few tokens: what is trained on, and held-out ones for dev and test.

Dev is the beginning of the training file, what is trained on follows it; test is the beginning of the test file.
Answers alone are trained and scored, as far as the row reaches; rows whose question leaves fewer than ``LEAST`` tokens
for the answer are left out.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from core.data.chat import encode
from core.data.example import Example
from core.data.rules import Row

LEAST = 32
"""Answer tokens of a row, at least."""


def fitting(path: Path, tokenizer: PreTrainedTokenizerBase, *, length: int, count: int) -> list[Example]:
    """The first rows of a file, cut to ``length`` tokens, that have ``LEAST`` tokens of answer or the whole of it."""
    found: list[Example] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        values = json.loads(line)
        row = Row(number, prompt=f"Question: {values['question']}\nAnswer:", completion=f" {values['answer']}")
        example = encode(row, tokenizer, max_length=length)
        if example.trained >= LEAST or not example.truncated:
            found.append(example)
        if len(found) == count:
            return found
    raise ValueError(f"{path} has {len(found)} rows that are short enough for {length} tokens; {count} are wanted")


@dataclass(frozen=True)
class Questions:
    """Encoded rows by use."""

    train: list[Example]
    dev: list[Example]
    test: list[Example]

    @classmethod
    def read(
        cls, folder: Path, tokenizer: PreTrainedTokenizerBase, *, length: int, train: int, dev: int, test: int
    ) -> Questions:
        """Read ``gsm8k/`` of the data folder.

        Args:
            folder: With ``gsm8k/{train,test}.jsonl``.
            tokenizer: The model's.
            length: Tokens of a row, at most.
            train: Rows to train on.
            dev: Rows of the training file that are held out.
            test: Rows of the test file.
        """
        known = fitting(folder / "gsm8k" / "train.jsonl", tokenizer, length=length, count=dev + train)
        held_out = fitting(folder / "gsm8k" / "test.jsonl", tokenizer, length=length, count=test)
        return cls(known[dev:], known[:dev], held_out)

    def batches(self, seed: int, size: int) -> Iterator[list[Example]]:
        """Endless batches: each epoch a new order of all rows, drawn from the seed alone."""
        draw = random.Random(seed)
        while True:
            order = draw.sample(self.train, len(self.train))
            for start in range(0, len(order) - size + 1, size):
                yield order[start : start + size]

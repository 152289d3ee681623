"""WikiText-2 and Shakespeare as tokens: what is trained on, and articles to choose rates on (dev) and to report (test).

WikiText-2's own training part is not used: its validation part and tinyshakespeare are trained on, its test part is
cut once, between two articles, into dev and test. So perplexities here compare with each other and with nothing else.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

TITLE = re.compile(r"^ = [^=\n]+ = ?$", re.MULTILINE)
IGNORED = -100


def articles(text: str) -> list[str]:
    """WikiText split before each title (``= ... =``, one pair of signs alone)."""
    starts = [found.start() for found in TITLE.finditer(text)]
    return [text[start:end].strip() for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]


def halves(parts: list[str]) -> tuple[list[str], list[str]]:
    """Cut a list of texts once, where the first part comes nearest to half of all characters."""
    whole, sums = sum(map(len, parts)), [0]
    for part in parts:
        sums.append(sums[-1] + len(part))
    cut = min(range(1, len(parts)), key=lambda index: abs(2 * sums[index] - whole))
    return parts[:cut], parts[cut:]


def trained_tokenizer(texts: list[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE; WikiText's ``<unk>`` is one token of it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


@dataclass(frozen=True)
class Corpus:
    """Training rows, and the articles of dev and test."""

    rows: Tensor
    """(rows, length + 1) int64: inputs are all but the last token, targets all but the first."""
    dev: list[list[int]]
    """Token ids of each article."""
    test: list[list[int]]
    """Token ids of each article."""
    vocabulary: int

    @classmethod
    def read(cls, folder: Path, *, vocabulary: int, length: int, characters: int | None = None) -> Corpus:
        """Read ``text/`` of the data folder and train the tokenizer on what is trained on.

        Args:
            folder: With ``text/wikitext2_{valid,test}.txt`` and ``text/tinyshakespeare.txt``.
            vocabulary: Entries of the tokenizer.
            length: Tokens of a row.
            characters: Of each file, read only so many.
        """
        names = ("wikitext2_valid", "tinyshakespeare", "wikitext2_test")
        wiki, plays, held_out = ((folder / "text" / f"{n}.txt").read_text(encoding="utf-8")[:characters] for n in names)
        tokenizer = trained_tokenizer([wiki, plays], vocabulary)
        ids = torch.tensor(tokenizer.encode(wiki).ids + tokenizer.encode(plays).ids)
        rows = ids[: len(ids) // (length + 1) * (length + 1)].view(-1, length + 1)
        dev, test = halves(articles(held_out))
        encoded = [[tokenizer.encode(article).ids for article in part] for part in (dev, test)]
        return cls(rows, dev=encoded[0], test=encoded[1], vocabulary=tokenizer.get_vocab_size())

    @cached_property
    def digest(self) -> str:
        """Identity of all tokens."""
        content = hashlib.sha256(self.rows.numpy().tobytes())
        content.update(repr((self.dev, self.test)).encode())
        return content.hexdigest()

    def batches(self, seed: int, size: int) -> Iterator[Tensor]:
        """Endless batches (size, length + 1): each epoch a new order of all rows, drawn from the seed alone."""
        draw = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(self.rows), generator=draw)
            for start in range(0, len(order) - size + 1, size):
                yield self.rows[order[start : start + size]]


def windows(article: list[int], length: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets (windows, length) in which every token of an article but the first is a target once.

    The last window is filled up with ignored targets.
    """
    inputs, targets = article[:-1], article[1:]
    short = -len(inputs) % length
    return (
        torch.tensor(inputs + [0] * short).view(-1, length),
        torch.tensor(targets + [IGNORED] * short).view(-1, length),
    )

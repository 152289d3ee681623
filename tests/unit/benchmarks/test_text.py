"""Cutting text: articles, halves, windows and batches."""

from __future__ import annotations

import torch

from benchmarks.optimizers.text import IGNORED, Corpus, articles, halves, trained_tokenizer, windows

WIKI = " \n = Robert <unk> = \n \n He acts . \n \n = = Career = = \n \n In 2000 . \n = Du Fu = \n \n A poet . \n"


def test_articles_begin_at_titles_and_not_at_sections() -> None:
    found = articles(WIKI)
    assert [text.splitlines()[0].strip() for text in found] == ["= Robert <unk> =", "= Du Fu ="]
    assert "= = Career = =" in found[0] and "poet" in found[1]


def test_a_list_is_cut_once_nearest_to_half_of_its_characters() -> None:
    assert halves(["a" * 10, "b" * 2, "c" * 2, "d" * 5]) == (["a" * 10], ["b" * 2, "c" * 2, "d" * 5])
    assert halves(["a", "b" * 9]) == (["a"], ["b" * 9])


def test_every_token_but_the_first_is_a_target_once() -> None:
    article = list(range(100, 123))
    inputs, targets = windows(article, 5)
    assert inputs.shape == targets.shape == (5, 5)
    assert targets[targets != IGNORED].tolist() == article[1:]
    assert inputs[targets != IGNORED].tolist() == article[:-1]


def test_the_tokenizer_knows_unk_and_loses_nothing() -> None:
    tokenizer = trained_tokenizer([WIKI], 280)
    ids = tokenizer.encode(" é <unk> \n").ids
    assert ids.count(tokenizer.token_to_id("<unk>")) == 1
    assert tokenizer.decode(ids, skip_special_tokens=False) == " é <unk> \n"
    assert tokenizer.get_vocab_size() <= 280


def test_batches_depend_on_the_seed_alone_and_show_every_row_once_an_epoch() -> None:
    corpus = Corpus(torch.arange(12).view(6, 2), [[1, 2]], [[3, 4]], 12)
    first = [batch for batch, _ in zip(corpus.batches(1, 2), range(6), strict=False)]
    again = [batch for batch, _ in zip(corpus.batches(1, 2), range(6), strict=False)]
    other = [batch for batch, _ in zip(corpus.batches(2, 2), range(6), strict=False)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert torch.cat(first[:3])[:, 0].sort().values.tolist() == [0, 2, 4, 6, 8, 10]


def test_the_digest_tells_held_out_articles_apart() -> None:
    rows = torch.arange(4).view(2, 2)
    assert Corpus(rows, [[1]], [[2]], 4).digest != Corpus(rows, [[2]], [[1]], 4).digest

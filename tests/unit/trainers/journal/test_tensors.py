"""A journal knows the tensors that it begins and ends with."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.unit.trainers.journal.helpers import header
from trainers.journal.tensors import check_start, digest, entries


def start() -> dict[str, Tensor]:
    """Three tensors; one is no contiguous piece of memory, one is in 16 bits, one is a scalar."""
    generator = torch.Generator().manual_seed(1)
    return {
        "a": torch.rand(5, 3, generator=generator).t(),
        "b": torch.rand(7, generator=generator).bfloat16(),
        "c": torch.rand((), generator=generator),
    }


def test_only_the_tensors_that_a_journal_begins_with_are_taken() -> None:
    first = start()
    head = header(tensors=entries(first), initial=digest(first).hex())
    check_start(head, first)
    check_start(head, first | {"a": first["a"].contiguous()})
    for tensors, said in (
        ({"a": first["a"], "c": first["c"], "b": first["b"]}, "name='b'.* has .*name='c'"),
        ({"a": first["a"], "b": first["b"]}, "name='c'.* has none"),
        (first | {"d": first["c"]}, "tunes no such tensor where this model has .*name='d'"),
        (first | {"b": first["b"].float()}, "bfloat16.* has .*float32"),
        (first | {"c": first["c"].reshape(1)}, r"shape=\(\)\) where this model has .*shape=\(1,\)"),
        (first | {"c": first["c"] + 1e-3}, "are not the tensors that the journal begins with: load the base sha256"),
    ):
        with pytest.raises(ValueError, match=said):
            check_start(head, tensors)


def test_the_hash_of_tensors_is_that_of_the_specification() -> None:
    made = {
        "a": torch.arange(6, dtype=torch.float32).reshape(2, 3).t(),
        "b": torch.tensor([1.0], dtype=torch.bfloat16),
        "c": torch.tensor(-0.0, dtype=torch.float64),
        "d": torch.zeros(0, 3),
    }
    expected = np.array([0, 3, 1, 4, 2, 5], "<f4").tobytes() + b"\x80\x3f" + np.array([-0.0], "<f8").tobytes()
    assert digest(made) == hashlib.sha256(expected).digest()
    assert [entry.dtype for entry in entries(made)] == ["float32", "bfloat16", "float64", "float32"]
    assert [entry.shape for entry in entries(made)] == [(3, 2), (1,), (), (0, 3)]

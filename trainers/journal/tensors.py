"""How the tensors of a run enter its journal: names, shapes and a hash in the header, another hash in the seal."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from itertools import zip_longest

import torch
from torch import Tensor

from trainers.journal.header import Header, TensorEntry


def entries(tensors: Mapping[str, Tensor]) -> tuple[TensorEntry, ...]:
    """How a header lists tensors.

    Args:
        tensors: By name, in the order in which the generator numbers them.

    Returns:
        Name, dtype and shape of each.
    """
    return tuple(
        TensorEntry(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        for name, tensor in tensors.items()
    )


def digest(tensors: Mapping[str, Tensor]) -> bytes:
    """SHA-256 of the bytes of tensors, one after the other: little-endian, the last index running fastest.

    Args:
        tensors: By name, in the header's order; on any device.

    Returns:
        32 bytes.
    """
    assert sys.byteorder == "little"
    found = hashlib.sha256()
    for tensor in tensors.values():
        found.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return found.digest()


def check_start(header: Header, tensors: Mapping[str, Tensor]) -> None:
    """Whether tensors are those that a journal begins with.

    Args:
        header: The journal's.
        tensors: By name, in the header's order.

    Raises:
        ValueError: They are others.
    """
    found = entries(tensors)
    if found != header.tensors:
        had, has = next((had, has) for had, has in zip_longest(header.tensors, found) if had != has)
        raise ValueError(f"the journal tunes {had or 'no such tensor'} where this model has {has or 'none'}")
    if digest(tensors).hex() != header.initial:
        raise ValueError(
            f"these are not the tensors that the journal begins with: load the base {header.base} afresh, quantised as "
            f"{dict(header.quantiser)}"
        )

"""The model that a journal's run began with, made again from its base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from core.models.load import Loaded, Quant, load
from core.models.quant.convert import quantised
from core.models.quant.linear import QuantLinear
from core.models.quant.scales import describe
from trainers.journal.header import Header
from trainers.optim.qzo import Qzo


@dataclass(frozen=True, slots=True)
class Base:
    """A base as before the first step."""

    loaded: Loaded
    """Model and tokenizer."""
    layers: Mapping[str, QuantLinear]
    """Its quantised layers by name; empty where it is not quantised."""
    tensors: Mapping[str, Tensor]
    """What is tuned, by name, in the header's order."""


def named(model: nn.Module, optimizer: Qzo) -> dict[str, Tensor]:
    """What an optimizer moves, as a journal lists it.

    Args:
        model: Whose parameters they are.
        optimizer: Over some of them.

    Returns:
        Parameters by their names in the model, in the optimizer's order.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)]: parameter for parameter in optimizer.parameters}


def begin(header: Header, model: str | None = None) -> Base:
    """Loads the base of a journal, and quantises it as the run did.

    Args:
        header: The journal's.
        model: Reference of the base; by default what the header says under ``about``.

    Returns:
        The base, which is that of the run: fingerprint and codes are compared.

    Raises:
        ValueError: It is another base, it cannot be found, or it was quantised by what this version does not have.
    """
    reference = header.about.get("model") if model is None else model
    if not isinstance(reference, str):
        raise ValueError("the journal does not say the name of its base: give it with --model")
    quant, group = _scheme(header.quantiser)
    loaded = load(reference, dtype="float32", quant=quant, group=group)
    if loaded.fingerprint != header.base:
        raise ValueError(f"{reference} has the weights {loaded.fingerprint}, and the journal is of {header.base}")
    layers = quantised(loaded.model)
    if layers and (found := describe(layers)) != header.quantiser:
        raise ValueError(f"quantised here the base has other codes, {found}, than the journal's, {header.quantiser}")
    parameters = dict(loaded.model.named_parameters())
    if missing := [entry.name for entry in header.tensors if entry.name not in parameters]:
        raise ValueError(f"the journal tunes {missing[0]}, which {reference} does not have")
    return Base(loaded, layers, {entry.name: parameters[entry.name] for entry in header.tensors})


def _scheme(quantiser: Mapping[str, Any]) -> tuple[Quant, int]:
    scheme, group = quantiser.get("scheme", "none"), quantiser.get("group", 64)
    if scheme not in ("none", "int4", "nf4", "q4_1") or type(group) is not int:
        raise ValueError(f"the journal's base was quantised as {dict(quantiser)}, which cannot be made again here")
    return scheme, group

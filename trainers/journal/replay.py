"""From the tensors before the first step, and a journal, to the tensors after any of its steps, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainers.journal.header import Header
from trainers.journal.reader import Journal
from trainers.journal.tensors import check_start, digest, entries
from trainers.optim.noise import VERSION
from trainers.optim.qzo import Qzo
from trainers.optim.record import Record as Taken


class Replayed(NamedTuple):
    """What a replay made."""

    step: int
    """The step whose tensors these are."""
    finished: bool
    """Whether that is the end of a sealed journal, and the tensors are those that its seal names."""
    tensors: bytes
    """SHA-256 of the tensors, 32 bytes."""

    @property
    def label(self) -> str:
        """What a model with these tensors may be called."""
        return f"step {self.step}, {'finished' if self.finished else 'unfinished'}"


def describe(
    optimizer: Qzo,
    tensors: Mapping[str, Tensor],
    *,
    base: str,
    quantiser: Mapping[str, Any],
    kernels: str,
    about: Mapping[str, Any],
) -> Header:
    """The header of a run that has not taken its first step.

    Args:
        optimizer: Of the run; it is prepared here.
        tensors: Its parameters by name, in its order.
        base: Fingerprint of the base weights.
        quantiser: How they were quantised.
        kernels: Name of the table that chooses how the forward pass multiplies.
        about: What decides nothing.

    Returns:
        The header.
    """
    assert optimizer.steps == 0, "a journal begins before the first step"
    assert [id(one) for one in tensors.values()] == [id(one) for one in optimizer.parameters]
    settings = optimizer.settings
    groups = [[len(group["params"]), group["weight_decay"], group["scales"]] for group in optimizer.param_groups]
    return Header(
        base=base,
        quantiser=quantiser,
        tensors=entries(tensors),
        initial=digest(tensors).hex(),
        epsilon=(optimizer.prepare(),),
        generator=_generator(settings.compat, tensors),
        kernels=kernels,
        seed=optimizer.seed if settings.compat is None else None,
        slots=settings.samples,
        estimator={"groups": groups, **asdict(settings)},
        about=about,
    )


def rebuild(header: Header, tensors: Mapping[str, Tensor]) -> Qzo:
    """The optimizer of a run, as before its first step.

    Args:
        header: Of the run's journal.
        tensors: What it tunes, by name, in the header's order, as before the first step.

    Returns:
        An optimizer over them.

    Raises:
        ValueError: The tensors are others, or the journal was made with another generator, or with settings that
            this version does not have.
    """
    check_start(header, tensors)
    settings = dict(header.estimator)
    if header.generator != (known := _generator(settings.get("compat"), tensors)):
        raise ValueError(
            f"the journal's directions come from the generator {header.generator}, and this version has {known}: "
            "replay it with the version that made it"
        )
    parameters, groups = iter(tensors.values()), []
    try:
        for count, weight_decay, scales in settings.pop("groups"):
            taken = list(islice(parameters, count))
            groups.append({"params": taken, "weight_decay": weight_decay, "scales": scales})
        optimizer = Qzo(groups, seed=header.seed or 0, **settings)
    except (TypeError, KeyError) as error:
        raise ValueError(f"the journal's estimator has settings that this version does not have: {error}") from error
    if next(parameters, None) is not None or optimizer.settings.samples != header.slots:
        raise ValueError("the journal's estimator does not fit its tensors and slots")
    if (optimizer.prepare(),) != header.epsilon:
        raise ValueError(f"the distance is {optimizer.prepare()} here and {header.epsilon} in the journal")
    return optimizer


def replay(journal: Journal, optimizer: Qzo, tensors: Mapping[str, Tensor], *, step: int | None = None) -> Replayed:
    """Takes the steps of a journal again, each of which needs no loss.

    Args:
        journal: As read.
        optimizer: From ``rebuild`` over the same tensors, or as the run made it, with no step taken.
        tensors: What is changed in place, by name, in the header's order.
        step: The last step to take; by default that of the journal.

    Returns:
        Which step the tensors are of now, and whether that is a finished run. The optimizer's state is that after this
        step too, so that a run can go on from there.

    Raises:
        ValueError: The tensors are not those that the journal begins with, there is no such step, or the result is not
            what the seal names. In the last case the tensors have changed, and must not be used.
    """
    last = len(journal) if step is None else step
    if not 0 <= last <= len(journal):
        raise ValueError(f"the journal holds the steps 1 to {len(journal)}, not {last}")
    check_start(journal.header, tensors)
    optimizer.replay(taken(journal, last))
    made = digest(tensors)
    seal = journal.seal if last == len(journal) else None
    if seal is not None and made != seal.tensors:
        raise ValueError(
            f"the replay ended with tensors {made.hex()}, and the seal names {seal.tensors.hex()}: this machine's "
            "arithmetic, or the estimator's version, is not that of the run; do not use the result"
        )
    return Replayed(last, seal is not None, made)


def taken(journal: Journal, last: int) -> Iterator[Taken]:
    """The records of a journal as the optimizer takes them: one for each direction, without losses.

    Args:
        journal: As read.
        last: The last step.

    Yields:
        Directions of step 1, of step 2, and so on.
    """
    for step, lr, slots, seed in islice(journal, last):
        for direction, slot in enumerate(slots):
            its = journal.header.seed if seed is None else seed
            assert its is not None
            yield Taken(step, its, slot.d_raw, slot.d_applied, lr, math.nan, math.nan, slot.clipped, direction)


def _generator(compat: str | None, tensors: Mapping[str, Tensor]) -> str:
    """What decides the random directions beside seed and place; torch's own generators differ by device and version."""
    if compat is None:
        return VERSION
    devices = sorted({tensor.device.type for tensor in tensors.values()})
    return f"torch {torch.__version__} {' '.join(devices)}"

"""Steering vectors in memory, known by their content."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from pathlib import Path

from service.engines.base import BadRequest, EngineError, Steering, SteersNothing
from steering.spec import RowSpec, SteeringError, Term
from steering.vector import SteeringVector, VectorError


class Vectors:
    """Reads vector files; files with equal bytes share one object.

    Args:
        limit: vectors held at once.
    """

    def __init__(self, *, limit: int = 64) -> None:
        self._limit = limit
        self._held: OrderedDict[bytes, SteeringVector] = OrderedDict()

    def spec(self, steering: Steering) -> RowSpec:
        """The row's spec, with its vectors read.

        Args:
            steering: what was asked.

        Returns:
            The spec; whether it fits the model is not checked here.

        Raises:
            EngineError: 400 if a file cannot be read or is no vector.
        """
        terms = tuple(Term(self.read(t.path), t.strength, t.layers, t.positions) for t in steering.terms)
        return RowSpec(terms, steering.preserve_norm)

    def read(self, path: str) -> SteeringVector:
        """One vector.

        Args:
            path: its file.

        Returns:
            The vector, from memory if a file with these bytes was read before.

        Raises:
            EngineError: 400 if it cannot be read or is no vector.
        """
        try:
            data = Path(path).read_bytes()
        except OSError:
            raise BadRequest("vector_not_found", f"The vector {Path(path).stem} is gone.", param="steering") from None
        key = hashlib.sha256(data).digest()
        if key not in self._held:
            try:
                self._held[key] = SteeringVector.from_bytes(data)
            except VectorError as error:
                raise BadRequest("vector_not_usable", f"The vector cannot be used: {error}", param="steering") from None
        self._held.move_to_end(key)
        while len(self._held) > self._limit:
            self._held.popitem(last=False)
        return self._held[key]


def as_engine_error(error: SteeringError) -> EngineError:
    """What a client is told about a spec that does not fit the model."""
    if error.code == "steering_touches_nothing":
        return SteersNothing(str(error))
    return BadRequest(error.code, str(error), param="steering")

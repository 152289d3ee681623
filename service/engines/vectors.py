"""Steering vectors in memory, known by their content; a file that has not changed is not read again."""

from __future__ import annotations

import hashlib
import os
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
        self._read: OrderedDict[str, tuple[tuple[int, ...], bytes]] = OrderedDict()  # path: its file as it was, its key

    def spec(self, steering: Steering) -> RowSpec:
        """The row's spec, with its vectors read.

        Args:
            steering: what was asked.

        Returns:
            The spec; whether it fits the model is not checked here.

        Raises:
            EngineError: 400 if a file cannot be read or is no vector, 400 or 422 if the terms cannot be.
        """
        try:
            terms = tuple(Term(self.read(t.path), t.strength, t.layers, t.positions) for t in steering.terms)
            return RowSpec(terms, steering.preserve_norm)
        except SteeringError as error:
            raise as_engine_error(error) from None

    def read(self, path: str) -> SteeringVector:
        """One vector.

        Args:
            path: its file.

        Returns:
            The vector, from memory if the file is as it was, or one with its bytes was read before.

        Raises:
            EngineError: 400 if it cannot be read or is no vector.
        """
        try:
            found = os.stat(path)
            state = (found.st_ino, found.st_mtime_ns, found.st_size)
            before, key = self._read.get(path, ((), b""))
            if before != state or key not in self._held:
                key = self._load(Path(path).read_bytes())
        except OSError:
            raise BadRequest("vector_not_found", f"The vector {Path(path).stem} is gone.", param="steering") from None
        self._read[path] = state, key
        self._read.move_to_end(path)
        self._held.move_to_end(key)
        for held in (self._read, self._held):
            while len(held) > self._limit:
                held.popitem(last=False)
        return self._held[key]

    def _load(self, data: bytes) -> bytes:
        key = hashlib.sha256(data).digest()
        if key not in self._held:
            try:
                self._held[key] = SteeringVector.from_bytes(data)
            except VectorError as error:
                raise BadRequest("vector_not_usable", f"The vector cannot be used: {error}", param="steering") from None
        return key


def as_engine_error(error: SteeringError) -> EngineError:
    """What a client is told about a spec that does not fit the model."""
    if error.code == "steering_touches_nothing":
        return SteersNothing(str(error))
    return BadRequest(error.code, str(error), param="steering")

"""One training run, and the file that remembers those that are finished."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import commit

TUNING_SEED = 0
"""Learning rates are chosen on dev with this seed; test is read with other seeds alone."""


@dataclass(frozen=True, order=True)
class Run:
    """An optimizer at a peak learning rate, from one seed: it draws the weights' start and the order of the data."""

    arm: str
    rate: float
    seed: int


@dataclass(frozen=True)
class Result:
    """What a run found."""

    loss: float
    """Nats per token on dev (tuning seed) or test (other seeds); infinite where the run diverged."""
    units: tuple[float, ...]
    """Summed nats of each unit (article, row) of that text; empty where the run diverged."""
    tokens: tuple[int, ...]
    """Scored tokens of each unit."""
    state_bytes: int
    """Of the optimizer, between steps."""
    seconds: float
    """Wall time of the whole run, evaluation included."""
    more: Mapping[str, Any]
    """Figures that no decision rests on."""

    def as_json(self) -> dict[str, Any]:
        """JSON has no infinity."""
        loss = self.loss if math.isfinite(self.loss) else None
        return {**vars(self), "loss": loss, "more": dict(self.more)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Result:
        """The inverse."""
        loss = math.inf if values["loss"] is None else values["loss"]
        units, tokens = tuple(values["units"]), tuple(values["tokens"])
        return cls(loss, units, tokens, values["state_bytes"], values["seconds"], values["more"])


class Record:
    """Finished runs, a JSON line each, so that what was cut off goes on where it was.

    Lines of another setting (other steps, text, sizes) stay in the file and count for nothing. A line that a kill cut
    short counts for nothing either.
    """

    def __init__(self, path: Path, setting: Mapping[str, Any]) -> None:
        self.path = path
        canonical = json.dumps(setting, sort_keys=True)
        self.setting = hashlib.sha256(canonical.encode()).hexdigest()[:16]
        self.foreign = 0
        """Lines of other settings, as of the last reading."""
        self.commits: dict[str, int] = {}
        """How many of the runs each commit of this repository did, as of the last reading."""
        self._commit = commit()

    def read(self) -> dict[Run, Result]:
        """All finished runs of this setting."""
        found: dict[Run, Result] = {}
        self.foreign, self.commits = 0, {}
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        for line in text.splitlines():
            try:
                values = json.loads(line)
            except json.JSONDecodeError:
                continue
            if values["setting"] != self.setting:
                self.foreign += 1
                continue
            done_by = values.get("commit", "unknown")
            self.commits[done_by] = self.commits.get(done_by, 0) + 1
            found[Run(values["arm"], values["rate"], values["seed"])] = Result.from_json(values)
        return found

    def add(self, run: Run, result: Result) -> None:
        """Remember a finished run."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"setting": self.setting, "commit": self._commit, **vars(run), **result.as_json()}) + "\n"
        with self.path.open("a+", encoding="utf-8") as file:
            file.seek(0)
            if (before := file.read()) and not before.endswith("\n"):
                line = "\n" + line
            file.write(line)

"""metrics.csv in the columns of OpenAI's step metrics, and the meter behind progress events."""

from __future__ import annotations

import csv
import io
import os
import resource
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path

import torch

COLUMNS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")


class MetricsFile:
    """One line a step. A resumed run cuts what lies beyond its checkpoint and goes on, so the file tells one story."""

    def __init__(self, path: Path, *, after: int) -> None:
        """Opens or starts the file and drops rows beyond a step.

        Args:
            path: The CSV file.
            after: Last step to keep; 0 starts afresh.
        """
        self.path = path
        kept = [row for row in self._rows() if int(row["step"]) <= after]
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(text.getvalue(), encoding="utf-8")
        os.replace(temporary, path)

    def _rows(self) -> list[dict[str, str]]:
        if not self.path.exists():
            return []
        whole = self.path.read_text(encoding="utf-8").rpartition("\n")[0]
        return [row for row in csv.DictReader(io.StringIO(whole)) if (row["step"] or "").isdigit()]

    def add(self, row: Mapping[str, float | int | None]) -> None:
        """Appends one step; missing columns stay empty.

        Args:
            row: Column -> value; other keys are ignored.
        """
        with self.path.open("a", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
            writer.writerow({key: value for key, value in row.items() if value is not None})


class Meter:
    """Speed, remaining time and memory of a run."""

    WINDOW = 20
    """Steps that the averages look back on."""

    def __init__(self) -> None:
        self._steps: deque[tuple[float, int]] = deque(maxlen=self.WINDOW)
        self.longest_micro_batch = 0.0
        self.last_save = 0.0

    def step(self, seconds: float, tokens: int) -> None:
        """Counts a step.

        Args:
            seconds: Its duration.
            tokens: Real tokens it read, padding excluded, over all processes.
        """
        self._steps.append((seconds, tokens))

    def micro_batch(self, started: float) -> None:
        """Counts a micro-batch.

        Args:
            started: ``time.perf_counter()`` at its start.
        """
        self.longest_micro_batch = max(self.longest_micro_batch, time.perf_counter() - started)

    @property
    def tokens_per_second(self) -> float:
        """Real tokens a second over the last steps."""
        seconds = sum(step[0] for step in self._steps)
        return sum(step[1] for step in self._steps) / seconds if seconds else 0.0

    def remaining(self, steps: int) -> float | None:
        """Seconds that so many steps will take; None before the first step."""
        if not self._steps:
            return None
        return steps * sum(step[0] for step in self._steps) / len(self._steps)


def peak_memory() -> int:
    """Most bytes held at once: allocated on the GPU where there is one, else resident in this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale

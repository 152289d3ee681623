"""From an optimizer's steps to a journal's records, and back."""

from __future__ import annotations

from trainers.journal.record import Record, Slot
from trainers.journal.writer import Writer
from trainers.optim.record import Record as Taken


class Recorder:
    """Appends each step of an optimizer to a journal: ``qzo.on_step = Recorder(writer)``.

    A step of several directions is one record; it is appended when its last direction is told.
    """

    def __init__(self, writer: Writer) -> None:
        """Expects the step after the writer's last.

        Args:
            writer: Of the journal.
        """
        self.writer = writer
        self._slots: list[Slot] = []

    def __call__(self, taken: Taken) -> None:
        """Takes one direction of a step.

        Args:
            taken: What the optimizer tells of it.

        Raises:
            ValueError: The step does not follow the last one of the journal, or has other directions or another seed
                than its header says.
            OSError: The journal cannot be written; the step is then not in it.
        """
        header = self.writer.header
        if taken.direction != len(self._slots) or header.seed not in (None, taken.seed):
            raise ValueError(
                f"step {taken.step} has direction {taken.direction} and seed {taken.seed}, where the journal expects "
                f"direction {len(self._slots)} and seed {header.seed}"
            )
        # A step that the optimizer skips is one whose derivative is no number and that applied none.
        skipped = taken.skipped and taken.d_applied == 0
        self._slots.append(Slot(taken.d_raw, taken.d_applied, taken.clipped, skipped))
        if len(self._slots) == header.slots:
            slots, self._slots = tuple(self._slots), []
            self.writer.append(Record(taken.step, taken.lr, slots, taken.seed if header.seed is None else None))

"""How the app's two large parts are built from the settings: the engine pool and the scheduler."""

from __future__ import annotations

from typing import Protocol

from service.engines.base import Engine
from service.jobs.store import JobStore
from service.settings import Settings


class SchedulerLike(Protocol):
    """What the app needs of a scheduler; both calls block for a moment."""

    def start(self) -> None:
        """Take the data folder's lock, adopt what runs, and begin."""
        ...

    def stop(self) -> None:
        """End the loop and release the lock; runs go on."""
        ...


class Parts:
    """Builds the parts that were not given.

    Args:
        settings: The configuration.
        store: The job store.
    """

    def __init__(self, settings: Settings, store: JobStore) -> None:
        self.settings, self.store = settings, store

    def engine(self) -> Engine:
        """The pool of engine processes."""
        from service.engines.pool import EnginePool  # type: ignore

        return EnginePool()

    def scheduler(self) -> SchedulerLike:
        """The scheduler of this data folder."""
        from service.jobs.scheduler import Scheduler  # type: ignore

        return Scheduler()

"""What a job starts from, kept in its own folder: the earlier model may be deleted while the job waits or runs.

``start/`` is an adapter to go on with, ``base/`` whole weights to train on instead of a pulled base. An adapter that
was itself made on such weights brings both. Files are hard links where the disk has them: artifacts are never written
again in place, so a link costs nothing and holds what it held.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Engine, select

from core.models.lock import appearing
from core.models.manifest import NAME as MANIFEST
from service.db import queries
from service.db.engine import read
from service.db.tables import Job
from service.jobs import names
from service.jobs.states import TERMINAL
from trainers.registry import METHODS

ADAPTER, MERGED, BOTH = "adapter", "merged", "both"
ON_TUNED = (MERGED, BOTH)
"""Kinds with a ``base/``."""
_PARTS = ("start", "base")


@dataclass(frozen=True, slots=True)
class Origin:
    """What a model name stands for where training starts."""

    base: str
    """Reference of the pulled base at its root."""
    weights: Path | None = None
    """Whole weights that an earlier job made; None: the base's own."""
    adapter: Path | None = None
    """An adapter on those weights."""

    @property
    def kind(self) -> str | None:
        """``start_kind`` of a job from it; None for a base."""
        if self.adapter is None:
            return None if self.weights is None else MERGED
        return ADAPTER if self.weights is None else BOTH


def keep(origin: Origin, home: Path, job_id: str) -> None:
    """Put what a job starts from into its folder.

    Args:
        origin: an earlier result.
        home: the data folder.
        job_id: the job, which need not have a row yet.

    Raises:
        FileNotFoundError: it was removed just now.
        OSError: the disk is full or not writable.
    """
    if origin.weights is not None:
        _copy(origin.weights, names.base_directory(home, job_id))
    if origin.adapter is not None:
        _copy(origin.adapter, names.start_directory(home, job_id))


def discard(home: Path, job_id: str) -> None:
    """Undo ``keep`` for a job that was never written. A folder with more in it stays.

    Args:
        home: the data folder.
        job_id: the job.
    """
    folder = names.job_directory(home, job_id)
    if unwritten(folder):
        shutil.rmtree(folder, ignore_errors=True)


def unwritten(folder: Path) -> bool:
    """Whether there is nothing in a job's folder but what it was to start from.

    Args:
        folder: of the job.

    Returns:
        False also when there is no such folder.
    """
    if folder.is_symlink() or not folder.is_dir():
        return False
    return all(path.name.lstrip(".").partition(".")[0] in _PARTS for path in folder.iterdir())


def over(job: Job, home: Path, *, served: bool) -> None:
    """Let go of what a job that is over started from; weights stay that its own adapters are served on.

    Args:
        job: the job.
        home: the data folder.
        served: whether a model of it, or a checkpoint that can be served, exists.
    """
    if job.start_kind is None:
        return
    shutil.rmtree(names.start_directory(home, job.id), ignore_errors=True)
    method = METHODS.get(job.method)  # None: this version knows it no more
    if not served or (method is not None and method.makes != "adapter"):
        shutil.rmtree(names.base_directory(home, job.id), ignore_errors=True)


def release(home: Path, engine: Engine) -> None:
    """``over`` for all that are: cancelled before they ran, ended in the moment of a kill, their last model deleted.

    Args:
        home: the data folder.
        engine: its database.
    """
    with read(engine) as session:
        ended = session.scalars(select(Job).where(Job.start_kind.is_not(None), Job.status.in_(TERMINAL))).all()
        served = {job.id for job in ended if queries.serves(session, job.id)}
    for job in ended:
        over(job, home, served=job.id in served)


def _copy(source: Path, target: Path) -> None:
    with appearing(target) as fresh:
        for path in sorted(source.rglob("*")):
            if path.is_symlink() or not path.is_file():
                continue
            place = fresh / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path, place)
            except FileNotFoundError:
                raise
            except OSError:  # another disk, or one without links
                shutil.copyfile(path, place)
        if not (fresh / MANIFEST).is_file():
            raise FileNotFoundError(f"{source} is gone")

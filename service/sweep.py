"""What a kill left in the data folder: halves of uploads, bytes that no row names, starts of jobs, and reserved keys.

Only halves are deleted, and what a job that is over started from. A whole file that no row names may be there because
the database is older than the folder (a backup that was restored), so it is put aside into ``trash/``, where it stays
until somebody removes it.
"""

from __future__ import annotations

import os
import re
import time
from contextlib import suppress
from pathlib import Path

from sqlalchemy import Engine as Database
from sqlalchemy import select

from service.db.engine import read, write
from service.db.tables import File, Job, Vector
from service.jobs import idempotency, starts, weights
from service.jobs.names import job_directory
from service.jobs.states import TERMINAL
from service.log import logger

log = logger(__name__)
TRASH = "trash"
"""Where in the data folder strays are put aside."""
STRAY_SECONDS = 24 * 3600.0
"""A file is put aside when nothing has touched it for so long: nobody is about to name it, or to restore its row."""
_JOB = re.compile(r"ftjob-[A-Za-z0-9]{24}")
_OWN = {"files": re.compile(r"file-([A-Za-z0-9]{24})"), "vectors": re.compile(r"vec_([A-Za-z0-9]{24})\.safetensors")}
_HALF = {
    "files": re.compile(r"\.file-([A-Za-z0-9]{24})\.part"),
    "vectors": re.compile(r"\.vec_([A-Za-z0-9]{24})(?:\.safetensors)?\.part"),
}


def sweep(home: Path, db: Database, *, now: float | None = None) -> list[Path]:
    """Clear away what nobody can reach any more: a file is put in place before its row, and removed after it.

    An ``Idempotency-Key`` whose request died without a job is free at once.

    Only plain files with names of our own making are touched, never links nor what lies behind them, and never what a
    job that is not over yet may be about to name. Halves of uploads are deleted. A whole file is moved to the trash, if
    it is older than ``STRAY_SECONDS`` and the database knows anything at all of what lies here: a new one, or that of
    another data folder, moves nothing. So it is with the folder of a job that has no row, in which there is nothing but
    what the job was to start from. What cannot be moved stays; a start never fails over it.

    Args:
        home: The data folder, locked by this process.
        db: Its database.
        now: Seconds since the epoch; none means the clock's.

    Returns:
        Where the files were that are gone from their places.
    """
    if db.dialect.name == "sqlite":  # another database may serve more than this process
        with write(db) as session:
            freed = idempotency.abandon(session)
        if freed:
            log.info("idempotency_keys_freed", count=freed)
    # Listed before the rows are read: what a job puts there in between is not in the list, or has its row.
    jobs = _job_folders(home / "jobs")
    found = {folder: _plain_files(home / folder) for folder in _OWN}
    with read(db) as session:
        named = {
            "files": set(session.scalars(select(File.id))),
            "vectors": {f"{name}.safetensors" for name in session.scalars(select(Vector.id))},
        }
        states: dict[str, str] = {name: status for name, status in session.execute(select(Job.id, Job.status))}  # noqa: C416
        over = {job_id: status in TERMINAL for job_id, status in states.items()}
    live = {job_id.rpartition("-")[2] for job_id, ended in over.items() if not ended}
    ours = any(named[folder].intersection(names) for folder, names in found.items()) or any(
        job_directory(home, job_id).is_dir() for job_id in over
    )
    before = (time.time() if now is None else now) - STRAY_SECONDS
    halves, strays = [], []
    for folder, names in found.items():
        for name in sorted(names.keys() - named[folder]):
            half = _HALF[folder].fullmatch(name)
            match = half or _OWN[folder].fullmatch(name)
            if match is None or match[1] in live:
                continue
            path = home / folder / name
            if half is not None:
                path.unlink(missing_ok=True)
                halves.append(path)
            elif ours and names[name] < before and _put_aside(path, home):
                strays.append(path)
    for job_id in sorted(jobs.keys() - over.keys()):
        path = job_directory(home, job_id)
        if ours and jobs[job_id] < before and starts.unwritten(path) and _put_aside(path, home):
            strays.append(path)
    starts.release(home, db)
    for job_id in jobs.keys() & states.keys():  # ended in the moment of a kill, or under an earlier version
        if states[job_id] in ("succeeded", "cancelled"):
            weights.settle(home, job_id)
    if halves:
        log.warning("halves_removed", paths=[str(path.relative_to(home)) for path in halves])
    if strays:
        log.warning("strays_put_aside", into=TRASH, paths=[str(path.relative_to(home)) for path in strays])
    return [*halves, *strays]


def _put_aside(path: Path, home: Path) -> bool:
    """Move a file or a job's folder into the trash, over nothing that lies there; False when it stays."""
    target = home / TRASH / path.parent.name / path.name
    try:
        if (home / TRASH).is_symlink() or target.parent.is_symlink():
            raise OSError("the trash is a link, and may lead out of the data folder")
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.path.lexists(target):
            raise FileExistsError(f"{target} is there already")
        path.rename(target)
    except OSError as error:
        log.warning("stray_left", path=str(path.relative_to(home)), reason=str(error))
        return False
    return True


def _job_folders(folder: Path) -> dict[str, float]:
    """Folders that jobs may have, as ``_plain_files``."""
    if folder.is_symlink():
        return {}
    with os.scandir(folder) as entries:
        named = [entry for entry in entries if _JOB.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)]
    return {entry.name: entry.stat(follow_symlinks=False).st_ctime for entry in named}


def _plain_files(folder: Path) -> dict[str, float]:
    """Names, and when each file was last written, moved or restored (seconds since the epoch)."""
    if folder.is_symlink():
        return {}
    found = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):  # the scheduler has begun, and renames what it copies
                if entry.is_file(follow_symlinks=False):
                    found[entry.name] = entry.stat(follow_symlinks=False).st_ctime
    return found

"""What a kill left in the folders of files and vectors: bytes that no row names, and halves of uploads."""

from __future__ import annotations

import os
import re
from pathlib import Path

from sqlalchemy import Engine as Database
from sqlalchemy import select

from service.db.engine import read
from service.db.tables import File, Job, Vector
from service.jobs.names import job_directory
from service.jobs.states import TERMINAL
from service.log import logger

log = logger(__name__)
_OWN = {"files": re.compile(r"file-([A-Za-z0-9]{24})"), "vectors": re.compile(r"vec_([A-Za-z0-9]{24})\.safetensors")}


def sweep(home: Path, db: Database) -> list[Path]:
    """Remove what nobody can reach any more: a file is put in place before its row, and removed after it.

    Only plain files with names of our own making are removed, never links nor what lies behind them, and never what a
    job that is not over yet may be about to name. A database that knows nothing of what lies here (a new one, or that
    of another data folder) removes no whole file.

    Args:
        home: The data folder, locked by this process.
        db: Its database.

    Returns:
        What was removed.
    """
    # Listed before the rows are read: what a job puts there in between is not in the list, or has its row.
    found = {folder: _plain_files(home / folder) for folder in _OWN}
    with read(db) as session:
        named = {
            "files": set(session.scalars(select(File.id))),
            "vectors": {f"{name}.safetensors" for name in session.scalars(select(Vector.id))},
        }
        over = {job_id: status in TERMINAL for job_id, status in session.execute(select(Job.id, Job.status))}
    live = {job_id.rpartition("-")[2] for job_id, ended in over.items() if not ended}
    ours = any(named[folder].intersection(names) for folder, names in found.items()) or any(
        job_directory(home, job_id).is_dir() for job_id in over
    )
    removed = []
    for folder, names in found.items():
        for name in sorted(names - named[folder]):
            half = name.startswith(".") and name.endswith(".part")
            match = _OWN[folder].fullmatch(name[1:-5] if half else name)
            if not half and (match is None or not ours):
                continue
            if match is not None and match[1] in live:
                continue
            path = home / folder / name
            path.unlink(missing_ok=True)
            removed.append(path)
    if removed:
        log.warning("strays_removed", paths=[str(path.relative_to(home)) for path in removed])
    return removed


def _plain_files(folder: Path) -> set[str]:
    if folder.is_symlink():
        return set()
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries if entry.is_file(follow_symlinks=False)}

"""What a run has written to its events file and the database does not have yet: taken over piece by piece.

SQLite has one writer at a time. A run that wrote for hours while no server lived must not keep a request that creates,
pauses or cancels a job waiting, nor the other jobs' looks and leases: pieces are small, and a look takes few of them.
"""

from __future__ import annotations

import time
from pathlib import Path

from core.events import read
from service.db.tables import Job
from service.jobs import tail
from service.jobs.store import JobStore

EVENTS = 500
"""Most events in one transaction."""
BYTES = 256 * 1024
"""Most bytes of the file in one transaction."""
SECONDS = 0.25
"""A look that has taken so long leaves the rest to the next one."""


def take(store: JobStore, job: Job, token: str, path: Path) -> tuple[Job, bool]:
    """Take over what is in the file by now: a busy writer must not keep us here.

    Args:
        store: where to.
        job: the row; its ``events_offset`` says where to go on.
        token: of its lease.
        path: events.jsonl; one that is not there holds nothing.

    Returns:
        The job after it, and whether there is more.

    Raises:
        StaleWrite: the lease is another's, or another reader was faster.
        OSError: the file is there and cannot be read.
    """
    end = path.stat().st_size if path.exists() else 0
    began = time.monotonic()
    while job.events_offset < end:
        batch, offset = read(path, job.events_offset, lines=EVENTS, size=BYTES)
        if offset == job.events_offset:
            break  # a half-written line
        changes = tail.translate(job, batch)
        gone = []
        if changes.checkpoints:
            kept = store.checkpoints(job.id, limit=1000).data
            gone = [row.id for row in kept if not Path(row.path).is_dir()]
        job = store.apply(
            job.id,
            token=token,
            offset=job.events_offset,
            events=changes.events,
            values={**changes.values, "events_offset": offset},
            checkpoints=changes.checkpoints,
            gone=gone,
        )
        if job.events_offset < end and time.monotonic() - began >= SECONDS:
            return job, True
        time.sleep(0)  # a request that waits for its turn to write may have it
    return job, False

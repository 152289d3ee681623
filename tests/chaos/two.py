"""One of two schedulers on one database, without the lock that forbids it: `two.py HOME NAME fake|real SECONDS`."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from service.db.engine import connect
from service.executors.base import Executor, Handle
from service.executors.fake import Behaviour, FakeExecutor
from service.executors.local import LocalExecutor
from service.jobs.scheduler import Options, Scheduler
from service.jobs.store import JobStore
from tests.chaos.server import STANDIN

VERDICT = '{"ok": true, "rows": 9, "problems": [], "problem_count": 0, "warnings": [], "warning_count": 0}'


class Instant(FakeExecutor):
    """Every run succeeds at once, and is written down in a file that both processes share."""

    def submit(
        self, job_id: str, argv: Sequence[str], env: Mapping[str, str], directory: Path, *, attempt: int, token: str
    ) -> Handle:
        kind = "validation" if directory.name == "validation" else "run"
        if kind == "validation":
            (directory / "validation.json").write_text(VERDICT)
        else:
            (directory / "artifact").mkdir(exist_ok=True)
            (directory / "artifact" / "manifest.json").write_text('{"kind": "adapter"}')
        with open(home / "starts", "a") as file:
            file.write(f"{kind} {job_id}\n")
        return super().submit(job_id, argv, env, directory, attempt=attempt, token=token)


home, name, how, seconds = Path(sys.argv[1]), sys.argv[2], sys.argv[3], float(sys.argv[4])
executor: Executor = Instant(lambda *_: Behaviour(exits=0)) if how == "fake" else LocalExecutor()
many = 8 if how == "fake" else 2
options = Options(
    max_running=many,
    max_validating=many,
    lease_seconds=30 if how == "fake" else 3,
    poll_seconds=0.05,
    run_argv=STANDIN,
    validate_argv=STANDIN,
)
scheduler = Scheduler(
    JobStore(connect(home / "gradhelm.db", busy_timeout_ms=5000)), executor, home, options, owner=name
)
scheduler.open()
(home / f"{name}.pid").write_text(str(os.getpid()))
deadline = time.monotonic() + seconds
while time.monotonic() < deadline and not (home / "stop").exists():
    scheduler.tick()
    if how == "real":
        time.sleep(0.05)

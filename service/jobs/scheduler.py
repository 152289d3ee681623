"""The thread that moves jobs along: it validates, claims, starts, watches, stops and ends them.

It keeps nothing that matters in memory. Each tick looks at the rows it has leases on, at their processes and at their
event files, and writes what changed, guarded by the lease's token; killed at any point, the next scheduler finds the
same things and goes on. A step that fails (database locked, disk full) is done again in the next tick.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import random
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.config import ConfigError
from service.db import queries
from service.db.engine import DatabaseBusy, read
from service.db.tables import Job
from service.executors.base import AlreadyRunning, Executor, Exited, Gone, Handle, Running, StaleAttempt
from service.jobs import backlog, logs, recovery, results, spec, starts, tail, validation, weights
from service.jobs.live import Live, phase_of
from service.jobs.lock import FolderLock
from service.jobs.records import Event, StaleWrite
from service.jobs.states import ACTIVE, TERMINAL
from service.jobs.store import JobStore
from service.jobs.supervisor import RECORD, read_json
from trainers.config import parse_run

log = logging.getLogger(__name__)

PATIENCE = 5
"""Looks in a row at one job that end in the same fault before the job is ended; tries to start it before others go."""
_PASSING = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM})
"""Faults of the machine, not of the job: they are never counted."""
_BACK_SECONDS = 60.0
"""A job that could not be started so often is not claimed again earlier."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Limits and times of a scheduler."""

    max_running: int = 1
    """Runs at the same time."""
    max_validating: int = 2
    """Validations at the same time, besides the runs."""
    threads: int = 1
    """CPU threads of a run."""
    lease_seconds: float = 30.0
    """A lease that is not renewed for this long may be taken over."""
    poll_seconds: float = 0.2
    """Between two looks at events and processes."""
    retry: recovery.RetryPolicy = field(default_factory=recovery.RetryPolicy)
    run_argv: tuple[str, ...] | None = None
    """Replaces ``python -m trainers`` and ``python -m steering fit``."""
    validate_argv: tuple[str, ...] | None = None
    """Replaces ``python -m core.data.validate``."""

    @property
    def renew_seconds(self) -> float:
        """Between two renewals: two may be missed."""
        return self.lease_seconds / 3


class Scheduler:
    """Runs the jobs of one data folder."""

    def __init__(
        self,
        store: JobStore,
        executor: Executor,
        home: Path,
        options: Options | None = None,
        *,
        owner: str | None = None,
        draw: random.Random | None = None,
    ) -> None:
        """Put the parts together; nothing starts yet.

        Args:
            store: the job store; its clock is the scheduler's.
            executor: where runs execute.
            home: the data folder.
            options: limits and times.
            owner: name under which leases are held, without the folder's lock (for several schedulers on one folder,
                which must then have different names); None: the folder is locked at ``start``.
            draw: source of the back-off's jitter.
        """
        self.store, self.executor, self.home = store, executor, home
        self.options = options or Options()
        self.clock: Callable[[], float] = store.clock
        self.elapsed: Callable[[], float] = time.monotonic
        self._lock = FolderLock(home) if owner is None else None
        self._owner = owner or ""
        self._draw = draw or random.Random()
        self._live: dict[str, Live] = {}
        self._renewed = self._swept = float("-inf")
        self._claiming = True
        self._adopting = False
        self._ending = False
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None

    # ---- life ------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Take the folder, adopt what runs, and go on in a thread.

        Raises:
            FolderInUse: another server holds the data folder.
        """
        self.open()
        self._ending = False
        self._thread = threading.Thread(target=self._loop, name="scheduler", daemon=True)
        self._thread.start()

    def open(self) -> None:
        """Take the folder and adopt what runs, without a thread: the caller ticks.

        Raises:
            FolderInUse: another server holds the data folder.
        """
        if self._lock is not None:
            self._lock.acquire()
            self._owner = self._lock.node
        else:
            self._owner = self._owner or f"{socket.gethostname()}-{os.getpid()}"
        self._claiming = True
        self._adopting = self._lock is not None
        self._safely(self._take_over)

    def stop(self, *, end_runs: bool = False, seconds: float = 60.0) -> None:
        """End the thread and let the folder go.

        Args:
            end_runs: also stop the runs at a checkpoint: where they would not survive the server (a container). Without
                it they run on, and the next server adopts them.
            seconds: how long to wait for that; what has not stopped by then is left to the next start.
        """
        self._ending = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if end_runs:
            self._end_runs(seconds)
        self._live.clear()
        if self._lock is not None:
            self._lock.release()

    def wake(self) -> None:
        """Tick now: something was submitted or cancelled."""
        self._wake.set()

    def _loop(self) -> None:
        while not self._ending:
            self.tick()
            self._wake.wait(self.options.poll_seconds)
            self._wake.clear()

    def _end_runs(self, seconds: float) -> None:
        self._claiming = False
        deadline = time.monotonic() + seconds
        for live in self._live.values():
            if live.handle is not None:
                live.mark_stop(self.home)
                self.executor.terminate(live.handle)
        # a job whose process could not be started yet has nothing to stop
        while any(live.handle for live in self._live.values()) and time.monotonic() < deadline:
            self.tick()
            time.sleep(min(0.05, self.options.poll_seconds))

    # ---- one look at everything ------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Do all that can be done now; never raises, what failed is tried again in the next tick."""
        now = self.clock()
        self._safely(self.executor.tidy)
        if not self._renewed <= now < self._renewed + self.options.renew_seconds:  # also after the clock jumped back
            self._safely(self._renew)
            self._safely(self._take_over)
        self._safely(self._follow_all)
        if self._claiming:
            self._safely(self._claim)

    def _safely(self, step: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        try:
            step(*args, **kwargs)
        except StaleWrite as error:  # the lease is lost, which the next look shows, or a user's wish came between
            log.info("%s: %s", step.__name__, error)
        except DatabaseBusy as error:
            log.warning("database busy in %s: %s", step.__name__, error)
        except OSError as error:
            log.warning("%s failed, to be tried again: %s", step.__name__, error)
        except Exception:
            log.exception("%s failed, to be tried again", step.__name__)

    def _renew(self) -> None:
        now = self.clock()
        lost = self.store.renew({live.job_id: live.token for live in self._live.values()}, self.options.lease_seconds)
        for job_id in lost:
            self._let_go(job_id)
        self._renewed = now
        if not self._swept <= now < self._swept + 3600:
            self.store.prune_idempotency()
            starts.release(self.home, self.store.engine)
            self._swept = now

    def _let_go(self, job_id: str) -> None:
        """The lease is another's: forget the job, touch none of its processes."""
        log.warning("lost the lease of %s", job_id)
        self._live.pop(job_id, None)

    def _take_over(self) -> None:
        """Leases that ran out, and, once after the start, those that this folder's earlier server held."""
        jobs = self.store.take_over(self._owner, self.options.lease_seconds, own=self._adopting)
        self._adopting = False
        for job in jobs:
            live = Live(job.id, job.lease_token or "", phase_of(job))
            self._live[job.id] = live
            self._safely(self._adopt, live, job)

    def _follow_all(self) -> None:
        if not self._live:
            return
        rows = self.store.leased({live.job_id: live.token for live in self._live.values()})
        for live in list(self._live.values()):
            row = rows.get(live.job_id)
            if row is None:
                self._let_go(live.job_id)
            else:
                self._safely(self._look, live, row)

    # ---- claiming and starting -------------------------------------------------------------------------------------

    def _claim(self) -> None:
        waiting = self.store.claimable()
        for status, phase, limit in (
            ("validating_files", "validation", self.options.max_validating),
            ("queued", "run", self.options.max_running),
        ):
            while status in waiting and sum(live.phase == phase for live in self._live.values()) < limit:
                job = self.store.claim(self._owner, self.options.lease_seconds, status=status)
                if job is None:
                    break
                live = Live(job.id, job.lease_token or "", phase_of(job))
                self._live[job.id] = live
                self._safely(self._launch, live, job)

    def _launch(self, live: Live, job: Job) -> None:
        """Start the process of a claimed job; what cannot be started now is tried again."""
        now = self.elapsed()
        if now < live.not_before:
            return
        try:
            if live.phase == "run" and job.kind == "fine_tuning":
                parse_run(spec.run_file(job, self.home, self.options.threads))
            directory = live.directory(self.home)
            directory.mkdir(parents=True, exist_ok=True)
            if live.phase == "run":
                spec.write_run(job, self.home, self.options.threads)
                argv = spec.run_argv(job, self.options.run_argv)
            else:
                (directory / validation.VERDICT).unlink(missing_ok=True)
                argv = spec.validation_argv(job, self.home, self.options.validate_argv)
            environment = {"GRADHELM_HOME": str(self.home)}
            live.handle = self.executor.submit(
                job.id, argv, environment, directory, attempt=job.attempt, token=live.token
            )
        except (ConfigError, ValueError) as error:
            failed = recovery.failure(None, default="invalid_hyperparameters", message=str(error), lines=())
            self._end(live, job, failed)
            return
        except (AlreadyRunning, StaleAttempt) as error:
            log.warning("%s: %s", job.id, error)
            self._adopt(live, job)
            return
        except OSError as error:
            self._not_started(live, job, error)
            return
        if live.phase == "run":
            again = f" again (attempt {job.attempt}), from step {job.step}" if job.step else ""
            self.store.append_event(job.id, Event(f"Job started{again}"), token=live.token)

    def _not_started(self, live: Live, job: Job, error: OSError) -> None:
        """Try again in a second; a fault that stays costs the job its slot, and never the job."""
        log.warning("%s cannot be started, to be tried again: %s", job.id, error)
        live.not_before, live.tries = self.elapsed() + 1.0, live.tries + 1
        if live.tries == 1:
            said = Event(f"The run cannot be started yet, and is tried again: {error}", "warn")
            self.store.append_event(job.id, said, token=live.token)
        elif live.tries >= PATIENCE:
            said = Event("The run could not be started; others go first, and it is tried again in a minute", "warn")
            back = "queued" if live.phase == "run" else job.status
            self._end(live, job, recovery.Ending(back, [said], {"not_before": self.clock() + _BACK_SECONDS}))

    def _adopt(self, live: Live, job: Job) -> None:
        """Look what became of the process of a job taken over; a run that is alive is never started again."""
        directory = live.directory(self.home)
        try:
            status = self.executor.recover(directory, job.id)
        except OSError:
            live.not_before = self.elapsed() + 1.0  # no start beside what may be alive
            raise
        known = status.handle.attempt if isinstance(status, Running) else status.attempt
        if isinstance(status, Running):
            said = Event(f"The server looks after the run again (process {status.handle.pid})")
            self.store.apply(job.id, token=live.token, events=[said], values={"attempt": status.handle.attempt})
            live.handle = status.handle
        elif known == job.attempt:  # it is over; what it said may take several looks to be taken over
            live.handle = Handle(job.id, directory, known, 0, 0, "")
            self._follow(live, job)
        elif known is not None and known > job.attempt:  # the database is older than the folder: go on counting from it
            self.store.apply(job.id, token=live.token, values={"attempt": known + 1})
        # else: claimed, and never started; the next look starts it

    # ---- watching --------------------------------------------------------------------------------------------------

    def _look(self, live: Live, job: Job) -> None:
        """Follow; a fault that does not go away ends this job, so that it does not keep the slot of all others."""
        try:
            self._follow(live, job)
        except (StaleWrite, DatabaseBusy, MemoryError):
            raise
        except Exception as error:
            if (isinstance(error, OSError) and error.errno in _PASSING) or live.failed(error) < PATIENCE:
                raise
            log.exception("%s cannot be looked after, and is ended", job.id)
            self._give_up(live, job)
        else:
            live.failures = 0

    def _give_up(self, live: Live, job: Job) -> None:
        handle = live.handle
        if handle is None:
            with contextlib.suppress(OSError):
                status = self.executor.recover(live.directory(self.home), job.id)
                handle = status.handle if isinstance(status, Running) else None
        if self.executor.kill(handle or Handle(job.id, live.directory(self.home), 0, 0, 0, "")):
            return  # not over while a process lives
        if job.status == "cancelling":
            ending = recovery.Ending("cancelled", [Event("Job cancelled; every process of it has ended")])
        else:
            message = f"the server could not look after this job: {live.failed_with[:1000]}"
            ending = recovery.failure(None, default="server_error", message=message, lines=())
        self._end(live, job, ending)

    def _follow(self, live: Live, job: Job) -> None:
        if live.handle is None:
            if job.status in ("cancelling", "pausing"):
                self._ended(live, job, self._never_started(live, job))
            elif self._claiming:
                self._launch(live, job)
            return
        status = self.executor.poll(live.handle)  # before the events: all that an ended run said is then there
        if isinstance(status, Gone):  # its supervisor is; what it started may live on, and is ended
            status = self.executor.recover(live.directory(self.home), job.id)
            if isinstance(status, Running):
                live.handle = status.handle
        try:
            job = self._catch_up(live, job)
        except StaleWrite:
            raise
        except Exception:  # what cannot be read any more can still be stopped
            if isinstance(status, Running) and job.status in ("pausing", "cancelling"):
                self._press(live, job)
            raise
        if isinstance(status, Running):
            if job.status in ("pausing", "cancelling"):
                self._press(live, job)
        elif not live.behind:
            self._ended(live, job, status)

    def _never_started(self, live: Live, job: Job) -> Exited | Gone:
        """A stop was asked for before there was a process; make sure that there is none."""
        status = self.executor.recover(live.directory(self.home), job.id)
        if isinstance(status, Running):
            live.handle = status.handle
            raise StaleWrite(job.id)
        return Gone(status.attempt)

    def _press(self, live: Live, job: Job) -> None:
        """First ask, then, after the grace time, end every process."""
        assert live.handle is not None
        if live.phase == "validation":
            self.executor.kill(live.handle)  # nothing to save
            return
        if not live.asked_to_stop:
            now, grace = self.clock(), job.grace_seconds
            if job.stop_deadline is None:  # written first: what cannot be written now is not yet asked
                self.store.apply(job.id, token=live.token, values={"stop_deadline": now + grace})
            else:  # asked by the server before this one, or it was about to; a second SIGTERM says nothing new
                grace = min(max(job.stop_deadline - now, 0.0), grace)
            self.executor.terminate(live.handle)
            live.asked_to_stop, live.stop_by = True, self.elapsed() + grace
        if self.elapsed() >= live.stop_by:
            left = self.executor.kill(live.handle)
            if left:
                log.warning("%s: %d processes are still alive", job.id, left)

    def _catch_up(self, live: Live, job: Job) -> Job:
        """Take over what the run has written to its events file, or a piece of it: others wait for us."""
        if live.phase != "run":
            return job
        job, live.behind = backlog.take(self.store, job, live.token, live.directory(self.home) / tail.EVENTS)
        return job

    # ---- ending ----------------------------------------------------------------------------------------------------

    def _ended(self, live: Live, job: Job, status: Exited | Gone) -> None:
        now = self.clock()
        directory, policy = live.directory(self.home), self.options.retry
        ours = live.was_stopped(self.home, status.attempt)
        if live.phase == "validation":
            self._end(live, job, validation.decide(job, status, directory, now=now, policy=policy, ours=ours))
            return
        error = None
        if isinstance(status, Exited) and status.code != 0:
            error = tail.last_error(directory, self._attempt_began(directory))
        ending = recovery.decide(job, status, error, now=now, policy=policy, draw=self._draw, ours=ours)
        told = [*self._log_notes(directory), *ending.events]
        rows: list[Any] = []
        if ending.target == "succeeded":
            try:
                found = results.collect(job, self.home, now, self.store.engine)
            except results.NoResult as problem:
                ending = recovery.failure(None, default="artifact_missing", message=str(problem), lines=())
                told = list(ending.events)
            else:
                rows = found.rows
                vector = found.values.get("result_vector")
                made = (
                    f"steering vector created: {vector}" if vector else f"model created: {found.values['result_model']}"
                )
                told += [Event(f"New {made}"), Event("The job has successfully completed")]
                ending = recovery.Ending("succeeded", told, found.values)
        self._end(live, job, recovery.Ending(ending.target, told, ending.values), rows)

    def _end(self, live: Live, job: Job, ending: recovery.Ending, rows: list[Any] | None = None) -> None:
        """Write the ending, once; then the job is nobody's."""
        if ending.target == job.status:
            freed = {"lease_owner": None, "lease_token": None, "lease_expires_at": None, "stop_deadline": None}
            values = {**ending.values, **freed}
            self.store.apply(job.id, source=job.status, token=live.token, events=ending.events, values=values)
        else:
            self.store.transition(
                job.id, job.status, ending.target, token=live.token, events=ending.events, values=ending.values,
                rows=rows or (),
            )  # fmt: skip
        self._live.pop(job.id, None)
        if ending.target in TERMINAL:
            with read(self.store.engine) as session:
                served = queries.serves(session, job.id)
            starts.over(job, self.home, served=served)
            if ending.target != "failed":
                weights.settle(self.home, job.id)
        assert ending.target not in ACTIVE
        self._wake.set()  # a slot is free

    @staticmethod
    def _attempt_began(directory: Path) -> float:
        record = read_json(directory / RECORD) or {}
        began = record.get("started_at")
        return float(began) if isinstance(began, int | float) else 0.0

    @staticmethod
    def _log_notes(directory: Path) -> list[Event]:
        """Say once that the log passed its quota."""
        dropped, _ = logs.span(directory)
        if dropped == 0:
            return []
        with contextlib.suppress(FileExistsError):
            os.close(os.open(directory / "log-quota.told", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
            return [Event(f"The run's log passed its quota; its oldest {dropped} bytes were dropped", "warn")]
        return []

"""How the app's two large parts are built from the settings: the engine pool and the scheduler."""

from __future__ import annotations

import os
from typing import Protocol

from service.engines.options import EngineOptions, PoolOptions
from service.engines.pool import EnginePool
from service.executors.local import LocalExecutor
from service.jobs.recovery import RetryPolicy
from service.jobs.scheduler import Options, Scheduler
from service.jobs.store import JobStore
from service.settings import Settings


class SchedulerLike(Protocol):
    """What the app needs of a scheduler; ``start`` and ``stop`` may block for a moment."""

    def start(self) -> None:
        """Take the data folder's lock, adopt what runs, and begin."""
        ...

    def stop(self, *, end_runs: bool = False, seconds: float = 60.0) -> None:
        """End the loop and release the lock; runs go on unless they are to end, at a checkpoint."""
        ...

    def wake(self) -> None:
        """Something was submitted or asked for: look now."""
        ...


def engine_pool(settings: Settings) -> EnginePool:
    """One engine process a base model in use, within the settings' limits."""
    how = settings.engine
    options = EngineOptions(
        threads=how.threads or cpu_threads(1),
        dtype=how.dtype,
        device=how.device,
        rows=how.rows,
        waiting=how.waiting,
        cache_bytes=how.cache_bytes,
        prefill_tokens=how.prefill_tokens,
        default_max_tokens=how.default_max_tokens,
        adapters=how.adapters,
        start_seconds=how.start_seconds,
        log_directory=settings.home / "logs",
    )
    return EnginePool(options, PoolOptions(memory_bytes=how.memory_bytes, idle_seconds=how.idle_seconds))


def scheduler(settings: Settings, store: JobStore) -> Scheduler:
    """The scheduler of the data folder, with runs on this machine."""
    how = settings.jobs
    threads = how.threads or cpu_threads(how.max_running)
    options = Options(
        max_running=how.max_running,
        threads=threads,
        lease_seconds=how.lease_seconds,
        poll_seconds=how.poll_seconds,
        retry=RetryPolicy(max_retries=how.max_retries),
        run_argv=how.run_argv,
        validate_argv=how.validate_argv,
    )
    executor = LocalExecutor(threads=threads, log_quota=how.log_quota_bytes)
    return Scheduler(store, executor, settings.home, options)


def cpu_threads(sharers: int) -> int:
    """Threads of a process where no setting says: OMP_NUM_THREADS, or this machine's CPUs divided by ``sharers``."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdecimal() and int(given) else max(1, len(os.sched_getaffinity(0)) // sharers)

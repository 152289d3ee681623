"""The life of a job, as data: states, allowed transitions, and what each state means.

``validating_files -> queued -> running -> succeeded | failed | cancelled`` is the main road.
"""

from __future__ import annotations

from collections.abc import Mapping

STATES: Mapping[str, str] = {
    "validating_files": "a short process of its own checks the files",
    "queued": "valid, waiting for a free slot (or for the end of a back-off)",
    "running": "claimed; a supervised run exists or is being started",
    "pausing": "the run was asked to stop at its next micro-batch and write a checkpoint",
    "paused": "no process; resumes from the last checkpoint",
    "cancelling": "the run was asked to end; terminal only when its last process is gone",
    "succeeded": "the artifact is verified and is a model or a vector",
    "failed": "see the job's error",
    "cancelled": "ended on request; never resumes, its checkpoints stay",
}

TRANSITIONS: Mapping[str, frozenset[str]] = {
    # A validation that vanished is simply done again, in the same state.
    "validating_files": frozenset({"queued", "failed", "cancelling", "cancelled"}),
    "queued": frozenset({"running", "paused", "failed", "cancelled"}),
    # running -> queued: a crash worth retrying, a run that vanished, or a server-wide shutdown.
    "running": frozenset({"succeeded", "failed", "pausing", "cancelling", "queued"}),
    # A run may finish, or die, while it is asked to pause.
    "pausing": frozenset({"paused", "succeeded", "failed", "cancelling"}),
    "paused": frozenset({"queued", "cancelled"}),
    # Whatever the run answers, a cancelled job ends as cancelled.
    "cancelling": frozenset({"cancelled"}),
    "succeeded": frozenset(),
    "failed": frozenset(),
    "cancelled": frozenset(),
}

TERMINAL = frozenset(state for state, targets in TRANSITIONS.items() if not targets)
"""States that no job leaves."""

ACTIVE = frozenset({"running", "pausing", "cancelling"})
"""States with a lease, in which processes may exist (``validating_files`` has a lease while its process lives)."""


_WISHES = {
    "queued": "be resumed",
    "pausing": "be paused",
    "paused": "be paused",
    "cancelling": "be cancelled",
    "cancelled": "be cancelled",
}


class IllegalTransition(ValueError):
    """A status change that the state machine does not allow."""

    def __init__(self, job_id: str, current: str, wanted: str) -> None:
        """Name the job, where it is, and what it could become.

        Args:
            job_id: the job.
            current: its status now.
            wanted: the status asked for.
        """
        allowed = ", ".join(sorted(TRANSITIONS[current]))
        why = f"; from here it can become {allowed}" if allowed else ": it is over"
        super().__init__(f"job {job_id} is {current} and cannot {_WISHES.get(wanted, f'become {wanted}')}{why}")
        self.job_id, self.current, self.wanted = job_id, current, wanted


def check(job_id: str, current: str, wanted: str) -> None:
    """Do nothing if ``current -> wanted`` is allowed.

    Args:
        job_id: named in the error.
        current: status now.
        wanted: status asked for.

    Raises:
        IllegalTransition: if it is not.
    """
    if wanted not in TRANSITIONS[current]:
        raise IllegalTransition(job_id, current, wanted)

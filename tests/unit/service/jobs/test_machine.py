"""200 steps of the machine; `make chaos` does 2,000."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

from tests.unit.service.jobs.machine import JobMachine

TestJobs = JobMachine.TestCase
TestJobs.settings = settings(
    max_examples=8, stateful_step_count=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)

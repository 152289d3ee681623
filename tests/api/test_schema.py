"""The API is total: whatever a client sends, the answer is one that the OpenAPI document declares, and never a 500.

A few examples an operation by default, a hundred and chains of linked requests when slow. Pulling a model is left out:
it starts a process for every name that could be one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import run_state_machine_as_test
from schemathesis import GenerationMode

from core.models.fingerprint import fingerprint
from service.app import create_app
from service.engines.fake import FakeEngine
from service.settings import LimitSettings, Settings
from tests.api.fixtures import BASE, IdleScheduler, make_base
from tests.api.live import Live, serving
from tests.contract.test_steering import vector_bytes

QUICK, FULL = 4, 100
# Rules about contents, and about fields together, that a schema cannot say: what fits the schema may still be a 400.
WITH_RULES = {
    "POST /v1/files",
    "POST /v1/steering/vectors/import",
    "POST /v1/fine_tuning/jobs",
    "POST /v1/steering/vectors",
    "POST /v1/chat/completions",
    "POST /v1/completions",
    "GET /v1/fine_tuning/jobs/{fine_tuning_job_id}/events",
    "GET /v1/fine_tuning/jobs/{fine_tuning_job_id}/logs",
    "POST /v1/fine_tuning/jobs/{fine_tuning_job_id}/cancel",
    "POST /v1/fine_tuning/jobs/{fine_tuning_job_id}/pause",
    "POST /v1/fine_tuning/jobs/{fine_tuning_job_id}/resume",
    "DELETE /v1/files/{file_id}",
    "GET /v1/models/{model}/content",
}
LEFT_OUT = "/v1/models/pull"


def configured(home: Path) -> Settings:
    return Settings(home=home, limits=LimitSettings(min_free_disk_bytes=0), grace_seconds=0.2, drain_seconds=0)


def document() -> dict[str, Any]:
    app = create_app(configured(Path(tempfile.gettempdir())), engine=FakeEngine(), scheduler=IdleScheduler())
    app.state.db.dispose()
    found: dict[str, Any] = app.openapi()
    return found


# Unknown query parameters are ignored, as HTTP APIs do; unknown names in a body are refused, and generated.
SCHEMA = schemathesis.openapi.from_dict(document())
SCHEMA.config.generation.allow_extra_parameters = False
OPERATIONS = {
    operation.label: operation
    for operation in (result.ok() for result in SCHEMA.get_all_operations())
    if operation.path != LEFT_OUT
}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    settings = configured(tmp_path_factory.mktemp("schema"))
    make_base(settings.home)
    app = create_app(settings, engine=FakeEngine(), scheduler=IdleScheduler())
    with serving(app, settings) as live:
        yield live


def things(live: Live) -> dict[str, str]:
    """Ids that exist, so that not every answer is a 404."""
    identity = fingerprint(live.server.app.state.settings.home / "models" / BASE)
    with httpx.Client(base_url=f"{live.url}/v1", headers=live.headers) as client:
        data = client.post("/files", files={"file": ("a.jsonl", b"{}")}, data={"purpose": "fine-tune"}).json()["id"]
        job = client.post("/fine_tuning/jobs", json={"model": BASE, "training_file": data}).json()["id"]
        vector = client.post("/steering/vectors/import", files={"file": ("v", vector_bytes(identity))}).json()["id"]
        key = client.post("/keys", json={"name": "k", "scopes": ["read"]}).json()["id"]
    return {
        "file_id": data,
        "training_file": data,
        "fine_tuning_job_id": job,
        "vector_id": vector,
        "key_id": key,
        "model": BASE,
    }


def attack(label: str, live: Live, mode: GenerationMode, examples: int) -> None:
    """Send generated requests of one operation, half of them about things that exist, and check every answer."""
    operation, known = OPERATIONS[label], things(live)
    inexpressible = [schemathesis.checks.CHECKS.get_one("positive_data_acceptance")] if label in WITH_RULES else []

    @hypothesis_settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(case=operation.as_strategy(generation_mode=mode), real=st.booleans())
    def one(case: Any, real: bool) -> None:
        if real:
            case.path_parameters = {name: known.get(name, value) for name, value in case.path_parameters.items()}
            if isinstance(case.body, dict) and mode is GenerationMode.POSITIVE:
                case.body = {name: known.get(name, value) for name, value in case.body.items()}
        case.call_and_validate(base_url=live.url, headers=live.headers, excluded_checks=inexpressible)

    one()


CASES = [
    pytest.param(label, mode, id=f"{label}-{mode.value}")
    for label, operation in OPERATIONS.items()
    for mode in GenerationMode
    if mode is GenerationMode.POSITIVE or operation.body or list(operation.iter_parameters())  # else nothing is wrong
]


@pytest.mark.parametrize(("label", "mode"), CASES)
def test_every_operation_answers_as_declared(label: str, mode: GenerationMode, live: Live) -> None:
    attack(label, live, mode, QUICK)


@pytest.mark.slow
@pytest.mark.parametrize(("label", "mode"), CASES)
def test_every_operation_answers_as_declared_a_hundred_times(label: str, mode: GenerationMode, live: Live) -> None:
    attack(label, live, mode, FULL)


@pytest.mark.slow
def test_chains_of_requests_answer_as_declared(live: Live) -> None:
    """What one answer names goes into the next request: created, looked at, changed, deleted, looked at again."""

    class Chain(SCHEMA.exclude(path=LEFT_OUT).as_state_machine()):  # type: ignore[misc]
        def get_call_kwargs(self, case: Any) -> dict[str, Any]:
            return {"base_url": live.url, "headers": live.headers}

        def validate_response(self, response: Any, case: Any, **_: Any) -> None:
            # What came before decides whether valid data is taken: a key may be used, a job over, a file in use.
            acceptance = schemathesis.checks.CHECKS.get_one("positive_data_acceptance")
            case.validate_response(response, headers=live.headers, excluded_checks=[acceptance])

    limits = hypothesis_settings(
        max_examples=FULL,
        stateful_step_count=8,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(Chain, settings=limits)

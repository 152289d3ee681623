"""`client.fine_tuning.jobs`: from an upload to a model, and every way to end early."""

from __future__ import annotations

import csv
import io
import time

import openai
import pytest

from tests.contract.base import BASE
from tests.contract.conftest import Served


@pytest.fixture(scope="module")
def finished(served: Served) -> str:
    """A job that has succeeded."""
    job = served.client.fine_tuning.jobs.create(
        model=BASE,
        training_file=served.upload(),
        suffix="tickets",
        seed=7,
        metadata={"team": "support", "round": "one"},
        method={"type": "lora", "lora": {"hyperparameters": {"n_epochs": 2, "batch_size": "auto", "rank": 4}}},
    )
    assert job.object == "fine_tuning.job" and job.status in ("validating_files", "queued", "running")
    assert served.settled(job.id) == "succeeded"
    return job.id


def test_a_finished_job_shows_what_was_asked_and_what_was_made_of_it(served: Served, finished: str) -> None:
    job = served.client.fine_tuning.jobs.retrieve(finished)
    assert job.fine_tuned_model == f"ft:{BASE}:local:tickets:{finished[-8:]}"
    assert job.seed == 7 and job.metadata == {"team": "support", "round": "one"} and job.error is None
    assert job.hyperparameters.n_epochs == 2
    assert isinstance(job.hyperparameters.batch_size, int), "auto must be resolved by now"
    assert job.hyperparameters.learning_rate_multiplier == 1.0
    assert job.method.type == "lora" and job.method.model_extra["lora"]["hyperparameters"]["rank"] == 4
    assert job.trained_tokens and job.finished_at >= job.created_at
    assert job.organization_id and job.validation_file is None


def test_the_result_file_is_the_csv_of_step_metrics(served: Served, finished: str) -> None:
    job = served.client.fine_tuning.jobs.retrieve(finished)
    text = served.client.files.content(job.result_files[0]).read().decode()
    rows = list(csv.DictReader(io.StringIO(text)))
    assert rows and {"step", "train_loss"} <= set(rows[0])
    assert served.client.files.retrieve(job.result_files[0]).purpose == "fine-tune-results"


def test_events_come_in_pages_newest_first(served: Served, finished: str) -> None:
    everything = list(served.client.fine_tuning.jobs.list_events(finished, limit=2))
    assert len(everything) > 4 and len({one.id for one in everything}) == len(everything)
    assert everything[-1].message == f"Created job {finished}"
    numbers = [int(one.id.rpartition("-")[2]) for one in everything]
    assert numbers == list(range(len(numbers), 0, -1)), "no gap, none twice"
    metrics = [one for one in everything if one.type == "metrics"]
    assert metrics and "train_loss" in metrics[0].data


def test_checkpoints_are_models(served: Served, finished: str) -> None:
    page = served.client.fine_tuning.jobs.checkpoints.list(finished, limit=1)
    newest = page.data[0]
    assert newest.object == "fine_tuning.job.checkpoint" and newest.fine_tuning_job_id == finished
    assert newest.fine_tuned_model_checkpoint.endswith(f":ckpt-step-{newest.step_number}")
    everything = list(page)
    assert [one.step_number for one in everything] == sorted({one.step_number for one in everything}, reverse=True)
    assert len(everything) > 1
    answer = served.client.chat.completions.create(
        model=newest.fine_tuned_model_checkpoint, messages=[{"role": "user", "content": "hi"}], max_tokens=4
    )
    assert answer.model == newest.fine_tuned_model_checkpoint


def test_the_tuned_model_chats(served: Served, finished: str) -> None:
    name = served.client.fine_tuning.jobs.retrieve(finished).fine_tuned_model
    found = served.client.models.retrieve(name)
    assert found.id == name and found.owned_by == "local"
    assert name in [one.id for one in served.client.models.list()]
    answer = served.client.chat.completions.create(
        model=name, messages=[{"role": "user", "content": "hi"}], max_tokens=4, temperature=0
    )
    assert answer.choices[0].message.role == "assistant" and answer.usage.completion_tokens <= 4


def test_a_job_starts_from_an_earlier_one_and_from_a_checkpoint_of_a_cancelled_one(
    served: Served, finished: str
) -> None:
    jobs = served.client.fine_tuning.jobs
    first = jobs.retrieve(finished).fine_tuned_model
    stopped = jobs.create(
        model=first,
        training_file=served.upload(steps=2000, seconds=0.05),
        hyperparameters={"n_epochs": 50, "batch_size": 1},
        suffix="more",
        extra_body={"seed": 3},
    )
    assert stopped.model == first and stopped.model_extra["base"] == BASE
    deadline = time.monotonic() + 60
    while not (saved := list(jobs.checkpoints.list(stopped.id, limit=1))):
        assert time.monotonic() < deadline, "no checkpoint came"
        time.sleep(0.05)
    jobs.cancel(stopped.id)
    assert served.settled(stopped.id) == "cancelled"
    name = next(iter(jobs.checkpoints.list(stopped.id))).fine_tuned_model_checkpoint
    assert name.startswith(f"ft:{BASE}:local:more:{stopped.id[-8:]}:ckpt-step-"), name
    assert int(name.rpartition("-")[2]) >= saved[0].step_number
    last = jobs.create(model=name, training_file=served.upload(), hyperparameters={"n_epochs": 1})
    assert served.settled(last.id) == "succeeded"
    made = jobs.retrieve(last.id).fine_tuned_model
    assert made == f"ft:{BASE}:local::{last.id[-8:]}"
    assert any(event.message.endswith(f"which starts from {name}") for event in jobs.list_events(last.id))
    for model in (first, name, made):
        answer = served.client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "hi"}], max_tokens=4
        )
        assert answer.model == model


def test_jobs_are_listed_and_found_by_metadata(served: Served, finished: str) -> None:
    assert finished in [one.id for one in served.client.fine_tuning.jobs.list(limit=1)]
    found = [one.id for one in served.client.fine_tuning.jobs.list(metadata={"team": "support"})]
    assert finished in found
    assert not list(served.client.fine_tuning.jobs.list(metadata={"team": "nobody"}))


def test_cancel_ends_a_running_job(served: Served) -> None:
    job = served.client.fine_tuning.jobs.create(
        model=BASE,
        training_file=served.upload(steps=2000, seconds=0.05),
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 50, "batch_size": 1}}},
    )
    assert job.method.type == "lora", "supervised means lora"
    served.running(job.id)
    assert served.client.fine_tuning.jobs.cancel(job.id).status in ("cancelling", "cancelled")
    assert served.settled(job.id) == "cancelled"
    with pytest.raises(openai.BadRequestError) as caught:
        served.client.fine_tuning.jobs.cancel(job.id)
    assert caught.value.code == "invalid_job_state" and "cancelled" in caught.value.message


def test_pause_and_resume(served: Served) -> None:
    job = served.client.fine_tuning.jobs.create(
        model=BASE,
        training_file=served.upload(steps=20, seconds=0.05),
        hyperparameters={"n_epochs": 3, "batch_size": 1},
    )
    served.running(job.id)
    assert served.client.fine_tuning.jobs.pause(job.id).status in ("pausing", "paused")
    assert served.settled(job.id) == "paused"
    step = served.client.fine_tuning.jobs.retrieve(job.id).model_extra["progress"]["step"]
    assert served.client.fine_tuning.jobs.resume(job.id).status in ("queued", "running")
    assert served.settled(job.id) in ("succeeded", "paused")
    assert served.settled(job.id) == "succeeded"
    assert served.client.fine_tuning.jobs.retrieve(job.id).model_extra["progress"]["step"] > step


def test_a_bad_file_fails_the_job_and_says_which_row(served: Served) -> None:
    if served.real:
        rows = b'{"messages": [{"role": "user", "content": "hi"}]}\n' * 12
        name = served.client.files.create(file=("bad.jsonl", rows), purpose="fine-tune").id
    else:
        name = served.upload(valid=False)
    job = served.client.fine_tuning.jobs.create(model=BASE, training_file=name)
    assert served.settled(job.id) == "failed"
    error = served.client.fine_tuning.jobs.retrieve(job.id).error
    assert error.param == "training_file" and error.code and "line" in error.message


@pytest.mark.parametrize("kind", ["dpo", "reinforcement", "made_up"])
def test_a_method_that_does_not_exist_lists_what_does(served: Served, kind: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        served.client.fine_tuning.jobs.create(model=BASE, training_file=served.upload(), method={"type": kind})
    assert caught.value.param == "method.type" and "lora" in caught.value.message and "full" in caught.value.message


def test_an_unknown_model_names_the_command_that_brings_it(served: Served) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        served.client.fine_tuning.jobs.create(model="org/nothing", training_file=served.upload())
    assert caught.value.code == "model_not_found" and "gradhelm models pull" in caught.value.message


@pytest.mark.parametrize(
    ("hyperparameters", "param"),
    [
        ({"n_epochs": 0}, "method.lora.hyperparameters.n_epochs"),
        ({"rank": 0}, "method.lora.hyperparameters"),
        ({"no_such": 1}, "method.lora.hyperparameters.no_such"),
        ({"batch_size": "many"}, "method.lora.hyperparameters.batch_size"),
    ],
)
def test_a_wrong_hyperparameter_is_named(served: Served, hyperparameters: dict[str, object], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        served.client.fine_tuning.jobs.create(
            model=BASE,
            training_file=served.upload(),
            method={"type": "lora", "lora": {"hyperparameters": hyperparameters}},
        )
    assert caught.value.param.startswith(param)


def test_an_unknown_job_is_a_404(served: Served) -> None:
    for call in (served.client.fine_tuning.jobs.retrieve, served.client.fine_tuning.jobs.cancel):
        with pytest.raises(openai.NotFoundError) as caught:
            call("ftjob-none")
        assert caught.value.code == "job_not_found"

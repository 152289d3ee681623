"""Interrupted and resumed is never interrupted, to the last bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from core import checkpoint
from core.config_yaml import write_yaml
from core.events import read
from trainers.errors import STOPPED, SUCCEEDED, RunError
from trainers.registry import METHODS

ROOT = Path(__file__).parents[3]
DATA = ROOT / "configs" / "debug" / "data"
SETTINGS: dict[str, dict[str, Any]] = {"lora": {"dropout": 0.2, "rank": 4}}


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _method(name: str) -> dict[str, Any]:
    return {"name": name, **SETTINGS.get(name, {})}


@pytest.mark.parametrize("name", METHODS)
def test_a_stop_anywhere_changes_nothing(name: str, train: Any, tmp_path: Path) -> None:
    common = {
        "batch_size": 2,
        "accumulation": 2,
        "eval_file": str(DATA / "harbour-held-out.jsonl"),
        "eval_every": 5,
        "save_every": 4,
        "schedule": "cosine",
        "warmup_steps": 2,
    }
    straight = train(_method(name), output_dir=str(tmp_path / "straight"), **common)
    assert straight.code == SUCCEEDED
    # A third of the checks is in the first four steps, so that stops in a step, in an evaluation, before the first
    # checkpoint and after it all have a chance.
    draw = random.Random(f"stop/{name}")
    for trial in range(3):
        output = str(tmp_path / f"stopped-{trial}")
        stops = 0
        while True:
            at = draw.randrange(1, straight.checks // 2)
            result = train(_method(name), output_dir=output, stop_at=at, **common)
            if result.code == SUCCEEDED:
                break
            assert result.code == STOPPED
            stops += 1
        assert stops
        assert _same(result.weights, straight.weights)
        assert _same(result.checkpoint.tensors, straight.checkpoint.tensors)
        assert result.checkpoint.state["progress"] == straight.checkpoint.state["progress"]
        assert result.checkpoint.state["rng"] == straight.checkpoint.state["rng"]
        assert (result.output / "metrics.csv").read_bytes() == (straight.output / "metrics.csv").read_bytes()


def test_a_stop_inside_an_evaluation_repeats_the_evaluation_alone(train: Any, tmp_path: Path) -> None:
    held_out = {"eval_file": str(DATA / "harbour-held-out.jsonl"), "eval_every": 2, "batch_size": 1, "max_steps": 2}
    straight = train("lora", output_dir=str(tmp_path / "a"), **held_out)
    # Checks: four before the first step, then (one a step and one a micro-batch) twice, then four.
    stopped = train("lora", output_dir=str(tmp_path / "b"), stop_at=straight.checks - 2, **held_out)
    assert stopped.code == STOPPED
    assert stopped.checkpoint.state["progress"]["step"] == 2
    assert stopped.checkpoint.state["progress"]["pending"] is not None
    again = train("lora", output_dir=str(tmp_path / "b"), **held_out)
    assert again.code == SUCCEEDED
    assert again.checks == 4
    assert again.metrics == straight.metrics


def test_a_stop_before_the_first_step_leaves_nothing_and_starts_over(train: Any) -> None:
    stopped = train("lora", stop_at=0)
    assert stopped.code == STOPPED
    assert checkpoint.latest(stopped.output / "checkpoints") is None
    assert train("lora").code == SUCCEEDED


def test_a_finished_run_that_is_started_again_trains_no_more(train: Any) -> None:
    first = train("lora")
    weights = first.weights
    again = train("lora")
    assert again.code == SUCCEEDED
    assert again.checks == 0
    assert _same(again.weights, weights)
    assert len(again.metrics) == 12


def test_a_damaged_checkpoint_is_passed_over(train: Any, tmp_path: Path) -> None:
    straight = train("full", output_dir=str(tmp_path / "a"))
    train("full", output_dir=str(tmp_path / "b"), save_every=4, stop_at=20)
    newest = checkpoint.latest(tmp_path / "b" / "checkpoints")
    assert newest is not None
    data = bytearray((newest / "tensors.safetensors").read_bytes())
    data[-1] ^= 1
    (newest / "tensors.safetensors").write_bytes(data)
    again = train("full", output_dir=str(tmp_path / "b"), save_every=4)
    assert _same(again.weights, straight.weights)
    assert again.losses == straight.losses


def test_checkpoints_of_another_run_are_refused(train: Any) -> None:
    train("lora", max_steps=2)
    with pytest.raises(RunError, match="run with other seed;") as caught:
        train("lora", max_steps=2, seed=1)
    assert caught.value.param == "output_dir"


def test_the_setting_of_the_method_that_differs_is_named(train: Any) -> None:
    train({"name": "lora", "rank": 4}, max_steps=1)
    with pytest.raises(RunError, match=r"run with other method\.rank \(4 there, 8 here\);"):
        train({"name": "lora", "rank": 8}, max_steps=1)
    with pytest.raises(RunError, match=r"run with other method \(lora there, full here\);"):
        train("full", max_steps=1)


def test_advice_to_repeat_the_command_is_for_those_who_gave_one(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = train("lora", stop_at=5)
    assert stopped.of_kind("message")[-1]["message"].endswith("; the same command goes on from there")
    monkeypatch.setenv("GRADHELM_JOB_ID", "ftjob-1")
    stopped = train("lora", stop_at=3)
    said = stopped.of_kind("message")[-1]["message"]
    assert said.startswith("stopped at step ") and "command" not in said


def test_other_held_out_rows_make_another_run(train: Any, tmp_path: Path) -> None:
    rows = (DATA / "harbour-held-out.jsonl").read_text().splitlines(keepends=True)
    paths = [tmp_path / name for name in ("held-out.jsonl", "moved.jsonl", "other.jsonl")]
    for path, some in zip(paths, (rows, rows, rows[:-1]), strict=True):
        path.write_text("".join(some))
    held_out, moved, other = (str(path) for path in paths)
    train("lora", max_steps=1)
    train("lora", max_steps=2, eval_file=held_out)  # no held-out rows before: nothing to compare with
    assert train("lora", max_steps=3, eval_file=moved).code == SUCCEEDED
    for changed in ({"eval_file": other}, {}):
        with pytest.raises(RunError, match="run with other eval_file;") as caught:
            train("lora", max_steps=4, **changed)
        assert caught.value.code == "checkpoint_mismatch"


ADJUSTED = {
    "learning_rate": (2e-3, 1e-3),
    "schedule": ("linear", "cosine"),
    "warmup_ratio": (0.03, 0.1),
    "warmup_steps": (None, 1),
    "clip_norm": (1.0, 0.5),
    "early_stopping_patience": (None, 5),
    "early_stopping_delta": (0.0, 0.5),
    "export": ("auto", "best"),
}


def _warnings(result: Any) -> list[str]:
    said = [event["message"] for event in result.of_kind("message") if event["level"] == "warn"]
    return [message for message in said if message.startswith("the checkpoint was made")]


def test_a_resume_with_other_settings_says_which(train: Any) -> None:
    held_out = {"eval_file": str(DATA / "harbour-held-out.jsonl")}
    train("lora", max_steps=2, **held_out)
    assert not _warnings(train("lora", max_steps=3, **held_out)), "a longer run is the same run"
    now = {name: new for name, (_, new) in ADJUSTED.items()}
    said = _warnings(train("lora", max_steps=4, **held_out, **now))
    assert len(said) == len(ADJUSTED)
    for message, (name, (old, new)) in zip(said, ADJUSTED.items(), strict=True):
        assert f"with {name} {old} and this run has {new}, from step 3 on" in message


def test_a_checkpoint_that_does_not_name_its_settings_is_gone_on_with(train: Any) -> None:
    held_out = {"eval_file": str(DATA / "harbour-held-out.jsonl")}
    result = train("lora", max_steps=2, **held_out)
    saved = result.checkpoint
    state = {name: value for name, value in saved.state.items() if name != "adjustable"}
    del state["signature"]["eval_file"]
    checkpoint.save(result.output / "checkpoints", step=saved.step, tensors=saved.tensors, state=state)
    longer = train("lora", max_steps=3, clip_norm=0.5, **held_out)
    assert longer.code == SUCCEEDED
    assert not _warnings(longer)
    assert "eval_file" in longer.checkpoint.state["signature"]


def test_a_run_can_be_made_longer(train: Any) -> None:
    assert len(train("lora", max_steps=2).metrics) == 2
    longer = train("lora", max_steps=5)
    assert [row["step"] for row in longer.metrics] == ["1", "2", "3", "4", "5"]


def _kill(run: Any, file: Path, number: signal.Signals, *, at: int) -> int:
    """Runs a run file in a process of its own and sends a signal once a step is reported; returns the exit code."""
    output = Path(run.config.output_dir)
    seen = len(read(output / "events.jsonl")[0])
    file.write_text(write_yaml(run.as_dict()))
    process = subprocess.Popen(
        [sys.executable, "-m", "trainers", str(file)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if any(event["kind"] == "metric" and event["step"] >= at for event in read(output / "events.jsonl")[0][seen:]):
            process.send_signal(number)
            break
        time.sleep(0.002)
    _, errors = process.communicate(timeout=60)
    assert process.returncode in (STOPPED, -signal.SIGKILL), errors.decode()
    return process.returncode


REAL = {"save_every": 5, "max_steps": 60, "accumulation": 2, "batch_size": 2}


@pytest.mark.parametrize(("name", "number"), [("lora", signal.SIGTERM), ("full", signal.SIGKILL)])
def test_a_real_signal_at_a_random_step(
    name: str, number: signal.Signals, train: Any, make_run: Any, tmp_path: Path
) -> None:
    straight = train(_method(name), output_dir=str(tmp_path / "straight"), **REAL)
    run = make_run(_method(name), output_dir=str(tmp_path / "killed"), **REAL)
    code = _kill(run, tmp_path / "run.yaml", number, at=random.Random(int(number)).randrange(6, 40))
    assert code == (STOPPED if number == signal.SIGTERM else -signal.SIGKILL)
    last = checkpoint.latest(tmp_path / "killed" / "checkpoints")
    assert last is not None
    assert checkpoint.load(last).step < 60
    again = train(_method(name), output_dir=str(tmp_path / "killed"), **REAL)
    assert again.code == SUCCEEDED
    assert _same(again.weights, straight.weights)
    assert (again.output / "metrics.csv").read_bytes() == (straight.output / "metrics.csv").read_bytes()


# Five starts of Python and torch for each method: half a minute each, for the promise that matters most.
@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_five_kills_at_random_steps(name: str, train: Any, make_run: Any, tmp_path: Path) -> None:
    straight = train(_method(name), output_dir=str(tmp_path / "straight"), **REAL)
    run = make_run(_method(name), output_dir=str(tmp_path / "killed"), **REAL)
    draw = random.Random(f"kill/{name}")
    for low in (0, 8, 18, 28, 38):
        assert _kill(run, tmp_path / "run.yaml", signal.SIGKILL, at=low + draw.randrange(1, 10)) == -signal.SIGKILL
    again = train(_method(name), output_dir=str(tmp_path / "killed"), **REAL)
    assert _same(again.checkpoint.tensors, straight.checkpoint.tensors)
    assert (again.output / "metrics.csv").read_bytes() == (straight.output / "metrics.csv").read_bytes()

"""The command line: exit codes, what it leaves behind, and what a dry run says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from core.config_yaml import read_yaml, write_yaml
from core.events import read
from trainers.__main__ import main
from trainers.config import load_run
from trainers.errors import CRASHED, SUCCEEDED, USER_ERROR
from trainers.registry import METHODS

ROOT = Path(__file__).parents[3]
CONFIGS = sorted((ROOT / "configs").glob("*/*.yaml"))
RUNS = [path for path in CONFIGS if path.parent.name not in ("accelerate", "steering")]


@pytest.fixture
def run_file(make_run: Any, tmp_path: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(write_yaml(make_run("lora", max_steps=2).as_dict()))
    return file


def _errors(output: Path) -> list[dict[str, Any]]:
    return [event for event in read(output / "events.jsonl")[0] if event["kind"] == "error"]


@pytest.mark.parametrize("path", RUNS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_shipped_run_file_loads_without_a_warning_and_shows_its_command(path: Path) -> None:
    run = load_run(path)
    assert run.warnings() == []
    assert run.method.name == path.stem.partition("-")[0]
    assert f"python -m trainers {path.relative_to(ROOT)}" in path.read_text()
    assert (ROOT / run.config.train_file).is_file()


@pytest.mark.parametrize("path", [p for p in CONFIGS if p.parent.name == "accelerate"], ids=lambda path: path.name)
def test_every_accelerate_file_shows_its_command(path: Path) -> None:
    assert f"accelerate launch --config_file {path.relative_to(ROOT)}" in path.read_text()
    assert read_yaml(path.read_text())["num_processes"] >= 1


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "debug").glob("*.yaml")), ids=lambda path: path.name)
def test_debug_runs_train(
    path: Path, tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert main([str(path), f"output_dir={tmp_path / 'out'}", "threads=1"]) == SUCCEEDED
    said = capsys.readouterr().out.splitlines()
    assert said[-1].startswith("done: the ") and f" is in {tmp_path / 'out' / 'artifact'};" in said[-1]
    assert any(line.startswith("saved: step 12 in ") for line in said)
    assert not any(line.startswith("artifact") or "servable" in line for line in said)
    events = read(tmp_path / "out" / "events.jsonl")[0]
    scores = [event["valid_loss"] for event in events if "valid_loss" in event]
    assert len(scores) == 3, "before the first step, at step 6, and after the last"
    assert scores[-1] < scores[0]
    assert [event["artifact"] for event in events if event["kind"] == "artifact"][-2] == "metrics"
    progress = [event for event in events if event["kind"] == "progress"][-1]
    assert progress["step"] == progress["total_steps"] == 12
    assert progress["peak_memory_bytes"] > 1 << 26
    assert progress["micro_batch_seconds"] > 0
    assert any(event["kind"] == "heartbeat" for event in events)
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert read_yaml((tmp_path / "out" / "resolved.yaml").read_text())["model"] == "tiny-llama"


def test_every_method_has_a_debug_run() -> None:
    assert {path.stem for path in (ROOT / "configs" / "debug").glob("*.yaml")} == METHODS.keys()


def test_a_dry_run_prints_settings_with_their_origin_and_a_plan_and_trains_nothing(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run_file), "seed=5", "eval_every=2", "--dry-run"]) == SUCCEEDED
    out = capsys.readouterr().out
    assert "seed: 5  # command line" in out
    assert "  rank: 16  # file" in out
    assert "# warning: eval_every has no effect without eval_file" in out
    assert "# trained parameters:" in out
    planned = {line.split()[1]: float(line.split()[2]) for line in out.splitlines() if line.endswith(" MiB")}
    assert planned["runtime"] > 100 and planned["total"] > planned["runtime"], "torch alone takes more"
    assert planned["total"] == pytest.approx(sum(size for name, size in planned.items() if name != "total"), abs=1)
    assert "# runtime: Python, torch" in out and "max_length tokens" in out
    assert not (tmp_path / "run").exists()


def test_a_bad_setting_is_a_user_error_with_an_event(run_file: Path, tmp_path: Path) -> None:
    assert main([str(run_file), "method.rank=0"]) == USER_ERROR
    (error,) = _errors(tmp_path / "run")
    assert error["code"] == "invalid_config"
    assert error["param"] == "method"
    assert error["retryable"] is False


@pytest.mark.parametrize(
    ("override", "code", "param"),
    [
        ("train_file=/nowhere.jsonl", "file_not_found", "train_file"),
        ("model=no-such-model", "invalid_value", None),
        ("max_length=6", "no_trained_tokens", "train_file"),
    ],
)
def test_what_cannot_succeed_is_a_user_error(
    override: str, code: str, param: str | None, run_file: Path, tmp_path: Path
) -> None:
    assert main([str(run_file), override]) == USER_ERROR
    (error,) = _errors(tmp_path / "run")
    assert (error["code"], error["param"], error["retryable"]) == (code, param, False)


def test_a_malformed_row_names_its_line(run_file: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n{"messa')
    assert main([str(run_file), f"train_file={rows}"]) == USER_ERROR
    (error,) = _errors(tmp_path / "run")
    assert "line 2" in error["message"]
    assert error["param"] == "train_file"


def test_a_full_disk_is_a_crash_that_may_be_retried(
    run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    from core import checkpoint

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    assert main([str(run_file)]) == CRASHED
    (error,) = _errors(tmp_path / "run")
    assert (error["code"], error["retryable"]) == ("disk_full", True)


def test_a_signal_before_the_model_is_loaded_stops_in_order(run_file: Path, tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "import trainers.config\n"
        "real = trainers.config.load_run\n"
        "import trainers.__main__ as entry\n"
        "def signalled(*arguments):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return real(*arguments)\n"
        "entry.load_run = signalled\n"
        f"code = entry.main([{str(run_file)!r}])\n"
        "assert 'torch' not in sys.modules\n"
        "sys.exit(code)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, timeout=60).returncode == 3
    assert not _errors(tmp_path / "run")


def test_only_the_run_file_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([])
    assert capsys.readouterr().err.splitlines()[-1].endswith("required: RUN.yaml")


def test_a_finished_run_says_so_and_trains_nothing(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run_file)]) == SUCCEEDED
    assert "info: training " in capsys.readouterr().out
    assert main([str(run_file)]) == SUCCEEDED
    again = capsys.readouterr().out
    assert "already finished at step 2" in again and "done: the adapter is in " in again
    assert "training " not in again and "resumed" not in again
    assert main([str(run_file), "max_steps=3"]) == SUCCEEDED
    assert "resumed from the checkpoint of step 2" in capsys.readouterr().out

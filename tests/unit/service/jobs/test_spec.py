"""From a job's row to a run file."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from core.config import parse
from service.db.tables import Job
from service.jobs import spec
from steering.config import FitConfig
from trainers.config import parse_run


def job(**changes: object) -> Job:
    values = {
        "id": "ftjob-" + "a" * 24, "kind": "fine_tuning", "model": "tiny-llama", "method": "lora", "seed": 5,
        "training_file": "file-t", "validation_file": None, "suffix": None,
        "resolved": {"n_epochs": 2, "batch_size": 6, "learning_rate_multiplier": 0.5, "rank": 4, "schedule": "cosine"},
    }  # fmt: skip
    return Job(**(values | changes))


@pytest.mark.parametrize(
    ("rows", "epochs"), [(1, 25), (4, 25), (10, 10), (33, 3), (34, 3), (8333, 3), (8334, 2), (25_000, 1), (10**6, 1)]
)
def test_auto_epochs_follows_openai(rows: int, epochs: int) -> None:
    assert spec.auto_epochs(rows) == epochs


@pytest.mark.parametrize(("rows", "size"), [(1, 1), (99, 1), (150, 3), (10_000, 16)])
def test_auto_batch_size(rows: int, size: int) -> None:
    assert spec.auto_batch_size(rows) == size


def test_only_auto_is_replaced() -> None:
    resolved = spec.resolve({"n_epochs": 9, "batch_size": "auto", "rank": 2}, 150)
    assert resolved == {"n_epochs": 9, "batch_size": 3, "learning_rate_multiplier": 1.0, "rank": 2}


def test_run_file_is_a_run() -> None:
    run = parse_run(spec.run_file(job(validation_file="file-v"), Path("/home/g"), 2))
    config = run.config
    assert (config.train_file, config.eval_file) == ("/home/g/files/file-t", "/home/g/files/file-v")
    assert config.output_dir == "/home/g/jobs/ftjob-" + "a" * 24
    assert (config.epochs, config.learning_rate_multiplier, config.schedule, config.seed, config.threads) == (
        2, 0.5, "cosine", 5, 2,
    )  # fmt: skip
    assert run.method.name == "lora" and run.settings.rank == 4  # type: ignore[attr-defined]


@pytest.mark.parametrize(("batch", "micro"), [(1, 1), (6, 6), (8, 8), (12, 6), (13, 1), (16, 8), (256, 8)])
def test_large_batches_are_accumulated_exactly(batch: int, micro: int) -> None:
    config = parse_run(spec.run_file(job(resolved={"batch_size": batch}), Path("/h"), 1)).config
    assert (config.batch_size, config.accumulation) == (micro, batch // micro)


def test_who_sets_accumulation_has_divided_already() -> None:
    for asked in ({"batch_size": 16, "accumulation": 4}, {"accumulation": 4, "batch_size": 16}):
        config = parse_run(spec.run_file(job(resolved=asked), Path("/h"), 1)).config
        assert (config.batch_size, config.accumulation) == (16, 4)


def test_fit_file_is_a_fit() -> None:
    row = job(kind="steering_fit", method="mean_difference", resolved={"site": "mlp", "layers": [1]})
    config = parse(FitConfig, spec.fit_file(row, Path("/h"), 1))
    assert (config.data_file, config.site, config.layers, config.seed) == ("/h/files/file-t", "mlp", (1,), 5)


def test_commands() -> None:
    home = Path("/h")
    argv = spec.validation_argv(job(validation_file="file-v", resolved={"max_length": 77}), home, None)
    assert argv[:3] == [sys.executable, "-m", "core.data.validate"]
    assert argv[argv.index("--eval") + 1] == "/h/files/file-v"
    assert argv[argv.index("--max-length") + 1] == "77"
    assert spec.validation_argv(job(), home, None)[-3] == "1024"
    assert spec.validation_argv(job(kind="steering_fit"), home, None)[2] == "service.jobs.check_pairs"
    assert spec.validation_argv(job(), home, ("x",))[0] == "x"
    assert spec.run_argv(job(), None) == [sys.executable, "-m", "trainers", "run.yaml"]
    assert spec.run_argv(job(kind="steering_fit"), None) == [sys.executable, "-m", "steering", "fit", "fit.yaml"]
    assert spec.run_argv(job(), ("a", "b")) == ["a", "b", "run.yaml"]


def test_write_run_replaces_at_once(tmp_path: Path) -> None:
    folder = spec.write_run(job(), tmp_path, 1)
    assert sorted(path.name for path in folder.iterdir()) == ["run.yaml"]


@pytest.mark.parametrize("asked", ["auto", 4])
def test_beside_max_steps_only_epochs_that_were_asked_for_are_warned_of(tmp_path: Path, asked: object) -> None:
    resolved = spec.resolve({"n_epochs": asked, "batch_size": "auto", "max_steps": 2}, 150)
    assert resolved["n_epochs"] == asked
    run = parse_run(spec.run_file(job(resolved=resolved), tmp_path, 1))
    assert any("epochs has no effect" in warning for warning in run.warnings()) == (asked == 4)

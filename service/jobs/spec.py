"""From a job's row to what is executed: the run file, the command, and hyperparameters instead of "auto"."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from service.db.tables import Job
from service.jobs import names, starts
from trainers.config import RunConfig

AUTO = "auto"
MICRO_BATCH = 8
"""Rows in one forward pass at most; a larger batch is accumulated."""

_OPENAI = {"n_epochs": "epochs", "learning_rate_multiplier": "learning_rate_multiplier"}
_OWN = frozenset({"model", "train_file", "eval_file", "output_dir", "seed", "start", "start_name"})
_RUN_FIELDS = frozenset(field.name for field in dataclasses.fields(RunConfig)) - _OWN


def auto_epochs(rows: int) -> int:
    """OpenAI's rule: 3 epochs, more for fewer than 100 examples seen, fewer above 25,000, within 1 and 25.

    Args:
        rows: rows of the training file.

    Returns:
        Epochs.
    """
    if rows * 3 < 100:
        return min(25, 100 // rows)
    if rows * 3 > 25_000:
        return max(1, 25_000 // rows)
    return 3


def auto_batch_size(rows: int) -> int:
    """About 2 % of the rows: enough steps for a small file, steadier ones for a large file.

    Args:
        rows: rows of the training file.

    Returns:
        Rows of one optimizer step, 1 to 16.
    """
    return max(1, min(16, rows // 50))


def resolve(asked: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """Replace "auto" now that the number of rows is known.

    Args:
        asked: hyperparameters of the job, as the API stored them.
        rows: rows of the training file.

    Returns:
        Hyperparameters to show and to run with.
    """
    # Beside max_steps the number of epochs has no effect: it stays "auto" unless it was asked for.
    values = {"n_epochs": auto_epochs(rows), "batch_size": auto_batch_size(rows), "learning_rate_multiplier": 1.0}
    return {
        **asked,
        **{
            key: value
            for key, value in values.items()
            if asked.get(key, AUTO) == AUTO and not (key == "n_epochs" and asked.get("max_steps"))
        },
    }


def max_length(job: Job) -> int:
    """Tokens of the longest row: what validation must know about the run.

    Args:
        job: the job.

    Returns:
        The hyperparameter, or the run file's default.
    """
    default: int = next(field.default for field in dataclasses.fields(RunConfig) if field.name == "max_length")  # type: ignore[assignment]
    return int(job.resolved.get("max_length", default))


def model_of(job: Job, home: Path) -> str:
    """The model that a job's processes load.

    Args:
        job: the job.
        home: the data folder.

    Returns:
        The base's reference, or the folder of the earlier job's whole weights.
    """
    return str(names.base_directory(home, job.id)) if job.start_kind in starts.ON_TUNED else job.model


def validation_argv(job: Job, home: Path, program: Sequence[str] | None) -> list[str]:
    """Command that judges a job's files and writes ``validation.json`` beside them.

    Args:
        job: the job.
        home: the data folder.
        program: replaces ``python -m core.data.validate`` in tests of the machinery.

    Returns:
        Program and arguments.
    """
    kind = "core.data.validate" if job.kind == "fine_tuning" else "service.jobs.check_pairs"
    argv = [*(program or (sys.executable, "-m", kind)), "--model", model_of(job, home)]
    argv += ["--train", str(names.file_path(home, job.training_file))]
    if job.validation_file is not None:
        argv += ["--eval", str(names.file_path(home, job.validation_file))]
    out = names.validation_directory(home, job.id) / "validation.json"
    return [*argv, "--max-length", str(max_length(job)), "--out", str(out)]


def run_argv(job: Job, program: Sequence[str] | None) -> list[str]:
    """Command of the run, to be started in the job's folder.

    Args:
        job: the job.
        program: replaces ``python -m trainers`` and ``python -m steering fit`` in tests of the machinery.

    Returns:
        Program and arguments.
    """
    if job.kind == "fine_tuning":
        return [*(program or (sys.executable, "-m", "trainers")), "run.yaml"]
    return [*(program or (sys.executable, "-m", "steering", "fit")), "fit.yaml"]


def run_file(job: Job, home: Path, threads: int) -> dict[str, Any]:
    """Content of run.yaml.

    Args:
        job: a fine-tuning job whose hyperparameters are resolved.
        home: the data folder.
        threads: CPU threads.

    Returns:
        A mapping that ``trainers.config.parse_run`` accepts.
    """
    content: dict[str, Any] = {
        "model": model_of(job, home),
        "train_file": str(names.file_path(home, job.training_file)),
        "output_dir": str(names.job_directory(home, job.id)),
        "seed": job.seed,
        "threads": threads,
    }
    if job.validation_file is not None:
        content["eval_file"] = str(names.file_path(home, job.validation_file))
    if job.start is not None:
        content["start_name"] = job.start
    if job.start_kind in (starts.ADAPTER, starts.BOTH):
        content["start"] = str(names.start_directory(home, job.id))
    method: dict[str, Any] = {"name": job.method}
    for key, value in job.resolved.items():
        if value == AUTO and key in _OPENAI:
            continue
        if key == "batch_size":
            content["batch_size"] = _micro_batch(int(value), job.resolved)
            content["accumulation"] = int(value) // content["batch_size"] * int(job.resolved.get("accumulation", 1))
        elif key == "accumulation":
            content.setdefault("accumulation", value)
        elif _OPENAI.get(key, key) in _RUN_FIELDS:
            content[_OPENAI.get(key, key)] = value
        else:
            method[key] = value
    return {**content, "method": method}


def fit_file(job: Job, home: Path, threads: int) -> dict[str, Any]:
    """Content of fit.yaml.

    Args:
        job: a steering job.
        home: the data folder.
        threads: CPU threads.

    Returns:
        A mapping that ``python -m steering fit`` accepts.
    """
    return {
        **job.resolved,
        "model": job.model,
        "data_file": str(names.file_path(home, job.training_file)),
        "output_dir": str(names.job_directory(home, job.id)),
        "method": job.method,
        "seed": job.seed,
        "threads": threads,
    }


def write_run(job: Job, home: Path, threads: int) -> Path:
    """Write the run file into the job's folder.

    Args:
        job: the job.
        home: the data folder.
        threads: CPU threads.

    Returns:
        The folder.

    Raises:
        OSError: the disk is full or not writable.
    """
    directory = names.job_directory(home, job.id)
    directory.mkdir(parents=True, exist_ok=True)
    tuned = job.kind == "fine_tuning"
    content = run_file(job, home, threads) if tuned else fit_file(job, home, threads)
    path = directory / ("run.yaml" if tuned else "fit.yaml")
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        yaml.safe_dump(content, file, sort_keys=False, allow_unicode=True)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    return directory


def _micro_batch(batch: int, asked: Mapping[str, Any]) -> int:
    """The largest divisor of the batch that is small enough; who sets ``accumulation`` has divided already."""
    if "accumulation" in asked:
        return batch
    return max(size for size in range(1, min(batch, MICRO_BATCH) + 1) if batch % size == 0)

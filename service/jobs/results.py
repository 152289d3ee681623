"""What a run leaves behind becomes rows: a model or a vector, and the file of step metrics. Torch-free."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import Engine

from core.text import clean
from service.db import queries
from service.db.engine import read
from service.db.tables import File, Job, Model, Vector
from service.jobs import names

METRICS = "metrics.csv"
_VECTOR_KEY_LIMIT = 16 * 1024 * 1024


class NoResult(ValueError):
    """A run said that it succeeded, and left no artifact."""


@dataclass
class Results:
    """Rows to insert and columns of the job to set when it succeeds."""

    rows: list[Any] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)


def collect(job: Job, home: Path, now: float, engine: Engine) -> Results:
    """Look at a finished run's folder, and put copies where the service serves them from.

    Doing it twice gives the same: ids are derived from the job, files are replaced at once.

    Args:
        job: the job.
        home: the data folder.
        now: seconds since the epoch.
        engine: the database, in which another job's model may have the short name already.

    Returns:
        What to write.

    Raises:
        NoResult: there is no artifact.
        OSError: the disk is full; try again when it is not.
    """
    directory = names.job_directory(home, job.id)
    found = Results()
    if job.kind == "fine_tuning":
        _model(job, directory / "artifact", found, now, engine)
    else:
        _vector(job, directory / "artifact" / "vector.safetensors", home, found, now)
    metrics = directory / METRICS
    if metrics.is_file():
        _metrics_file(job, metrics, home, found, now)
    return found


def _model(job: Job, artifact: Path, found: Results, now: float, engine: Engine) -> None:
    try:
        manifest = json.loads((artifact / "manifest.json").read_text(encoding="utf-8"))
        kind = manifest["kind"]
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise NoResult(
            f"the run ended well but left no artifact with a manifest in {artifact.name}/: {error}"
        ) from None
    if kind not in ("adapter", "merged"):
        raise NoResult(f"the artifact's manifest says kind {kind!r}; adapter and merged are known")
    with read(engine) as session:
        name = names.model_id(job, whole=queries.model_id_taken(session, job, names.model_id(job)))
    found.rows.append(
        Model(
            id=name,
            kind=kind,
            base=job.model,
            path=str(artifact),
            job_id=job.id,
            key_id=job.key_id,
            created_at=int(now),
            manifest=clean(manifest),
        )
    )
    found.values["result_model"] = name


def _vector(job: Job, artifact: Path, home: Path, found: Results, now: float) -> None:
    try:
        about, layers = vector_header(artifact)
    except FileNotFoundError:
        raise NoResult("the run ended well but left no artifact/vector.safetensors") from None
    vector_id = names.own_id(job, "vec_")
    path = home / "vectors" / f"{vector_id}.safetensors"
    size, digest = _copy(artifact, path)
    found.rows.append(
        Vector(
            id=vector_id,
            name=job.suffix or vector_id,
            source="fit",
            base=job.model,
            fingerprint=about["fingerprint"],
            site=about["site"],
            method=about["method"],
            layers=layers,
            path=str(path),
            bytes=size,
            sha256=digest,
            job_id=job.id,
            key_id=job.key_id,
            created_at=int(now),
            metadata_={**about["metadata"], "data_hash": about["data_hash"], "norms": about["norms"]},
        )
    )
    found.values["result_vector"] = vector_id


def vector_header(path: Path) -> tuple[dict[str, Any], list[int]]:
    """Read what a steering vector says of itself, without torch and without its numbers.

    Args:
        path: a safetensors file of ``SteeringVector``.

    Returns:
        Its metadata (fingerprint, site, method, data_hash, norms, metadata...) and its layers, ascending.

    Raises:
        NoResult: it is no steering vector.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > _VECTOR_KEY_LIMIT:
            raise NoResult(f"{path.name} is no steering vector: its header is too long")
        try:
            header = json.loads(file.read(size))
            (text,) = header.pop("__metadata__").values()
            about = json.loads(text)
            layers = sorted(int(name.removeprefix("layer.")) for name in header)
            missing = {"fingerprint", "site", "method", "data_hash", "norms", "metadata"} - about.keys()
        except (ValueError, KeyError, AttributeError) as error:
            raise NoResult(f"{path.name} is no steering vector: {error}") from None
    if missing:
        raise NoResult(f"{path.name} is no steering vector: it lacks {', '.join(sorted(missing))}")
    return about, layers


def _metrics_file(job: Job, metrics: Path, home: Path, found: Results, now: float) -> None:
    file_id = names.own_id(job, "file-")
    size, digest = _copy(metrics, names.file_path(home, file_id))
    found.rows.append(
        File(
            id=file_id,
            filename="step_metrics.csv",
            purpose="fine-tune-results",
            bytes=size,
            sha256=digest,
            created_at=int(now),
            status="processed",
            key_id=job.key_id,
            job_id=job.id,
        )
    )
    found.values["result_files"] = [file_id]


def _copy(source: Path, target: Path) -> tuple[int, str]:
    """Copy at once or not at all; return bytes and sha256."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.part")
    with source.open("rb") as reader, partial.open("wb") as writer:
        shutil.copyfileobj(reader, writer)
        writer.flush()
        os.fsync(writer.fileno())
    partial.replace(target)
    with target.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return target.stat().st_size, digest

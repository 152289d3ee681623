"""From the names in a request to files on this machine: models and vectors. The only place where the API does so."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from sqlalchemy import Engine as Database
from sqlalchemy import select

from core.models.fingerprint import fingerprint
from core.models.ref import ModelRef, parse_ref
from core.models.resolve import local_directory
from service.api.errors import APIError, bad_request
from service.api.model_names import ModelMissing
from service.api.schemas.generation import SteeringSpec, VectorUse
from service.db.engine import read
from service.db.tables import Checkpoint, Job, Model, Vector
from service.engines.base import Steering, SteeringTerm
from service.jobs import names
from service.jobs.starts import ON_TUNED, Origin


@dataclass(frozen=True, slots=True)
class Target:
    """What a model name stands for: the directory of the base, the directory of an adapter on it, if any."""

    base: Path
    adapter: Path | None = None
    own_weights: bool = False
    """Whether a job made the base: no vector can be fitted on it."""


def base_ref(name: str) -> ModelRef:
    """The reference of a base model as a client may write it: a catalog name or a Hub id, never a path.

    Args:
        name: As the client wrote it.

    Returns:
        The reference.

    Raises:
        APIError: 404 for everything else.
    """
    try:
        ref = parse_ref(name)
    except ValueError:
        raise ModelMissing(name) from None
    if ref.kind not in ("catalog", "hub"):
        raise ModelMissing(name)
    return ref


def base_directory(name: str, home: Path) -> Path:
    """The directory of a base model that was pulled.

    Args:
        name: As the client wrote it.
        home: The data folder.

    Returns:
        Where its files lie.

    Raises:
        APIError: 404 when it was not.
    """
    directory = local_directory(base_ref(name), home)
    if directory is None:
        raise ModelMissing(name)
    return directory


def target(db: Database, home: Path, name: str) -> Target:
    """What to run for a model name: a base, ``ft:...`` or ``ft:...:ckpt-step-N``.

    Args:
        db: The database.
        home: The data folder.
        name: As the client wrote it.

    Returns:
        Directories for the engine.

    Raises:
        APIError: 404 when there is no such model, or retention removed the checkpoint.
    """
    found = origin(db, home, name)
    return Target(found.weights or base_directory(found.base, home), found.adapter, found.weights is not None)


def origin(db: Database, home: Path, name: str) -> Origin:
    """What lies behind a model name, down to the base model at its root.

    Args:
        db: The database.
        home: The data folder.
        name: As the client wrote it.

    Returns:
        The base's name; of a model that jobs made, the whole weights and the adapter on them, where there are such.

    Raises:
        APIError: 404, as for ``target``.
    """
    if not name.startswith("ft:"):
        base_directory(name, home)
        return Origin(name)
    kind, base, path, job = _made(db, name)
    if kind == "merged":
        return Origin(base, weights=path)
    if job is None or job.start_kind not in ON_TUNED:
        base_directory(base, home)
        return Origin(base, adapter=path)
    weights = names.base_directory(home, job.id)
    if not weights.is_dir():
        raise ModelMissing(name)
    return Origin(base, weights=weights, adapter=path)


def _made(db: Database, name: str) -> tuple[str, str, Path, Job | None]:
    """Kind, base and directory of a model that a job made, and the job; 404 when it is not here."""
    if "\x00" in name:
        raise ModelMissing(name)
    with read(db) as session:
        made = session.scalar(select(Model).where(Model.id == name))
        if made is not None:
            kind, base, path = made.kind, made.base, Path(made.path)
            job = session.scalar(select(Job).where(Job.id == made.job_id))
        else:
            row = session.execute(
                select(Checkpoint, Job).join(Job, Job.id == Checkpoint.job_id).where(Checkpoint.model_id == name)
            ).first()
            if row is None or not row[0].available:
                raise ModelMissing(name)
            kind, base, path, job = row[0].kind, row[1].model, Path(row[0].path), row[1]
    if not path.is_dir():
        raise ModelMissing(name)
    return kind, base, path, job


def check_base(db: Database, home: Path, name: str) -> None:
    """Refuse a model that no vector can be fitted on: one that is not here, or one that a job made.

    Args:
        db: The database.
        home: The data folder.
        name: As the client wrote it.

    Raises:
        APIError: 404 when there is no such model, 400 when it is a tuned one, naming its base.
    """
    if not name.startswith("ft:"):
        base_directory(name, home)
        return
    kind, base, _, job = _made(db, name)
    own = kind == "merged" or (job is not None and job.start_kind in ON_TUNED)
    message = f"The model {name[:200]!r} is a tuned one, and vectors are fitted on base models only. " + (
        f"It has whole weights of its own, so it cannot be steered, nor can a vector of its base {base!r} steer it: "
        "tune with lora to have a model that can."
        if own
        else f"Its base is {base!r}: give that as the model; the vector steers adapters on it too."
    )
    raise bad_request(message, param="model", code="base_model_required")


def check_blocks(home: Path, name: str, layers: Sequence[int]) -> None:
    """Refuse layers that a base model does not have.

    Args:
        home: The data folder.
        name: A base model that is here.
        layers: Block indices, from 0.

    Raises:
        APIError: 400 naming the first that is out of range.
    """
    if layers:
        _check_range("layers", layers, _blocks(base_directory(name, home)))


@lru_cache(maxsize=64)
def _fingerprint(directory: Path, _changed: int) -> str:
    return fingerprint(directory)


def identity(directory: Path) -> str:
    """The fingerprint of a model directory, computed once per change of its ``config.json``."""
    return _fingerprint(directory, (directory / "config.json").stat().st_mtime_ns)


def _blocks(directory: Path) -> int | None:
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    count = config.get("num_hidden_layers") or config.get("text_config", {}).get("num_hidden_layers")
    return count if isinstance(count, int) else None


def steering(db: Database, spec: SteeringSpec, model: Target) -> Steering:
    """The engine's form of a steering object, once every vector exists, fits the model and has the layers.

    Args:
        db: The database.
        spec: The request's steering object.
        model: What it is to steer.

    Returns:
        Paths, strengths, layers and positions.

    Raises:
        APIError: 404 unknown vector, 400 vector of another model or layer out of range.
    """
    wanted = [use.id for use in spec.vectors]
    with read(db) as session:
        found = {row.id: row for row in session.scalars(select(Vector).where(Vector.id.in_(wanted)))}
    terms = [_term(index, use, found.get(use.id), model) for index, use in enumerate(spec.vectors)]
    return Steering(tuple(terms), spec.preserve_norm)


def _term(index: int, use: VectorUse, row: Vector | None, model: Target) -> SteeringTerm:
    param = f"steering.vectors.{index}"
    if row is None:
        message = f"No such steering vector: {use.id[:100]!r}. GET /v1/steering/vectors lists them."
        raise APIError(404, message, code="vector_not_found", param=f"{param}.id")
    if row.fingerprint != identity(model.base):
        message = f"The vector {row.id} belongs to {row.base}, not to the weights of this model. " + (
            "This model has whole weights of its own, and such cannot be steered; adapters (lora) on a base can."
            if model.own_weights
            else "Fit one for this model's base."
        )
        raise bad_request(message, param=f"{param}.id", code="steering_wrong_model")
    if use.layers is not None:
        _check_layers(param, use.layers, [int(layer) for layer in row.layers], _blocks(model.base))
    layers = None if use.layers is None else tuple(sorted(set(use.layers)))
    return SteeringTerm(row.path, use.strength, layers, use.positions)


def _check_range(param: str, asked: Sequence[int], blocks: int | None) -> None:
    beyond = [layer for layer in asked if blocks is not None and layer >= blocks]
    if beyond:
        message = f"Layer {beyond[0]} is out of range: the model has blocks 0 to {(blocks or 1) - 1}."
        raise bad_request(message, param=param, code="steering_layer_out_of_range")


def _check_layers(param: str, asked: Sequence[int], has: Sequence[int], blocks: int | None) -> None:
    _check_range(f"{param}.layers", asked, blocks)
    without = [layer for layer in asked if layer not in has]
    if without:
        message = f"The vector has no direction for layer {without[0]}; it has {list(has)}."
        raise bad_request(message, param=f"{param}.layers", code="steering_layer_not_in_vector")

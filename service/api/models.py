"""`/v1/models`: bases that were pulled, models that jobs made, their files as a tar, and the pull itself."""

from __future__ import annotations

from pathlib import Path

from anyio import from_thread, to_thread
from fastapi import APIRouter, Request
from sqlalchemy import Engine as Database
from sqlalchemy import delete, select, update
from starlette.responses import Response

from core.models.resolve import available
from service.api import archive, pulling
from service.api.deps import Config, Db, needs
from service.api.docs import errors_of
from service.api.errors import APIError, bad_request
from service.api.fine_tuning import known_id
from service.api.model_names import ModelMissing
from service.api.resolve import base_directory, origin
from service.api.schemas.resources import DeletedModel, Listing, ModelObject, PullModel
from service.api.shape import BoundedRoute
from service.db import queries
from service.db.engine import read, write
from service.db.tables import Checkpoint, Job, Model
from service.jobs import names, weights
from service.jobs.states import TERMINAL
from service.settings import Settings

router = APIRouter(tags=["models"], route_class=BoundedRoute)
_MADE = select(Model, Job.start).outerjoin(Job, Job.id == Model.job_id)


def wire(row: Model, start: str | None) -> ModelObject:
    """A made model's row as the wire shows it, and what its job started from."""
    return ModelObject(
        id=row.id,
        created=row.created_at,
        owned_by="local",
        kind="merged" if row.kind == "merged" else "adapter",
        base=row.base,
        start=start,
        job_id=row.job_id,
    )


def _base(name: str, settings: Settings) -> ModelObject:
    created = int((base_directory(name, settings.home) / "config.json").stat().st_mtime)
    return ModelObject(id=name, created=created, owned_by="base", kind="base")


def _made(db: Database, name: str) -> ModelObject | None:
    with read(db) as session:
        made = session.execute(_MADE.where(Model.id == name)).first()
        if made is not None:
            return wire(*made)
        found = session.execute(
            select(Checkpoint, Job.model, Job.start)
            .join(Job, Job.id == Checkpoint.job_id)
            .where(Checkpoint.model_id == name)
        ).first()
    if found is None or not found[0].available:
        return None
    checkpoint, base, start = found
    return ModelObject(
        id=name,
        created=checkpoint.created_at,
        owned_by="local",
        kind="merged" if checkpoint.kind == "merged" else "adapter",
        base=base,
        start=start,
        job_id=checkpoint.job_id,
    )


@router.get("/v1/models", response_model=Listing[ModelObject])
@needs("read")
def list_models(db: Db, settings: Config) -> Listing[ModelObject]:
    """Every model that a request may name, checkpoints aside: bases first, then made ones, newest first."""
    with read(db) as session:
        made = [wire(*row) for row in session.execute(_MADE.order_by(Model.number.desc()))]
    data = [_base(name, settings) for name in available(settings.home)] + made
    return Listing[ModelObject](data=data, first_id=data[0].id if data else None, last_id=data[-1].id if data else None)


@router.post("/v1/models/pull", response_model=ModelObject, responses=errors_of(409, 502, 507))
@needs("admin")
async def pull_model(request: Request, wanted: PullModel) -> ModelObject:
    """Bring a base model to this machine, in a process of its own; repeated, it answers at once. May take minutes."""
    settings: Settings = request.app.state.settings
    name = await pulling.pull(wanted.model, settings.home, request.app.state.draining)
    return await to_thread.run_sync(_base, name, settings)


@router.get(
    "/v1/models/{model:path}/content",
    response_class=Response,
    responses={
        200: {"content": {"application/x-tar": {"schema": {"type": "string", "format": "binary"}}}},
        **errors_of(404, 429),
    },
)
@needs("read")
def get_model_content(model: str, db: Db, settings: Config) -> Response:
    """The artifact of a made model as a tar: adapter or merged weights, manifest with sha256 sums, model card.

    An adapter that was trained on another job's whole weights comes with them, in `base/`: on the pulled base it would
    be wrong without a sign of it.
    """
    name = known_id(model) or ""
    made = _made(db, name)
    if made is None:
        if not name.startswith("ft:"):
            base_directory(name, settings.home)
            raise bad_request("Only models that a job made can be downloaded, not their base.", param="model")
        raise ModelMissing(name)
    found = origin(db, settings.home, name)
    folders = {"": found.adapter or found.weights}
    if found.adapter is not None and found.weights is not None:
        folders["base/"] = found.weights
    return archive.tar_of({inside: folder for inside, folder in folders.items() if folder is not None}, made.id)


@router.get("/v1/models/{model:path}", response_model=ModelObject, responses=errors_of(404))
@needs("read")
def get_model(model: str, db: Db, settings: Config) -> ModelObject:
    """One model: a base, `ft:...`, or `ft:...:ckpt-step-N`."""
    name = known_id(model) or ""
    if not name.startswith("ft:"):
        return _base(name, settings)
    made = _made(db, name)
    if made is None:
        raise ModelMissing(name)
    return made


@router.delete("/v1/models/{model:path}", response_model=DeletedModel, responses=errors_of(404, 409))
@needs("jobs")
def delete_model(model: str, db: Db, settings: Config, request: Request) -> DeletedModel:
    """Delete a made model, its files and its job's checkpoints; `ft:...:ckpt-step-N` deletes that checkpoint alone.

    Base models stay. The answer says how much of the disk is free again, and what stays since later jobs share it.
    """
    name = known_id(model) or ""
    if not name.startswith("ft:"):
        base_directory(name, settings.home)
        raise APIError(403, "Base models are not deleted over the API.", code="base_model", param="model")
    with write(db) as session:
        made = session.scalar(select(Model).where(Model.id == name))
        if made is not None:
            session.execute(delete(Model).where(Model.id == name))
            job_id, paths, wanted = made.job_id, [Path(made.path)], Checkpoint.job_id == made.job_id
        else:
            saved = session.scalar(select(Checkpoint).where(Checkpoint.model_id == name, Checkpoint.available))
            if saved is None:
                raise ModelMissing(name)
            status = session.scalar(select(Job.status).where(Job.id == saved.job_id))
            if status not in TERMINAL:
                message = f"The job {saved.job_id} is {status} and may go on from this checkpoint; cancel it first."
                raise APIError(409, message, code="checkpoint_in_use", param="model")
            job_id, paths, wanted = saved.job_id, [], Checkpoint.id == saved.id
        gone = session.scalars(select(Checkpoint).where(wanted, Checkpoint.available)).all()
        ids, folders = [row.model_id for row in gone], [Path(row.path) for row in gone]
        session.execute(update(Checkpoint).where(wanted).values(available=False))
        session.flush()
        last = job_id is not None and not queries.serves(session, job_id)
    served = [*paths, *folders]
    paths += [folder.parent for folder in folders]
    if last and job_id is not None:  # what only a resume or an adapter of it could have used
        served.append(names.base_directory(settings.home, job_id))
        paths += [served[-1], names.checkpoints_directory(settings.home, job_id)]
    inside = {path.resolve() for path in paths} - {settings.home}
    found = weights.remove(path for path in inside if path.is_relative_to(settings.home))
    for path in served:  # a process that has it merged, or as its base, would keep its memory until it is idle for long
        if path.resolve().is_relative_to(settings.home):
            from_thread.run(request.app.state.engine.drop, str(path.resolve()))
    return DeletedModel(
        id=name,
        object="model",
        checkpoints=[one for one in ids if one != name],
        freed_bytes=found.freed,
        kept_bytes=found.kept,
    )

"""The answer to a model name that stands for nothing here: the nearest name, and those that exist.

A key that may not list models is told of the catalog only, which is the same on every machine.
"""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI, Request
from sqlalchemy import Engine as Database
from sqlalchemy import select
from starlette.responses import Response

from core.models.catalog import CATALOG
from core.models.resolve import available
from core.nearest import choices
from service.api.errors import APIError, answer
from service.db.engine import DatabaseBusy, read
from service.db.tables import Model

LISTED = 12
"""Names in a message; GET /v1/models has them all."""
NEWEST = 200
"""Made models that a wrong name is compared with, newest first."""


class ModelMissing(APIError):
    """The 404 for a model that nobody made or pulled.

    Args:
        name: As the client wrote it.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(404, f"The model {name[:200]!r} is not here.", code="model_not_found", param="model")


def known(home: Path, db: Database) -> list[str]:
    """Every name that could have been meant: bases that are here, made models, then the rest of the catalog."""
    try:
        with read(db) as session:
            made = list(session.scalars(select(Model.id).order_by(Model.number.desc()).limit(NEWEST)))
    except DatabaseBusy:
        made = []  # the answer is a 404 with or without them
    return [*available(home), *made, *CATALOG]


def _missing(request: Request, error: Exception) -> Response:
    assert isinstance(error, ModelMissing)
    state, name = request.app.state, error.name
    if name in CATALOG:
        hint = f"It is in the catalog: an admin can bring it with `gradhelm models pull {name}`."
    else:
        may_list = request.state.identity.may("read")
        names = known(state.settings.home, state.db) if may_list else list(CATALOG)
        meant = choices(name, names, most=LISTED)
        hint = (
            f"{meant[0].upper()}{meant[1:]}. GET /v1/models lists what is here; an admin can bring a base model with "
            "`gradhelm models pull NAME` (a catalog name or org/name)."
        )
    return answer(error.status, f"{error.message} {hint}", code=error.code, param=error.param)


def install(app: FastAPI) -> None:
    """Register the handler on an app."""
    app.add_exception_handler(ModelMissing, _missing)

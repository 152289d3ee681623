"""Every error leaves in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}``.

A message says what was wrong and what to do. Nothing internal leaves: an unhandled exception is logged with the
request's id and answered with that id only.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import iter_route_contexts
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from core.nearest import nearest
from service.db.engine import DatabaseBusy, DatabaseFull
from service.engines.base import EngineError
from service.jobs.records import IdempotencyInFlight, IdempotencyMismatch, UnknownJob
from service.jobs.states import IllegalTransition
from service.log import logger
from service.security.uploads import UploadError

log = logger(__name__)

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


NO_KEY = "A valid API key is required: Authorization: Bearer gh-... (on this machine: $GRADHELM_HOME/admin.key)."
BEARER = {"WWW-Authenticate": "Bearer"}


class APIError(Exception):
    """An answer that is an error.

    Args:
        status: HTTP status.
        message: What is wrong and what to do about it.
        code: Machine-readable code.
        param: The parameter at fault, in dots (``method.lora.hyperparameters.rank``).
        headers: Extra response headers (``Retry-After``).
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})


def bad_request(message: str, *, param: str | None = None, code: str | None = "invalid_value") -> APIError:
    """A 400 about one parameter."""
    return APIError(400, message, param=param, code=code)


def not_found(what: str, name: str, *, param: str | None = None, code: str | None = None) -> APIError:
    """A 404 that names what is missing; the name is cut to 200 characters."""
    return APIError(
        404,
        f"No such {what}: {name[:200]!r}. List what exists, and check the id.",
        param=param,
        code=code or "not_found",
    )


def busy(message: str, *, seconds: int = 1, code: str = "server_busy") -> APIError:
    """A 503 that says when to try again."""
    return APIError(503, message, code=code, headers={"Retry-After": str(seconds)})


def body(status: int, message: str, *, code: str | None, param: str | None) -> dict[str, Any]:
    """The error object for a status. Half surrogate pairs, which no answer can carry, are written out."""
    message = message.encode("utf-8", "backslashreplace").decode()
    param = param and param.encode("utf-8", "backslashreplace").decode()
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def answer(
    status: int, message: str, *, code: str | None, param: str | None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """An error's response."""
    return JSONResponse(body(status, message, code=code, param=param), status_code=status, headers=dict(headers or {}))


def engine_body(error: EngineError) -> dict[str, Any]:
    """The error object for what an engine reports, for use inside a stream."""
    return body(error.status, error.message, code=error.code, param=error.param)


def _api_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, APIError)
    return answer(error.status, error.message, code=error.code, param=error.param, headers=error.headers)


def _engine_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, EngineError)
    headers: dict[str, str] = {}
    if error.status in (429, 503):
        headers["Retry-After"] = str(max(1, round(error.retry_after or 1)))
    return JSONResponse(engine_body(error), status_code=error.status, headers=headers)


_HTTP_CODES = {
    401: "invalid_api_key",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "request_too_large",
    415: "unsupported_media_type",
}


def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = str(error.detail)
    if error.status_code == 404 and message == "Not Found":
        path = request.url.path[:200]
        routes = {
            (context.path or "").split("/", 3)[2]
            for context in iter_route_contexts(request.app.routes)
            if (context.path or "").startswith("/v1/")
        }
        meant = path.strip("/").partition("/")[0] in routes
        under = f" There is /v1{path}: the base URL of a client ends in /v1." if meant else ""
        message = f"No such route: {request.method} {path}.{under} GET /openapi.json lists them."
    if error.status_code == 405:
        message = f"{request.method} is not allowed on {request.url.path[:200]}."
    code = _HTTP_CODES.get(error.status_code, "invalid_request")
    return answer(error.status_code, message, code=code, param=None, headers=error.headers)


def path_of(location: Sequence[str | int], body: Any = None) -> str | None:
    """A validation error's location as a parameter name: ``("body", "messages", 0, "role")`` -> ``messages.0.role``.

    Args:
        location: Where the framework found it.
        body: The request's body. What stands in the location and not in the body names a member of a union or a
            check, which a client has never heard of.

    Returns:
        The name; none for the whole.
    """
    if location[:1] != ("body",) or not isinstance(body, dict | list):
        return ".".join(str(part) for part in location[1:] if part != "root") or None
    parts: list[str] = []
    for part in location[1:]:
        if isinstance(body, dict) and part in body:
            body = body[part]
        elif isinstance(body, list) and isinstance(part, int) and part < len(body):
            body = body[part]
        else:
            continue
        parts.append(str(part))
    return ".".join(parts) or None


def parameters(request: Request, location: Sequence[str | int]) -> list[str]:
    """Names that could stand at the end of a location in a request's body, by the route's own model of it.

    Args:
        request: The request, of a route that was found.
        location: A validation error's, ``("body", "steering", "vectors", 0, "strenght")``.

    Returns:
        The names, ``id``, ``strength`` and so on; none where the route has no body.
    """
    body_field = getattr(request.scope.get("route"), "body_field", None)
    found = [] if body_field is None else list(_models(body_field.field_info.annotation))
    for part in location[1:-1]:
        fields = [field for model in found for name, field in model.model_fields.items() if part in (name, field.alias)]
        # What is no field is a place in a list, or names one member of a union.
        found = [model for field in fields for model in _models(field.annotation)] or found
    return sorted({field.alias or name for model in found for name, field in model.model_fields.items()})


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)


_LOOKED_AT = 50
"""Faults among which the one to tell is looked for."""


def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    found = error.errors()[:_LOOKED_AT]
    first = found[0]
    near = path_of(first["loc"], error.body) or ""
    for other in found:  # of a union's complaints, the one that goes deepest into what was sent
        place = path_of(other["loc"], error.body) or ""
        if place.startswith(f"{near}.") and near:
            first, near = other, place
    kind, reason = str(first["type"]), str(first["msg"])
    if kind == "json_invalid":
        return answer(400, "The body is not valid JSON.", code="invalid_json", param=None)
    param = path_of(first["loc"], error.body)
    if kind == "missing" and first["loc"][0] == "body" and len(first["loc"]) > 1:
        param = f"{param}.{first['loc'][-1]}" if param else str(first["loc"][-1])
    codes = {"missing": "missing_required_parameter", "extra_forbidden": "unsupported_parameter"}
    if kind == "missing":
        message = f"Missing required parameter: {param!r}." if param else "A JSON body is required."
    elif kind == "extra_forbidden":
        close = nearest(str(first["loc"][-1]), parameters(request, first["loc"]))
        meant = "" if close is None else f" Did you mean {close}?"
        message = (
            f"Unsupported parameter: {param!r}. It would have no effect, so it is refused rather than ignored.{meant}"
        )
    else:
        message = f"Invalid value for {param!r}: {reason}." if param else f"Invalid body: {reason}."
    return answer(400, message, code=codes.get(kind, "invalid_value"), param=param)


def _database_busy(_request: Request, error: Exception) -> Response:
    log.warning("database_unavailable", detail=str(error)[:200])
    if isinstance(error, DatabaseFull):
        return answer(507, f"{error}.", code="disk_full", param=None)
    return answer(503, f"{error}.", code="database_unavailable", param=None, headers={"Retry-After": "1"})


def _unknown_job(_request: Request, error: Exception) -> Response:
    return answer(404, f"{error}.", code="job_not_found", param="fine_tuning_job_id")


def _illegal_transition(_request: Request, error: Exception) -> Response:
    return answer(400, f"{error}.", code="invalid_job_state", param="status")


def _mismatch(_request: Request, error: Exception) -> Response:
    return answer(422, f"{error}.", code="idempotency_key_reused", param="Idempotency-Key")


def _in_flight(_request: Request, error: Exception) -> Response:
    return answer(409, f"{error}.", code="idempotency_key_in_flight", param=None, headers={"Retry-After": "1"})


def _upload_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, UploadError)
    return answer(error.status, error.message, code=error.code, param=error.param, headers={"Connection": "close"})


def _os_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, OSError)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return answer(507, "The data folder's disk is full; free some space.", code="disk_full", param=None)
    return internal_error(request.scope.get("request_id", ""), error)


def _client_left(_request: Request, _error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it; the status is for the log


def internal_error(request_id: str, error: BaseException) -> JSONResponse:
    """Log what went wrong and answer 500 with nothing but the request's id."""
    log.error("unhandled_exception", exc_info=error)
    message = f"The server failed on this request. Its log has the cause under request id {request_id!r}."
    return answer(500, message, code="internal_error", param=None)


def install(app: FastAPI) -> None:
    """Register the handlers on an app."""
    app.add_exception_handler(APIError, _api_error)
    app.add_exception_handler(EngineError, _engine_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(DatabaseBusy, _database_busy)
    app.add_exception_handler(UnknownJob, _unknown_job)
    app.add_exception_handler(IllegalTransition, _illegal_transition)
    app.add_exception_handler(IdempotencyMismatch, _mismatch)
    app.add_exception_handler(IdempotencyInFlight, _in_flight)
    app.add_exception_handler(UploadError, _upload_error)
    app.add_exception_handler(ClientDisconnect, _client_left)
    app.add_exception_handler(OSError, _os_error)

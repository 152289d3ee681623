"""What the OpenAPI document says beside the routes: every status that can occur, in one error shape."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from service.api import methods
from service.api.schemas.common import ErrorAnswer

_MEANING = {
    400: "The request cannot succeed as it is.",
    401: "No valid API key.",
    403: "The key lacks the scope, or Host or Origin are not allowed.",
    404: "There is no such thing.",
    405: "The method is not allowed.",
    408: "The body stopped coming.",
    409: "A request with the same Idempotency-Key is in flight.",
    413: "The body is too large.",
    416: "The range is not in the file.",
    422: "Understood, and cannot be done.",
    429: "Too many at once; see Retry-After.",
    500: "The server failed; its log has the cause.",
    502: "The model could not be fetched.",
    503: "Not now; see Retry-After.",
    507: "The disk is full.",
}
_EVERYWHERE = (400, 401, 403, 405, 408, 413, 500, 503, 507)
_PUBLIC = (400, 403, 405, 413, 500)


SSE: dict[str, Any] = {
    "text/event-stream": {
        "itemSchema": {
            "type": "object",
            "properties": {"data": {"type": "string"}, "event": {"type": "string"}, "id": {"type": "string"}},
        }
    }
}
"""Content of a response that may be a stream of server-sent events."""


def errors_of(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Responses for a route's decorator, all in the error shape."""
    return {status: {"model": ErrorAnswer, "description": _MEANING[status]} for status in statuses}


def describe(app: FastAPI, public: frozenset[str]) -> dict[str, Any]:
    """The OpenAPI document: what any route may answer is added, FastAPI's own 422 is taken out, probes need no key.

    Args:
        app: The app.
        public: Paths that answer without a key.

    Returns:
        The document.
    """
    document = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes, tags=app.openapi_tags
    )
    reference = {"$ref": "#/components/schemas/ErrorAnswer"}
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for path, item in document["paths"].items():
        for operation in item.values():
            responses = operation["responses"]
            if responses.get("422", {}).get("description") == "Validation Error":
                del responses["422"]
            for status in _PUBLIC if path in public else _EVERYWHERE:
                content = {"application/json": {"schema": reference}}
                responses.setdefault(str(status), {"description": _MEANING[status], "content": content})
            if path in public:
                operation.pop("security", None)
    if "CreateJob" in schemas:
        properties = schemas["CreateJob"]["properties"]
        method = methods.schema()
        properties["method"] = {"anyOf": [method, {"type": "null"}], "description": properties["method"]["description"]}
        basic = method["properties"]["supervised"]["properties"]["hyperparameters"]
        properties["hyperparameters"] |= {"anyOf": [basic, {"type": "null"}]}
        schemas.pop("MethodChoice", None)
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    if "ErrorAnswer" not in schemas:
        definitions = ErrorAnswer.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas.update(definitions.pop("$defs", {}))
        schemas["ErrorAnswer"] = definitions
    return document

"""The only list of methods: the API's schema, the command line, the docs and the tests all read it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Any

from core.config_docs import json_schema
from core.nearest import choices
from trainers.method import Attached, Method, MethodConfig, TrainContext

__all__ = ["METHODS", "Attached", "Method", "MethodConfig", "TrainContext", "get_method", "method_schema"]

# To add a method, write trainers/methods/<name>.py with a METHOD and add its name here.
_NAMES = (
    "full",
    "lora",
    "frugal",
    "galore",
    "dct_adamw",
    "trion",
    "muon",
    "mezo",
    "qzo",
)


def _collect(names: tuple[str, ...]) -> Mapping[str, Method]:
    methods: dict[str, Method] = {}
    for name in names:
        method: Method = import_module(f"trainers.methods.{name}").METHOD
        assert method.name == name, f"trainers/methods/{name}.py holds a method called {method.name!r}"
        assert name not in methods, f"method {name!r} is listed twice"
        methods[name] = method
    return MappingProxyType(methods)


METHODS: Mapping[str, Method] = _collect(_NAMES)


def get_method(name: str) -> Method:
    """Looks a method up.

    Args:
        name: What a request or run file calls it.

    Returns:
        The method of that name.

    Raises:
        ValueError: There is none; the message has the nearest name and lists what exists.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name[:64]!r}; {choices(name, METHODS)}")
    return METHODS[name]


def method_schema(name: str) -> dict[str, Any]:
    """JSON Schema of a method's settings, with defaults and descriptions; needs no torch.

    Args:
        name: A name in ``METHODS``.

    Returns:
        An object schema that allows exactly what the run file's ``method`` section may hold besides ``name``.

    Raises:
        ValueError: Unknown method.
    """
    method = get_method(name)
    return json_schema(method.config) | {"title": name, "description": method.summary}

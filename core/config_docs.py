"""What is written under a configuration's fields, as data: for help texts, docs and the API's JSON schema."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import textwrap
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

NoneType = type(None)


@dataclass(frozen=True, slots=True)
class FieldDoc:
    """One setting, for readers."""

    type: str
    """Which values are allowed, in words."""
    default: Any
    """The default as plain data; None when the setting is required."""
    doc: str
    """The string under the field, on one line; "" when there is none."""
    required: bool
    """Whether there is no default."""


def fields_doc(cls: type) -> dict[str, FieldDoc]:
    """Collect the settings of a configuration with their documentation; nested ones by dots.

    Args:
        cls: a dataclass whose source can be read.

    Returns:
        Dotted name -> documentation, in the order of the fields. A test may require every `doc` to be non-empty.
    """
    hints, docs = typing.get_type_hints(cls), _docs(cls)
    result: dict[str, FieldDoc] = {}
    for item in dataclasses.fields(cls):
        hint = hints[item.name]
        required, default = _default(item)
        result[item.name] = FieldDoc(describe(hint), default, docs.get(item.name, ""), required)
        for nested in (arg for arg in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(arg)):
            inner = fields_doc(typing.cast("type", nested))
            result |= {f"{item.name}.{name}": doc for name, doc in inner.items()}
    return result


def json_schema(cls: type) -> dict[str, Any]:
    """Describe a configuration as JSON Schema (2020-12, no references), as OpenAPI 3.1 takes it.

    Args:
        cls: a dataclass.

    Returns:
        An object schema that allows exactly what `core.config.parse` accepts, up to checks across fields.
    """
    hints, docs = typing.get_type_hints(cls), _docs(cls)
    properties: dict[str, Any] = {}
    required: list[str] = []
    for item in dataclasses.fields(cls):
        schema = _schema(hints[item.name])
        if docs.get(item.name):
            schema["description"] = docs[item.name]
        is_required, default = _default(item)
        if is_required:
            required.append(item.name)
        else:
            schema["default"] = default
        properties[item.name] = schema | dict(item.metadata.get("schema", {}))
    result: dict[str, Any] = {"type": "object", "title": cls.__name__, "properties": properties}
    if cls.__doc__ and not cls.__doc__.startswith(f"{cls.__name__}("):
        result["description"] = inspect.cleandoc(cls.__doc__)
    return result | {"required": required, "additionalProperties": False}


def describe(hint: Any) -> str:
    """Say in words which values an annotation allows.

    Args:
        hint: an evaluated annotation.

    Returns:
        For example "a whole number or null".
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}
    if hint in words:
        return words[hint]
    if hint is NoneType:
        return "null"
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(repr(arg) for arg in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(arg) for arg in args)
    if origin in (tuple, list):
        if origin is list or args[1:] == (Ellipsis,):
            return f"a list whose items are each {describe(args[0])}"
        return f"a list of {len(args)}: {', '.join(describe(arg) for arg in args)}"
    return "any value" if hint is Any else "a mapping"


def plain(value: Any) -> Any:
    """Turn a value of a configuration into what JSON and YAML can hold.

    Args:
        value: a dataclass, mapping, list, tuple, path or scalar.

    Returns:
        Dicts, lists and scalars.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _schema(hint: Any) -> dict[str, Any]:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    names: dict[Any, str] = {bool: "boolean", int: "integer", float: "number", str: "string", NoneType: "null"}
    if hint in names:
        return {"type": names[hint]}
    if hint is Path:
        return {"type": "string", "minLength": 1}
    if origin is Literal:
        return {"enum": list(args)}
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_schema(arg) for arg in args]}
    if origin is list or (origin is tuple and args[1:] == (Ellipsis,)):
        return {"type": "array", "items": _schema(args[0])}
    if origin is tuple:
        return {"type": "array", "prefixItems": [_schema(arg) for arg in args], "minItems": len(args), "items": False}
    if hint in (dict, Mapping) or origin in (dict, Mapping):
        return {"type": "object", "additionalProperties": _schema(args[1]) if args else {}}
    return json_schema(hint) if dataclasses.is_dataclass(hint) and isinstance(hint, type) else {}


def _default(item: dataclasses.Field[Any]) -> tuple[bool, Any]:
    if item.default is not dataclasses.MISSING:
        value = item.default
    elif item.default_factory is not dataclasses.MISSING:
        value = item.default_factory()
    else:
        return True, None
    return False, plain(value)


@functools.cache
def _docs(cls: type) -> dict[str, str]:
    """Harvest the strings under the fields of a class and its bases; Python itself throws them away."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        body = typing.cast("ast.ClassDef", tree.body[0]).body
        for field, below in itertools.pairwise(body):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
                and isinstance(below.value.value, str)
            ):
                docs[field.target.id] = " ".join(below.value.value.split())
    return docs

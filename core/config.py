"""Configuration as values: frozen dataclasses, filled by YAML, mappings and key=value, with the origin of each value.

The dataclass is the only description of a setting: its annotation is the check, its default the default, and the
string under the field the documentation in `--help`, in the API's schema and in the docs. YAML is only a way to fill
it. Read as YAML 1.2: `1e-4` is a number and `no` a string, unlike in PyYAML's own 1.1 rules.

Understood annotations: bool, int, float, str, Path, Any, Literal, unions of these with None, tuple[X, ...],
tuple[X, Y], list[X], dict[str, X] / Mapping[str, X], nested dataclasses. Checks across fields belong in
`__post_init__`, as ValueError. `field(metadata={"schema": {"minimum": 1}})` adds to the JSON schema.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from core.config_docs import FieldDoc as FieldDoc
from core.config_docs import describe, plain
from core.config_docs import fields_doc as fields_doc
from core.config_docs import json_schema as json_schema
from core.config_yaml import read_yaml
from core.config_yaml import write_yaml as write_yaml
from core.nearest import choices

T = TypeVar("T")

NoneType = type(None)
MAX_FILE_BYTES = 1024 * 1024


class ConfigError(ValueError):
    """A setting that is unknown, missing or of the wrong kind; `key` is its dotted name ("" for the whole)."""

    def __init__(self, message: str, key: str = "") -> None:
        """Keep the name of the setting beside the text.

        Args:
            message: what is wrong, with the name, the value and what is allowed.
            key: the setting's dotted name.
        """
        super().__init__(message)
        self.key = key


@dataclass(frozen=True, slots=True)
class Resolved(Generic[T]):
    """A configuration and where each of its values came from."""

    value: T
    """The filled dataclass."""
    origin: dict[str, str]
    """Dotted name of each setting -> "default", "file", the given name of the mapping, or "command line"."""


class _Text(str):
    """A value typed as text on the command line: its kind is that of the field it goes to."""


def resolve(
    cls: type[T],
    *,
    file: Path | None = None,
    data: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
    data_origin: str = "request",
) -> Resolved[T]:
    """Fill a configuration from defaults, then a file, then a mapping, then key=value; later ones win.

    Args:
        cls: a dataclass.
        file: a YAML file holding a mapping.
        data: nested settings, as `parse` takes them.
        overrides: `key=value` with dots for nesting; the value is read as YAML, or as plain text for str fields.
        data_origin: what `origin` calls a value that came from `data`.

    Returns:
        The configuration and the origin of each value.

    Raises:
        ConfigError: an unknown or missing setting, a wrong kind of value, or a malformed file or override.
    """
    merged: dict[str, Any] = {}
    origin: dict[str, str] = {}
    if file is not None:
        _merge(merged, _read_file(file), "file", origin)
    if data is not None:
        _merge(merged, data, data_origin, origin)
    for text in overrides:
        _merge(merged, _override(text), "command line", origin)
    value = parse(cls, merged)
    return Resolved(value, {key: origin.get(key, "default") for key in _leaves(value)})


def parse(cls: type[T], data: Mapping[str, Any]) -> T:
    """Fill a dataclass from a nested mapping, checking every name and every kind of value.

    Args:
        cls: a dataclass.
        data: settings by name; nested dataclasses take nested mappings.

    Returns:
        The filled dataclass.

    Raises:
        ConfigError: an unknown or missing setting, or a value that the field's annotation does not allow.
    """
    return typing.cast("T", _build(cls, data, ""))


def dump(obj: Any) -> dict[str, Any]:
    """Turn a configuration into plain dicts, lists and scalars; `parse(type(obj), dump(obj)) == obj`.

    Args:
        obj: a filled dataclass.

    Returns:
        What JSON and YAML can hold.
    """
    return {item.name: plain(getattr(obj, item.name)) for item in dataclasses.fields(obj)}


def _read_file(file: Path) -> Mapping[str, Any]:
    try:
        with open(file, "rb") as stream:
            raw = stream.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from error
    if len(raw) > MAX_FILE_BYTES:
        raise ConfigError(f"{file} is over {MAX_FILE_BYTES} bytes; that is no configuration")
    try:
        data = read_yaml(raw.decode())
    except ValueError as error:
        raise ConfigError(f"{file} is no YAML: {error}") from error
    if data is None:
        return {}
    if not isinstance(data, Mapping):
        raise ConfigError(f"{file} must hold a mapping of settings, not a {type(data).__name__}")
    return data


def _override(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"{text!r} is no override; write key=value, with dots for nested settings")
    nested: Any = _Text(value)
    for part in reversed(parts):
        nested = {part: nested}
    return typing.cast("dict[str, Any]", nested)


def _merge(
    into: dict[str, Any], data: Mapping[str, Any], source: str, origin: dict[str, str], prefix: str = ""
) -> None:
    """Lay one source over the settings so far, noting who set each leaf; mappings merge, all else replaces."""
    for key, value in data.items():
        name = f"{prefix}{key}"
        if isinstance(value, _Text) and (parsed := _text_as_mapping(value)) is not None:
            value = parsed
        if isinstance(value, Mapping):
            inner = into.get(key)
            if not isinstance(inner, dict):
                inner = into[key] = {}
            origin[name] = source
            _merge(inner, value, source, origin, f"{name}.")
        else:
            into[key] = value
            origin[name] = source


def _text_as_mapping(text: str) -> Mapping[str, Any] | None:
    if not text.lstrip().startswith("{"):
        return None
    try:
        value = read_yaml(text)
    except ValueError:
        return None
    return value if isinstance(value, Mapping) else None


def _leaves(value: Any, prefix: str = "") -> list[str]:
    """Dotted names of all settings of a configuration; free mappings count by their keys."""
    if dataclasses.is_dataclass(value):
        items = [(item.name, getattr(value, item.name)) for item in dataclasses.fields(value)]
    else:
        items = list(value.items())
    names: list[str] = []
    for name, item in items:
        if dataclasses.is_dataclass(item) or (isinstance(item, Mapping) and item):
            names += _leaves(item, f"{prefix}{name}.")
        else:
            names.append(f"{prefix}{name}")
    return names


def _build(cls: Any, data: Any, key: str) -> Any:
    if not isinstance(data, Mapping):
        raise ConfigError(f"{_named(key)} must be a mapping of settings, not {_show(data)}", key)
    hints = typing.get_type_hints(cls)
    fields = {item.name: item for item in dataclasses.fields(cls) if item.init}
    for name in data:
        if name not in fields:
            raise ConfigError(_unknown(str(name), key, list(fields)), _join(key, str(name)))
    values = {}
    for name, item in fields.items():
        if name in data:
            values[name] = _convert(hints[name], data[name], _join(key, name))
        elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{_join(key, name)} is missing; it must be {describe(hints[name])}", _join(key, name))
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}" if key else str(error), _join(key, error.key)) from error
    except ValueError as error:
        raise ConfigError(f"{key}: {error}" if key else str(error), key) from error


def _unknown(name: str, key: str, known: list[str]) -> str:
    shown = name if len(name) <= 80 else f"{name[:80]}..."
    return f"unknown setting {_join(key, shown)}; {choices(name, sorted(known), prefix=f'{key}.' if key else '')}"


def _convert(hint: Any, value: Any, key: str) -> Any:
    """Check a value against an annotation and bring it into its type, or raise ConfigError."""
    found, result = _try(hint, value, key)
    if not found:
        raise ConfigError(f"{key} must be {describe(hint)}, not {_show(value)}", key)
    return result


def _try(hint: Any, value: Any, key: str) -> tuple[bool, Any]:
    if isinstance(value, _Text):
        return _try_text(hint, value, key)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True, _untext(value)
    if hint is NoneType:
        return value is None, None
    if origin is Literal:
        # 1 == True and 1 == 1.0, so the kind is compared too.
        return any(value == arg and type(value) is type(arg) for arg in args), value
    if origin in (typing.Union, types.UnionType):
        return _try_union(args, value, key)
    if dataclasses.is_dataclass(hint):
        return True, value if isinstance(value, typing.cast("type", hint)) else _build(hint, value, key)
    if origin in (tuple, list):
        return _try_sequence(origin, args, value, key)
    if hint in (dict, Mapping) or origin in (dict, Mapping):
        return _try_mapping(args, value, key)
    if hint is float:
        return _is_number(value), float(value) if _is_number(value) else None
    if hint is Path:
        return isinstance(value, str | Path) and str(value) != "", Path(value) if isinstance(
            value, str | Path
        ) else None
    if hint is int and type(value) is float and value.is_integer() and abs(value) < 2**53:
        return True, int(value)  # JSON does not tell 1.0 from 1
    if hint in (bool, int, str):
        return type(value) is hint, value
    raise AssertionError(f"{key}: annotation {hint!r} is not one that core.config understands")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**1023


def _try_text(hint: Any, value: str, key: str) -> tuple[bool, Any]:
    text = str(value)
    members = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if members == (str,):
        return True, text
    try:
        parsed = read_yaml(text)
    except ValueError:
        parsed = text
    others = tuple(member for member in members if member is not str)
    found, result = _try_union(others, parsed, key)
    if found:
        return True, result
    if str in members:
        return True, text
    return False, None


def _try_union(args: tuple[Any, ...], value: Any, key: str) -> tuple[bool, Any]:
    # What already has an allowed type stays as it is; a nested dataclass comes last: it reports its own, exact error.
    if type(value) in args and type(value) in (bool, int, str):
        return True, value
    for arg in sorted(args, key=lambda arg: (dataclasses.is_dataclass(arg), arg is int)):
        if dataclasses.is_dataclass(arg) and not isinstance(value, Mapping):
            if isinstance(value, typing.cast("type", arg)):
                return True, value
            continue
        found, result = _try(arg, value, key)
        if found:
            return True, result
    return False, None


def _try_sequence(origin: Any, args: tuple[Any, ...], value: Any, key: str) -> tuple[bool, Any]:
    if not isinstance(value, list | tuple):
        return False, None
    if origin is list or (len(args) == 2 and args[1] is Ellipsis):
        hints = [args[0]] * len(value)
    elif len(args) == len(value):
        hints = list(args)
    else:
        return False, None
    return True, origin(
        _convert(hint, item, f"{key}[{i}]") for i, (hint, item) in enumerate(zip(hints, value, strict=True))
    )


def _try_mapping(args: tuple[Any, ...], value: Any, key: str) -> tuple[bool, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        return False, None
    hint = args[1] if args else Any
    return True, {name: _convert(hint, item, f"{key}.{name}") for name, item in value.items()}


def _untext(value: Any) -> Any:
    """In a free mapping nothing says what a key=value should be, so YAML decides, at every depth."""
    if isinstance(value, _Text):
        return _try_text(Any, value, "")[1]
    return {name: _untext(item) for name, item in value.items()} if isinstance(value, Mapping) else value


def _show(value: Any) -> str:
    text = repr(str(value) if isinstance(value, _Text) else value)
    return f"{text[:80]}..." if len(text) > 80 else text


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key and name else key or name


def _named(key: str) -> str:
    return key or "the configuration"

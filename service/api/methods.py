"""From the wire's `method` to a training method and checked hyperparameters. Torch-free, as the registry is."""

from __future__ import annotations

import dataclasses
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from core.config import ConfigError, fields_doc, json_schema
from core.nearest import choices, nearest
from service.api.errors import APIError, bad_request
from service.api.schemas.resources import CreateJob
from trainers.config import DEFAULT_METHOD, RunConfig, parse_run
from trainers.registry import METHODS

OPENAI = {"n_epochs": "epochs", "batch_size": "batch_size", "learning_rate_multiplier": "learning_rate_multiplier"}
"""OpenAI's names of three hyperparameters, and ours. Each takes "auto"."""

AUTO = "auto"
_OURS = frozenset(
    {
        *("model", "train_file", "eval_file", "output_dir", "seed", "epochs", "threads", "heartbeat_seconds"),
        *("start", "start_name"),
    }
)
_RANGES = {"n_epochs": (1, 50), "batch_size": (1, 256)}


def run_fields() -> frozenset[str]:
    """Fields of a run file that a request may set as hyperparameters."""
    return frozenset(field.name for field in dataclasses.fields(RunConfig)) - _OURS


def chosen(wanted: CreateJob) -> tuple[str, dict[str, Any]]:
    """The method's name and the hyperparameters as asked.

    Args:
        wanted: The request.

    Returns:
        Name in METHODS, and hyperparameters, not checked yet.

    Raises:
        APIError: 400 for a method that does not exist, or a malformed `method`.
    """
    if wanted.method is None:
        return DEFAULT_METHOD, dict(wanted.hyperparameters or {})
    if wanted.hyperparameters is not None:
        raise bad_request("Give hyperparameters inside method, not beside it.", param="hyperparameters")
    kind = wanted.method.type
    name = DEFAULT_METHOD if kind == "supervised" else kind
    if name not in METHODS:
        meant = choices(kind, [*METHODS, "supervised"])
        raise bad_request(
            f"There is no method {kind[:64]!r}; {meant} (which means {DEFAULT_METHOD}).",
            param="method.type",
            code="unknown_method",
        )
    extra = {key: value for key, value in (wanted.method.model_extra or {}).items() if value is not None}
    settings = extra.pop(kind, {})
    for key in extra:
        message = f"method holds settings of {key[:64]!r}, but its type is {kind!r}."
        raise bad_request(message, param=f"method.{key[:64]}", code="unsupported_parameter")
    if not isinstance(settings, dict) or set(settings) - {"hyperparameters"}:
        raise bad_request(f'method.{kind} must be {{"hyperparameters": {{...}}}}.', param=f"method.{kind}")
    hyperparameters = settings.get("hyperparameters")
    if hyperparameters is None:
        return name, {}
    if not isinstance(hyperparameters, dict):
        raise bad_request("hyperparameters must be an object.", param=f"method.{kind}.hyperparameters")
    return name, dict(hyperparameters)


def check(
    name: str, hyperparameters: dict[str, Any], *, where: str, validated: bool, start: Path | None = None
) -> dict[str, Any]:
    """The hyperparameters to store: what was asked, checked, with "auto" for OpenAI's three where nothing was asked.

    Args:
        name: A name in METHODS.
        hyperparameters: As asked.
        where: Dotted name of the object that held them, for errors.
        validated: Whether the job has a validation file; some settings need one.
        start: Folder of the adapter that the job goes on with, which fixes some settings.

    Returns:
        What to store as the job's resolved hyperparameters; those that the start fixes are among them.

    Raises:
        APIError: 400 naming the hyperparameter, or the model where the start itself cannot be used.
    """
    own = {field.name for field in dataclasses.fields(METHODS[name].config)}
    common = run_fields()
    content: dict[str, Any] = {"model": "m", "train_file": "t", "output_dir": "o"}
    if validated:
        content["eval_file"] = "e"
    if start is not None:
        content["start"] = str(start)
    method: dict[str, Any] = {"name": name}
    for key, value in hyperparameters.items():
        param = f"{where}.{key[:64]}"
        if key in OPENAI:
            if value == AUTO or value is None:
                continue
            _check_range(key, value, param)
            content[OPENAI[key]] = value
        elif key in own:
            method[key] = value
        elif key in common:
            content[key] = value
        else:
            raise bad_request(
                f"Unknown hyperparameter {key[:64]!r} of {name}; {_known(key, sorted({*OPENAI, *own, *common}))}.",
                param=param,
                code="unknown_hyperparameter",
            )
    try:
        run = parse_run({**content, "method": method})
    except (ConfigError, ValueError) as error:
        raise _refused(error, hyperparameters, where, start) from None
    if run.method.quant(run.settings) == "bnb-nf4" and find_spec("bitsandbytes") is None:
        raise bad_request(
            "base bnb-nf4 needs bitsandbytes, which this server's environment does not have: its administrator "
            "installs it with `pip install -c constraints.txt -e '.[bnb]'`; base none trains without it.",
            param=f"{where}.base",
            code="extra_not_installed",
        )
    asked = {key: value for key, value in hyperparameters.items() if value is not None}
    fixed = {key: value for key, value in run.as_dict()["method"].items() if run.origin[f"method.{key}"] == "start"}
    return {**dict.fromkeys(OPENAI, AUTO), **fixed, **asked}


def _known(key: str, names: list[str]) -> str:
    """The nearest name alone, since there are some fifty; all of them where none is near."""
    close = nearest(key, names)
    return (
        choices(key, names) if close is None else f"did you mean {close}? docs/configuration.md lists all {len(names)}"
    )


def _check_range(key: str, value: Any, param: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise bad_request(f'{key} must be a number or "auto".', param=param)
    if key in _RANGES:
        least, most = _RANGES[key]
        if not isinstance(value, int) or not least <= value <= most:
            raise bad_request(f'{key} must be a whole number from {least} to {most}, or "auto".', param=param)
    elif not 0 < value < float("inf"):
        raise bad_request(f'{key} must be a positive number, or "auto".', param=param)


def _refused(error: ValueError, asked: dict[str, Any], where: str, start: Path | None) -> APIError:
    key = error.key.removeprefix("method.") if isinstance(error, ConfigError) else ""
    if key == "start":
        reason = str(error).removeprefix("start: ").replace(str(start), "it")
        return bad_request(f"The model cannot be trained on: {reason}.", param="model", code="model_not_usable")
    if key == "name":
        return bad_request(f"{error}.", param="method")
    if key in ("", "method"):  # a check across fields: it says which in words
        key = next((word for word in re.findall(r"\w+", str(error)) if word in asked), "")
    return bad_request(f"{error}.", param=f"{where}.{key}" if key else where)


def schema() -> dict[str, Any]:
    """JSON Schema of `method`, made from the registry: every method with its hyperparameters and their descriptions."""
    names = ["supervised", *METHODS]
    properties: dict[str, Any] = {"type": {"type": "string", "enum": names}}
    for name in names:
        method = METHODS[DEFAULT_METHOD if name == "supervised" else name]
        own = json_schema(method.config).get("properties", {})
        shared = {key: value for key, value in json_schema(RunConfig)["properties"].items() if key in run_fields()}
        documented = fields_doc(RunConfig)
        openai = {
            key: {
                "anyOf": [{"const": AUTO}, {"type": "number", "exclusiveMinimum": 0}]
                if key not in _RANGES
                else [{"const": AUTO}, {"type": "integer", "minimum": _RANGES[key][0], "maximum": _RANGES[key][1]}],
                "description": documented[ours].doc,
                "default": AUTO,
            }
            for key, ours in OPENAI.items()
        }
        hyperparameters = {"type": "object", "properties": {**shared, **own, **openai}, "additionalProperties": False}
        properties[name] = {
            "type": "object",
            "description": method.summary,
            "properties": {"hyperparameters": hyperparameters},
            "additionalProperties": False,
        }
    return {"type": "object", "required": ["type"], "properties": properties, "additionalProperties": False}

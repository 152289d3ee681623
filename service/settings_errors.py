"""What to say about settings that are not valid: where each came from, and the nearest name for one that is unknown."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ValidationError

from core.nearest import choices, nearest

PREFIX = "GRADHELM_"
OTHER_VARIABLES = frozenset(
    {
        # Read by the client commands, ...
        *("GRADHELM_URL", "GRADHELM_API_KEY"),
        # ... by model pulls, ...
        *("GRADHELM_WHEEL_DIR", "GRADHELM_HUB_HOSTS"),
        # ... by the benchmarks and the demo, ...
        *("GRADHELM_EVAL_DATA", "GRADHELM_DEMO_HOME"),
        # ... and set for what the server starts.
        "GRADHELM_JOB_ID",
    }
)
"""Variables of ours that are no settings of the server."""
_SERVICE_LINK = re.compile(
    r"GRADHELM(_[A-Z0-9]+)*_(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?|PORT_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
_ADDRESS = re.compile(r"(tcp|udp|sctp)://\S+")


def is_service_link(name: str, value: str) -> bool:
    """Whether Kubernetes set a variable, as it does for each Service in a pod's namespace, whose name may be ours.

    Args:
        name: the variable, ``GRADHELM_SERVICE_HOST`` or ``GRADHELM_PORT``.
        value: what it holds; ``GRADHELM_PORT`` is a setting too, unless it is ``tcp://10.0.0.1:8000``.

    Returns:
        True where nothing of the server is meant.
    """
    if name.endswith("_PORT") and _ADDRESS.fullmatch(value):
        return True
    return _SERVICE_LINK.fullmatch(name) is not None


def variables(model: type[BaseModel], prefix: str = PREFIX) -> Iterator[str]:
    """Names of the environment variables that a settings model reads.

    Args:
        model: the settings, or a group of them.
        prefix: what stands before a field's name.

    Yields:
        str: ``GRADHELM_PORT``, ``GRADHELM_ENGINE``, ``GRADHELM_ENGINE__ROWS``...
    """
    for name, field in model.model_fields.items():
        yield f"{prefix}{name.upper()}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from variables(field.annotation, f"{prefix}{name.upper()}__")


def check_environment(model: type[BaseModel], environment: Mapping[str, str]) -> None:
    """Refuse variables that look like settings of ours and are read by nothing.

    Args:
        model: the settings.
        environment: the variables.

    Raises:
        ValueError: naming the first, and the nearest that exists.
    """
    known = {*variables(model), *OTHER_VARIABLES}
    for name in sorted(environment):
        if name.upper().startswith(PREFIX) and name.upper() not in known:
            if is_service_link(name.upper(), environment[name]):
                continue
            # The prefix is left out: with it, any two names would be near each other.
            close = nearest(name[len(PREFIX) :], [one.removeprefix(PREFIX) for one in sorted(known)])
            meant = "" if close is None else f"did you mean {PREFIX}{close}? "
            raise ValueError(
                f"nothing reads the environment variable {name}; {meant}docs/configuration.md lists the settings. "
                f"Correct it, or take it away: `unset {name}`"
            )


def explain(model: type[BaseModel], error: ValidationError, file: Path | None) -> str:
    """One line for each thing that is wrong.

    Args:
        model: the settings.
        error: what pydantic found.
        file: the settings file, if there is one.

    Returns:
        Where each value came from, what is wrong with it, and for a name that does not exist the nearest that does.
    """
    lines = []
    environment = {name.upper() for name in os.environ}
    for one in error.errors():
        path = [str(part) for part in one["loc"]]
        variable = PREFIX + "__".join(path).upper()
        source = f"{file}: " if file is not None and variable not in environment else ""
        dotted = ".".join(path) if source or variable not in environment else variable
        if one["type"] == "extra_forbidden":
            group = "".join(f"{part}." for part in path[:-1])
            meant = choices(path[-1], _group(model, path[:-1]).model_fields, prefix=group)
            lines.append(f"{source}there is no setting {'.'.join(path)}; {meant}")
        else:
            # A database's address holds its password.
            given = "" if path[:1] == ["database_url"] else f", and {one['input']!r:.60} is not"
            reason = str(one["msg"]).removeprefix("Value error, ")
            lines.append(f"{source}{dotted}: {reason[:1].lower()}{reason[1:]}{given}")
    return "; ".join(lines)


def _group(model: type[BaseModel], path: Sequence[str]) -> type[BaseModel]:
    for part in path:
        field = model.model_fields.get(part)
        if field is None or not isinstance(field.annotation, type) or not issubclass(field.annotation, BaseModel):
            break
        model = field.annotation
    return model

"""What there is to document, read from the running code: settings, routes, commands, metrics, error codes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from docs.codes import error_codes

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class Setting:
    """One field of a configuration."""

    name: str
    type: str
    default: str
    doc: str


@dataclass(frozen=True, slots=True)
class Group:
    """The settings of one configuration, and what they are for."""

    title: str
    doc: str
    settings: tuple[Setting, ...]


@dataclass(frozen=True, slots=True)
class Route:
    """One method on one path."""

    method: str
    path: str
    scope: str
    doc: str


@dataclass(frozen=True, slots=True)
class Option:
    """One option or argument of a command."""

    names: tuple[str, ...]
    value: str
    default: str
    doc: str


@dataclass(frozen=True, slots=True)
class Command:
    """One command of the command line."""

    name: str
    doc: str
    options: tuple[Option, ...]


@dataclass(frozen=True, slots=True)
class Metric:
    """One time series."""

    name: str
    kind: str
    labels: tuple[str, ...]
    doc: str


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything that the pages must name."""

    settings: Mapping[str, Group]
    routes: tuple[Route, ...]
    commands: tuple[Command, ...]
    metrics: tuple[Metric, ...]
    codes: Mapping[str, set[str]]


def collect(root: Path = ROOT) -> Facts:
    """All facts; error codes come from the sources under ``root``, the rest from the imported packages."""
    return Facts(
        settings=dict(settings()),
        routes=tuple(routes()),
        commands=tuple(commands()),
        metrics=tuple(metrics()),
        codes=error_codes(root),
    )


def settings() -> Iterator[tuple[str, Group]]:
    """Every configuration by the name of its block."""
    from service.settings import Settings
    from steering.config import FitConfig
    from trainers.config import RunConfig
    from trainers.registry import METHODS

    yield "service", Group("Server", _first(Settings.__doc__), tuple(_pydantic(Settings)))
    yield "run", Group("Run file", _first(RunConfig.__doc__), tuple(_dataclass(RunConfig)))
    for name, method in METHODS.items():
        title = f"Method `{name}` (arXiv {method.paper})"
        yield f"method-{name}", Group(title, method.summary, tuple(_dataclass(method.config)))
    yield "fit", Group("Fit file", _first(FitConfig.__doc__), tuple(_dataclass(FitConfig)))


def _dataclass(cls: type) -> Iterator[Setting]:
    from core.config import fields_doc

    for name, field in fields_doc(cls).items():
        yield Setting(name, field.type, "required" if field.required else _shown(field.default), field.doc)


def _pydantic(cls: Any, prefix: str = "") -> Iterator[Setting]:
    from core.config_docs import describe
    from core.home import home

    for name, field in cls.model_fields.items():
        if hasattr(field.annotation, "model_fields"):
            yield from _pydantic(field.annotation, f"{prefix}{name}.")
            continue
        default = (
            "~/.gradhelm" if field.default_factory is home else _shown(field.get_default(call_default_factory=True))
        )
        yield Setting(f"{prefix}{name}", describe(field.annotation), default, field.description or "")


class _Idle:
    """A scheduler for an app that is looked at and never started."""

    def start(self) -> None:
        """Nothing."""

    def stop(self, *, end_runs: bool = False, seconds: float = 60.0) -> None:
        """Nothing."""

    def wake(self) -> None:
        """Nothing."""


def routes() -> Iterator[Route]:
    """Every route of the app, with the scope that its key needs."""
    from fastapi.routing import iter_route_contexts

    from service.api.deps import scope_of
    from service.app import create_app
    from service.engines.fake import FakeEngine
    from service.settings import Settings

    for route in iter_route_contexts(create_app(Settings(), engine=FakeEngine(), scheduler=_Idle()).routes):
        path = route.path_format or route.path or str(route)
        for method in sorted((route.methods or {"any"}) - {"HEAD"}):
            scope = scope_of(route.endpoint) if route.endpoint else "unknown"
            yield Route(method, path, scope or "none", _first(getattr(route.endpoint, "__doc__", "")))


def commands() -> Iterator[Command]:
    """Every command with its options, out of the command line itself."""
    import typer

    from service.cli import app

    yield from _commands(typer.main.get_command(app), ())


def _commands(command: Any, path: tuple[str, ...]) -> Iterator[Command]:
    if hasattr(command, "commands"):
        for name, child in command.commands.items():
            yield from _commands(child, (*path, name))
        return
    options = tuple(_option(param) for param in command.params if param.name != "help")
    yield Command(" ".join(path), _first(command.help), options)


def _option(param: Any) -> Option:
    argument = param.param_type_name == "argument"
    flag = bool(getattr(param, "is_flag", False))
    value = (
        "" if flag or argument else (param.metavar or param.bare_type().removeprefix("list[").removesuffix("]").upper())
    )
    default = "required" if param.required else ("" if flag or param.default is None else str(param.default))
    names = (param.metavar or param.name.upper(),) if argument else tuple(param.opts)
    doc = (getattr(param, "help", "") or "").strip()
    if getattr(param, "envvar", None):
        doc += f" Environment: `{param.envvar}`."
    return Option(names, value, default, doc)


def metrics() -> Iterator[Metric]:
    """Every metric of the server's registry."""
    from prometheus_client.metrics import MetricWrapperBase

    from service.metrics import Metrics

    for metric in vars(Metrics()).values():
        if isinstance(metric, MetricWrapperBase):
            described = next(iter(metric.describe()))
            name = f"{described.name}_total" if described.type == "counter" else described.name
            # The client offers no public way to the names of labels that have no values yet.
            yield Metric(name, described.type, tuple(metric._labelnames), described.documentation)


def _first(text: str | None) -> str:
    """The first paragraph on one line."""
    return " ".join((text or "").strip().partition("\n\n")[0].split())


def _shown(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list) and not value:
        return "none"
    return str(value)

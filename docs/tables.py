"""Turns facts into the generated parts of the pages: Markdown that reads well as text too."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from docs.facts import Command, Facts, Group

# Options that every command of a kind has are described once, above the commands.
SHARED = ("--url", "--key", "--json")


def blocks(facts: Facts) -> dict[str, str]:
    """Every generated block by name: ``settings-<name>``, ``routes``, ``commands``, ``metrics``, ``row-codes``,
    ``optimizer-costs``."""
    made = {f"settings-{name}": _settings(group) for name, group in facts.settings.items() if "method-" not in name}
    groups = [group for name, group in facts.settings.items() if "method-" in name]
    made["settings-methods"] = "\n\n".join(
        f"### {group.title}\n\n{group.doc}\n\n{_settings(group)}" for group in groups
    )
    made["routes"] = _table(
        ("method and path", "scope", "what it does"),
        ((f"`{route.method} {route.path}`", route.scope, _cell(route.doc)) for route in facts.routes),
    )
    made["commands"] = "\n\n".join(_commands(facts.commands))
    made["metrics"] = _table(
        ("metric", "kind", "labels", "meaning"),
        ((f"`{one.name}`", one.kind, ", ".join(one.labels) or "-", one.doc) for one in facts.metrics),
    )
    made["row-codes"] = _row_codes()
    made["pair-codes"] = _pair_codes()
    made["fit-methods"] = _fit_methods()
    made["optimizer-costs"] = _optimizer_costs()
    return made


def _settings(group: Group) -> str:
    rows = ((f"`{one.name}`", _cell(one.type), f"`{one.default}`", _cell(one.doc)) for one in group.settings)
    return _table(("setting", "values", "default", "meaning"), rows)


def _commands(commands: Iterable[Command]) -> Iterator[str]:
    for command in commands:
        own = [option for option in command.options if option.names[0] not in SHARED]
        shared = [option.names[0] for option in command.options if option.names[0] in SHARED]
        lines = [f"### `gradhelm {command.name}`", "", command.doc, ""]
        for option in own:
            name = ", ".join(f"`{name}`" for name in option.names)
            value = f" `{option.value}`" if option.value else ""
            default = {"": "", "required": " (required)"}.get(option.default, f" (default `{option.default}`)")
            lines.append(f"- {name}{value}{default}: {option.doc}".rstrip(": "))
        if shared:
            lines.append(f"- and {', '.join(f'`{name}`' for name in shared)}")
        yield "\n".join(lines)


def _row_codes() -> str:
    from core.data.rules import CODES, WARNINGS

    rows = [(f"`{code}`", "error", _cell(text)) for code, text in CODES.items()]
    rows += [(f"`{code}`", "warning", _cell(text)) for code, text in WARNINGS.items()]
    return _table(("code", "kind", "meaning"), rows)


def _pair_codes() -> str:
    from steering.pairs import CODES

    return _table(("code", "meaning"), ((f"`{code}`", _cell(text)) for code, text in CODES.items()))


def _fit_methods() -> str:
    from steering.registry import METHODS

    rows = ((f"`{one.name}`", one.paper, _cell(one.summary)) for one in METHODS.values())
    return _table(("method", "arXiv", "what it does"), rows)


def _optimizer_costs() -> str:
    from docs.costs import SIZES, table

    return _table(("method", "bytes for an (m, n) matrix, m >= n", *(size.name for size in SIZES)), table())


def _table(heading: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(heading) + " |", "|" + "---|" * len(heading)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def _cell(text: str) -> str:
    """Text that stays inside its table cell."""
    return " ".join(text.split()).replace("|", "\\|")

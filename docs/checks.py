"""What must hold for the documentation. Each check takes what it judges, so that tests can hand it a broken copy."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from docs.facts import Facts
from docs.generate import BLOCK, pages, stale
from service.settings_errors import OTHER_VARIABLES

MAX_LINES = 500
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```", re.M | re.S)
MAKE = re.compile(r"\bmake ((?:[a-z][a-z-]*\s?)+)")
GRADHELM = re.compile(r"\bgradhelm ([a-z]+)(?: ([a-z]+))?((?: +(?:--?[a-z][\w-]*|[^-`\n|&;#][^\s`\n|&;#]*))*)")


def undocumented(root: Path, facts: Facts) -> Iterator[str]:
    """Names that no page mentions, and settings, routes, commands and metrics that say nothing about themselves."""
    page = {name: _text(root / "docs" / f"{name}.md") for name in ("configuration", "api", "cli", "errors", "metrics")}
    for name, group in facts.settings.items():
        for one in group.settings:
            if not one.doc.strip():
                yield f"setting {name}.{one.name} has no description: write one under (or into) the field"
            if f"`{one.name}`" not in page["configuration"]:
                yield f"setting {name}.{one.name} is not in docs/configuration.md"
    for route in facts.routes:
        if not route.doc.strip():
            yield f"route {route.method} {route.path} has no docstring"
        if f"`{route.method} {route.path}`" not in page["api"]:
            yield f"route {route.method} {route.path} is not in docs/api.md"
    for command in facts.commands:
        if not command.doc.strip():
            yield f"command {command.name} has no docstring"
        if f"`gradhelm {command.name}`" not in page["cli"]:
            yield f"command {command.name} is not in docs/cli.md"
        section = page["cli"].partition(f"### `gradhelm {command.name}`\n")[2].partition("\n###")[0]
        for option in command.options:
            if not option.doc.strip():
                yield f"command {command.name}: {option.names[0]} has no help text"
            yield from (
                f"command {command.name}: {name} is not in docs/cli.md"
                for name in option.names
                if f"`{name}`" not in section
            )
    for metric in facts.metrics:
        if not metric.doc.strip():
            yield f"metric {metric.name} has no description"
        if f"`{metric.name}`" not in page["metrics"]:
            yield f"metric {metric.name} is not in docs/metrics.md"
    for code, files in facts.codes.items():
        if f"| `{code}` |" not in page["errors"]:
            yield f"error code {code} ({', '.join(sorted(files))}) is not in docs/errors.md"


def gone(root: Path, facts: Facts) -> Iterator[str]:
    """Error codes that the page explains and no source uses any more."""
    for code in re.findall(r"^\| `(\w+)` \|", _text(root / "docs" / "errors.md"), re.M):
        if code not in facts.codes:
            yield f"docs/errors.md explains {code}, which nothing uses"


def drifted(root: Path, made: Mapping[str, str]) -> Iterator[str]:
    """Generated parts that are not what the code says now, and blocks that no page shows."""
    for page in stale(root, made):
        yield f"{page.relative_to(root)} is stale: run `python -m docs`"
    shown = {match["name"] for page in pages(root) for match in BLOCK.finditer(_text(page))}
    yield from (f"no page shows the generated block {name}" for name in made if name not in shown)


def broken_links(root: Path) -> Iterator[str]:
    """Links inside the repository that lead nowhere, headings included."""
    for page in pages(root):
        for target in LINK.findall(FENCE.sub("", _text(page))):
            if re.match(r"[a-z]+:", target):
                continue
            name, _, heading = target.partition("#")
            file = (page.parent / name) if name else page
            if not file.resolve().is_relative_to(root.resolve()) or not file.exists():
                yield f"{page.relative_to(root)} links to {target}, which is not there"
            elif heading and heading not in _headings(_text(file)):
                yield f"{page.relative_to(root)} links to {target}: no such heading"


def unknown_commands(root: Path, facts: Facts) -> Iterator[str]:
    """Commands in the pages that do not exist: targets of make, commands and options of gradhelm, modules."""
    targets = set(re.findall(r"^([a-z][a-z-]*):", _text(root / "Makefile"), re.M))
    commands = {
        command.name: {name for option in command.options for name in option.names} for command in facts.commands
    }
    groups = {name.partition(" ")[0] for name in commands}
    for page in pages(root):
        where = page.relative_to(root)
        for code in _code(_text(page)):
            for match in MAKE.finditer(code):
                for word in match[1].split():
                    if word not in targets:
                        yield f"{where}: `make {word}` is no target of the Makefile"
            for match in GRADHELM.finditer(code):
                yield from (f"{where}: {problem}" for problem in _gradhelm(match, commands, groups))


def _gradhelm(match: re.Match[str], commands: Mapping[str, set[str]], groups: set[str]) -> Iterator[str]:
    first, second = match[1], match[2]
    name = next((one for one in (f"{first} {second}", first) if one in commands), None)
    if name is None:
        if first not in groups or second is not None:
            yield f"`gradhelm {first} {second or ''}`".rstrip(" `") + "` is no command"
        return
    for option in re.findall(r"(?<=\s)--?[a-z][\w-]*", match[3]):
        if option not in commands[name] | {"--help"}:
            yield f"`gradhelm {name}` has no option {option}"


def unknown_variables(root: Path, facts: Facts) -> Iterator[str]:
    """Environment variables in the pages, the Makefile and the Dockerfile that nothing reads."""
    settings = facts.settings["service"].settings
    known = {f"GRADHELM_{one.name.replace('.', '__').upper()}" for one in settings} | OTHER_VARIABLES
    for page in [*pages(root), root / "Makefile", root / "Dockerfile"]:
        for name in sorted(set(re.findall(r"\bGRADHELM_[A-Z_]+\b", _text(page)))):
            if name not in known and not name.endswith("_"):
                yield f"{page.relative_to(root)}: nothing reads {name}"


def long_files(root: Path, files: Iterable[str]) -> Iterator[str]:
    """Hand-written files that are too long to be read at once."""
    for name in files:
        path = root / name
        if path.suffix in {".py", ".sh"} and path.is_file():
            count = len(path.read_text(encoding="utf-8").splitlines())
            if count > MAX_LINES:
                yield f"{name} has {count} lines, more than {MAX_LINES}: split it by nouns"


def broken_arrows(root: Path) -> Iterator[str]:
    """What import-linter says against the imports of the packages under ``root``."""
    tool = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([tool, "--no-cache"], cwd=root, capture_output=True, text=True, check=False, timeout=120)
    if done.returncode != 0:
        yield done.stdout + done.stderr


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _code(text: str) -> list[str]:
    """Fenced blocks and inline code."""
    fenced = FENCE.findall(text)
    inline = re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
    return [*fenced, *inline]


def _headings(text: str) -> set[str]:
    """Anchors of a page's headings, as forges make them."""
    found = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in found}

"""Finds every error code in the source: what is passed as ``code`` anywhere, by name or by place.

The source is the only list that cannot be forgotten. A code is a string constant that reaches a parameter, field or
keyword called ``code`` or ``error_code``, a default of one, or a value of a table whose name ends in ``codes``.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

NAMES = ("code", "error_code")
# Functions whose code has another name.
ALSO = {"failure": "default"}
PACKAGES = ("core", "trainers", "steering", "service")
# The command line reads codes and makes none.
SKIPPED = ("service/cli",)
CODE = re.compile(r"[a-z]+(_[a-z0-9]+)*")


def sources(root: Path) -> dict[str, ast.Module]:
    """Syntax trees of the four packages by path, relative to ``root``."""
    found = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            name = path.relative_to(root).as_posix()
            if not name.startswith(SKIPPED):
                found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def error_codes(root: Path) -> dict[str, set[str]]:
    """Each error code and the files that use it."""
    trees = sources(root)
    places = dict(_places(trees.values()))
    found: dict[str, set[str]] = {}
    for name, tree in trees.items():
        for value in _values(tree, places):
            for code in _constants(value):
                if CODE.fullmatch(code):
                    found.setdefault(code, set()).add(name)
    return found


def _places(trees: Iterable[ast.Module]) -> Iterator[tuple[str, int]]:
    """Callables that take a code by position, with that position (``self`` not counted)."""
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name != "__init__":
                yield from _place(node.name, [one.arg for one in node.args.args])
            elif isinstance(node, ast.ClassDef):
                inits = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
                fields = [
                    n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
                ]
                yield from _place(node.name, [one.arg for one in inits[0].args.args] if inits else fields)


def _place(name: str, parameters: list[str]) -> Iterator[tuple[str, int]]:
    parameters = parameters[1:] if parameters[:1] in (["self"], ["cls"]) else parameters
    for wanted in NAMES:
        if wanted in parameters:
            yield name, parameters.index(wanted)


def _handed_up(kind: ast.ClassDef, places: dict[str, int]) -> Iterator[ast.expr]:
    """What a subclass gives to ``super().__init__`` at its base's place."""
    bases = [base.id for base in kind.bases if isinstance(base, ast.Name) and base.id in places]
    for node in ast.walk(kind):
        if bases and isinstance(node, ast.Call) and ast.unparse(node.func) == "super().__init__":
            yield from node.args[places[bases[0]] :][:1]


def _values(tree: ast.Module, places: dict[str, int]) -> Iterator[ast.expr]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            yield from _handed_up(node, places)
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            names = (*NAMES, ALSO.get(called, "code"))
            yield from (keyword.value for keyword in node.keywords if keyword.arg in names)
            place = places.get(called)
            if place is not None and place < len(node.args):
                yield node.args[place]
        elif isinstance(node, ast.arguments):
            named = [*node.posonlyargs, *node.args][-len(node.defaults) :] if node.defaults else []
            pairs = [*zip(named, node.defaults, strict=True), *zip(node.kwonlyargs, node.kw_defaults, strict=True)]
            yield from (default for one, default in pairs if one.arg in NAMES and default is not None)
        elif isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.expr):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            tables = [target.id.lower() for target in targets if isinstance(target, ast.Name)]
            if any(name.endswith("codes") for name in tables):
                yield from _entries(node.value)
            elif any(name in NAMES for name in tables):
                yield node.value


def _entries(value: ast.expr) -> list[ast.expr]:
    """Where a table holds its codes: in its values, or in its keys when the values are prose."""
    if not isinstance(value, ast.Dict):
        return [value]
    prose = not any(CODE.fullmatch(code) for entry in value.values for code in _constants(entry))
    return [key for key in value.keys if key is not None] if prose else value.values


def _constants(value: ast.expr) -> Iterator[str]:
    """Strings that an expression may be: a constant, a choice of two, an ``or``, the items of a collection."""
    if isinstance(value, ast.Constant) and isinstance(value.value, str):
        yield value.value
    elif isinstance(value, ast.IfExp):
        yield from _constants(value.body)
        yield from _constants(value.orelse)
    elif isinstance(value, ast.BoolOp):
        for part in value.values:
            yield from _constants(part)
    elif isinstance(value, ast.Tuple | ast.List | ast.Set):
        for part in value.elts:
            yield from _constants(part)
    elif isinstance(value, ast.Call):
        called = ast.unparse(value.func)
        for part in value.args if called == "str" else value.args[1:] if called.endswith(".get") else []:
            yield from _constants(part)

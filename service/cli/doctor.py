"""`gradhelm doctor`: is this machine ready, and if not, what to do."""

from __future__ import annotations

import typer
from rich.text import Text

from service.cli import checks
from service.cli.options import AsJson
from service.cli.output import emit, out

MARKS = {"ok": ("ok  ", "green"), "warn": ("warn", "yellow"), "fail": ("FAIL", "bold red")}


def doctor(as_json: AsJson = False) -> None:
    """Check this machine; exit code 1 when something must be repaired first."""
    found = []
    for check in checks.run():
        found.append(check)
        if not as_json:
            out().print(Text.assemble(MARKS[check.level], f"  {check.name:<12} {check.found}"))
            if check.advice:
                out().print(Text(f"      {'':<12} {check.advice}", style="dim"))
    if as_json:
        emit([check.as_dict() for check in found])
    if any(check.level == "fail" for check in found):
        raise typer.Exit(1)

"""The documentation says what the code does, all of it, and nothing else. Runs in `make check`.

Each check is shown twice: it finds nothing in this repository, and it does find what is put wrong in a copy.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from docs import checks
from docs.codes import error_codes
from docs.facts import ROOT, Command, Facts, Group, Metric, Option, Route, _dataclass, collect, routes, settings
from docs.tables import blocks


@pytest.fixture(scope="module")
def facts() -> Facts:
    return collect()


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The pages and the Makefile, to be spoiled; links to sources still lead somewhere."""
    for page in [*ROOT.glob("*.md"), ROOT / "Makefile", ROOT / "Dockerfile"]:
        shutil.copy(page, tmp_path)
    (tmp_path / "docs").mkdir()
    for page in (ROOT / "docs").glob("*.md"):
        shutil.copy(page, tmp_path / "docs")
    return tmp_path


def tracked() -> list[str]:
    """Hand-written files: what git tracks."""
    argv = ["git", "ls-files"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False, timeout=20)
    return done.stdout.splitlines() or [path.relative_to(ROOT).as_posix() for path in sources(ROOT)]


def sources(root: Path) -> Iterator[Path]:
    """Python files outside of hidden folders, for a tree without git."""
    for path in root.rglob("*.py"):
        if not any(part.startswith(".") for part in path.relative_to(root).parts):
            yield path


# What must hold here.


def test_everything_is_documented(facts: Facts) -> None:
    assert list(checks.undocumented(ROOT, facts)) == []


def test_no_error_code_is_explained_that_is_gone(facts: Facts) -> None:
    assert list(checks.gone(ROOT, facts)) == []


def test_generated_parts_are_what_the_code_says(facts: Facts) -> None:
    assert list(checks.drifted(ROOT, blocks(facts))) == []


def test_links_lead_somewhere() -> None:
    assert list(checks.broken_links(ROOT)) == []


def test_commands_in_the_pages_exist(facts: Facts) -> None:
    assert list(checks.unknown_commands(ROOT, facts)) == []


def test_variables_in_the_pages_are_read_by_something(facts: Facts) -> None:
    assert list(checks.unknown_variables(ROOT, facts)) == []


def test_no_file_is_too_long_to_read() -> None:
    assert list(checks.long_files(ROOT, tracked())) == []


def test_measured_results_in_the_readme_are_the_recorded_ones() -> None:
    from benchmarks import readme
    from benchmarks.report import RESULTS

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = readme.BLOCK.search(text)
    assert found is not None, "README.md has lost the place of its results"
    recorded = list(RESULTS.glob("*.json"))
    assert found[0] == found[1] + (readme.table() if recorded else "") + found[2], "run `python -m benchmarks.readme`"


def test_facts_are_not_empty(facts: Facts) -> None:
    """A check over nothing would always pass."""
    assert {"service", "run", "method-lora", "method-full", "fit"} <= set(facts.settings)
    assert all(group.settings for group in facts.settings.values())
    assert {("POST", "/v1/fine_tuning/jobs"), ("POST", "/v1/chat/completions"), ("GET", "/healthz")} <= {
        (route.method, route.path) for route in facts.routes
    }
    assert {"serve", "doctor", "chat", "jobs follow", "models export", "keys create"} <= {
        command.name for command in facts.commands
    }
    assert {"gradhelm_http_requests_total", "gradhelm_jobs"} <= {metric.name for metric in facts.metrics}
    assert {"model_not_found", "context_length_exceeded", "missing_messages_list", "non_finite"} <= set(facts.codes)


# What the checks find when it does not hold.


@dataclass(frozen=True, kw_only=True)
class NewConfig:
    """A configuration with a setting that says nothing."""

    told: int = 1
    """It has a description."""
    untold: int = 2


def test_a_setting_without_a_description_is_found(facts: Facts) -> None:
    group = Group("New", "", tuple(_dataclass(NewConfig)))
    found = list(checks.undocumented(ROOT, dataclasses.replace(facts, settings={**facts.settings, "new": group})))
    assert "setting new.untold has no description: write one under (or into) the field" in found
    assert "setting new.untold is not in docs/configuration.md" in found
    assert "setting new.told has no description: write one under (or into) the field" not in found


def test_a_method_in_the_registry_is_a_group_of_settings(facts: Facts, monkeypatch: pytest.MonkeyPatch) -> None:
    from trainers import registry

    added = dataclasses.replace(registry.METHODS["lora"], name="new", config=NewConfig)
    monkeypatch.setattr(registry, "METHODS", {**registry.METHODS, "new": added})
    found = list(checks.undocumented(ROOT, dataclasses.replace(facts, settings=dict(settings()))))
    assert "setting method-new.untold is not in docs/configuration.md" in found


def test_a_route_of_the_app_without_a_docstring_is_found(facts: Facts, monkeypatch: pytest.MonkeyPatch) -> None:
    from service import app

    create = app.create_app

    def with_one_more(*arguments: Any, **named: Any) -> FastAPI:
        made = create(*arguments, **named)
        made.add_api_route("/v1/new", lambda: None, methods=["PUT"])
        return made

    monkeypatch.setattr(app, "create_app", with_one_more)
    found = list(checks.undocumented(ROOT, dataclasses.replace(facts, routes=tuple(routes()))))
    assert [problem for problem in found if "PUT" in problem] == [
        "route PUT /v1/new has no docstring",
        "route PUT /v1/new is not in docs/api.md",
    ]


NEW: dict[str, Callable[[Facts], Facts]] = {
    "route POST /v1/new has no docstring": lambda facts: dataclasses.replace(
        facts, routes=(*facts.routes, Route("POST", "/v1/new", "read", ""))
    ),
    "route POST /v1/new is not in docs/api.md": lambda facts: dataclasses.replace(
        facts, routes=(*facts.routes, Route("POST", "/v1/new", "read", "It has a docstring."))
    ),
    "command jobs new is not in docs/cli.md": lambda facts: dataclasses.replace(
        facts, commands=(*facts.commands, Command("jobs new", "New.", ()))
    ),
    "command doctor: --new is not in docs/cli.md": lambda facts: dataclasses.replace(
        facts, commands=(Command("doctor", "Check.", (Option(("--new",), "", "", "New."),)),)
    ),
    "command doctor: --json has no help text": lambda facts: dataclasses.replace(
        facts, commands=(Command("doctor", "Check.", (Option(("--json",), "", "", ""),)),)
    ),
    "metric gradhelm_new is not in docs/metrics.md": lambda facts: dataclasses.replace(
        facts, metrics=(*facts.metrics, Metric("gradhelm_new", "gauge", (), "New."))
    ),
    "error code new_code (service/new.py) is not in docs/errors.md": lambda facts: dataclasses.replace(
        facts, codes={**facts.codes, "new_code": {"service/new.py"}}
    ),
}


@pytest.mark.parametrize("problem", NEW)
def test_what_is_new_and_not_documented_is_found(problem: str, facts: Facts) -> None:
    assert problem in list(checks.undocumented(ROOT, NEW[problem](facts)))


def test_an_explanation_that_outlived_its_code_is_found(copy: Path, facts: Facts) -> None:
    page = copy / "docs" / "errors.md"
    page.write_text(page.read_text() + "\n| `bygone_code` | 400 | it was once |\n")
    assert list(checks.gone(copy, facts)) == ["docs/errors.md explains bygone_code, which nothing uses"]


def test_a_table_that_was_edited_by_hand_is_found(copy: Path, facts: Facts) -> None:
    page = copy / "docs" / "api.md"
    page.write_text(page.read_text().replace("| `GET /healthz` |", "| `GET /health` |"))
    assert list(checks.drifted(copy, blocks(facts))) == ["docs/api.md is stale: run `python -m docs`"]


def test_a_block_that_no_page_shows_is_found(copy: Path, facts: Facts) -> None:
    page = copy / "docs" / "metrics.md"
    page.write_text("# Metrics\n")
    assert list(checks.drifted(copy, blocks(facts))) == ["no page shows the generated block metrics"]


@pytest.mark.parametrize(
    ("link", "problem"),
    [
        ("[x](docs/missing.md)", "which is not there"),
        ("[x](docs/api.md#no-such-part)", "no such heading"),
        ("[x](#no-such-part)", "no such heading"),
        ("[x](../outside.md)", "which is not there"),
    ],
)
def test_a_broken_link_is_found(tmp_path: Path, link: str, problem: str) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "api.md").write_text("# API\n\n## Jobs and more\n")
    (tmp_path.parent / "outside.md").write_text("# Outside\n")
    (tmp_path / "README.md").write_text(
        f"# Top\n\n[ok](docs/api.md#jobs-and-more) [web](https://example.org)\n\n{link}\n"
    )
    found = list(checks.broken_links(tmp_path))
    assert len(found) == 1
    assert problem in found[0]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("`make nonsense`", "`make nonsense` is no target"),
        ("```\nmake install check nonsense\n```", "`make nonsense` is no target"),
        ("`gradhelm nonsense`", "`gradhelm nonsense` is no command"),
        ("```\ngradhelm jobs nonsense ID\n```", "`gradhelm jobs nonsense` is no command"),
        ("`gradhelm jobs follow ID --nonsense`", "`gradhelm jobs follow` has no option --nonsense"),
        ("```\n.venv/bin/gradhelm serve --port 0 --nonsense 3\n```", "`gradhelm serve` has no option --nonsense"),
    ],
)
def test_a_command_that_does_not_exist_is_found(copy: Path, facts: Facts, text: str, problem: str) -> None:
    (copy / "NEW.md").write_text(f"# New\n\n`make test` and `gradhelm jobs` are fine.\n\n{text}\n")
    found = list(checks.unknown_commands(copy, facts))
    assert len(found) == 1
    assert found[0].startswith("NEW.md: ")
    assert problem in found[0]


def test_a_variable_that_nothing_reads_is_found(copy: Path, facts: Facts) -> None:
    (copy / "NEW.md").write_text("`GRADHELM_PORT=1`, `GRADHELM_ENGINE__ROWS=2`, `GRADHELM_ENGINE__COLUMNS=3`\n")
    assert list(checks.unknown_variables(copy, facts)) == ["NEW.md: nothing reads GRADHELM_ENGINE__COLUMNS"]


def test_a_long_file_is_found(tmp_path: Path) -> None:
    (tmp_path / "long.py").write_text("x = 1\n" * (checks.MAX_LINES + 1))
    (tmp_path / "short.py").write_text("x = 1\n" * checks.MAX_LINES)
    assert list(checks.long_files(tmp_path, ["long.py", "short.py", "gone.py"])) == [
        f"long.py has {checks.MAX_LINES + 1} lines, more than {checks.MAX_LINES}: split it by nouns"
    ]


CODES = """
class Refused(Exception):
    def __init__(self, status: int, code: str = "by_default") -> None: ...

class Narrower(Refused):
    def __init__(self) -> None:
        super().__init__(400, "from_subclass")

LOCAL_CODES = {404: "from_values"}
CODES = {"from_keys": "what it means, in prose"}

def fail(message: str, *, code: str | None = None) -> None:
    raise Refused(400, "by_place")

fail("No.", code="by_name" if LOCAL_CODES else "by_choice")
failure(None, default="by_another_name")
code = str(LOCAL_CODES.get("code") or "by_or")
"""


def test_codes_are_found_however_they_are_passed(tmp_path: Path) -> None:
    for package in ("core", "trainers", "steering", "service/cli"):
        (tmp_path / package).mkdir(parents=True)
    (tmp_path / "core" / "new.py").write_text(CODES)
    (tmp_path / "service" / "cli" / "reader.py").write_text('fail("x", code="not_ours")')
    assert set(error_codes(tmp_path)) == {
        *("by_default", "from_subclass", "from_values", "from_keys", "by_place", "by_name", "by_choice"),
        *("by_another_name", "by_or"),
    }


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the four packages with the settings of import-linter."""
    root = tmp_path_factory.mktemp("arrows")
    shutil.copy(ROOT / "pyproject.toml", root)
    for package in ("core", "trainers", "steering", "service"):
        shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    return root


@pytest.mark.parametrize(
    ("file", "line", "arrow"),
    [
        ("core/new_module.py", "import trainers.registry", r"core\.new_module -> trainers\.registry"),
        ("trainers/new_module.py", "from steering import registry", r"trainers\.new_module -> steering\.registry"),
        (
            "steering/new_module.py",
            "def f():\n    import service.settings",
            r"steering\.new_module -> service\.settings",
        ),
        ("service/new_module.py", "import demo.server", r"service\.new_module -> demo"),
        ("trainers/new_module.py", "import benchmarks.report", r"trainers\.new_module -> benchmarks"),
        ("core/new_module.py", "import docs.facts", r"core\.new_module -> docs"),
        ("steering/new_module.py", "from tests.chaos import standin", r"steering\.new_module -> tests"),
        ("core/new_module.py", "import fastapi, sqlalchemy", r"core\.new_module -> fastapi[\s\S]*-> sqlalchemy"),
        ("trainers/new_module.py", "def f():\n    from sqlite3 import dbapi2", r"trainers\.new_module -> sqlite3"),
        ("steering/new_module.py", "from pydantic import BaseModel", r"steering\.new_module -> pydantic"),
    ],
)
def test_a_broken_arrow_is_found(tree: Path, file: str, line: str, arrow: str) -> None:
    path = tree / file
    path.write_text(f"{line}\n")
    try:
        found = list(checks.broken_arrows(tree))
    finally:
        path.unlink()
    assert len(found) == 1
    assert re.search(arrow, found[0])


def test_an_unbroken_copy_has_no_broken_arrow(tree: Path) -> None:
    """So that the test above fails for the arrow, and not for the copy."""
    assert list(checks.broken_arrows(tree)) == []


def test_every_gradhelm_command_of_the_readme_is_one_that_the_command_line_takes() -> None:
    import typer

    from service.cli import app

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL))
    lines = [line for line in blocks.splitlines() if line.startswith("gradhelm ")]
    assert sum("--vector" in line for line in lines) >= 1 and sum("--system" in line for line in lines) >= 1
    for line in lines:
        command: Any = typer.main.get_command(app)
        words = shlex.split(line, comments=True)[1:]
        while hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
        command.make_context("gradhelm", words)


def test_every_claim_of_the_readme_says_what_it_measures() -> None:
    from benchmarks import readme

    told = {claim["id"] for path in readme.RESULTS.glob("*.json") for claim in json.loads(path.read_text())["claims"]}
    assert told <= readme.WHAT.keys(), "say in benchmarks/readme.py what a new claim measures"

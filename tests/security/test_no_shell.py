"""No shell, no eval, no pickle anywhere in the tree: read from the syntax, so nothing can be spelled around it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("core", "trainers", "steering", "service", "demo", "benchmarks", "docs")

MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib", "pty"}
CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "os.execl",
    "os.execlp",
    "os.spawnl",
    "os.spawnlp",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
    "asyncio.create_subprocess_shell",
    "torch.load",
    "torch.save",
    "torch.hub.load",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "yaml.load_all",
    "yaml.unsafe_load_all",
    "numpy.load",
    "np.load",
    "jinja2.Environment",
    "jinja2.Template",
}
# torch.compile and re.compile are methods of modules; only the built-in is meant.
ALLOWED: dict[str, set[str]] = {}


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return "?"


def findings(tree: ast.AST) -> Iterator[str]:
    """What is forbidden in a module, as words."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name] = alias.name
                if alias.name.split(".")[0] in MODULES:
                    yield f"import {alias.name}"
        elif isinstance(node, ast.ImportFrom):
            if (node.module or "").split(".")[0] in MODULES:
                yield f"from {node.module} import"
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = dotted(node.func)
        head, _, rest = called.partition(".")
        full = f"{names.get(head, head)}.{rest}" if rest else names.get(head, head)
        if full in CALLS or called in CALLS:
            yield full
        for keyword in node.keywords:
            value = keyword.value
            if keyword.arg == "shell" and not (isinstance(value, ast.Constant) and value.value is False):
                yield "shell="
            if keyword.arg == "trust_remote_code" and not (isinstance(value, ast.Constant) and value.value is False):
                yield "trust_remote_code="
            if keyword.arg in ("allow_pickle", "weights_only") and isinstance(value, ast.Constant):
                yield f"{keyword.arg}="


def files() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def test_the_tree_is_clean() -> None:
    assert len(files()) > 80
    bad = {}
    for path in files():
        name = path.relative_to(ROOT).as_posix()
        found = set(findings(ast.parse(path.read_text(encoding="utf-8")))) - ALLOWED.get(name, set())
        if found:
            bad[name] = found
    assert not bad


@pytest.mark.parametrize(
    "source",
    [
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "import subprocess as s\ns.run('ls', shell=flag)",
        "from os import system\nsystem('ls')",
        "from os import system as run\nrun('ls')",
        "import os\nos.popen('ls')",
        "eval('1')",
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load(p)",
        "from torch import load as read\nread(p)",
        "import yaml\nyaml.load(t, Loader=yaml.SafeLoader)",
        "from yaml import unsafe_load\nunsafe_load(t)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "from asyncio import create_subprocess_shell\ncreate_subprocess_shell('ls')",
        "import numpy as np\nnp.load(p)",
    ],
)
def test_the_test_can_fail(source: str) -> None:
    assert list(findings(ast.parse(source)))


@pytest.mark.parametrize(
    "source",
    [
        "import re\nre.compile('a')",
        "import torch\ntorch.compile(model)",
        "import subprocess\nsubprocess.run(['ls'], shell=False)",
        "model.eval()",
        "import yaml\nyaml.safe_load(t)",
        "from x import y\ny.from_pretrained(z, trust_remote_code=False)",
    ],
)
def test_what_is_fine_is_left_alone(source: str) -> None:
    assert not list(findings(ast.parse(source)))

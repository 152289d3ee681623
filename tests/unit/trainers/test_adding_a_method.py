"""A new method is a file of its own and one line in the registry; schema, command line and tests then know it."""

from __future__ import annotations

import difflib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
COPIED = ("trainers", "configs", "tests/unit/trainers", "tests/conftest.py", "tests/gguf_file.py", "pyproject.toml")

METHOD = '''
"""SGD with momentum on every weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trainers.method import Attached, Method, MethodConfig, TrainContext


@dataclass(frozen=True, kw_only=True, slots=True)
class SgdConfig(MethodConfig):
    """Settings of ``sgd``."""

    momentum: float = 0.9
    """Share of the last update that is repeated, in [0, 1)."""

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), not {self.momentum}")


def attach(model: Any, config: SgdConfig, context: TrainContext) -> Attached:
    """Makes every weight trainable."""
    import torch

    model.requires_grad_(True)
    return Attached(model, torch.optim.SGD(model.parameters(), lr=context.learning_rate, momentum=config.momentum))


METHOD = Method(
    name="sgd",
    summary="Every weight, with SGD.",
    paper="1609.04747",
    config=SgdConfig,
    attach=attach,
    makes="weights",
    learning_rate=1e-2,
)
'''

DEBUG_RUN = """
# SGD on the two-layer debug model.
#
#   python -m trainers configs/debug/sgd.yaml
model: tiny-llama
train_file: configs/debug/data/harbour.jsonl
eval_file: configs/debug/data/harbour-held-out.jsonl
output_dir: .gradhelm/runs/debug-sgd
method:
  name: sgd
max_length: 128
eval_every: 6
"""


def _files(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): path.read_text()
        for top in ("trainers", "configs", "tests")
        for path in (root / top).rglob("*")
        if path.suffix in (".py", ".yaml")
    }


def test_adding_a_method_takes_five_files_at_most_and_one_line(tmp_path: Path, tiny_llama: Path) -> None:
    for name in COPIED:
        source, target = ROOT / name, tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    before = _files(tmp_path)

    (tmp_path / "trainers" / "methods" / "sgd.py").write_text(METHOD.lstrip())
    (tmp_path / "configs" / "debug" / "sgd.yaml").write_text(DEBUG_RUN.lstrip())
    registry = tmp_path / "trainers" / "registry.py"
    registry.write_text(registry.read_text().replace('    "lora",\n', '    "lora",\n    "sgd",\n'))

    after = _files(tmp_path)
    assert len(after.keys() - before.keys()) <= 5
    changed = [
        line
        for name, text in before.items()
        for line in difflib.ndiff(text.splitlines(), after[name].splitlines())
        if line[0] in "+-"
    ]
    assert changed == ['+     "sgd",']

    # One interpreter for schema, command line and collection: importing torch is what takes the time.
    code = (
        "import json, pytest, trainers.registry, trainers.__main__ as entry\n"
        "print(json.dumps(trainers.registry.method_schema('sgd')))\n"
        "run = ['configs/debug/sgd.yaml', 'output_dir=out', 'max_steps=2', 'method.momentum=0.5']\n"
        "assert entry.main(run) == 0\n"
        "assert pytest.main(['--collect-only', '-q', '-W', 'ignore', 'tests/unit/trainers']) == 0\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    schema = json.loads(done.stdout.splitlines()[0])
    assert schema["properties"]["momentum"]["default"] == 0.9
    assert schema["properties"]["momentum"]["description"].startswith("Share of the last update")
    assert "done: the model is in " in done.stdout
    for test in (
        "test_two_runs_are_bitwise_equal[sgd]",
        "test_a_stop_anywhere_changes_nothing[sgd]",
        "test_debug_runs_train[sgd.yaml]",
        "test_every_method_has_a_debug_run",
    ):
        assert test in done.stdout


def test_a_name_that_does_not_fit_its_file_fails_loudly() -> None:
    from trainers.registry import _collect

    with pytest.raises(AssertionError, match="listed twice"):
        _collect(("full", "full"))

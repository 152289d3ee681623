"""A step is a step, however its rows are split into micro-batches and processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from core import checkpoint
from core.config_yaml import write_yaml
from core.models.load import load
from trainers.batch import collator
from trainers.dataset import read_examples
from trainers.loss import TokenLoss
from trainers.registry import METHODS

ROOT = Path(__file__).parents[3]
DATA = ROOT / "configs" / "debug" / "data" / "harbour.jsonl"
SPLITS = [(8, 1), (1, 8), (2, 4), (3, 3)]
# torch's Muon iterates in bfloat16, where the gradient's last bits decide how numbers round: losses drift more.
COARSE = {"muon": 4}
# Singular vectors with nearly equal values turn by more than the gradient's last bits.
# A derivative is the difference of two losses over twice the distance, here a hundredth of a per mille of them.
TURNED = {"galore": 1e-5, "mezo": 1e-3, "qzo": 1e-3}


GRADIENTS = [name for name, method in METHODS.items() if method.needs_gradients]


def _seen(output: Path, step: int = 1) -> torch.Tensor:
    """What an optimizer keeps of its first gradient, or of its first derivative."""
    tensors = checkpoint.load(output / "checkpoints" / f"step-{step:08d}").tensors
    return torch.cat([v.flatten() for k, v in sorted(tensors.items()) if k.endswith(("exp_avg", "window"))])


def _relative(one: list[float], other: list[float]) -> list[float]:
    return [(a - b) / b for a, b in zip(one, other, strict=True)]


@pytest.mark.parametrize("name", METHODS)
def test_one_by_eight_is_eight_by_one(name: str, train: Any, tmp_path: Path) -> None:
    def run(batch_size: int, accumulation: int) -> Any:
        output = str(tmp_path / f"{batch_size}x{accumulation}")
        return train(name, output_dir=output, batch_size=batch_size, accumulation=accumulation, max_steps=20)

    results = [run(*split) for split in SPLITS[:2]]
    size = "grad_norm" if name in GRADIENTS else "derivative"
    one, other = (result.of_kind("metric")[0][size] for result in results)
    assert other == pytest.approx(one, rel=TURNED.get(name, 1e-6))
    one, other = (result.losses for result in results)
    difference = _relative(other, one)
    assert max(map(abs, difference)) <= COARSE.get(name, 1) * 1e-5
    assert abs(sum(difference)) / len(difference) <= COARSE.get(name, 1) * 2e-6


def test_the_gradient_of_a_step_does_not_depend_on_the_split(tiny_llama: Path) -> None:
    loaded = load("tiny-llama")
    rows = read_examples(DATA, loaded.tokenizer, max_length=128, param="train_file")[:8]
    tokens = sum(row.trained for row in rows)
    token_loss = TokenLoss(loaded.model)
    collate = collator(pad_id=0, device=torch.device("cpu"))
    gradients = []
    for size in (8, 1, 3):
        loaded.model.zero_grad(set_to_none=True)
        for start in range(0, 8, size):
            (token_loss(**collate(rows[start : start + size]))[0] / tokens).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in loaded.model.parameters() if p.grad is not None]))
    for other in gradients[1:]:
        assert float((other - gradients[0]).norm()) <= 1e-6 * float(gradients[0].norm())


@pytest.mark.parametrize("name", METHODS)
def test_the_first_update_saw_the_same_gradient(name: str, train: Any, tmp_path: Path) -> None:
    moments = []
    for batch_size, accumulation in SPLITS:
        result = train(
            name,
            output_dir=str(tmp_path / f"{batch_size}x{accumulation}"),
            batch_size=batch_size,
            accumulation=accumulation,
            max_steps=1,
            clip_norm=0,
        )
        moments.append(_seen(result.output))
    for other in moments[1:3]:
        assert float((other - moments[0]).norm()) <= TURNED.get(name, 1e-6) * float(moments[0].norm())
    assert float((moments[3] - moments[0]).norm()) > 1e-3 * float(moments[0].norm()), "3 x 3 is a step of nine rows"


# Two more interpreters on two cores take 15 s and more; one method shows the default path, the slow run shows all.
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "lora" else pytest.mark.slow) for name in METHODS]
)
def test_two_processes_are_one_with_the_same_global_batch(name: str, train: Any, make_run: Any, tmp_path: Path) -> None:
    # Fifteen rows in steps of six: an epoch ends with three rows, so one process runs a filler.
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(DATA.read_text().splitlines(keepends=True)[:15]))
    settings = {"train_file": str(rows), "max_steps": 20, "accumulation": 3, "save_every": 1, "keep_checkpoints": 30}
    alone = train(name, output_dir=str(tmp_path / "one"), batch_size=2, **settings)
    run = make_run(name, output_dir=str(tmp_path / "two"), batch_size=1, **settings)
    file = tmp_path / "run.yaml"
    file.write_text(write_yaml(run.as_dict()))
    launched = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch"),
            *("--config_file", str(ROOT / "configs" / "accelerate" / "cpu2.yaml"), "--main_process_port", "0"),
            *("-m", "trainers", str(file)),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert launched.returncode == 0, launched.stderr[-4000:]
    two = type(alone)(0, tmp_path / "two", 0)
    assert two.of_kind("message")[0]["processes"] == 2
    difference = _relative(two.losses, alone.losses)
    assert len(difference) == 20
    assert max(map(abs, difference)) <= COARSE.get(name, 1) * 1e-5
    assert abs(sum(difference)) / 20 <= COARSE.get(name, 1) * 2e-6
    one, other = _seen(alone.output), _seen(two.output)
    assert float((other - one).norm()) <= TURNED.get(name, 1e-6) * float(one.norm())

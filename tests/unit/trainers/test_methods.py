"""Proofs that hold for every method in the registry."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from core.config_docs import fields_doc
from core.models.load import load
from trainers.method import TrainContext
from trainers.registry import METHODS, get_method, method_schema

CONTEXT: dict[str, Any] = {"learning_rate": 1e-3, "seed": 3, "activation_checkpointing": False, "mean": float}


@pytest.mark.parametrize("name", METHODS)
def test_two_runs_are_bitwise_equal(name: str, train: Any, tmp_path: Path) -> None:
    one, other = (train(name, output_dir=str(tmp_path / part), max_steps=4) for part in "ab")
    assert all(torch.equal(value, other.weights[key]) for key, value in one.weights.items())
    assert one.metrics == other.metrics


@pytest.mark.parametrize("name", METHODS)
def test_another_seed_is_another_run(name: str, train: Any, tmp_path: Path) -> None:
    one, other = (train(name, output_dir=str(tmp_path / str(seed)), max_steps=2, seed=seed) for seed in (0, 1))
    assert one.losses != other.losses


@pytest.mark.parametrize("name", METHODS)
def test_learns_the_debug_rows(name: str, train: Any) -> None:
    # The base is random and LoRA may not touch its embeddings, so it needs large updates here.
    settings, rate = {
        "lora": ({"alpha": 128.0}, 5e-3),
        "trion": ({"adam_ratio": 0.3}, 1e-2),
        "muon": ({"adam_ratio": 0.3}, 1e-2),
        "mezo": ({}, 6e-2),
        "qzo": ({}, 1e-1),
    }.get(name, ({}, 3e-3))
    # Along one direction of two hundred thousand at a time, sixty steps go a small part of the way.
    rows, reached = (4, 3.5) if METHODS[name].needs_gradients else (16, 7.05)
    result = train(
        {"name": name, **settings},
        max_steps=60,
        batch_size=rows,
        learning_rate=rate,
        schedule="cosine",
        log_every=60,
    )
    assert result.losses[0] > 6.5
    assert sum(result.losses[-4:]) / 4 < reached


@pytest.mark.parametrize("name", METHODS)
def test_the_artifact_is_what_was_trained(name: str, train: Any) -> None:
    result = train(name, max_steps=3)
    artifact = [event for event in result.of_kind("artifact") if event["artifact"] in ("adapter", "merged")][-1]
    assert artifact["logit_difference"] <= 1e-4
    assert (result.output / "artifact" / "manifest.json").is_file()


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.makes != "scales"])
def test_every_checkpoint_can_be_served(name: str, train: Any) -> None:
    result = train(name, max_steps=4, save_every=2)
    ids = torch.tensor([[5, 9, 11, 30]])
    logits = []
    for step in (2, 4):
        folder = result.output / "checkpoints" / f"step-{step:08d}"
        if METHODS[name].makes == "adapter":
            served = load("tiny-llama", adapter=folder / "adapter").model
        else:
            served = load(str(folder / "merged")).model
        with torch.no_grad():
            logits.append(served(input_ids=ids).logits)
    assert not torch.equal(logits[0], logits[1])


@pytest.mark.parametrize("name", METHODS)
def test_activation_checkpointing_gives_the_same_run(name: str, train: Any, tmp_path: Path) -> None:
    plain, recomputed = (
        train(name, output_dir=str(tmp_path / str(on)), max_steps=3, activation_checkpointing=on)
        for on in (False, True)
    )
    assert recomputed.losses == pytest.approx(plain.losses, rel=1e-6)
    for key, value in plain.weights.items():
        assert torch.allclose(recomputed.weights[key], value, atol=1e-6), key
    if name == "lora":
        trained = [value for key, value in recomputed.weights.items() if ".lora_B." in key]
        assert trained
        assert all(value.any() for value in trained)


@pytest.mark.parametrize("name", METHODS)
def test_packing_trains_on_every_token_once_an_epoch(name: str, train: Any, tmp_path: Path) -> None:
    plain = train(name, output_dir=str(tmp_path / "a"), max_steps=None, epochs=1)
    packed = train(
        name, output_dir=str(tmp_path / "b"), max_steps=None, epochs=1, pack=True, bucket=False, batch_size=1
    )
    assert packed.of_kind("progress")[-1]["trained_tokens"] == plain.of_kind("progress")[-1]["trained_tokens"]


def test_each_setting_of_each_method_has_a_description_in_the_schema() -> None:
    for name, method in METHODS.items():
        schema = method_schema(name)
        assert schema["additionalProperties"] is False
        assert schema["properties"].keys() == fields_doc(method.config).keys()
        assert all(setting["description"] for setting in schema["properties"].values())
        assert all("default" in setting for setting in schema["properties"].values())
        assert method.summary
        assert method.paper


def test_an_unknown_method_is_told_what_exists() -> None:
    with pytest.raises(ValueError, match="these exist: full, lora"):
        get_method("dpo")


def test_describing_methods_and_runs_needs_no_torch() -> None:
    code = (
        "import sys, trainers.registry, trainers.config, trainers.errors\n"
        "[trainers.registry.method_schema(name) for name in trainers.registry.METHODS]\n"
        "heavy = {'torch', 'transformers', 'peft', 'accelerate'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
    ("name", "settings", "idle"),
    [
        ("dct_adamw", {}, []),
        ("dct_adamw", {"density": 0.5, "rank": 8}, ["rank"]),
        ("dct_adamw", {"learn_gap": 50}, ["learn_steps"]),
        ("dct_adamw", {"basis": "learned", "learn_gap": 50}, []),
        ("dct_adamw", {"density": 1.0, "update_gap": 4}, ["update_gap,"]),
        ("trion", {"density": 0.5, "rank": 8}, ["rank"]),
        ("trion", {"learn_steps": 5}, ["learn_steps"]),
        ("galore", {"rank": 8}, []),
        ("galore", {"rank": 8, "density": 0.5}, ["density"]),
        ("mezo", {}, []),
        ("mezo", {"clip_quantile": 0.9}, ["clip_quantile"]),
        ("qzo", {}, []),
        ("qzo", {"eps": 1e-5, "eps_rel": 1e-2}, ["eps_rel"]),
    ],
)
def test_settings_without_effect_warn(name: str, settings: dict[str, Any], idle: list[str]) -> None:
    assert [line.split()[0] for line in METHODS[name].config(**settings).warnings()] == idle


@pytest.mark.parametrize("name", ["galore", "dct_adamw", "trion", "muon"])
def test_targets_choose_what_is_projected(name: str, tiny_llama: object) -> None:
    method, context = METHODS[name], TrainContext(**CONTEXT)
    attached = method.attach(load("tiny-llama").model, method.config(targets=("q_proj", "down_proj")), context)
    names = {p: name for name, p in attached.model.named_parameters()}
    groups = attached.optimizer.param_groups
    projected = {names[p] for group in groups if group.get("role") != "full" for p in group["params"]}
    assert projected == {name for name in names.values() if "q_proj" in name or "down_proj" in name}
    with pytest.raises(ValueError, match="linear layers"):
        method.attach(load("tiny-llama").model, method.config(targets=("nonsense",)), context)


@pytest.mark.parametrize("name", ["dct_adamw", "trion"])
def test_learned_bases_are_made_as_a_job_says(name: str, tiny_llama: object) -> None:
    method = METHODS[name]
    config = method.config(basis="learned", learn_steps=3, learn_gap=7)
    groups = method.attach(load("tiny-llama").model, config, TrainContext(**CONTEXT)).optimizer.param_groups
    assert all((group["learn_steps"], group["learn_gap"]) == (3, 7) for group in groups)

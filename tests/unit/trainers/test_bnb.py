"""LoRA on a 4-bit base, with the real bitsandbytes: `make test-bnb`.

On a CPU with AVX512-BF16 bitsandbytes repacks its layers in their first evaluation; several of these tests fail there
if it is let.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from core.config_yaml import write_yaml
from core.events import read
from core.models.load import Loaded, load
from trainers.dataset import read_examples
from trainers.errors import STOPPED, SUCCEEDED, RunError
from trainers.memory import plan
from trainers.method import TrainContext
from trainers.registry import METHODS

pytestmark = pytest.mark.bnb

ROOT = Path(__file__).parents[3]
DATA = ROOT / "configs" / "debug" / "data"
HELD_OUT = str(DATA / "harbour-held-out.jsonl")
CONTEXT = TrainContext(learning_rate=1e-3, seed=0, activation_checkpointing=False, mean=float)
FOUR: dict[str, Any] = {"name": "lora", "base": "bnb-nf4"}
IDS = torch.randint(3, 200, (2, 24), generator=torch.Generator().manual_seed(0))
LAYERS = 14
"""Seven linear layers in each of two blocks."""


def _quantised(model: torch.nn.Module) -> dict[str, Any]:
    """Layers in 4 bits, by their names in the plain model."""
    from bitsandbytes.nn import Linear4bit

    found = {n: m for n, m in model.named_modules() if isinstance(m, Linear4bit)}
    return {n.removeprefix("base_model.model.").removesuffix(".base_layer"): m for n, m in found.items()}


def _held(layer: Any) -> dict[str, torch.Tensor]:
    """All tensors that a layer's weight is made of."""
    state = layer.weight.quant_state
    return {
        "codes": layer.weight.data,
        "scales": state.absmax,
        "offset": state.offset,
        "table": state.code,
        "scales of scales": state.state2.absmax,
        "table of scales": state.state2.code,
    }


def _dequantised(layer: Any) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit

    weight: torch.Tensor = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return weight


def _attach(model: Any, **settings: Any) -> Any:
    torch.manual_seed(0)
    method = METHODS["lora"]
    return method.attach(model, method.config(**settings), CONTEXT)


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=IDS).logits
    return logits


def _loss(loaded: Loaded) -> float:
    """Mean loss per trained token of the debug rows, in nats."""
    rows = read_examples(DATA / "harbour.jsonl", loaded.tokenizer, max_length=128, param="train_file")
    total = 0.0
    with torch.no_grad():
        for row in rows:
            labels = torch.tensor([row.labels])
            total += float(loaded.model(input_ids=torch.tensor([row.input_ids]), labels=labels).loss) * row.trained
    return total / sum(row.trained for row in rows)


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_importing_bitsandbytes_breaks_nothing() -> None:
    argv = [sys.executable, "-W", "error", "-c", "import bitsandbytes"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    # Where a faster kernel would be of use, the library says that it has none.
    assert all("kernels" in line for line in done.stderr.splitlines())


def test_linear_layers_are_in_4_bits_and_nothing_else_is() -> None:
    four, exact = load("tiny-llama", quant="bnb-nf4").model, load("tiny-llama").model
    layers = _quantised(four)
    assert len(layers) == LAYERS
    weights = dict(exact.named_parameters())
    for name, parameter in four.named_parameters():
        weight = weights.pop(name)
        if name.removesuffix(".weight") not in layers:
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, weight), name
            continue
        assert parameter.dtype == torch.uint8
        assert parameter.numel() == weight.numel() // 2
        # NF4 has its widest gap, 0.304, between -1 and -0.696: no value is further than half of it from a code. The
        # scales have 8 bits of their own.
        blocks = weight.detach().reshape(-1, 64)
        error = (_dequantised(layers[name.removesuffix(".weight")]).reshape(-1, 64) - blocks).abs()
        assert (error <= 0.16 * blocks.abs().amax(1, keepdim=True)).all()
        assert error.max() > 0
    assert not weights
    assert four.get_input_embeddings().weight.dtype == torch.float32
    assert four.get_output_embeddings().weight.dtype == torch.float32


def test_an_evaluation_changes_neither_the_logits_nor_the_base() -> None:
    model = load("tiny-llama", quant="bnb-nf4").model
    before = {name: {k: v.clone() for k, v in _held(layer).items()} for name, layer in _quantised(model).items()}
    training = _logits(model.train())
    assert torch.equal(_logits(model.eval()), training)
    assert torch.equal(model.train()(input_ids=IDS).logits, training)
    for name, layer in _quantised(model).items():
        assert _same(_held(layer), before[name]), name


def test_gradients_are_those_of_the_dequantised_base() -> None:
    four, plain = load("tiny-llama", quant="bnb-nf4").model, load("tiny-llama").model
    with torch.no_grad():
        for name, layer in _quantised(four).items():
            plain.get_submodule(name).weight.copy_(_dequantised(layer))
    models = [_attach(model, rank=4).model for model in (four, plain)]
    gradients = []
    for model in models:
        draw = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".lora_B." in name:  # zero at the start, which would leave A without a gradient
                    parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.02)
        _logits(model.eval())
        model.train()
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert len(gradients[0]) == 2 * LAYERS
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient is not None and gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(_logits(models[0]), _logits(models[1]), rtol=0, atol=1e-5)


def test_a_run_from_the_command_line_learns_and_leaves_a_plain_adapter(tmp_path: Path, tiny_llama: Path) -> None:
    output = tmp_path / "out"
    argv = [sys.executable, "-W", "error", "-m", "trainers", "configs/debug/lora.yaml", "method.base=bnb-nf4"]
    done = subprocess.run(
        [*argv, "threads=1", f"output_dir={output}"],
        cwd=ROOT,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == SUCCEEDED, done.stderr
    events = read(output / "events.jsonl")[0]
    scores = [event["valid_loss"] for event in events if "valid_loss" in event]
    assert scores[-1] < scores[0] - 0.5
    losses = [event["train_loss"] for event in events if "train_loss" in event]
    assert losses[-1] < losses[0] - 0.5
    exported = [event for event in events if event["kind"] == "artifact"][-1]
    assert exported["artifact"] == "adapter"
    assert exported["logit_difference"] == 0.0, "reloaded on the same 4-bit base"

    adapter = output / "artifact"
    assert {path.name for path in adapter.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "manifest.json",
    }
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["base_model_name_or_path"] == "tiny-llama"
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert len(tensors) == 2 * LAYERS
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}

    exact, four = load("tiny-llama", adapter=adapter), load("tiny-llama", adapter=adapter, quant="bnb-nf4")
    learnt = [
        _loss(load("tiny-llama")) - _loss(exact),
        _loss(load("tiny-llama", quant="bnb-nf4")) - _loss(four),
    ]
    assert learnt[0] > 0.5, "on the base as it is"
    assert learnt[1] > 0.5, "on the base that it was trained on"
    assert learnt[0] == pytest.approx(learnt[1], rel=0.1)
    # By PEFT alone, without our loader.
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama, dtype="float32"), str(adapter))
    assert torch.equal(_logits(plain.eval()), _logits(exact.model))


def test_training_leaves_the_base_bitwise_alone(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import core.models.load

    seen: list[tuple[Any, dict[str, dict[str, torch.Tensor]]]] = []

    def watched(*arguments: Any, **options: Any) -> Loaded:
        loaded = load(*arguments, **options)
        held = {
            name: {k: v.clone() for k, v in _held(layer).items()} for name, layer in _quantised(loaded.model).items()
        }
        seen.append((loaded.model, held))
        return loaded

    monkeypatch.setattr(core.models.load, "load", watched)  # A run imports it when it begins.
    result = train(FOUR, max_steps=6, eval_file=HELD_OUT, eval_every=2, learning_rate=1e-2)
    assert result.losses[-1] < result.losses[0]
    ((model, before),) = seen
    after = _quantised(model)
    assert len(before) == len(after) == LAYERS
    for name, layer in after.items():
        assert _same(_held(layer), before[name]), name
    assert all(".lora_" in name for name in result.weights), "checkpoints hold the adapter alone"


def test_a_stop_anywhere_changes_nothing(train: Any, tmp_path: Path) -> None:
    method = {**FOUR, "dropout": 0.2, "rank": 4}
    common = {"batch_size": 2, "accumulation": 2, "eval_file": HELD_OUT, "eval_every": 3, "save_every": 2}
    straight = train(method, output_dir=str(tmp_path / "straight"), max_steps=8, **common)
    draw = random.Random("stop/bnb")
    for trial in range(2):
        output, stops = str(tmp_path / f"stopped-{trial}"), 0
        while True:
            at = draw.randrange(1, straight.checks // 2)
            result = train(method, output_dir=output, stop_at=at, max_steps=8, **common)
            if result.code == SUCCEEDED:
                break
            assert result.code == STOPPED
            stops += 1
        assert stops
        assert _same(result.checkpoint.tensors, straight.checkpoint.tensors)
        assert result.checkpoint.state["rng"] == straight.checkpoint.state["rng"]
        assert (result.output / "metrics.csv").read_bytes() == (straight.output / "metrics.csv").read_bytes()
        adapter = "artifact/adapter_model.safetensors"
        assert (result.output / adapter).read_bytes() == (straight.output / adapter).read_bytes()


def test_another_process_goes_on_to_the_same_bits(make_run: Any, train: Any, tmp_path: Path) -> None:
    common = {"eval_file": HELD_OUT, "eval_every": 3, "save_every": 2, "max_steps": 6}
    straight = train(FOUR, output_dir=str(tmp_path / "straight"), **common)
    stopped = train(FOUR, output_dir=str(tmp_path / "stopped"), stop_at=straight.checks // 2, **common)
    assert stopped.code == STOPPED
    file = tmp_path / "run.yaml"
    file.write_text(write_yaml(make_run(FOUR, output_dir=str(stopped.output), **common).as_dict()))
    argv = [sys.executable, "-m", "trainers", str(file)]
    done = subprocess.run(argv, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=240)
    assert done.returncode == SUCCEEDED, done.stderr
    assert any("resumed" in event["message"] for event in stopped.of_kind("message"))
    assert _same(stopped.checkpoint.tensors, straight.checkpoint.tensors)


def test_checkpoints_of_the_other_base_are_refused(train: Any) -> None:
    train("lora", max_steps=1)
    with pytest.raises(RunError, match=r"run with other method\.base \(none there, bnb-nf4 here\);"):
        train(FOUR, max_steps=1)


@pytest.mark.parametrize(
    ("method", "settings"),
    [({"dora": True}, {}), ({"rslora": True, "lora_plus_ratio": 4.0}, {}), ({}, {"dtype": "bfloat16"})],
    ids=["dora", "rslora", "bfloat16"],
)
def test_variants_train_and_their_artifacts_verify(
    method: dict[str, Any], settings: dict[str, Any], train: Any
) -> None:
    result = train({**FOUR, **method}, max_steps=6, eval_file=HELD_OUT, eval_every=3, **settings)
    assert result.code == SUCCEEDED
    assert result.losses[-1] < result.losses[0]
    assert result.of_kind("artifact")[-1]["logit_difference"] <= 1e-6


def test_activation_checkpointing_changes_no_bit(train: Any, tmp_path: Path) -> None:
    method = {**FOUR, "dropout": 0.2}
    plain = train(method, output_dir=str(tmp_path / "a"), max_steps=3)
    recomputed = train(method, output_dir=str(tmp_path / "b"), max_steps=3, activation_checkpointing=True)
    assert _same(recomputed.weights, plain.weights)


@pytest.mark.parametrize("model", ["tiny-llama", "tiny-qwen3", "tiny-gemma3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_memory_plan_counts_what_is_held(model: str, dtype: str, make_run: Any) -> None:
    run = make_run(FOUR, model=model, dtype=dtype)
    planned = plan(run)
    attached = run.method.attach(load(model, dtype=dtype, quant="bnb-nf4").model, run.settings, CONTEXT)
    tensors = [*attached.model.parameters()]
    for layer in _quantised(attached.model).values():
        held = _held(layer)
        tensors += [tensor for name, tensor in held.items() if name != "codes"]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    assert planned.weights == pytest.approx(sum(storages.values()), rel=0.01)
    trained = [parameter for parameter in attached.model.parameters() if parameter.requires_grad]
    assert planned.gradients == sum(parameter.numel() * parameter.element_size() for parameter in trained)

"""Loading: what comes back, in what precision, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from core.models.fingerprint import EDGE, fingerprint
from core.models.load import load, load_tokenizer
from core.models.ref import ModelRef
from core.models.resolve import local_directory, resolve

ROOT = Path(__file__).parents[4]
IDS = torch.tensor([[5, 9, 300, 41, 7]])


@pytest.fixture
def copy(tiny_llama: Path, tmp_path: Path) -> Path:
    target = tmp_path / "model"
    shutil.copytree(tiny_llama, target)
    return target


def test_what_comes_back(tiny_llama: Path) -> None:
    loaded = load("tiny-llama")
    assert loaded.ref == ModelRef("catalog", "tiny-llama")
    assert loaded.directory == tiny_llama
    assert loaded.fingerprint == fingerprint(tiny_llama)
    assert not loaded.model.training
    again = load(ModelRef("directory", str(tiny_llama)))
    assert again.fingerprint == loaded.fingerprint
    assert torch.equal(again.model(IDS).logits, loaded.model(IDS).logits)
    assert load_tokenizer("tiny-llama").get_vocab() == loaded.tokenizer.get_vocab()


def test_precision_is_what_was_asked_for() -> None:
    exact = load("tiny-llama").model
    assert {parameter.dtype for parameter in exact.parameters()} == {torch.float32}
    for name in ("bfloat16", "float16"):
        model = load("tiny-llama", dtype=name).model
        assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, name)}
        difference = (model(IDS).logits.float() - exact(IDS).logits).abs().max()
        assert 0 < difference < 0.2
    with pytest.raises(ValueError, match="float32, bfloat16, float16"):
        load("tiny-llama", dtype="int8")
    with pytest.raises(ValueError, match="give none, bnb-nf4, int4"):
        load("tiny-llama", quant="gptq")  # type: ignore[arg-type]


def test_loading_says_nothing(tiny_llama: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load(str(tiny_llama))
    assert capfd.readouterr() == ("", "")


def test_a_model_without_some_of_its_weights_is_refused(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 of the model's weights, model\.layers\.1\.mlp\.up_proj\.weight"):
        load(str(copy))


def test_a_sharded_model_is_the_same_model(copy: Path, tiny_llama: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    names = sorted(tensors)
    shards = {"model-1.safetensors": names[:9], "model-2.safetensors": names[9:]}
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, copy / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, held in shards.items() for name in held}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    (copy / "model.safetensors").unlink()
    assert fingerprint(copy) == fingerprint(tiny_llama)
    assert torch.equal(load(str(copy)).model(IDS).logits, load(str(tiny_llama)).model(IDS).logits)
    (copy / "model-2.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-2\.safetensors"):
        load(str(copy))


def test_the_fingerprint_follows_what_is_computed_and_nothing_else(copy: Path, tiny_llama: Path) -> None:
    known = fingerprint(tiny_llama)
    assert known.startswith("sha256:") and len(known) == 71
    assert fingerprint(copy) == known
    config = json.loads((copy / "config.json").read_text())
    harmless = {
        "transformers_version": "9",
        "use_cache": False,
        "dtype": "bfloat16",
        "_name_or_path": "x",
        "extra": None,
    }
    (copy / "config.json").write_text(json.dumps({**config, **harmless}))
    (copy / "README.md").write_text("words")
    assert fingerprint(copy) == known
    for key, value in {"rms_norm_eps": 1e-5, "num_key_value_heads": 4, "rope_parameters": {"rope_theta": 1.0}}.items():
        (copy / "config.json").write_text(json.dumps({**config, key: value}))
        assert fingerprint(copy) != known, key


def test_the_fingerprint_sees_both_ends_of_every_tensor(copy: Path) -> None:
    known, file = fingerprint(copy), copy / "model.safetensors"
    with safe_open(file, "pt") as opened:
        names = list(opened.keys())
    tensors = load_file(file)
    assert max(tensor.nbytes for tensor in tensors.values()) > 2 * EDGE
    for name in names:
        for place in (0, -1):
            changed = {key: value.clone() for key, value in tensors.items()}
            changed[name].view(-1)[place] += 1
            save_file(changed, file, metadata={"format": "pt"})
            assert fingerprint(copy) != known, (name, place)
    save_file(tensors, file, metadata={"format": "pt"})
    assert fingerprint(copy) == known


def test_what_is_no_model_directory_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"needs config\.json"):
        fingerprint(tmp_path)
    with pytest.raises(ValueError, match=r"no config\.json"):
        load(str(tmp_path))
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_tokenizer(str(tmp_path / "missing"))
    assert local_directory(str(tmp_path)) is None


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_without_bitsandbytes_the_error_names_the_extra() -> None:
    with pytest.raises(ValueError, match=r"not installed: pip install .*\[bnb\]"):
        load("tiny-llama", quant="bnb-nf4")


@pytest.mark.bnb
def test_a_4_bit_base_is_close_small_and_trains_an_adapter(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    from core.models.save import save_adapter, save_merged

    exact, loaded = load("tiny-llama"), load("tiny-llama", quant="bnb-nf4")
    assert loaded.model.is_quantized and loaded.fingerprint == exact.fingerprint
    assert "4bit" in type(loaded.model.model.layers[0].self_attn.q_proj).__name__.lower()
    cosine = torch.cosine_similarity(loaded.model(IDS).logits, exact.model(IDS).logits, dim=-1)
    assert cosine.min() > 0.9
    model = get_peft_model(loaded.model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model(input_ids=IDS, labels=IDS).loss.backward()
    gradients = [p.grad for name, p in model.named_parameters() if "lora_B" in name]
    assert gradients and all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)
    adapter = save_adapter(model, tmp_path / "a", card={"base": "tiny-llama"})
    assert torch.equal(load("tiny-llama", adapter=adapter).model(IDS).logits, exact.model(IDS).logits)
    with pytest.raises(ValueError, match="quantised base cannot be merged"):
        save_merged(model, loaded.tokenizer, tmp_path / "m", card={"base": "tiny-llama"})


def test_everything_but_loading_works_without_torch(tiny_llama: Path) -> None:
    script = (
        "import sys\n"
        "import core.models.ref, core.models.policy, core.models.catalog, core.models.gguf, core.models.fingerprint\n"
        "import core.models.load, core.models.manifest\n"
        "from core.models.resolve import available, local_directory, resolve\n"
        "assert 'tiny-llama' in available()\n"
        "print(resolve('tiny-llama', allow_download=False), local_directory('org/none'))\n"
        "core.models.fingerprint.fingerprint(resolve('tiny-llama'))\n"
        "heavy = {'torch', 'transformers', 'peft', 'numpy', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=60
    )
    assert done.stderr == ""
    assert done.stdout.strip() == f"{tiny_llama} None"
    assert resolve("tiny-llama") == tiny_llama

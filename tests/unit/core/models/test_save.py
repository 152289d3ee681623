"""Artifacts hold what was trained, load with plain PEFT and transformers, and leave the caller its model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from core.models import manifest
from core.models.fingerprint import fingerprint
from core.models.load import attach, load
from core.models.merge import merged_state
from core.models.policy import PolicyError, check_adapter
from core.models.save import save_adapter, save_merged, verify

FAMILIES = ["tiny-llama", "tiny-qwen3", "tiny-gemma3"]
LORA: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": "all-linear"},
    "rslora": {"target_modules": ["q_proj", "down_proj"], "use_rslora": True},
    "dora": {"target_modules": ["q_proj", "v_proj", "gate_proj"], "use_dora": True},
    "bias": {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]},
}
IDS = torch.tensor([[5, 9, 300, 41, 7, 812, 64, 3], [1, 2, 3, 4, 5, 6, 7, 8]])


def tuned(name: str, **options: Any) -> tuple[Any, Any]:
    """A model with a random adapter that is far from zero, and its tokenizer."""
    loaded = load(name)
    torch.manual_seed(7)
    model = get_peft_model(loaded.model, LoraConfig(r=4, task_type="CAUSAL_LM", **options)).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape) * 0.1)
    return model, loaded.tokenizer


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits  # (2, 8, 1024) float32


@pytest.mark.parametrize("kind", LORA)
@pytest.mark.parametrize("name", FAMILIES)
def test_merged_is_adapter_is_what_was_trained(name: str, kind: str, tmp_path: Path) -> None:
    model, tokenizer = tuned(name, **LORA[kind])
    expected, base = logits(model), logits(load(name).model)
    assert (expected - base).abs().max() > 0.1
    held = {key: (value.data_ptr(), value.clone()) for key, value in model.state_dict().items()}

    merged = save_merged(model, tokenizer, tmp_path / "merged", card={"base": name})
    adapter = save_adapter(model, tmp_path / "adapter", card={"base": name})

    for key, value in model.state_dict().items():
        assert value.data_ptr() == held[key][0] and torch.equal(value, held[key][1]), key
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(load(name, adapter=adapter).model), expected)
    assert (logits(load(str(merged)).model) - expected).abs().max() < 1e-4
    assert verify(merged)["fingerprint"] == fingerprint(merged) != fingerprint(load(name).directory)
    assert verify(adapter)["base_fingerprint"] == load(name).fingerprint


def test_plain_peft_and_transformers_load_the_artifacts(tmp_path: Path) -> None:
    model, tokenizer = tuned("tiny-llama", target_modules=["q_proj", "v_proj"])
    expected = logits(model)
    save_adapter(model, tmp_path / "a", card={"base": "tiny-llama"})
    save_merged(model, tokenizer, tmp_path / "m", card={"base": "tiny-llama"})
    plain = AutoModelForCausalLM.from_pretrained(load("tiny-llama").directory, dtype=torch.float32)
    assert torch.equal(logits(PeftModel.from_pretrained(plain, tmp_path / "a").eval()), expected)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32).eval()
    assert (logits(merged) - expected).abs().max() < 1e-4
    again = AutoTokenizer.from_pretrained(tmp_path / "m")
    chat = [{"role": "user", "content": "Hello"}]
    assert again.apply_chat_template(chat, return_dict=False) == tokenizer.apply_chat_template(chat, return_dict=False)
    assert merged.generation_config.eos_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize("name", FAMILIES)
def test_a_whole_model_round_trips_bitwise(name: str, tmp_path: Path) -> None:
    loaded = load(name)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.add_(0.01)
    save_merged(loaded.model, loaded.tokenizer, tmp_path / "m", card={"base": name})
    again = load(str(tmp_path / "m"))
    assert torch.equal(logits(again.model), logits(loaded.model))
    assert again.model.config.tie_word_embeddings == loaded.model.config.tie_word_embeddings
    assert again.fingerprint != loaded.fingerprint


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_an_adapter_on_one_of_two_tied_tensors_unties_them(tmp_path: Path) -> None:
    model, tokenizer = tuned("tiny-qwen3", target_modules=["embed_tokens", "q_proj"])
    expected = logits(model)
    save_merged(model, tokenizer, tmp_path / "m", card={"base": "tiny-qwen3"})
    again = load(str(tmp_path / "m"))
    assert not again.model.config.tie_word_embeddings
    assert (logits(again.model) - expected).abs().max() < 1e-4
    assert model.get_base_model().config.tie_word_embeddings


def test_a_bfloat16_model_keeps_its_dtype(tmp_path: Path) -> None:
    loaded = load("tiny-llama", dtype="bfloat16")
    save_merged(loaded.model, loaded.tokenizer, tmp_path / "m", card={"base": "tiny-llama"})
    assert json.loads((tmp_path / "m" / "config.json").read_text())["dtype"] == "bfloat16"
    again = load(str(tmp_path / "m"), dtype="bfloat16")
    assert torch.equal(logits(again.model), logits(loaded.model))


def test_the_same_adapter_is_the_same_bytes_and_names_its_base(tmp_path: Path) -> None:
    made = []
    for name in ("one", "two"):
        model, _ = tuned("tiny-llama", target_modules=["v_proj", "q_proj", "o_proj", "up_proj"])
        directory = save_adapter(model, tmp_path / name, card={"base": "tiny-llama", "metrics": {"loss": 1.5}})
        made.append(verify(directory)["files"])
    assert made[0] == made[1]
    assert set(made[0]) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny-llama"
    assert config["target_modules"] == ["o_proj", "q_proj", "up_proj", "v_proj"]
    assert config["inference_mode"] is True


def test_the_manifest_and_the_card_say_where_it_came_from(tmp_path: Path) -> None:
    model, tokenizer = tuned("tiny-llama", target_modules=["q_proj"])
    card = {"base": "tiny-llama", "title": "Ticket | tuner", "seed": 3, "metrics": {"loss": 0.25}, "data_hash": "abc"}
    directory = save_merged(model, tokenizer, tmp_path / "m", card=card)
    read = json.loads((directory / "manifest.json").read_text())
    assert read == verify(directory)
    assert (read["format"], read["kind"], read["base"], read["card"]) == (manifest.FORMAT, "merged", "tiny-llama", card)
    assert set(read["files"]) == {path.name for path in directory.iterdir()} - {"manifest.json"}
    text = (directory / "README.md").read_text()
    assert text.startswith('---\nbase_model: "tiny-llama"\n')
    assert "# Ticket \\| tuner\n" in text and "| seed | 3 |" in text and '"loss": 0.25' in text
    assert load("tiny-llama").fingerprint in text


def test_verify_notices_every_change(tmp_path: Path) -> None:
    model, _ = tuned("tiny-llama", target_modules=["q_proj"])
    sound = save_adapter(model, tmp_path / "sound", card={"base": "tiny-llama"})

    def changed(name: str) -> Path:
        copy = tmp_path / name
        shutil.copytree(sound, copy)
        return copy

    flipped = changed("flipped") / "adapter_model.safetensors"
    raw = bytearray(flipped.read_bytes())
    raw[-1] ^= 1
    flipped.write_bytes(raw)
    (changed("missing") / "README.md").unlink()
    (changed("extra") / "notes.txt").write_text("x")
    (changed("unlisted") / "manifest.json").write_text(json.dumps({"format": manifest.FORMAT, "kind": "adapter"}))
    (changed("format") / "manifest.json").write_text("{}")
    (changed("none") / "manifest.json").unlink()
    escaping = changed("escaping") / "manifest.json"
    listed = json.loads(escaping.read_text())
    listed["files"]["../sound/README.md"] = listed["files"]["README.md"]
    escaping.write_text(json.dumps(listed))
    for name, reason in [
        ("flipped", "has changed"),
        ("missing", "lacks README.md"),
        ("extra", "notes.txt, which its manifest does not list"),
        ("unlisted", "does not list files"),
        ("format", "not a manifest"),
        ("none", "no manifest.json"),
        ("escaping", "lacks ../sound/README.md"),
    ]:
        with pytest.raises(ValueError, match=reason):
            verify(tmp_path / name)


def test_a_failed_save_keeps_the_old_one_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tuned("tiny-llama", target_modules=["q_proj"])
    save_merged(model, tokenizer, tmp_path / "m", card={"base": "tiny-llama", "round": 1})
    with pytest.raises(ValueError, match="plain JSON"):
        save_merged(model, tokenizer, tmp_path / "m", card={"base": "tiny-llama", "round": object()})
    with pytest.raises(ValueError, match="plain JSON"):
        save_adapter(model, tmp_path / "a", card={"base": "tiny-llama", "loss": float("nan")})
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert verify(tmp_path / "m")["card"]["round"] == 1
    save_merged(model, tokenizer, tmp_path / "m", card={"base": "tiny-llama", "round": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert verify(tmp_path / "m")["card"]["round"] == 2


def test_what_cannot_be_saved_says_what_to_do(tmp_path: Path) -> None:
    loaded = load("tiny-llama")
    with pytest.raises(ValueError, match="use save_merged"):
        save_adapter(loaded.model, tmp_path / "x", card={"base": "tiny-llama"})
    model, tokenizer = tuned("tiny-llama", target_modules=["q_proj"])
    with pytest.raises(ValueError, match="under 'base'"):
        save_adapter(model, tmp_path / "x", card={})
    with pytest.raises(ValueError, match="under 'base_fingerprint'"):
        save_adapter(model, tmp_path / "x", card={"base": "org/elsewhere"})
    saved = save_adapter(model, tmp_path / "y", card={"base": "org/elsewhere", "base_fingerprint": "sha256:0"})
    assert verify(saved)["base_fingerprint"] == "sha256:0"
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged into the model already"):
        save_merged(model, tokenizer, tmp_path / "x", card={"base": "tiny-llama"})
    model.unmerge_adapter()
    model.base_model.set_adapter([])
    with pytest.raises(ValueError, match="exactly one adapter"):
        merged_state(model)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_saved(value: float, tmp_path: Path) -> None:
    model, tokenizer = tuned("tiny-llama", target_modules=["q_proj"])
    before = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight.clone()
    model.get_base_model().model.layers[0].self_attn.q_proj.lora_B["default"].weight.data[0, 0] = value
    with pytest.raises(ValueError, match="not finite"):
        save_adapter(model, tmp_path / "a", card={"base": "tiny-llama"})
    with pytest.raises(ValueError, match="NaNs detected"):
        save_merged(model, tokenizer, tmp_path / "m", card={"base": "tiny-llama"})
    assert torch.equal(model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight, before)
    plain = load("tiny-llama")
    plain.model.model.norm.weight.data[3] = value
    with pytest.raises(ValueError, match=r"model\.norm\.weight is not finite"):
        save_merged(plain.model, plain.tokenizer, tmp_path / "m", card={"base": "tiny-llama"})
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    model, _ = tuned("tiny-llama", target_modules=["q_proj"])
    adapter = save_adapter(model, tmp_path / "a", card={"base": "tiny-llama"})
    with pytest.raises(PolicyError, match=r"was made for 'tiny-llama'.*not for tiny-qwen3"):
        load("tiny-qwen3", adapter=adapter)
    (adapter / "manifest.json").unlink()
    with pytest.raises(PolicyError, match=r"was made for 'tiny-llama', not for tiny-qwen3"):
        load("tiny-qwen3", adapter=adapter)
    assert torch.equal(logits(load("tiny-llama", adapter=adapter).model), logits(model))
    copy = tmp_path / "copy"  # the same weights under another name
    shutil.copytree(load("tiny-llama").directory, copy)
    assert torch.equal(logits(load(str(copy), adapter=adapter).model), logits(model))


HOSTILE_ADAPTERS: dict[str, dict[str, Any]] = {
    "imports-a-module": {"megatron_config": {"x": 1}, "megatron_core": "evil"},
    "imports-a-library": {"auto_mapping": {"parent_library": "evil", "base_model_class": "Evil"}},
    "remote-code": {"trust_remote_code": True},
    "another-kind": {"peft_type": "EVIL"},
    "kind-not-text": {"peft_type": ["LORA"]},
    "changes-the-base": {"init_lora_weights": "pissa"},
    "replicates-layers": {"layer_replication": [[0, 10**9]]},
    "rank-bomb": {"r": 2**31},
    "rank-pattern-bomb": {"rank_pattern": {"q_proj": 2**31}},
    "rank-pattern-list": {"rank_pattern": [1]},
    "no-base": {"base_model_name_or_path": None},
    "base-not-text": {"base_model_name_or_path": {"x": 1}},
    "base-elsewhere": {"base_model_name_or_path": "evil/other"},
    "base-url": {"base_model_name_or_path": "http://127.0.0.1/x"},
    "base-path": {"base_model_name_or_path": "/etc"},
}


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound adapter as plain PEFT would have saved it: no manifest."""
    model, _ = tuned("tiny-llama", target_modules=["q_proj"])
    adapter = save_adapter(model, tmp_path_factory.mktemp("foreign") / "a", card={"base": "tiny-llama"})
    (adapter / "manifest.json").unlink()
    return adapter


@pytest.mark.parametrize("name", HOSTILE_ADAPTERS)
def test_a_hostile_adapter_is_refused(name: str, foreign: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "a"
    shutil.copytree(foreign, adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, **HOSTILE_ADAPTERS[name]}))
    with pytest.raises(PolicyError):
        load("tiny-llama", adapter=adapter)


def test_an_adapter_needs_its_two_files_and_no_pickle(foreign: Path, tmp_path: Path) -> None:
    check_adapter(foreign)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        adapter = tmp_path / name
        shutil.copytree(foreign, adapter)
        (adapter / name).unlink()
        (adapter / "adapter_model.bin").write_bytes(b"\x80\x04.")
        with pytest.raises(PolicyError, match=f"no {name}"):
            check_adapter(adapter)
    adapter = tmp_path / "both"
    shutil.copytree(foreign, adapter)
    (adapter / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(PolicyError, match=r"adapter_model\.bin"):
        check_adapter(adapter)


def test_adapters_go_on_beside_each_other(foreign: Path, tmp_path: Path) -> None:
    other, _ = tuned("tiny-llama", target_modules=["v_proj", "up_proj"])
    second = save_adapter(other, tmp_path / "second", card={"base": "tiny-llama"})
    loaded = load("tiny-llama")
    plain = logits(loaded.model)
    both = attach(attach(loaded.model, foreign, name="a"), second, name="b").eval()
    assert torch.equal(logits(both), logits(load("tiny-llama", adapter=foreign).model))
    both.set_adapter("b")
    assert torch.equal(logits(both), logits(other))
    with both.disable_adapter():
        assert torch.equal(logits(both), plain)
    with pytest.raises(ValueError, match="named 'b' already"):
        attach(both, foreign, name="b")
    with pytest.raises(PolicyError):
        attach(both, tmp_path, name="c")


def test_an_adapter_can_stay_trainable(foreign: Path) -> None:
    frozen = load("tiny-llama", adapter=foreign).model
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    trainable = load("tiny-llama", adapter=foreign, is_trainable=True).model
    names = {name for name, parameter in trainable.named_parameters() if parameter.requires_grad}
    assert names and all("lora_" in name for name in names)


@pytest.mark.slow
@torch.no_grad()
def test_merged_is_adapter_on_the_real_model(tmp_path: Path) -> None:
    """Exact arithmetic agrees within 1e-4; float32 adds no more than its own rounding of this model, which is as much.

    SmolLM2's float32 forward is itself about 1e-4 from its float64 forward on ordinary text (logits up to 38).
    """
    model, tokenizer = tuned("smollm2-135m-instruct", target_modules="all-linear")
    torch.manual_seed(8)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.copy_(torch.randn_like(parameter) * 0.003)  # about what training leaves
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = torch.tensor([tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)])
    expected = model(input_ids=ids).logits
    base = load("smollm2-135m-instruct").model(input_ids=ids).logits
    assert (expected - base).abs().max() > 0.1
    adapter = save_adapter(model, tmp_path / "a", card={"base": "smollm2-135m-instruct"})
    merged = load(str(save_merged(model, tokenizer, tmp_path / "m", card={"base": "smollm2-135m-instruct"}))).model
    assert torch.equal(model(input_ids=ids).logits, expected)
    assert torch.equal(load("smollm2-135m-instruct", adapter=adapter).model(input_ids=ids).logits, expected)

    single = (merged(input_ids=ids).logits - expected).abs().max()
    exact = model.double()(input_ids=ids).logits
    rounding = (expected - exact).abs().max()
    assert (merged.double()(input_ids=ids).logits - exact).abs().max() < 1e-4
    assert single < 4 * rounding < 1e-3

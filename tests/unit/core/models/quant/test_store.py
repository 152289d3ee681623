"""What is saved is what is loaded, bit for bit; what is not whole, or belongs elsewhere, is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.models import manifest
from core.models.load import load
from core.models.quant import scales, store
from core.models.quant.convert import quantise_model, quantised
from core.models.quant.linear import QuantLinear
from core.models.quant.quantise import quantise
from core.models.save import save_merged

IDS = torch.tensor([[5, 17, 300, 42, 1000, 3, 77]])
BASE = "sha256:" + "0" * 64
CARD = {"base": "tiny-llama", "base_fingerprint": BASE}


def _model(name: str = "tiny-llama", scheme: str = "int4", dtype: str = "float32") -> Any:
    model = load(name, dtype=dtype).model
    quantise_model(model, scheme)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():  # tuned: no longer what quantising gives
        for layer in quantised(model).values():
            layer.scales.add_(torch.rand(layer.scales.shape, generator=generator) * 1e-3)
    return model


@pytest.mark.parametrize(
    ("name", "scheme", "dtype"),
    [("tiny-llama", "int4", "float32"), ("tiny-qwen3", "nf4", "float32"), ("tiny-gemma3", "int4", "bfloat16")],
)
def test_a_model_comes_back_bit_for_bit(name: str, scheme: str, dtype: str, tmp_path: Path) -> None:
    model = _model(name, scheme, dtype)
    again = store.load(store.save(model, tmp_path / "q", base_fingerprint=BASE))
    assert again.base_fingerprint == BASE and list(again.layers) == list(quantised(model))
    one, other = model.state_dict(), again.model.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) and one[key].dtype == other[key].dtype for key in one)
    ends = (again.model.get_input_embeddings(), again.model.get_output_embeddings())
    assert (ends[0].weight is ends[1].weight) == model.config.tie_word_embeddings
    assert not again.model.training and again.model.generation_config.eos_token_id == model.config.eos_token_id
    assert [layer.scales.requires_grad for layer in again.layers.values()] == [False] * 14
    with torch.no_grad():
        assert torch.equal(again.model(IDS).logits, model(IDS).logits)


def test_tuning_a_loaded_model_leaves_its_file_alone(tmp_path: Path) -> None:
    folder = store.save(_model(), tmp_path / "q", base_fingerprint=BASE)
    before = manifest.sha256(folder / store.WEIGHTS)
    with torch.no_grad():
        for layer in store.load(folder).layers.values():
            layer.scales.mul_(2)
    assert manifest.sha256(folder / store.WEIGHTS) == before


def test_every_part_of_a_layer_is_kept_and_identified(tmp_path: Path) -> None:
    model = _model()
    name, old = next(iter(quantised(model).items()))
    parts = {"zeros": torch.full_like(old.scales, -0.0), "constants": torch.ones_like(old.scales)}
    order = torch.arange(old.in_features, dtype=torch.int32).flip(0)
    fixed = torch.zeros_like(old.scales, dtype=torch.bool)
    fixed[3, 0] = True
    extra: dict[str, Any] = {**parts, "order": order, "fixed": fixed}
    sizes: dict[str, Any] = {"in_features": old.in_features, "group": old.group, "scheme": "odd"}
    model.set_submodule(name, QuantLinear(old.codes, old.scales.detach(), old.table, **sizes, **extra))
    layers = store.load(store.save(model, tmp_path / "q", base_fingerprint=BASE)).layers
    for part, tensor in extra.items():
        assert torch.equal(getattr(layers[name], part), tensor), part
    assert str(layers[name].zeros[0, 0].item()) == "-0.0" and layers[name].scheme == "odd"
    known = scales.identity(layers)
    for part in ("codes", *extra):
        changed = {key: tensor.clone() for key, tensor in extra.items()} | {"codes": old.codes.clone()}
        changed[part] = changed[part].flip(0) if part == "order" else changed[part]
        if part != "order":
            changed[part].view(torch.uint8)[-1, -1] ^= 1
        codes = changed.pop("codes")
        other = QuantLinear(codes, old.scales.detach(), old.table, **sizes, **changed)
        assert scales.identity({**layers, name: other}) != known, part
    with torch.no_grad():
        layers[name].scales.add_(1)
    assert scales.identity(layers) == known


def test_the_identity_covers_names_and_is_the_same_for_the_same_floats() -> None:
    floats = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    made = quantise(floats, "int4")
    assert scales.identity({"a": made}) == scales.identity({"a": quantise(floats.clone(), "int4")})
    assert scales.identity({"b": made}) != scales.identity({"a": made})


Change = Callable[[dict[str, Any], dict[str, torch.Tensor]], object]
LAYER = "model.layers.0.self_attn.q_proj"


def _codes(_: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{LAYER}.codes"][0, 0] ^= 1


def _scale(_: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{LAYER}.scales"][0, 0] *= 1 + 2**-20


CHANGES: dict[str, tuple[Change, str]] = {
    "codes": (_codes, "has changed since it was written"),
    "scale": (_scale, "has changed since it was written"),
    "format": (lambda s, t: s.update(format="other/1"), "not of the format"),
    "dtype": (lambda s, t: s.update(dtype="int8"), "names the dtype 'int8'"),
    "group": (lambda s, t: s["layers"][LAYER].update(group=0), "describes model"),
    "inputs": (lambda s, t: s["layers"][LAYER].update(in_features=80), "codes are"),
    "key": (lambda s, t: s["layers"][LAYER].update(more=1), "by other keys"),
    "no scales": (lambda s, t: t.pop(f"{LAYER}.scales"), "lacks codes, scales or table"),
    "no norm": (lambda s, t: t.pop("model.norm.weight"), "missing, for instance model.norm.weight"),
    "more": (lambda s, t: t.update(more=torch.ones(2)), "more, 2, is not a weight"),
    "shape": (lambda s, t: t.update({"model.norm.weight": torch.ones(2)}), "is not a weight .* has 64 there"),
    "no layer": (lambda s, t: s["layers"].pop(LAYER), "has changed since it was written"),
}


@pytest.mark.parametrize("which", CHANGES)
def test_files_that_do_not_fit_together_are_refused(which: str, tmp_path: Path) -> None:
    folder = store.save(_model(), tmp_path / "q", base_fingerprint=BASE)
    settings, tensors = json.loads((folder / store.SETTINGS).read_text()), load_file(folder / store.WEIGHTS)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change, says = CHANGES[which]
    change(settings, tensors)
    (folder / store.SETTINGS).write_text(json.dumps(settings))
    save_file(tensors, folder / store.WEIGHTS)
    with pytest.raises(ValueError, match=says):
        store.load(folder)


def test_code_and_lies_in_the_configuration_are_refused(tmp_path: Path) -> None:
    folder = store.save(_model(), tmp_path / "q", base_fingerprint=BASE)
    config = json.loads((folder / "config.json").read_text())
    for changes, says in (({"auto_map": {"x": "y.z"}}, "runs code"), ({"hidden_size": 10**9}, "weights contradict")):
        (folder / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(ValueError, match=says):
            store.load(folder)
    (folder / "config.json").write_text(json.dumps(config))
    generation = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(generation | {"custom_generate": "a/b"}))
    with pytest.raises(ValueError, match="runs code"):
        store.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has no config\.json"):
        store.load(folder)


def test_only_plain_quantised_models_are_saved_and_never_as_floats(tmp_path: Path) -> None:
    loaded = load("tiny-llama")
    with pytest.raises(ValueError, match="only a plain model"):
        store.save(loaded.model, tmp_path / "q", base_fingerprint=BASE)
    quantise_model(loaded.model, "int4")
    with pytest.raises(ValueError, match="linear layers are quantised"):
        save_merged(loaded.model, loaded.tokenizer, tmp_path / "m", card={"base": "tiny-llama"})
    assert list(tmp_path.iterdir()) == []


def test_scales_alone_turn_the_same_codes_into_the_tuned_model(tmp_path: Path) -> None:
    tuned = _model()
    folder = scales.save_scales(quantised(tuned), tmp_path / "s", card=CARD)
    assert manifest.verify(folder)["kind"] == "scales"
    fresh = load("tiny-llama").model
    layers = quantise_model(fresh, "int4")
    settings = scales.load_scales(layers, folder, base_fingerprint=BASE)
    assert settings["quantiser"] == {"scheme": "int4", "group": 64, "identity": scales.identity(layers)}
    assert settings["digest"] == scales.digest(layers) == scales.digest(quantised(tuned))
    assert all(torch.equal(layer.scales, quantised(tuned)[name].scales) for name, layer in layers.items())
    with torch.no_grad():
        assert torch.equal(fresh(IDS).logits, tuned(IDS).logits)


def test_scales_of_another_base_of_other_codes_or_changed_are_refused(tmp_path: Path) -> None:
    folder = scales.save_scales(quantised(_model()), tmp_path / "s", card=CARD)
    layers = quantised(_model(scheme="nf4"))
    before = scales.digest(layers)
    with pytest.raises(ValueError, match="belong to the base"):
        scales.load_scales(layers, folder, base_fingerprint="sha256:1")
    with pytest.raises(ValueError, match="belong to other codes"):
        scales.load_scales(layers, folder, base_fingerprint=BASE)
    with pytest.raises(ValueError, match="does not hold scales"):
        scales.load_scales(layers, tmp_path, base_fingerprint=BASE)
    assert scales.digest(layers) == before
    layers = quantised(_model())
    damaged = tmp_path / "d"
    shutil.copytree(folder, damaged)
    saved = {name: tensor.clone() for name, tensor in load_file(damaged / scales.SCALES).items()}
    saved[LAYER][0, 0] += 1e-6
    save_file(saved, damaged / scales.SCALES)
    with pytest.raises(ValueError, match="has changed since it was written"):
        scales.load_scales(layers, damaged, base_fingerprint=BASE)
    with torch.no_grad():
        layers[LAYER].scales[0, 0] = float("inf")
    with pytest.raises(ValueError, match=f"{LAYER} has scales that are not finite"):
        scales.save_scales(layers, tmp_path / "n", card=CARD)
    with pytest.raises(ValueError, match="base_fingerprint"):
        scales.save_scales(layers, tmp_path / "n", card={"base": "tiny-llama"})

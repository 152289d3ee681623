"""QZO in the loop: codes that never change, scales of the chosen blocks that do, and what is left in files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from core.models.load import load
from core.models.quant.convert import quantise_model, quantised
from core.models.quant.scales import digest, identity, load_scales
from trainers.memory import plan
from trainers.method import TrainContext
from trainers.registry import METHODS

CONTEXT = TrainContext(learning_rate=1e-2, seed=3, activation_checkpointing=False, mean=float)


def _attached(**settings: Any) -> Any:
    method = METHODS["qzo"]
    return method.attach(load("tiny-llama").model, method.config(**settings), CONTEXT)


@pytest.mark.parametrize(("scheme", "group"), [("int4", 32), ("nf4", 64)])
def test_the_codes_stay_and_the_artifact_is_codes_times_tuned_scales(
    scheme: str, group: int, train: Any, tiny_llama: Path
) -> None:
    result = train({"name": "qzo", "scheme": scheme, "group": group}, max_steps=5)
    loaded = load("tiny-llama")
    layers = quantise_model(loaded.model, scheme, group)
    codes, before = identity(layers), digest(layers)
    load_scales(layers, result.output / "scales", base_fingerprint=loaded.fingerprint)
    assert identity(layers) == codes, "load_scales refuses scales that belong to other codes"
    assert digest(layers) != before
    for name, layer in layers.items():
        assert torch.equal(layer.scales, result.weights[f"model.{name}.scales"])
    exported = load(str(result.output / "artifact")).model
    ids = torch.tensor([[5, 9, 11, 30]])
    with torch.no_grad():
        assert torch.allclose(exported(ids).logits, loaded.model(ids).logits, atol=1e-4)
    for name, layer in layers.items():
        assert torch.equal(exported.get_submodule(name).weight, layer.dequantised())


def test_a_run_never_holds_the_floats_of_the_layers_while_it_loads(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from core.models.quant import convert

    monkeypatch.setattr(convert, "quantise_model", lambda *given: pytest.fail("quantised after it was loaded"))
    assert train({"name": "qzo", "group": 32}, max_steps=1).code == 0


def test_a_checkpoint_holds_scales_and_nothing_else_of_the_model(train: Any) -> None:
    result = train("qzo", max_steps=2, save_every=1)
    assert all(name.endswith(".scales") for name in result.weights)
    saved = [event for event in result.of_kind("artifact") if event["artifact"] == "checkpoint"]
    assert [event["servable"] for event in saved] == [False, False]
    folder = Path(saved[-1]["path"])
    scales = sum(value.numel() * 4 for value in result.weights.values())
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < scales + 40_000


def test_an_export_leaves_the_model_as_it_was(tiny_llama: Path, tmp_path: Path) -> None:
    from trainers import export

    loaded = load("tiny-llama")
    method = METHODS["qzo"]
    model, _, _ = method.attach(loaded.model, method.config(), CONTEXT)
    before, names = quantised(model), [name for name, _ in model.named_parameters()]
    card = {"base": "tiny-llama", "base_fingerprint": loaded.fingerprint}
    assert export.write(model, method, loaded, tmp_path / "out", card) == "merged"
    assert {name: id(layer) for name, layer in quantised(model).items()} == {k: id(v) for k, v in before.items()}
    assert [name for name, _ in model.named_parameters()] == names


@pytest.mark.parametrize(("last", "tuned"), [(None, {"0", "1"}), (1, {"1"}), (2, {"0", "1"})])
def test_the_last_blocks_alone_are_tuned_and_all_are_quantised(
    last: int | None, tuned: set[str], tiny_llama: Path
) -> None:
    attached = _attached(last_blocks=last)
    trained = [name for name, p in attached.model.named_parameters() if p.requires_grad]
    assert {name.split(".")[2] for name in trained} == tuned
    assert all(name.endswith(".scales") for name in trained)
    assert len(quantised(attached.model)) == 14
    held = {id(p) for group in attached.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in attached.model.parameters() if p.requires_grad}


def test_no_gradient_and_no_whole_matrix_is_made(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from core.models.quant.linear import QuantLinear

    attached = _attached()
    monkeypatch.setattr(QuantLinear, "dequantised", lambda self: pytest.fail("a whole matrix in floats"))
    ids = torch.tensor([[5, 9, 11, 30]])

    def closure() -> torch.Tensor:
        loss: torch.Tensor = attached.model(ids, labels=ids).loss
        assert not loss.requires_grad
        return loss

    before = [p.detach().clone() for p in attached.optimizer.parameters]
    attached.optimizer.step(closure)
    assert all(not torch.equal(p, start) for p, start in zip(attached.optimizer.parameters, before, strict=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group": 16}, "group must be 32, 64 or 128, not 16"),
        ({"scheme": "nf4", "group": 32}, "group must be 64, not 32"),
        ({"last_blocks": 0}, "last_blocks must be at least 1"),
        ({"eps_rel": 0.0}, "eps_rel must be positive"),
    ],
)
def test_refuses(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        METHODS["qzo"].config(**settings)


def test_more_blocks_than_there_are(tiny_llama: Path) -> None:
    with pytest.raises(ValueError, match="last_blocks is 3, and the model has 2 blocks"):
        _attached(last_blocks=3)


@pytest.mark.parametrize("settings", [{}, {"scheme": "nf4"}, {"group": 32, "last_blocks": 1}, {"restore": "additive"}])
def test_memory_is_planned_as_it_is(settings: dict[str, Any], make_run: Any) -> None:
    planned = plan(make_run({"name": "qzo", **settings}))
    model, optimizer, _ = _attached(**settings)
    optimizer.step(lambda: model(input_ids=torch.tensor([[5, 6, 7]])).logits.sum())

    def size(tensors: Any) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    layers = quantised(model)
    buffers = [part for layer in layers.values() for part in layer.buffers()]
    state = [v for values in optimizer.state.values() for v in values.values()]
    assert planned.weights == size(model.parameters()) + size(buffers)
    assert planned.gradients == 0
    assert planned.optimizer == size(state) + size(optimizer._walk()._saved)
    assert planned.trained_parameters == sum(p.numel() for p in optimizer.parameters)

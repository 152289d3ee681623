"""From a trained model to files that can be served, checked by loading them again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core.models.load import Loaded, load
from core.models.quant.convert import dequantise_model, quantised
from core.models.ref import ModelRef
from core.models.save import save_adapter, save_merged
from trainers.method import Method

TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
"""Largest difference of a logit between the trained model and its reloaded artifact, by dtype of the weights."""


def write(model: nn.Module, method: Method, loaded: Loaded, directory: Path, card: dict[str, Any]) -> str:
    """Writes the servable form of a model, atomically; quantised layers as floats, which takes the memory of them all.

    Args:
        model: As attached.
        method: What it was trained with.
        loaded: Its base.
        directory: Where to; replaced when it exists.
        card: For the manifest and the model card.

    Returns:
        Kind of artifact: adapter or merged.
    """
    if method.makes == "adapter":
        save_adapter(model, directory, card=card)
        return "adapter"
    with _in_floats(model):
        save_merged(model, loaded.tokenizer, directory, card=card)
    return "merged"


@contextmanager
def _in_floats(model: nn.Module) -> Iterator[None]:
    """Holds quantised layers as the matrices that they stand for, and puts the very same layers back afterwards."""
    layers = quantised(model)
    dequantise_model(model)
    try:
        yield
    finally:
        for name, layer in layers.items():
            model.set_submodule(name, layer)


def probe(model: nn.Module, input_ids: list[int]) -> Tensor:
    """Logits of one row in evaluation mode.

    Args:
        model: Any causal language model.
        input_ids: Its T tokens.

    Returns:
        (T, V) float32 on the CPU.
    """
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            ids = torch.tensor([input_ids], device=next(model.parameters()).device)
            logits: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    finally:
        model.train(training)
    return logits[0].float().cpu()


def verify(
    expected: Tensor, kind: str, loaded: Loaded, directory: Path, input_ids: list[int], *, dtype: str, quant: Any
) -> float:
    """Loads an artifact as the service would and compares its logits with the trained model's.

    Args:
        expected: (T, V) logits of the trained model.
        kind: adapter or merged.
        loaded: The base.
        directory: The artifact.
        input_ids: The row that ``expected`` belongs to.
        dtype: What the weights are held in.
        quant: How the base is held.

    Returns:
        Largest absolute difference.

    Raises:
        RuntimeError: It is beyond the tolerance: the files do not hold what was trained.
    """
    if kind == "adapter":
        again = load(loaded.ref, dtype=dtype, adapter=directory, quant=quant)
    else:
        again = load(ModelRef("directory", str(directory.resolve())), dtype=dtype)
    model = again.model.to(next(loaded.model.parameters()).device) if quant == "none" else again.model
    difference = float((probe(model, input_ids) - expected).abs().max())
    if not difference <= TOLERANCE[dtype]:
        raise RuntimeError(
            f"the exported {kind} in {directory} gives other logits than the trained model: largest difference "
            f"{difference:.3g}, allowed {TOLERANCE[dtype]:.0e}"
        )
    return difference

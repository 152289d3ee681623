"""Artifacts: an adapter in PEFT's format, or a whole model. Each directory appears complete or not at all."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from core.models import manifest
from core.models.fingerprint import fingerprint
from core.models.lock import appearing
from core.models.manifest import verify as verify  # the other half of saving: offered here too
from core.models.merge import inner_model, merged_state
from core.models.resolve import local_directory

MAX_SHARD = "5GB"


def save_adapter(model: Any, directory: Path, *, card: Mapping[str, Any]) -> Path:
    """Saves the active adapter of a PEFT model.

    Args:
        model: a ``PeftModel`` with exactly one active adapter.
        directory: where it goes; a directory of that name is replaced once the new one is complete.
        card: what is known about it, plain JSON. ``base``, the reference of the base model, is required;
            ``base_fingerprint`` is computed from the base's directory if it is not given.

    Returns:
        ``directory``: ``adapter_config.json`` (its ``base_model_name_or_path`` is the reference),
        ``adapter_model.safetensors``, ``README.md`` and ``manifest.json``.

    Raises:
        ValueError: if the model has no adapter or several active ones, or the card lacks the base.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import save_file

    if not isinstance(model, PeftModel):
        raise ValueError("the model has no adapter; use save_merged for whole models")
    active = list(model.active_adapters)
    if len(active) != 1:
        raise ValueError(f"exactly one adapter must be active to save it, not {len(active)}")
    base, identity = _origin(card)
    config = copy.deepcopy(model.peft_config[active[0]])
    config.base_model_name_or_path = base
    config.inference_mode = True
    config.auto_mapping = None
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)  # sets have no order: the same adapter, the same bytes
    # "auto" would ask the Hub whether the base's vocabulary has changed; embeddings are never an adapter's business.
    state = get_peft_model_state_dict(model, adapter_name=active[0], save_embedding_layers=False)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"the adapter's {name} is not finite; it will not be saved")
    with appearing(directory) as fresh:
        save_file(tensors, fresh / "adapter_model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(str(fresh))
        manifest.write(fresh, kind="adapter", base=base, base_fingerprint=identity, fingerprint=None, card=card)
    return directory


def save_merged(model: Any, tokenizer: Any, directory: Path, *, card: Mapping[str, Any]) -> Path:
    """Saves a whole model, with the adapter folded in if there is one. The caller's model is left bitwise unchanged.

    Args:
        model: a transformers model, or a PEFT model around one with exactly one active adapter.
        tokenizer: its tokenizer; its end-of-turn token becomes the model's end-of-sequence token.
        directory: where it goes; a directory of that name is replaced once the new one is complete.
        card: as in :func:`save_adapter`.

    Returns:
        ``directory``: configuration, safetensors, tokenizer with chat template, generation settings, ``README.md`` and
        ``manifest.json``.

    Raises:
        ValueError: if the base is quantised, the merged weights are not finite, or the card lacks the base.
    """
    base, identity = _origin(card)
    state = merged_state(model)
    for name, tensor in state.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"the model's {name} is not finite; it will not be saved")
    skeleton = _skeleton(inner_model(model), state, tokenizer)
    with appearing(directory) as fresh:
        skeleton.save_pretrained(fresh, state_dict=state, max_shard_size=MAX_SHARD)
        tokenizer.save_pretrained(fresh)
        for path in fresh.glob("*.safetensors"):
            path.chmod(0o644)
        own = fingerprint(fresh)
        manifest.write(fresh, kind="merged", base=base, base_fingerprint=identity, fingerprint=own, card=card)
    return directory


def _skeleton(inner: Any, state: dict[str, torch.Tensor], tokenizer: Any) -> Any:
    """A model of the same class without weights, which writes ``state`` under the right names and settings."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = copy.deepcopy(inner.config)
    head, embedding = inner.get_output_embeddings(), inner.get_input_embeddings()
    names = {id(module): name for name, module in inner.named_modules()}
    pair = [f"{_plain(names[id(module)])}.weight" for module in (head, embedding)] if head is not None else []
    if len(pair) == 2 and all(name in state for name in pair):
        tied = state[pair[0]].data_ptr() == state[pair[1]].data_ptr()
        if config.tie_word_embeddings and not tied:  # an adapter changed one of the two
            config.tie_word_embeddings = False
    with torch.device("meta"):
        skeleton: nn.Module = type(inner)(config)
    settings = copy.deepcopy(inner.generation_config)
    settings.eos_token_id = tokenizer.eos_token_id
    if settings.pad_token_id is None:
        settings.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    skeleton.generation_config = settings
    skeleton.to(dtype=inner.dtype)
    return skeleton


def _plain(name: str) -> str:
    """The name that a module, possibly inside an adapter's wrapper, has in the plain model."""
    return name.removesuffix(".base_layer").removesuffix(".original_module")


def _origin(card: Mapping[str, Any]) -> tuple[str, str]:
    base = card.get("base")
    if not isinstance(base, str) or not base:
        raise ValueError("the card must name the base model's reference under 'base'")
    identity = card.get("base_fingerprint")
    if identity is None:
        directory = local_directory(base)
        if directory is None:
            raise ValueError(f"{base} is not on this machine: give its fingerprint under 'base_fingerprint'")
        identity = fingerprint(directory)
    return base, str(identity)

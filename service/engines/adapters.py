"""LoRA adapters of one base, several in memory, a different one for each row of a batch.

PEFT's layers take ``adapter_names`` with every forward. Its own wrapper hooks and unhooks every layer for every
forward to pass them; here each layer gets one hook that reads the names of the present forward.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

from core.models.load import Incomplete, Loaded, attach, check_adapter_base
from core.models.policy import check_adapter
from service.engines.base import BadRequest, EngineUnavailable

BASE = "__base__"  # PEFT's name for a row without an adapter
LORA_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")

Key = tuple[str, int, int]  # directory, and its weights' modification time (ns) and size: files may be replaced


class PlacesTaken(EngineUnavailable):
    """Every place for an adapter is in use by a row."""


class AdapterStuck(RuntimeError):
    """Half an adapter is in the layers and cannot be taken out again: what they compute is nobody's model."""


class Adapters:
    """Loads adapters when they are asked for and drops the least recently used.

    Args:
        loaded: the base; its layers are wrapped in place when the first adapter comes.
        limit: adapters held at once.
    """

    def __init__(self, loaded: Loaded, *, limit: int) -> None:
        self._loaded = loaded
        self._limit = limit
        self._peft: Any = None
        self._names: dict[Key, str] = {}  # least recently used first
        self._users: dict[str, int] = {}
        self._numbers = itertools.count(1)
        self._current: list[str] = []
        self._hooked: set[int] = set()

    def __len__(self) -> int:
        """Adapters in memory."""
        return len(self._names)

    def acquire(self, directory: str) -> str:
        """Have an adapter in memory until ``release``.

        Args:
            directory: in PEFT's format.

        Returns:
            Its name in this model.

        Raises:
            EngineError: 400 if it is refused or belongs to another base; 503 if all places are in use.
        """
        weights = Path(directory) / "adapter_model.safetensors"
        try:
            about = weights.stat()
        except OSError:
            raise BadRequest("model_not_found", f"The adapter {Path(directory).name} is gone.", param="model") from None
        key = (directory, about.st_mtime_ns, about.st_size)
        name = self._names.pop(key, None)
        if name is None:
            self._make_room()
            try:
                name = self._load(Path(directory))
            except ValueError as error:
                raise BadRequest("model_not_usable", f"The adapter cannot be used: {error}", param="model") from None
        self._names[key] = name
        self._users[name] = self._users.get(name, 0) + 1
        return name

    def release(self, name: str) -> None:
        """End one use of an adapter; it stays in memory until its place is needed."""
        self._users[name] -= 1

    def names(self, rows: Sequence[str | None]) -> None:
        """Set the adapter of each row of the coming forward."""
        self._current = [name or BASE for name in rows]

    def _make_room(self) -> None:
        while len(self._names) >= self._limit:
            idle = next((k for k, name in self._names.items() if not self._users[name]), None)
            if idle is None:
                raise PlacesTaken(f"All {self._limit} places for adapters are in use. Try again shortly.")
            name = self._names.pop(idle)
            del self._users[name]
            if self._names:  # PEFT warns when it has to choose another active one; forwards here name theirs
                self._peft.set_adapter(next(iter(self._names.values())))
            self._peft.delete_adapter(name)

    def _load(self, directory: Path) -> str:
        name = f"a{next(self._numbers)}"
        loaded = self._loaded
        check_adapter_base(directory, loaded.ref, loaded.directory, loaded.fingerprint)
        if check_adapter(directory).get("use_dora"):
            raise ValueError("a DoRA adapter cannot share a batch; it is served merged")
        check_shapes(directory, loaded.model)
        # What fails from here on leaves layers half wrapped. No ValueError but of
        # weights that are missing: that would blame the adapter for it.
        try:
            peft = attach(loaded.model if self._peft is None else self._peft, directory, name=name)
            peft.eval()
            self._hook(peft)
        except Exception as error:
            try:
                self._take_out(name)
            except Exception as stuck:
                raise AdapterStuck(f"half of the adapter {directory} is in the layers: {stuck}") from error
            if isinstance(error, Incomplete):
                raise
            raise RuntimeError(f"PEFT could not take the adapter {directory}") from error
        self._peft = peft
        return name

    def _take_out(self, name: str) -> None:
        """Undo what a load that failed left in the layers; without an adapter before it, they are unwrapped again."""
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        if self._peft is not None:
            if name in self._peft.peft_config:
                self._peft.delete_adapter(name)
            return
        model = self._loaded.model
        for parent in list(model.modules()):
            for place, child in list(parent.named_children()):
                if isinstance(child, BaseTunerLayer):
                    setattr(parent, place, child.get_base_layer())
                elif isinstance(child, AuxiliaryTrainingWrapper):
                    setattr(parent, place, child.original_module)
        self._hooked.clear()
        if hasattr(model, "peft_config"):
            del model.peft_config  # PEFT's mark on a model that it has wrapped

    def _hook(self, peft: Any) -> None:
        from peft.tuners.lora.layer import LoraLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        for module in peft.modules():
            if isinstance(module, LoraLayer | AuxiliaryTrainingWrapper) and id(module) not in self._hooked:
                module.register_forward_pre_hook(self._inject, with_kwargs=True)
                self._hooked.add(id(module))

    def _inject(self, module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        del module
        return args, kwargs | {"adapter_names": self._current}


def check_shapes(directory: Path, model: Any) -> None:
    """Check that every matrix of a LoRA fits the layer that it names, before PEFT changes any layer.

    Args:
        directory: the adapter.
        model: the base, its layers wrapped or not.

    Raises:
        ValueError: if a layer is missing or has another width.
    """
    with safe_open(directory / "adapter_model.safetensors", framework="pt") as file:
        for key in file.keys():
            found = LORA_KEY.fullmatch(key)
            if found is None:
                continue
            path, which = found.groups()
            try:
                layer = model.get_submodule(path)
            except AttributeError:
                raise ValueError(f"it adapts {path}, which this model does not have") from None
            layer = getattr(layer, "base_layer", layer)
            if not isinstance(layer, nn.Linear):
                continue
            # A reads what the layer reads, B writes what it writes.
            mine, theirs = (layer.in_features, 1) if which == "A" else (layer.out_features, 0)
            width = file.get_slice(key).get_shape()[theirs]
            if width != mine:
                raise ValueError(f"its {path} has width {width}, the model's has {mine}")


def merged(loaded: Loaded, adapter: Path) -> Loaded:
    """A base with an adapter's weights added for good: how what cannot share a batch (DoRA) is served.

    Its fingerprint stays the base's, since vectors are fitted on the base.

    Args:
        loaded: the base; its weights are changed in place.
        adapter: directory in PEFT's format.

    Returns:
        The merged model.

    Raises:
        ValueError: if the adapter is refused or belongs to another base.
    """
    check_adapter_base(adapter, loaded.ref, loaded.directory, loaded.fingerprint)
    model = attach(loaded.model, adapter).merge_and_unload(safe_merge=True)
    return replace(loaded, model=model.eval())

"""From a reference to a model in memory: the only place that hands weights to transformers and PEFT."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from core.models import catalog, policy
from core.models.fingerprint import fingerprint
from core.models.ref import ModelRef, parse_ref
from core.models.resolve import local_directory, resolve

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Quant = Literal["none", "bnb-nf4", "int4", "nf4", "q4_1"]
DTYPES = ("float32", "bfloat16", "float16")

# Settings of an adapter that say nothing about what it computes, or only about how it was trained.
_INCIDENTAL = frozenset(
    {
        *("base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version", "task_type"),
        *("lora_dropout", "init_lora_weights"),
    }
)


@dataclass(frozen=True)
class Loaded:
    """A model ready to run.

    Attributes:
        model: a causal language model in eval mode; a PEFT model around one if an adapter was asked for.
        tokenizer: its tokenizer, with a chat template if the model has one.
        fingerprint: identity of the base's weights, ``sha256:...``; an adapter does not change it.
        directory: where the base's files lie.
        ref: what was asked for.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str
    directory: Path
    ref: ModelRef


def load(
    ref: ModelRef | str,
    *,
    dtype: str = "float32",
    adapter: Path | None = None,
    quant: Quant = "none",
    group: int = 64,
    is_trainable: bool = False,
) -> Loaded:
    """Loads a model, pulling it first if the catalog or the Hub has it and this machine does not.

    The directory passes the policy before any of it is opened; code from a model never runs, and only safetensors are
    read.

    Args:
        ref: what to load.
        dtype: ``float32``, ``bfloat16`` or ``float16``: what the weights are held in (with ``bnb-nf4``: computed in).
        adapter: directory of a LoRA in PEFT's format, made for this base.
        quant: how the linear layers inside the blocks are held: ``int4`` and ``nf4`` quantise them while they are read
            (:mod:`core.models.quant`), ``q4_1`` takes the codes of a GGUF file, ``bnb-nf4`` needs the ``bnb`` extra.
        group: with ``int4``, weights that share a scale: 32, 64 or 128.
        is_trainable: keep the adapter's parameters trainable.

    Returns:
        The loaded model, in eval mode.

    Raises:
        ValueError: if the reference, a directory, the dtype or the quantisation is refused, or the adapter belongs to
            another base.
    """
    parsed = parse_ref(ref) if isinstance(ref, str) else ref
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; give {', '.join(DTYPES)}")
    if quant not in get_args(Quant):
        raise ValueError(f"unknown quantisation {quant!r}; give {', '.join(get_args(Quant))}")
    if adapter is not None and quant in ("int4", "nf4", "q4_1"):
        raise ValueError(f"an adapter cannot be put on a base of {quant}; load the base with none or bnb-nf4")
    directory = resolve(parsed)
    identity = fingerprint(directory)
    if adapter is not None:
        check_adapter_base(adapter, parsed, directory, identity)
    # Only what has been checked reaches a library that would act on it.
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch_dtype = getattr(torch, dtype)
    if quant in ("int4", "nf4", "q4_1"):
        own = _quantised(parsed, directory, quant, group, torch_dtype)
        return Loaded(own, _tokenizer(directory), identity, directory, parsed)
    options: dict[str, Any] = {"quantization_config": _nf4(torch_dtype)} if quant == "bnb-nf4" else {}
    model, info = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch_dtype,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
        **options,
    )
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{directory} lacks {len(missing)} of the model's weights, {missing[0]} among them")
    if quant == "bnb-nf4":
        _keep_layout(model)
    tokenizer = _tokenizer(directory)
    if adapter is not None:
        model = attach(model, adapter, is_trainable=is_trainable)
    return Loaded(model.eval(), tokenizer, identity, directory, parsed)


def load_tokenizer(ref: ModelRef | str) -> PreTrainedTokenizerBase:
    """Loads only the tokenizer of a model, pulling the model first if need be.

    Args:
        ref: the model.

    Returns:
        Its tokenizer, with a chat template if the model has one.

    Raises:
        ValueError: if the reference or the directory is refused.
    """
    return _tokenizer(resolve(ref))


class Incomplete(ValueError):
    """An adapter's file lacks weights that its settings ask for."""


def attach(
    model: PreTrainedModel | PeftModel, adapter: Path, *, name: str = "default", is_trainable: bool = False
) -> Any:
    """Puts an adapter on a model, beside those that it has already.

    Args:
        model: the base, or what this function returned for it before.
        adapter: directory in PEFT's format; it passes the policy first. See :func:`check_adapter_base` for whether it
            belongs to this base.
        name: what PEFT calls it on this model; no other adapter on it has that name.
        is_trainable: keep its parameters trainable.

    Returns:
        The ``PeftModel``; the first adapter is the active one until the caller says otherwise.

    Raises:
        Incomplete: if tensors are missing, for which PEFT would leave random numbers; the adapter is on the model then.
        ValueError: if the directory is refused or the name is taken.
    """
    from peft import PeftModel

    policy.check_adapter(adapter)
    if isinstance(model, PeftModel) and name in model.peft_config:
        raise ValueError(f"the model has an adapter named {name!r} already")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found missing adapter keys", UserWarning)  # refused below
        # PEFT 0.21 asks transformers 5.23 by a name that the latter is about to drop; goes with a PEFT that does not.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        if isinstance(model, PeftModel):
            made = model
            made.load_adapter(str(adapter), adapter_name=name, is_trainable=is_trainable)
        else:
            made = PeftModel.from_pretrained(model, str(adapter), adapter_name=name, is_trainable=is_trainable)
    _check_complete(made, adapter, name)
    return made


def _check_complete(model: PeftModel, adapter: Path, name: str) -> None:
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    wanted = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        missing = sorted(wanted.keys() - set(file.keys()))
    if missing:
        raise Incomplete(f"it lacks {len(missing)} of {len(wanted)} tensors, for instance {missing[0]}")


def restore_adapter(model: PeftModel, adapter: Path) -> None:
    """Puts a saved adapter's weights into a fresh one of the same form, in place: what ``save_adapter`` wrote, bitwise.

    Args:
        model: a PEFT model with exactly one active adapter.
        adapter: directory in PEFT's format; it passes the policy first.

    Raises:
        ValueError: if the directory is refused, or the two adapters differ in a setting, a tensor's name or its shape.
    """
    saved = policy.check_adapter(adapter)
    import torch
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    (active,) = model.active_adapters
    fresh = json.loads(json.dumps(model.peft_config[active].to_dict(), default=sorted))
    for key in sorted(fresh.keys() & saved.keys() - _INCIDENTAL):
        one, other = (sorted(v) if key == "target_modules" else v for v in (saved[key], fresh[key]))
        if one != other:
            raise ValueError(f"the saved adapter has {key} {one!r:.200}, and the one to train has {other!r:.200}")
    mine = get_peft_model_state_dict(model, adapter_name=active, save_embedding_layers=False)
    theirs = load_file(adapter / "adapter_model.safetensors")
    shapes, wanted = ({name: tuple(tensor.shape) for name, tensor in some.items()} for some in (theirs, mine))
    if odd := sorted(name for name in shapes.keys() | wanted.keys() if shapes.get(name) != wanted.get(name)):
        raise ValueError(f"the saved adapter has other weights than the one to train: {odd[0]:.200}")
    with torch.no_grad():
        for name, tensor in mine.items():
            tensor.copy_(theirs[name])


def check_adapter_base(adapter: Path, ref: ModelRef, directory: Path, identity: str) -> None:
    """Checks that an adapter was made for a base.

    One that Gradhelm saved carries its base's fingerprint. Any other names its base: that name must be the reference
    in use, or lead to a directory on this machine with the same weights.

    Args:
        adapter: the adapter's directory.
        ref: the base as it was asked for.
        directory: the base's directory.
        identity: the base's fingerprint.

    Raises:
        ValueError: if it was made for another base, or does not say for which.
    """
    config = policy.check_adapter(adapter)
    manifest = adapter / "manifest.json"
    expected = policy.read_json(manifest).get("base_fingerprint") if manifest.is_file() else None
    named = config.get("base_model_name_or_path")
    if expected is not None:
        if expected != identity:
            raise policy.PolicyError(f"the adapter was made for {named!r} ({expected}), not for {ref} ({identity})")
        return
    if not isinstance(named, str) or not named:
        raise policy.PolicyError("the adapter does not say which base it was made for (base_model_name_or_path)")
    if named in (str(ref), ref.name, str(directory)):
        return
    try:
        other = local_directory(named)
        same = other is not None and fingerprint(other) == identity
    except ValueError:
        same = False
    if not same:
        raise policy.PolicyError(f"the adapter was made for {named!r:.200}, not for {ref}")


def _tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def _quantised(ref: ModelRef, directory: Path, quant: Quant, group: int, dtype: Any) -> Any:
    """The model with our own 4-bit layers, in eval mode."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    from core.models.quant import convert, gguf_q4, streamed

    if quant == "q4_1":
        file = ref.path if ref.kind == "gguf" else catalog.gguf(ref.name) if ref.kind == "catalog" else None
        if file is None:
            raise ValueError(f"{ref} is no GGUF file, from which alone q4_1 is read; give int4 or nf4")
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        model = gguf_q4.read(file, config, dtype)
    elif (model := streamed.load(directory, quant, group, dtype)) is None:
        # Names that transformers translates: the whole model in floats first.
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, use_safetensors=True, local_files_only=True, trust_remote_code=False
        )
        convert.quantise_model(model, quant, group)
    if (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory, local_files_only=True)
    return model.eval()


def _nf4(compute: Any) -> Any:
    import importlib.util

    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            "quant bnb-nf4 needs bitsandbytes, which is not installed: pip install -c constraints.txt -e '.[bnb]'"
        )
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def _keep_layout(model: PreTrainedModel) -> None:
    """Keeps bitsandbytes from repacking 4-bit layers for CPU inference.

    On a CPU with AVX512-BF16 their first forward pass in eval mode would replace the weights for good by a layout that
    computes in bfloat16 and passes no gradient: an evaluation would end the training, and the logits would differ
    between the modes. The pass that training uses gives the same bits in both.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False

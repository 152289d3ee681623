"""Which model directories may be opened at all: weights are data, and nothing in a directory may run.

Everything here is decided from bytes on the disk, before any machine-learning library is imported, so a hostile
directory is refused before something could act on it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from core.models.headers import TensorInfo, read_safetensors_header

MAX_JSON = 4 * 1024 * 1024
MAX_FILES = 10_000
MAX_DEPTH = 64

ARCHITECTURES = frozenset(
    {
        *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "gemma3_text", "siglip_vision_model"),
        *("phi", "phi3", "olmo2", "granite", "smollm3", "gpt2", "gpt_neox"),
    }
)
"""Values that ``model_type`` may have, at any depth of a configuration."""

TOKENIZERS = frozenset(
    {
        *("PreTrainedTokenizerFast", "TokenizersBackend", "LlamaTokenizer", "LlamaTokenizerFast"),
        *("GPT2Tokenizer", "GPT2TokenizerFast", "Qwen2Tokenizer", "Qwen2TokenizerFast", "GemmaTokenizer"),
        *("GemmaTokenizerFast", "GPTNeoXTokenizer", "GPTNeoXTokenizerFast", "CodeGenTokenizer", "CodeGenTokenizerFast"),
    }
)
"""Values that ``tokenizer_class`` may have."""

# Keys that make a library import code, from the directory or from the Hub. Their value does not matter, except that
# an explicit "no" is harmless.
_CODE = frozenset(
    {
        *("auto_map", "trust_remote_code", "_attn_implementation_internal", "custom_pipelines", "custom_generate"),
        *("custom_code", "code_revision", "auto_mapping", "megatron_config", "kernel_config", "use_kernels"),
        *("_experts_implementation", "experts_implementation", "_experts_implementation_internal"),
    }
)
# Keys that switch to a format or source of weights other than the safetensors files beside them.
_WEIGHTS = frozenset({"quantization_config", "compression_config", "gguf_file", "use_pretrained_backbone", "backbone"})
_ATTENTION = frozenset({"eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"})
_PICKLES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz", ".msgpack", ".h5"})
_CODE_FILES = frozenset({".py", ".pyc", ".so", ".dll", ".dylib", ".pyd"})
# In a vocabulary the keys are text, and in our own manifest they are the user's: none of them is a setting.
_PLAIN_JSON = frozenset(
    {"tokenizer.json", "vocab.json", "added_tokens.json", "manifest.json", "model.safetensors.index.json"}
)
_INDEX = "model.safetensors.index.json"
_ADAPTER_INITS: tuple[object, ...] = (True, False, None, "gaussian", "orthogonal")
# Keys that would make a tokenizer read a file, and the names that they may have.
_FILE_KEYS = frozenset({"tokenizer_file", "vocab_file", "merges_file", "spm_file", "source_spm", "target_spm"})
_FILE_NAMES = frozenset({"tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model"})
# Sizes that a library would allocate for before it looks at the weights.
_COUNTS = frozenset({"num_hidden_layers", "n_layer", "num_layers"})
_DIMENSIONS = frozenset(
    {
        *("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
        *("n_embd", "n_inner", "n_head"),
    }
)
HUB = "huggingface.co"
_ENDPOINT = re.compile(r"(?P<scheme>https?)://(?P<host>[a-z0-9.-]+(?::[0-9]{1,5})?)/?", re.ASCII)
_CLASS = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)


class PolicyError(ValueError):
    """A directory or configuration that Gradhelm will not open; the message says why and what would do."""


def check_config(config: Mapping[str, Any], *, quantised: bool = False) -> None:
    """Checks a parsed configuration, at every depth.

    Args:
        config: what a ``config.json``, ``tokenizer_config.json`` or the like holds.
        quantised: let it say how the weights are quantised; for readers that act on no other setting of that kind.

    Raises:
        PolicyError: if a key would bring in code or other weights, a ``model_type`` is not in the allow-list, or the
            nesting is deeper than 64.
    """
    for key, value in _items(config):
        if key in _CODE and value not in (None, False):
            raise PolicyError(f"the configuration has {key!r}, which runs code from the model; models are data here")
        if key in _WEIGHTS and not (quantised and key == "quantization_config") and value not in (None, False):
            raise PolicyError(f"the configuration has {key!r}; give the plain, unquantised safetensors model")
        if key in ("_attn_implementation", "attn_implementation") and not _known_attention(value):
            raise PolicyError(
                f"the configuration names an attention implementation that is not built in: {value!r:.80}"
            )
        if key == "model_type" and not _one_of(value, ARCHITECTURES):
            raise PolicyError(
                f"model_type {value!r:.80} is not supported; supported: {', '.join(sorted(ARCHITECTURES))}"
            )
        if key == "architectures" and not _class_names(value):
            raise PolicyError("the configuration's 'architectures' is not a list of class names")
        if key in _FILE_KEYS and value is not None and not _one_of(value, _FILE_NAMES):
            raise PolicyError(f"the configuration's {key!r} names a file of its own; remove the key")
        if key == "tokenizer_class" and value is not None and not _one_of(value, TOKENIZERS):
            raise PolicyError(
                f"tokenizer class {value!r:.80} is not supported; supported: {', '.join(sorted(TOKENIZERS))}"
            )


def check_directory(path: Path, *, quantised: bool = False) -> None:
    """Checks a base model's directory: safetensors only, no code, sound headers, nothing that points elsewhere.

    Args:
        path: the directory.
        quantised: whether its weights may be quantised ones, as in :func:`check_config`.

    Raises:
        PolicyError: if anything in it is refused; the message names the file.
    """
    files = _files(path)
    if "adapter_config.json" in files:
        raise PolicyError(f"{path} is an adapter, not a model: give its base as the model and this as the adapter")
    if "config.json" not in files:
        raise PolicyError(f"{path} has no config.json: it is not a model directory")
    config = read_json(files["config.json"])
    if "model_type" not in config:
        raise PolicyError("config.json has no model_type")
    if _INDEX in files:
        weights = _indexed(files[_INDEX], files)
    elif "model.safetensors" in files:
        weights = {"model.safetensors"}
    else:
        raise PolicyError(f"{path} has neither model.safetensors nor {_INDEX}")
    headers = _check_files(files, quantised=quantised)
    check_sizes(config, [tensor for name in weights for tensor in headers[name].values()])


def check_adapter(path: Path) -> dict[str, Any]:
    """Checks an adapter's directory.

    Args:
        path: the directory, in PEFT's format.

    Returns:
        Its ``adapter_config.json``. Whether it belongs to the base in use is for the caller to compare.

    Raises:
        PolicyError: if anything in it is refused; the message names the file.
    """
    files = _files(path)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if name not in files:
            raise PolicyError(f"{path} has no {name}: it is not an adapter in PEFT's safetensors format")
    config = read_json(files["adapter_config.json"])
    if config.get("peft_type") != "LORA":
        raise PolicyError(f"adapter type {config.get('peft_type')!r:.80} is not supported; supported: LORA")
    if config.get("init_lora_weights", True) not in _ADAPTER_INITS:
        raise PolicyError("the adapter's init_lora_weights would change the base; convert it to a plain LoRA first")
    if config.get("layer_replication") is not None:
        raise PolicyError("the adapter has 'layer_replication', which changes the base's layers")
    headers = _check_files(files)
    longest = max((max(t.shape, default=1) for t in headers["adapter_model.safetensors"].values()), default=1)
    pattern = config.get("rank_pattern") or {}
    ranks = [config.get("r"), *(pattern.values() if isinstance(pattern, dict) else [None])]
    if not all(type(rank) is int and 1 <= rank <= longest for rank in ranks):
        raise PolicyError(f"the adapter's ranks {ranks!r:.80} are not those of its tensors")
    return config


def check_sizes(config: Mapping[str, Any], tensors: list[TensorInfo]) -> None:
    """Refuses sizes that the weights contradict: a library allocates for the former before it reads the latter.

    Args:
        config: a parsed configuration.
        tensors: the weights' headers.

    Raises:
        PolicyError: if a count or a dimension is larger than any of the weights could have.
    """
    longest = max((max(tensor.shape, default=1) for tensor in tensors), default=0)
    for key, value in _items(config):
        bound = len(tensors) if key in _COUNTS else longest if key in _DIMENSIONS else None
        if bound is not None and value is not None and not (type(value) is int and 0 <= value <= bound):
            raise PolicyError(f"config.json: {key} is {value!r:.80}, which the weights contradict")


def check_endpoint(url: str) -> str:
    """Checks where model snapshots come from: ``huggingface.co`` over https, or a host that the operator lists.

    Args:
        url: the Hub's address, as ``HF_ENDPOINT`` has it.

    Returns:
        The address, rebuilt from its parsed parts, so that what was checked is what is connected to.

    Raises:
        PolicyError: if the host is neither the Hub's nor in ``GRADHELM_HUB_HOSTS`` (names separated by commas; ``host``
            or ``host:port``), or the address holds more than a host. Only a listed host may use plain http.
    """
    listed = {name.strip() for name in os.environ.get("GRADHELM_HUB_HOSTS", "").split(",") if name.strip()}
    match = _ENDPOINT.fullmatch(url)
    if match is None or (match["host"] not in listed and (match["host"] != HUB or match["scheme"] != "https")):
        raise PolicyError(
            f"{url!r:.200} is not an allowed Hub: list its host in GRADHELM_HUB_HOSTS or unset HF_ENDPOINT"
        )
    return f"{match['scheme']}://{match['host']}"


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object of bounded size and depth.

    Args:
        path: the file.

    Returns:
        What it holds.

    Raises:
        PolicyError: if it is larger than 4 MiB, not JSON, not an object, or nested too deeply.
    """
    if path.stat().st_size > MAX_JSON:
        raise PolicyError(f"{path.name} is larger than {MAX_JSON} bytes")
    try:
        value = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise PolicyError(f"{path.name} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise PolicyError(f"{path.name} is not a JSON object")
    return value


def _files(path: Path) -> dict[str, Path]:
    """Every file below ``path`` by its relative name; refuses links that leave it and file types that can run."""
    if not path.is_dir():
        raise PolicyError(f"{path} is not a directory")
    root = path.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":  # the Hub's cache keeps its files as links into blobs, two levels up
        allowed.append(root.parent.parent / "blobs")
    found: dict[str, Path] = {}
    for folder, folders, names in os.walk(root):
        for name in (*folders, *names):
            full = Path(folder, name)
            relative = str(full.relative_to(root))
            if len(found) >= MAX_FILES:
                raise PolicyError(f"{path} has more than {MAX_FILES} entries: it is not a model directory")
            if full.is_symlink() and not any(full.resolve().is_relative_to(place) for place in allowed):
                raise PolicyError(f"{relative} is a link that leaves the model's directory")
            if name in names:
                if not full.is_file():
                    raise PolicyError(f"{relative} is not a plain file")
                found[relative] = full
    return found


def _check_files(files: Mapping[str, Path], *, quantised: bool = False) -> dict[str, dict[str, TensorInfo]]:
    """Checks every file by its kind; returns the headers of the safetensors files."""
    headers = {}
    for name, path in files.items():
        suffix = Path(name).suffix.lower()
        if suffix in _PICKLES:
            raise PolicyError(f"{name} is in a format that may run code when read: only safetensors are accepted")
        if suffix in _CODE_FILES:
            raise PolicyError(f"{name} is program code: a model directory must hold data only")
        if suffix == ".json" and "/" not in name and name not in _PLAIN_JSON:
            try:
                check_config(read_json(path), quantised=quantised)
            except PolicyError as error:
                raise PolicyError(f"{name}: {error}") from None
        if suffix == ".safetensors":
            try:
                headers[name] = read_safetensors_header(path)
            except ValueError as error:
                raise PolicyError(str(error)) from None
    return headers


def _indexed(index: Path, files: Mapping[str, Path]) -> set[str]:
    mapping = read_json(index).get("weight_map")
    if not isinstance(mapping, dict) or not all(isinstance(name, str) for name in mapping.values()):
        raise PolicyError(f"{index.name} has no weight_map of names")
    missing = {name for name in mapping.values() if not name.endswith(".safetensors") or name not in files}
    if missing:
        raise PolicyError(f"{index.name} names {sorted(missing)[0]!r:.80}, which is not a file of this directory")
    return set(mapping.values())


def _items(value: Any, depth: int = 0) -> Iterator[tuple[str, Any]]:
    if depth > MAX_DEPTH:
        raise PolicyError(f"the configuration is nested deeper than {MAX_DEPTH}")
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key), item
            yield from _items(item, depth + 1)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _items(item, depth + 1)


def _one_of(value: Any, allowed: frozenset[str]) -> bool:
    return isinstance(value, str) and value in allowed


def _known_attention(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(_known_attention(item) for item in value.values())
    return value is None or _one_of(value, _ATTENTION)


def _class_names(value: Any) -> bool:
    return value is None or (
        isinstance(value, list) and all(isinstance(item, str) and _CLASS.fullmatch(item) for item in value)
    )

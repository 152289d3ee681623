"""From a reference to a directory on this machine. No torch here: the API asks it what can be served."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from core.home import home as default_home
from core.models import catalog, policy
from core.models.lock import once
from core.models.ref import ModelRef, parse_ref

# What a Hub snapshot may hold: nothing that runs, and no weights but safetensors.
HUB_PATTERNS = (
    *("model*.safetensors", "config.json", "generation_config.json", "model.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "tokenizer.model", "chat_template.jinja", "LICENSE*"),
)


def local_directory(ref: ModelRef | str, home: Path | None = None) -> Path | None:
    """The directory of a model that is on this machine already.

    Args:
        ref: a reference.
        home: the data folder; Gradhelm's own by default.

    Returns:
        Its directory, or None if it would have to be pulled, converted, or does not exist. Nothing is checked beyond
        that it looks like a model; :func:`resolve` applies the policy.

    Raises:
        ValueError: if ``ref`` is text and no model reference.
    """
    parsed = parse_ref(ref) if isinstance(ref, str) else ref
    directory = _directory(parsed, home or default_home())
    return directory if directory is not None and (directory / "config.json").is_file() else None


def available(home: Path | None = None) -> list[str]:
    """The references of all models on this machine: pulled catalog models, then Hub snapshots, sorted."""
    where = home or default_home()
    names = [name for name in catalog.CATALOG if catalog.is_pulled(name, where)]
    hub = []
    for config in (where / "models" / "hub").glob("*/config.json"):
        if config.parent.name.startswith("."):
            continue  # half-made
        name, _, revision = config.parent.name.partition("@")
        name = name.replace("--", "/")
        hub.append(name if revision == "main" else f"{name}@{revision}")
    return names + sorted(hub)


def resolve(ref: ModelRef | str, *, allow_download: bool = True, home: Path | None = None) -> Path:
    """Finds a model's directory, bringing it to this machine if need be, and applies the policy to it.

    Args:
        ref: a reference.
        allow_download: False refuses what is not here yet.
        home: the data folder; Gradhelm's own by default.

    Returns:
        A directory with ``config.json``, safetensors and a tokenizer. A GGUF file's is a converted copy, made once
        and kept.

    Raises:
        ValueError: if the reference is malformed or unknown, the model is not here and may not be brought, or the
            policy refuses it.
    """
    parsed = parse_ref(ref) if isinstance(ref, str) else ref
    where = home or default_home()
    directory = local_directory(parsed, where)
    if directory is None:
        if parsed.kind == "directory":
            raise ValueError(f"{parsed} is not a model directory: it has no config.json")
        if parsed.kind == "catalog":
            catalog.directory_of(parsed.name, where)
        if not allow_download and parsed.kind != "gguf":
            raise ValueError(
                f"{parsed} is not on this machine; an administrator brings it: gradhelm models pull {parsed}"
            )
        directory = _bring(parsed, where)
    policy.check_directory(directory)
    return directory


def _directory(ref: ModelRef, home: Path) -> Path | None:
    if ref.kind == "directory":
        return ref.path
    if ref.kind == "catalog":
        return catalog.directory_of(ref.name, home) if ref.name in catalog.CATALOG else None
    if ref.kind == "hub":
        return home / "models" / "hub" / f"{ref.name.replace('/', '--')}@{ref.revision or 'main'}"
    return _converted(ref.path, home) if ref.path.is_file() else None


def _bring(ref: ModelRef, home: Path) -> Path:
    if ref.kind == "catalog":
        return catalog.pull(ref.name, home)
    if ref.kind == "hub":
        return _snapshot(ref, home)
    if not ref.path.is_file():
        raise ValueError(f"{ref} does not exist")
    from core.models import wheel

    directory = _converted(ref.path, home)
    with once(directory) as fresh:
        if fresh is not None:
            wheel.convert_gguf(ref.path, fresh)
    return directory


def _snapshot(ref: ModelRef, home: Path) -> Path:
    """Downloads a Hub snapshot: safetensors, JSON and tokenizer files only, checked before it takes its place.

    Tests run it against a small server on the loopback, never against the real Hub.
    """
    endpoint = policy.check_endpoint(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    directory = _directory(ref, home)
    assert directory is not None
    with once(directory) as fresh:
        if fresh is not None:
            patterns = list(HUB_PATTERNS)
            try:
                snapshot_download(
                    ref.name, revision=ref.revision, local_dir=fresh, allow_patterns=patterns, endpoint=endpoint
                )
            except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
                raise ValueError(f"could not download {ref} from {endpoint}: {error}") from error
            shutil.rmtree(fresh / ".cache", ignore_errors=True)
            policy.check_directory(fresh)
    return directory


def _converted(file: Path, home: Path) -> Path:
    """Where a GGUF file's conversion is kept: the name changes with the file's place, size and time of change."""
    real = file.resolve()
    status = real.stat()
    key = hashlib.sha256(f"{real}\0{status.st_size}\0{status.st_mtime_ns}".encode()).hexdigest()[:24]
    return home / "models" / "gguf" / key

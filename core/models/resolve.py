"""From a reference to a directory on this machine. No torch here: the API asks it what can be served."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from core.home import home as default_home
from core.models import catalog, lock, policy
from core.models.lock import once
from core.models.ref import ModelRef, parse_ref

# What a Hub snapshot may hold: nothing that runs, and no weights but safetensors.
HUB_PATTERNS = (
    *("model*.safetensors", "config.json", "generation_config.json", "model.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "tokenizer.model", "chat_template.jinja", "LICENSE*"),
)
_COMMIT = ".of-commit"
"""In a snapshot on its way: what its files belong to."""


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


def arriving(ref: ModelRef, home: Path) -> int:
    """Bytes of a catalog model or a Hub snapshot that is on its way.

    Args:
        ref: a reference.
        home: the data folder.

    Returns:
        How much of it is here by now; it may shrink, too. 0 for what is not on its way.
    """
    directory = _directory(ref, home)
    return 0 if directory is None else lock.arriving(directory)


class NotFetched(ValueError):
    """The Hub did not give the files: no network, no such repository, or no right to it."""


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
    directory = _directory(ref, home)
    assert directory is not None
    with once(directory, keep=True) as fresh:
        if fresh is not None:
            try:
                _download(ref, fresh, endpoint)
            except Exception as error:  # of the Hub's client, which changes its HTTP library
                raise NotFetched(f"could not download {ref} from {endpoint}: {error}") from error
            for made in (".cache", _COMMIT):
                _remove(fresh / made)
            try:
                policy.check_directory(fresh)
            except ValueError:
                shutil.rmtree(fresh)
                raise
    return directory


def _download(ref: ModelRef, folder: Path, endpoint: str) -> None:
    """Fetches what is not in the folder yet: files that arrived whole stay, as long as they are of the same commit.

    They are trusted within one boot of the machine only, since a power cut may leave less than was written.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.utils import filter_repo_objects

    info = HfApi(endpoint=endpoint).model_info(ref.name, revision=ref.revision or "main")
    belongs = f"{info.sha} {Path('/proc/sys/kernel/random/boot_id').read_text(encoding='ascii').strip()}"
    note = folder / _COMMIT
    if not note.is_file() or note.read_text(encoding="ascii") != belongs:
        for left in folder.iterdir():
            _remove(left)
        note.write_text(belongs, encoding="ascii")
    patterns = list(HUB_PATTERNS)
    snapshot_download(ref.name, revision=info.sha, local_dir=folder, allow_patterns=patterns, endpoint=endpoint)
    wanted = filter_repo_objects((file.rfilename for file in info.siblings or ()), allow_patterns=patterns)
    missing = [name for name in wanted if not (folder / name).is_file()]
    if missing:  # without the Hub the client takes a folder for what should be in it
        raise ValueError(f"{', '.join(missing[:5])} did not arrive; pull again")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _converted(file: Path, home: Path) -> Path:
    """Where a GGUF file's conversion is kept: the name changes with the file's place, size and time of change."""
    real = file.resolve()
    status = real.stat()
    key = hashlib.sha256(f"{real}\0{status.st_size}\0{status.st_mtime_ns}".encode()).hexdigest()[:24]
    return home / "models" / "gguf" / key

"""What an artifact directory holds and where it came from: ``manifest.json`` with a digest of every file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from core.models import policy

FORMAT = "gradhelm-artifact/1"
NAME = "manifest.json"
CARD = "README.md"


def write(
    directory: Path,
    *,
    kind: Literal["adapter", "merged", "scales"],
    base: str,
    base_fingerprint: str,
    fingerprint: str | None,
    card: Mapping[str, Any],
) -> dict[str, Any]:
    """Writes the model card and the manifest of a directory that is otherwise complete.

    Args:
        directory: where the artifact's files lie.
        kind: what the artifact is.
        base: reference of the model that it was made from.
        base_fingerprint: identity of that model's weights.
        fingerprint: identity of the artifact's own weights if it is a whole model.
        card: what else is known (data, configuration, metrics): plain JSON.

    Returns:
        The manifest.

    Raises:
        ValueError: if the card holds something that JSON cannot.
    """
    try:
        plain = json.loads(json.dumps(dict(card), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"the model card must be plain JSON: {error}") from None
    (directory / CARD).write_text(_readme(kind, base, base_fingerprint, plain), "utf-8")
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "kind": kind,
        "base": base,
        "base_fingerprint": base_fingerprint,
        "fingerprint": fingerprint,
        "files": {name: sha256(path) for name, path in sorted(_files(directory).items())},
        "card": plain,
    }
    (directory / NAME).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", "utf-8")
    return manifest


def verify(directory: Path) -> dict[str, Any]:
    """Hashes an artifact's files again and compares them with its manifest.

    Args:
        directory: the artifact.

    Returns:
        The manifest.

    Raises:
        ValueError: if the manifest is missing or malformed, or a file is missing, changed, or not in the manifest.
    """
    path = directory / NAME
    if not path.is_file():
        raise ValueError(f"{directory} has no {NAME}: it is not an artifact, or was not written to the end")
    manifest = policy.read_json(path)
    listed = manifest.get("files")
    if manifest.get("format") != FORMAT or manifest.get("kind") not in ("adapter", "merged", "scales"):
        raise ValueError(f"{path} is not a manifest of the format {FORMAT}")
    if not isinstance(listed, dict) or not all(isinstance(digest, str) for digest in listed.values()):
        raise ValueError(f"{path} does not list files with their sha256")
    present = _files(directory)
    if missing := sorted(set(listed) - set(present)):
        raise ValueError(f"{directory} lacks {', '.join(missing)}")
    if unknown := sorted(set(present) - set(listed)):
        raise ValueError(f"{directory} holds {', '.join(unknown)}, which its manifest does not list")
    for name, digest in listed.items():
        if sha256(present[name]) != digest:
            raise ValueError(f"{directory / name} has changed since it was written")
    return manifest


def sha256(path: Path) -> str:
    """The hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(directory: Path) -> dict[str, Path]:
    """Every file but the manifest, by its name relative to the directory."""
    found = {str(path.relative_to(directory)): path for path in directory.rglob("*") if not path.is_dir()}
    found.pop(NAME, None)
    return found


def _readme(kind: str, base: str, base_fingerprint: str, card: Mapping[str, Any]) -> str:
    """The model card: YAML front matter that model hubs read, then a table of what is known."""
    library = "peft" if kind == "adapter" else "transformers"
    front = {"base_model": base, "library_name": library, "pipeline_tag": "text-generation", "tags": ["gradhelm"]}
    head = "\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in front.items())
    kinds = {"adapter": "LoRA adapter in PEFT's format", "scales": "scales of a quantised model"}
    what = kinds.get(kind, "whole model in safetensors")
    rows = {"Kind": what, "Base": base, "Base fingerprint": base_fingerprint}
    details = {key: value for key, value in card.items() if isinstance(value, dict | list)}
    rows.update(
        {
            key: value
            for key, value in card.items()
            if key not in details and key not in ("base", "base_fingerprint", "title")
        }
    )
    table = "\n".join(f"| {_cell(key)} | {_cell(value)} |" for key, value in rows.items())
    sections = "".join(
        f"\n## {_cell(key)}\n\n```json\n{json.dumps(value, indent=2, ensure_ascii=False)}\n```\n"
        for key, value in details.items()
    )
    title = _cell(card.get("title", f"Fine-tuned from {base}"))
    return f"---\n{head}\n---\n\n# {title}\n\n| | |\n|---|---|\n{table}\n{sections}"


def _cell(value: Any) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")

"""Unpacks the tar of a model: plain files inside one new folder, or nothing at all.

The tar comes from a server that may not be trusted: no path leaves the folder, no links, no devices, no compression
(so no bombs), nothing is overwritten, and every file must match the manifest that travels with it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
import tempfile
from pathlib import Path, PurePosixPath
from typing import IO

from service.cli.errors import CliError, UsageProblem

BLOCK = 1 << 20


def check_target(directory: Path) -> None:
    """Refuse a target that holds something already, before anything is downloaded."""
    if directory.is_symlink() or (directory.exists() and (not directory.is_dir() or any(directory.iterdir()))):
        raise UsageProblem(f"{directory} exists already and is not an empty folder: choose another name.")


def unpack(stream: IO[bytes], directory: Path) -> list[Path]:
    """Unpack an uncompressed tar into ``directory``, all or nothing.

    Args:
        stream: the tar's bytes, read once from the front.
        directory: a folder that does not exist yet, or an empty one.

    Returns:
        The files written, sorted.

    Raises:
        CliError: the archive is broken, holds something else than plain files, or does not match its manifest.
    """
    check_target(directory)
    parent = directory.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=parent))
    try:
        try:
            digests = _extract(stream, scratch)
        except tarfile.TarError as error:
            raise CliError(f"What the server sent is not a whole tar ({error}): try again.") from error
        _verify(scratch, digests)
        scratch.chmod(0o755)
        if directory.exists():
            directory.rmdir()
        scratch.rename(directory)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return sorted(directory / name for name in digests)


def _extract(stream: IO[bytes], scratch: Path) -> dict[str, str]:
    digests: dict[str, str] = {}
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            name = _safe_name(member)
            target = scratch / name
            if member.isdir():
                target.mkdir(parents=True, exist_ok=True)
                continue
            if not member.isreg() or str(name) in digests:
                raise CliError(f"The archive holds {member.name!r}, which is no plain file of its own: refused.")
            target.parent.mkdir(parents=True, exist_ok=True)
            source = archive.extractfile(member)
            assert source is not None, "a regular member always has contents"
            digest = hashlib.sha256()
            with target.open("xb") as sink:
                while block := source.read(BLOCK):
                    sink.write(block)
                    digest.update(block)
            digests[str(name)] = digest.hexdigest()
    if not digests:
        raise CliError("The archive is empty: nothing was unpacked.")
    return digests


def _safe_name(member: tarfile.TarInfo) -> PurePosixPath:
    name = PurePosixPath(member.name)
    bad = name.is_absolute() or ".." in name.parts or "\\" in member.name or "\0" in member.name
    if bad or (not name.parts and not member.isdir()):
        raise CliError(f"The archive holds the path {member.name!r}, which leaves its folder: refused.")
    return name


def _verify(scratch: Path, digests: dict[str, str]) -> None:
    """Compare with each manifest.json in the tree; a tree without one is accepted (a base model has none)."""
    for name in digests:
        if PurePosixPath(name).name != "manifest.json":
            continue
        try:
            listed = json.loads((scratch / name).read_text(encoding="utf-8"))["files"]
            expected = {str(PurePosixPath(name).parent / file): str(digest) for file, digest in listed.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CliError(f"{name} is not a manifest of ours: nothing was unpacked.") from error
        for file, digest in expected.items():
            if digests.get(file) != digest.removeprefix("sha256:"):
                raise CliError(f"{file} is missing or does not match its manifest: nothing was unpacked, try again.")

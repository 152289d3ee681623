"""Folders as a tar, made while it is sent: nothing is buffered whole, and it says nothing about this machine."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from starlette.responses import Response, StreamingResponse

_BLOCK = 512
_PIECE = 1 << 20


def _header(name: str, size: int, mtime: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = size, mtime, 0o644
    return info.tobuf(tarfile.PAX_FORMAT)


def pieces(folders: Mapping[str, Path]) -> Iterator[bytes]:
    """The tar's bytes; regular files only, sorted, symbolic links left out.

    Args:
        folders: Their files become members named relative to them, behind the folder's key.

    Yields:
        bytes: headers, contents and padding, at most a megabyte at a time.
    """
    files = [
        (inside + path.relative_to(folder).as_posix(), path)
        for inside, folder in folders.items()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink()
    ]
    for name, path in files:
        with path.open("rb") as file:
            size = path.stat().st_size
            yield _header(name, size, int(path.stat().st_mtime))
            left = size
            while left:
                piece = file.read(min(_PIECE, left))
                if not piece:
                    raise OSError(f"{path.name} was cut while it was read")
                left -= len(piece)
                yield piece
            yield b"\0" * (-size % _BLOCK)
    yield b"\0" * (2 * _BLOCK)


def tar_of(folders: Mapping[str, Path], name: str) -> Response:
    """A streamed tar of folders.

    Args:
        folders: What to send, by what stands before the names in it.
        name: The model's id; characters that a file name should not have become `-`.

    Returns:
        The response.
    """
    shown = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in name)
    headers = {"Content-Disposition": f'attachment; filename="{shown}.tar"'}
    return StreamingResponse(pieces(folders), media_type="application/x-tar", headers=headers)

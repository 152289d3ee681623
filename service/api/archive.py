"""A folder as a tar, made while it is sent: nothing is buffered whole, and it says nothing about this machine."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path

from starlette.responses import Response, StreamingResponse

_BLOCK = 512
_PIECE = 1 << 20


def _header(name: str, size: int, mtime: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = size, mtime, 0o644
    return info.tobuf(tarfile.PAX_FORMAT)


def pieces(folder: Path) -> Iterator[bytes]:
    """The tar's bytes; regular files only, sorted, symbolic links left out.

    Args:
        folder: Its files become members named relative to it.

    Yields:
        bytes: headers, contents and padding, at most a megabyte at a time.
    """
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink()]
    for path in files:
        with path.open("rb") as file:
            size = path.stat().st_size
            yield _header(path.relative_to(folder).as_posix(), size, int(path.stat().st_mtime))
            left = size
            while left:
                piece = file.read(min(_PIECE, left))
                if not piece:
                    raise OSError(f"{path.name} was cut while it was read")
                left -= len(piece)
                yield piece
            yield b"\0" * (-size % _BLOCK)
    yield b"\0" * (2 * _BLOCK)


def tar_of(folder: Path, name: str) -> Response:
    """A streamed tar of a folder.

    Args:
        folder: What to send.
        name: The model's id; characters that a file name should not have become `-`.

    Returns:
        The response.
    """
    shown = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in name)
    headers = {"Content-Disposition": f'attachment; filename="{shown}.tar"'}
    return StreamingResponse(pieces(folder), media_type="application/x-tar", headers=headers)

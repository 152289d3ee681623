"""The one function that turns a name from outside into a path: decode, then resolve, then compare."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote

_MOST = 255  # bytes of one path component on Linux file systems


def inside(root: Path, name: str) -> Path:
    """The path of ``name`` in ``root``, when it stays there.

    Percent-encoding is undone until nothing changes, so a doubly encoded ``..`` is seen for what it is. The comparison
    is by path components after symbolic links are resolved; a sibling that only shares a prefix is outside.

    Args:
        root: An existing folder.
        name: One or more components separated by ``/``.

    Returns:
        The resolved path; it need not exist.

    Raises:
        ValueError: The name is empty, absolute, too long, holds a NUL, a control character or a backslash, has a
            component ``.`` or ``..``, or leads outside.
    """
    decoded = name
    for _ in range(8):
        again = unquote(decoded, errors="strict") if "%" in decoded else decoded
        if again == decoded:
            break
        decoded = again
    else:
        raise ValueError("the name is percent-encoded too many times")
    if not decoded:
        raise ValueError("the name is empty")
    if "\\" in decoded or any(ord(c) < 32 or 0xD800 <= ord(c) <= 0xDFFF for c in decoded):
        raise ValueError("the name holds a backslash, a control character or half a surrogate pair")
    parts = decoded.split("/")
    if any(part in ("", ".", "..") for part in parts):
        raise ValueError("the name must be relative, without empty, '.' or '..' components")
    if len(decoded.encode()) > 4 * _MOST or any(len(part.encode()) > _MOST for part in parts):
        raise ValueError("the name is too long")
    base = root.resolve(strict=True)
    path = base.joinpath(*parts).resolve()
    if not path.is_relative_to(base):
        raise ValueError("the name leads outside the folder")
    return path

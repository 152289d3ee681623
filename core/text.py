"""Text that any database, log or wire can carry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def clean(value: Any) -> Any:
    r"""Write halves of surrogate pairs and NULs as escapes, through all of a JSON value.

    JSON can name them (``"\ud800"``), and UTF-8, and so SQLite, PostgreSQL and HTTP, cannot hold them.

    Args:
        value: text, or JSON data with text in it; anything else comes back as it is.

    Returns:
        The same where there was nothing to replace.
    """
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode().replace("\x00", "\\x00")
    if isinstance(value, Mapping):
        return {clean(key): clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    return value

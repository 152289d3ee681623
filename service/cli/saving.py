"""Downloads into new files: whole or not there, and never over something that exists."""

from __future__ import annotations

from pathlib import Path

from service.cli.client import Client
from service.cli.errors import UsageProblem


def save_new(client: Client, route: str, path: Path) -> int:
    """Download a route's body into a file that must not exist yet.

    Args:
        client: the server.
        route: what to download.
        path: the new file.

    Returns:
        Bytes written.

    Raises:
        UsageProblem: the file exists, or its folder cannot be written.
    """
    partial = path.with_name(f".{path.name}.part")
    try:
        if path.exists():
            raise UsageProblem(f"{path} exists already: choose another name.")
        with partial.open("wb") as sink:
            written = client.save(route, sink)
        partial.rename(path)
    except OSError as error:
        raise UsageProblem(f"Cannot write {path}: {error.strerror or error}.") from error
    finally:
        partial.unlink(missing_ok=True)
    return written

"""Options that every command talking to the server shares, so that they read the same everywhere."""

from __future__ import annotations

from typing import Annotated

import typer

DEFAULT_URL = "http://127.0.0.1:8000"

Url = Annotated[
    str,
    typer.Option("--url", envvar="GRADHELM_URL", help="Address of the server."),
]
Key = Annotated[
    str | None,
    typer.Option(
        "--key",
        envvar="GRADHELM_API_KEY",
        help="API key; without one, OPENAI_API_KEY if it is one of ours, then this machine's admin.key.",
        show_default=False,
        show_envvar=True,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of text for people.")]
Limit = Annotated[int, typer.Option("--limit", min=1, max=10_000, help="At most so many entries.")]
After = Annotated[str | None, typer.Option("--after", help="Continue behind this id.", show_default=False)]

"""What a user may call a model: a Hub id, a directory, a GGUF file or a catalog name. The only parser, and a pure one.

Nothing here looks at the disk or the network, so the same text means the same thing on every machine, and a text that
is not plainly one of the four forms is refused rather than guessed at.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from core.models.catalog import CATALOG
from core.nearest import nearest

Kind = Literal["hub", "directory", "gguf", "catalog"]

MAX_LENGTH = 4096

# An organisation has a letter and no dot: an address such as 169.254.169.254, in any spelling, is never one.
_ORG = r"(?=[0-9_-]*[A-Za-z])[A-Za-z0-9](?:[A-Za-z0-9_]|-(?!-))*"
_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9_]|-(?!-)|\.(?!\.))*"
_HUB = re.compile(rf"(?P<name>(?!0x){_ORG}/{_NAME})(?:@(?P<revision>{_NAME}))?", re.ASCII)
_CATALOG = re.compile(r"[a-z][a-z0-9]*(?:-[a-z0-9]+)*", re.ASCII)
_LOCAL = ("/", "./", "../", "~/")

ALLOWED = (
    "a catalog name (smollm2-135m-instruct), a Hub id with an optional revision (org/name or org/name@revision), "
    "a directory (/path, ./path, ../path or ~/path) or a GGUF file (the same, ending in .gguf)"
)


@dataclass(frozen=True, slots=True)
class ModelRef:
    """One reference to a model; ``str()`` gives back text that parses to an equal one.

    Attributes:
        kind: which of the four forms it is.
        name: the Hub id, the path as it was written, or the catalog name.
        revision: a Hub revision, or None for the default branch.
    """

    kind: Kind
    name: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name}@{self.revision}"

    @property
    def path(self) -> Path:
        """The path of a directory or GGUF reference, with ``~`` expanded.

        Raises:
            ValueError: if this is a Hub id or a catalog name, which have no path of their own.
        """
        if self.kind not in ("directory", "gguf"):
            raise ValueError(f"{self} is not a path: resolve() finds the directory of a {self.kind} model")
        return Path(self.name).expanduser()


def parse_ref(text: str) -> ModelRef:
    """Reads a model reference.

    Args:
        text: what the user wrote.

    Returns:
        The reference; nothing has been looked up yet.

    Raises:
        ValueError: if the text is none of the allowed forms; the message lists them.
    """
    if not isinstance(text, str) or not text:
        raise ValueError(f"a model reference must not be empty; give {ALLOWED}")
    if len(text) > MAX_LENGTH:
        raise ValueError(f"a model reference of {len(text)} characters is too long; give {ALLOWED}")
    if not text.isprintable() or "\\" in text or text != text.strip():
        raise _refused(text)
    if text.startswith(_LOCAL):
        if text.startswith("//"):
            raise _refused(text)
        return ModelRef("gguf" if text.endswith(".gguf") else "directory", text)
    if match := _HUB.fullmatch(text):
        if any(len(part) > 96 for part in match["name"].split("/")) or match["name"].endswith((".git", ".")):
            raise _refused(text)
        return ModelRef("hub", match["name"], match["revision"])
    if len(text) <= 96 and _CATALOG.fullmatch(text):
        return ModelRef("catalog", text)
    raise _refused(text)


def _refused(text: str) -> ValueError:
    shown = text if len(text) <= 80 else text[:80] + "..."
    meant = nearest(text, CATALOG)
    hint = f"did you mean {meant}? Give" if meant else "give"
    return ValueError(f"{shown!r} is not a model reference; {hint} {ALLOWED}. URLs are never followed.")

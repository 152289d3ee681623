"""Renews the generated parts of the pages.

A generated part stands between two markers, each on a line of its own:

    <!-- generated: NAME -->
    <!-- end -->
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

BLOCK = re.compile(
    r"(?P<open>^<!-- generated: (?P<name>[\w-]+) -->\n)(?P<body>.*?)(?P<close>^<!-- end -->$)", re.M | re.S
)

# Made from measurements, not from code: `python -m benchmarks.readme`.
ELSEWHERE = frozenset({"results"})


def pages(root: Path) -> list[Path]:
    """Every page of the documentation, the ones at the top of the repository included."""
    return sorted([*root.glob("*.md"), *(root / "docs").glob("*.md")])


def rewrite(text: str, made: Mapping[str, str]) -> str:
    """A page with its generated parts renewed.

    Args:
        text: the page.
        made: blocks by name.

    Returns:
        The page as it should be.

    Raises:
        ValueError: the page asks for a block that does not exist.
    """

    def renew(match: re.Match[str]) -> str:
        name = match["name"]
        if name in ELSEWHERE:
            return match[0]
        if name not in made:
            raise ValueError(f"there is no generated block {name!r}; these exist: {', '.join(sorted(made))}")
        return f"{match['open']}\n{made[name]}\n\n{match['close']}"

    return BLOCK.sub(renew, text)


def stale(root: Path, made: Mapping[str, str]) -> dict[Path, str]:
    """Pages that are not as they should be, with what they should hold."""
    found = {}
    for page in pages(root):
        text = page.read_text(encoding="utf-8")
        if (fresh := rewrite(text, made)) != text:
            found[page] = fresh
    return found

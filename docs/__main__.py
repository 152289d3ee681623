"""`python -m docs` rewrites the generated parts of the pages; with `--check` it only says what is stale."""

from __future__ import annotations

import sys

from docs.facts import ROOT, collect
from docs.generate import stale
from docs.tables import blocks


def main(arguments: list[str]) -> int:
    """Rewrite, or with --check report; 1 when something is stale."""
    found = stale(ROOT, blocks(collect()))
    for page, text in found.items():
        print(f"{'stale' if arguments == ['--check'] else 'wrote'}: {page.relative_to(ROOT)}")
        if arguments != ["--check"]:
            page.write_text(text, encoding="utf-8")
    return int(bool(found) and arguments == ["--check"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

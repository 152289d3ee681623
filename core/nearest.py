"""What to answer when a name is unknown: the nearest one that exists, and all that do. The only such helper."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LONGEST = 200
"""Characters of the unknown name that are compared; names of ours are shorter."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Finds the name that was probably meant.

    Args:
        name: What the user wrote; case, and whether words are joined by ``-`` or ``_``, do not count.
        known: The names that exist.

    Returns:
        One of ``known``, or None where none is near.
    """
    folded = {_fold(one): one for one in known}
    close = difflib.get_close_matches(_fold(name[:LONGEST]), folded, n=1)
    return folded[close[0]] if close else None


def choices(name: str, known: Iterable[str], *, prefix: str = "", most: int = 100) -> str:
    """Says what could be meant by an unknown name, for the end of an error message.

    Args:
        name: What the user wrote.
        known: The names that exist, in the order in which to list them.
        prefix: Stands before the suggestion, not before the names of the list: ``optimizer.`` of ``optimizer.rank``.
        most: Names to list; how many more there are is said.

    Returns:
        ``did you mean rank? These exist: alpha, rank``, or only the list; without a full stop.
    """
    names = list(dict.fromkeys(known))
    more = f" and {len(names) - most} more" if len(names) > most else ""
    listed = f"hese exist: {', '.join(names[:most]) or 'none'}{more}"
    close = nearest(name, names)
    return f"t{listed}" if close is None else f"did you mean {prefix}{close}? T{listed}"


def _fold(name: str) -> str:
    return name.casefold().replace("-", "_")

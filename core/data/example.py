"""A training row as tokens."""

from __future__ import annotations

from dataclasses import dataclass

IGNORED = -100
"""Label of a token that is not trained on."""


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids of one row, or of several rows packed into one, and which of them are trained on."""

    line: int
    """Line of the row in its file, from 1; of the first row when packed; 0 for a filler that trains nothing."""
    input_ids: list[int]
    """Token ids, at least one."""
    labels: list[int]
    """As long as `input_ids`: the token's own id where it is trained on, else -100. The first is always -100."""
    total: int = 0
    """Tokens before truncation; 0 means that nothing was cut."""
    segments: tuple[int, ...] = ()
    """Lengths of the packed rows, adding up to that of `input_ids`; empty when this is one row."""

    @property
    def trained(self) -> int:
        """How many tokens are trained on."""
        return len(self.labels) - self.labels.count(IGNORED)

    @property
    def truncated(self) -> bool:
        """Whether tokens were cut away."""
        return self.total > len(self.input_ids)

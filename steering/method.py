"""What a fitting method is: a name, where it comes from, and one function from pairs to directions. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.load import Loaded
    from steering.config import FitConfig
    from steering.pairs import Pair


@dataclass(frozen=True, slots=True)
class Fitted:
    """What a method found."""

    directions: Mapping[int, Tensor]
    """Block index -> (D,) float32 on the CPU, unscaled."""
    norms: Mapping[int, float]
    """Block index -> median norm of the activations that it looked at."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """More, as JSON."""


Advance = Callable[[int, int, int], None]
"""Called with (batches done, batches in all, tokens read) after each batch; raises to stop the fit."""


class Fit(Protocol):
    """The function of a method."""

    def __call__(self, loaded: Loaded, pairs: Sequence[Pair], config: FitConfig, advance: Advance) -> Fitted:
        """Fit directions to pairs.

        Args:
            loaded: The model, in eval mode.
            pairs: At least one.
            config: Layers, site, positions, batch size.
            advance: To be called after each batch.

        Returns:
            The directions.

        Raises:
            core.data.source.DataError: Rows that the model cannot read.
            ValueError: Settings that do not fit the model.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """One entry of `steering.registry.METHODS`."""

    name: str
    """As written in a fit file and in the API."""
    paper: str
    """arXiv id."""
    summary: str
    """One sentence for help texts and the API's docs."""
    fit: Fit
    """Imports torch only when it is called."""

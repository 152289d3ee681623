"""From logits to a token, row by row: each request has its own generator, so neighbours cannot change its draw."""

from __future__ import annotations

import random
from collections import Counter
from secrets import randbits

import torch
from torch import Tensor

from service.engines.base import Sampling

NUCLEUS = 512  # candidates looked at before the whole vocabulary is sorted


class Sampler:
    """The state of one request's choices.

    Args:
        sampling: what was asked.
    """

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.counts: Counter[int] = Counter()  # generated tokens, for the penalties
        seed = randbits(64) if sampling.seed is None else sampling.seed
        self._random = random.Random(seed if seed >= 0 else f"{seed}")  # of a number, Random takes the magnitude

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.sampling.temperature < 1e-5

    @property
    def penalised(self) -> bool:
        """Whether logits change with what was generated."""
        return bool(self.sampling.presence_penalty or self.sampling.frequency_penalty)

    def penalise(self, logits: Tensor) -> Tensor:
        """Logits (V,) less the penalties of the tokens generated so far; a new tensor."""
        if not self.counts:
            return logits
        ids = torch.tensor(list(self.counts), device=logits.device)
        times = torch.tensor(list(self.counts.values()), dtype=logits.dtype, device=logits.device)
        cost = self.sampling.presence_penalty + self.sampling.frequency_penalty * times
        return logits.index_add(0, ids, -cost)

    def draw(self, logits: Tensor) -> int:
        """Draw by temperature and nucleus.

        The draw walks the vocabulary in its own order, not by probability: a rounding difference between batches of
        other shapes then moves a boundary by as much, and does not swap two tokens.

        Args:
            logits: (V,), penalties applied.

        Returns:
            The token's id.
        """
        scaled = logits.double() / self.sampling.temperature
        probabilities = torch.softmax(scaled, 0)
        if self.sampling.top_p < 1:
            probabilities = torch.where(probabilities >= self._threshold(probabilities), probabilities, 0.0)
        heights = probabilities.cumsum(0)
        point = self._random.random() * float(heights[-1])
        return min(int(torch.searchsorted(heights, point, right=True)), len(logits) - 1)

    def _threshold(self, probabilities: Tensor) -> float:
        """The smallest probability inside the nucleus: the fewest likeliest tokens that hold ``top_p`` together."""
        for count in (min(NUCLEUS, len(probabilities)), len(probabilities)):
            top = probabilities.topk(count).values
            reached = torch.nonzero(top.cumsum(0) >= self.sampling.top_p)
            if len(reached):
                return float(top[reached[0, 0]])
        return 0.0


def choose(logits: Tensor, samplers: list[Sampler]) -> list[int]:
    """One token for each row.

    Args:
        logits: (B, V), raw.
        samplers: one for each row; their counts and generators move on.

    Returns:
        B token ids.
    """
    greedy: list[int] = logits.argmax(-1).tolist()
    chosen = []
    for row, sampler in enumerate(samplers):
        if sampler.greedy and not sampler.penalised:
            token = greedy[row]
        else:
            one = sampler.penalise(logits[row]) if sampler.penalised else logits[row]
            token = int(one.argmax()) if sampler.greedy else sampler.draw(one)
        if sampler.penalised:
            sampler.counts[token] += 1
        chosen.append(token)
    return chosen

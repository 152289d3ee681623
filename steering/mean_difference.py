"""Mean difference (arXiv 2312.06681, section 3): what activations have more of in the positive texts.

    direction[layer] = mean over rows of h(positive) - mean over rows of h(negative)

with h a row's activation at the chosen tokens (their mean, where there are several). Nothing is scaled.
Legend: N rows, B texts of a batch, L layers, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from core.activations import record
from core.data.batch import Batch, collate
from core.data.chat import encode, text_prompt_ids
from core.data.example import IGNORED, Example
from core.data.rules import Message, Row, RowProblem
from core.data.source import DataError
from core.models.load import Loaded
from core.models.sites import blocks
from steering.config import FitConfig
from steering.method import Advance, Fitted
from steering.pairs import MAX_PROBLEMS, Pair

_ALL_TOKENS = 2**40  # no truncation: a row that is too long is refused instead


def fit(loaded: Loaded, pairs: Sequence[Pair], config: FitConfig, advance: Advance) -> Fitted:
    """Fit one direction per layer. Same machine, threads and batch size: same bits.

    Args:
        loaded: The model, in eval mode.
        pairs: At least one.
        config: Layers, site, positions, batch size.
        advance: Called after each batch.

    Returns:
        Directions, and per layer the median norm of the activations at the chosen tokens.

    Raises:
        DataError: Rows that cannot be encoded, are too long, or leave no token.
        ValueError: A layer that the model lacks; activations that are not finite, or do not differ.
    """
    depth = len(blocks(loaded.model))
    layers = tuple(range(depth)) if config.layers is None else tuple(sorted(config.layers))
    if layers[-1] >= depth:
        raise ValueError(f"layer {layers[-1]} is out of range: {loaded.ref} has layers 0 to {depth - 1}")
    texts = encode_pairs(pairs, loaded.tokenizer, positions=config.positions, max_length=config.max_length)
    pad = loaded.tokenizer.pad_token_id
    batches = [texts[start : start + config.batch_size] for start in range(0, len(texts), config.batch_size)]
    means, norms, tokens = [], [], 0
    for number, rows in enumerate(batches, 1):
        batch = collate(rows, pad_id=0 if pad is None else int(pad))
        chosen = (batch.labels != IGNORED).to(next(loaded.model.parameters()).device)
        mean, norm = _pooled(loaded, batch, layers, config.site, chosen)
        means.append(mean)
        norms.append(norm)
        tokens += batch.tokens
        advance(number, len(batches), tokens)
    pooled = torch.cat(means)  # (2N, L, D)
    if not bool(torch.isfinite(pooled).all()):
        raise ValueError(f"activations of {loaded.ref} are not finite; use dtype float32")
    directions = mean_difference(pooled[0::2], pooled[1::2])
    if not bool(directions.any()):
        raise ValueError("the positive and negative texts give the same activations, so there is no direction")
    ordered = torch.cat(norms, dim=1).sort(dim=1).values  # (L, n); torch.quantile refuses more than 2**24 numbers
    count = ordered.shape[1]
    medians = ((ordered[:, (count - 1) // 2] + ordered[:, count // 2]) / 2).tolist()
    return Fitted(
        directions={layer: direction.clone() for layer, direction in zip(layers, directions.float(), strict=True)},
        norms=dict(zip(layers, medians, strict=True)),
        metadata={"pairs": len(pairs), "tokens": tokens, "positions": config.positions},
    )


def mean_difference(positive_NLD: Tensor, negative_NLD: Tensor) -> Tensor:
    """Subtract the means.

    Args:
        positive_NLD: (N, L, D) float64.
        negative_NLD: (N, L, D) float64.

    Returns:
        (L, D) float64.
    """
    return positive_NLD.mean(0) - negative_NLD.mean(0)


def encode_pairs(
    pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase, *, positions: str, max_length: int
) -> list[Example]:
    """Turn pairs into tokens as training and serving would, and mark those that count.

    Args:
        pairs: N rows.
        tokenizer: The model's.
        positions: "last", "answer" or "all".
        max_length: Most tokens of a text.

    Returns:
        2N examples: positive, negative, positive, ...; labels are set where a token counts.

    Raises:
        DataError: Rows that the template refuses, that are too long, or of which no token counts.
    """
    examples: list[Example] = []
    problems: list[RowProblem] = []
    for pair in pairs:
        for name, text in (("positive", pair.positive), ("negative", pair.negative)):
            try:
                example = _encode(pair, text, tokenizer, positions)
            except ValueError as error:
                problems.append(RowProblem(pair.line, "not_encodable", str(error)))
                continue
            if len(example.input_ids) > max_length:
                message = f"{name} has {len(example.input_ids)} tokens with its prompt, max_length is {max_length}"
                problems.append(RowProblem(pair.line, "row_too_long", message))
            elif example.trained == 0:
                message = f"{name} has no token that counts: the first token of a text never does"
                problems.append(RowProblem(pair.line, "row_too_short", message))
            examples.append(example)
    if problems:
        raise DataError(problems[:MAX_PROBLEMS])
    return examples


def _encode(pair: Pair, text: str, tokenizer: PreTrainedTokenizerBase, positions: str) -> Example:
    if pair.prompt:
        row = Row(pair.line, messages=(*pair.prompt, Message("assistant", text)))
        whole = encode(row, tokenizer, max_length=_ALL_TOKENS)
        trained = [index for index, label in enumerate(whole.labels) if label != IGNORED]
        start, end = trained[0], trained[-1]  # the last trained token ends the turn and says nothing
        ids = whole.input_ids[:end]
    else:
        ids, start = text_prompt_ids(text, tokenizer), 0
    first = {"last": len(ids) - 1, "answer": start, "all": 0}[positions]
    first = max(first, 1)
    return Example(pair.line, ids, [IGNORED] * min(first, len(ids)) + ids[first:])


def _pooled(loaded: Loaded, batch: Batch, layers: Sequence[int], site: str, chosen_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Give per text the mean over its chosen tokens (B, L, D), and every chosen token's norm (L, n): float64, CPU."""
    norms: list[Tensor] = []
    weights = chosen_BT.double() / chosen_BT.sum(1, keepdim=True)

    def pool(h_BTD: Tensor) -> Tensor:
        norms.append(h_BTD[chosen_BT].double().norm(dim=-1).cpu())
        # Padding may hold anything, NaN too, so it is cleared rather than weighted by 0.
        clean = h_BTD.double().masked_fill(~chosen_BT.unsqueeze(2), 0.0)
        return torch.einsum("btd,bt->bd", clean, weights).cpu()

    means = record(loaded.model, batch, layers=layers, site=site, reduce=pool)
    return means, torch.stack(norms)

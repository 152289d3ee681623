"""From rows to tokens by the model's own chat template, so that what is trained is what is served.

An answer is trained as: what the template puts behind the generation prompt, up to and including the end-of-turn
token. Both sides tokenize through `_tokens`, cutting the text at the same places (the two ends of every answer), so a
served prompt is token for token the beginning of the trained row, even where a byte-pair merge would cross such a
place. Where nothing crosses, the ids are those of `apply_chat_template(tokenize=True)`.

Not covered: tools, images, and templates that write earlier turns differently once the conversation goes on (they
get an error that names them, unless only the last answer is trained on).
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from core.data.example import IGNORED
from core.data.example import Example as Example
from core.data.rules import Row
from core.data.turns import beginnings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FEW = 4  # answers whose places are found by rendering the conversation up to each


class Turn(Protocol):
    """Anything with a role and a content: rows' messages and requests' messages alike."""

    @property
    def role(self) -> str:
        """system, developer, user or assistant."""
        ...

    @property
    def content(self) -> str:
        """What is said."""
        ...


def encode(row: Row, tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> Example:
    """Turn one row into tokens and labels, cut on the right.

    Args:
        row: a row that passed `core.data.source`.
        tokenizer: the model's, with a chat template for chat rows.
        max_length: most tokens to keep, at least 1.

    Returns:
        Trained are the answers of weight 1 with their end-of-turn token; for prompt/completion rows the completion
        with the end-of-sequence token. After truncation there may be no trained token left.

    Raises:
        ValueError: the tokenizer has no (usable) template or end token, or the template refuses the row.
    """
    if row.kind == "chat":
        ids, spans = _chat(row, tokenizer)
    else:
        assert row.prompt is not None and row.completion is not None
        ids, spans = _pair(row.prompt, row.completion, tokenizer)
    # What follows the last trained token teaches nothing; without it the row ends where a served answer ends.
    ids = ids[: max(end for _, end in spans)]
    labels = [IGNORED] * len(ids)
    for start, end in spans:
        labels[start:end] = ids[start:end]
    # Nothing predicts the first token; in a packed row the neighbour before it must not.
    labels[0] = IGNORED
    return Example(row.line, ids[:max_length], labels[:max_length], total=len(ids))


class TooLong(ValueError):
    """A prompt has more tokens than it may have; not all of it was tokenized.

    Args:
        tokens: how many were counted before the rest was left alone.
        most: how many it may have.
    """

    def __init__(self, tokens: int, most: int) -> None:
        super().__init__(f"the prompt has more than {tokens} tokens, the most allowed is {most}")
        self.tokens = tokens


def prompt_ids(messages: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, *, most: int | None = None) -> list[int]:
    """Tokens to generate an answer from; training and serving share this function.

    Args:
        messages: the conversation so far.
        tokenizer: the model's, with a chat template.
        most: tokens beyond which the prompt is of no use; a prompt far beyond is not tokenized to its end.

    Returns:
        The conversation with the generation prompt behind it; it may have a few more tokens than ``most``.

    Raises:
        TooLong: far more than ``most`` tokens.
        ValueError: no chat template, or the template refuses the conversation.
    """
    text = _render(messages, tokenizer, prompt=True)
    _check_length(text, most, tokenizer)
    cuts = [cut for pair in _answers(messages, text, tokenizer) for cut in pair or ()]
    return _tokens(text, cuts, tokenizer)[0]


def text_prompt_ids(prompt: str, tokenizer: PreTrainedTokenizerBase, *, most: int | None = None) -> list[int]:
    """Tokens to complete raw text from; training and serving share this function too.

    Args:
        prompt: any text.
        tokenizer: the model's.
        most: as for ``prompt_ids``.

    Returns:
        The text's tokens, behind a beginning-of-sequence token if the tokenizer sets one.

    Raises:
        TooLong: far more than ``most`` tokens.
    """
    _check_length(prompt, most, tokenizer)
    ids = _plain(prompt, tokenizer, special=True)
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id and not prompt.endswith(tokenizer.eos_token) else ids


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Find the token that ends an answer in the model's template; generation has to stop at it.

    Args:
        tokenizer: the model's, with a chat template.

    Returns:
        The token's id; often but not always the end-of-sequence token.

    Raises:
        ValueError: no chat template, or one that ends answers with no special token.
    """
    probe = (_Probe("user", "a"), _Probe("assistant", "b"))
    text = _render(probe, tokenizer)
    start = len(_render(probe[:1], tokenizer, prompt=True))
    ids = _plain(text[start:], tokenizer)
    return ids[_last_special(ids, 0, tokenizer)]


def _check_length(text: str, most: int | None, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse what is far too long by its beginning: text of words has over a token in eight characters."""
    if most is None:
        return
    size = 8 * most + 1024
    while size < len(text):
        tokens = len(_plain(text[:size], tokenizer))
        if tokens > most + most // 16 + 64:  # where the beginning is cut, its tokens may differ from the whole text's
            raise TooLong(tokens, most)
        size *= 2


class _Probe:
    def __init__(self, role: str, content: str) -> None:
        self.role, self.content = role, content


def _chat(row: Row, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[tuple[int, int]]]:
    text = _render(row.messages, tokenizer)
    answers = _answers(row.messages, text, tokenizer)
    assistant = [message for message in row.messages if message.role == "assistant"]
    cuts = [cut for pair in answers for cut in pair or ()]
    ids, lengths = _tokens(text, cuts, tokenizer)
    at, spans = dict(zip(cuts, lengths, strict=True)), []
    for message, pair in zip(assistant, answers, strict=True):
        if message.weight == 0:
            continue
        if pair is None:
            raise ValueError(
                f"the chat template of {_name(tokenizer)} writes an answer differently once the conversation goes on, "
                "so what is trained would not be what is served; weight all answers but the last 0, or give each a row"
            )
        start, end = at[pair[0]], at[pair[1]]
        spans.append((start, start + _last_special(ids[start:end], start, tokenizer) + 1))
    return ids, spans


def _answers(messages: Sequence[Turn], text: str, tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, int] | None]:
    """Find where each answer begins and ends in the rendered text: one pair per assistant message.

    None where the conversation up to there, rendered alone, is not how the text begins.
    """
    places = [index for index, message in enumerate(messages) if message.role == "assistant"]
    spans = _watched(messages, places, text, tokenizer) if len(places) > FEW else None
    if spans is None:
        spans = {index: _rendered(messages, index, tokenizer, text) for index in places}
    result: list[tuple[int, int] | None] = []
    reached = 0
    for index in places:
        span = spans[index]
        found = span is not None and reached <= span[0] < span[1]
        result.append(span if found else None)
        reached = span[1] if span is not None and found else reached
    return result


def _rendered(
    messages: Sequence[Turn], index: int, tokenizer: PreTrainedTokenizerBase, text: str
) -> tuple[int, int] | None:
    """One answer's place, by rendering the conversation before it and up to its end."""
    before = _render(messages[:index], tokenizer, prompt=True)
    after = _render(messages[: index + 1], tokenizer)
    return (len(before), len(after)) if text.startswith(before) and text.startswith(after) else None


def _watched(
    messages: Sequence[Turn], places: Sequence[int], text: str, tokenizer: PreTrainedTokenizerBase
) -> dict[int, tuple[int, int] | None] | None:
    """Every answer's place from one rendering, or None where the template cannot be read so.

    The first and the last answer behind each role, and the first of all, are rendered in full: they give what the
    template puts before an answer, and must be found where the one rendering has them.
    """
    template = tokenizer.chat_template
    if not isinstance(template, str):
        return None
    made = beginnings(
        _turns(messages),
        template,
        {**tokenizer.special_tokens_map, "tools": None, "documents": None, "add_generation_prompt": False},
    )
    if made is None or not text.startswith(made[1]):
        return None
    starts = made[0]
    samples = {places[0], places[-1]}
    for ordered in (places, places[::-1]):
        samples |= set({messages[index - 1].role: index for index in ordered if index > 0}.values())
    opening: str | None = None
    spans: dict[int, tuple[int, int] | None] = {}
    for index in sorted(samples):
        before, after = _render(messages[:index], tokenizer, prompt=True), _render(messages[: index + 1], tokenizer)
        spans[index] = (len(before), len(after)) if text.startswith(before) and text.startswith(after) else None
        if index == 0:
            continue  # what a template writes before an answer to nobody need not be what it writes elsewhere
        start, end = starts[index], starts[index + 1]
        tail = before[start:]
        if before[:start] != text[:start] or after != text[:end] or opening not in (None, tail):
            return None
        opening = tail
    if opening is None:
        return None
    for index in places:
        if index not in spans:
            start, end = starts[index], starts[index + 1]
            spans[index] = (start + len(opening), end) if text.startswith(opening, start) else None
    return spans


def _tokens(text: str, cuts: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Tokenize a text so that its tokens up to each cut never depend on what follows.

    Returns the tokens of the whole text, and how many lie before each cut. Where tokenizing up to the next cut
    in one go leaves the earlier tokens as they are, that is the result; elsewhere the piece between them is tokenized
    alone, and so is every later piece. "In one go" begins at the last special token before the piece: tokenizers split
    there first, so what precedes it changes nothing behind it.
    """
    specials = _strings(tokenizer)
    ids: list[int] = []
    lengths: list[int] = []
    done = 0
    crossed = False
    first, place = 0, 0  # the last special token in `ids`: which token it is, and at which character
    for cut in (*cuts, len(text)):
        if cut > done:
            known = len(ids)
            if crossed:
                ids += _plain(text[done:cut], tokenizer)
            else:
                window = _plain(text[place:cut], tokenizer)
                if window[: known - first] != ids[first:]:
                    window, first = _plain(text[:cut], tokenizer), 0
                    crossed = window[:known] != ids
                if crossed:
                    ids += _plain(text[done:cut], tokenizer)
                else:
                    ids[first:] = window
                    first, place = _last_split(ids, known, text, cut, specials) or (first, place)
            done = cut
        lengths.append(len(ids))
    return ids, lengths[:-1]


def _last_split(
    ids: Sequence[int], known: int, text: str, cut: int, specials: dict[int, str]
) -> tuple[int, int] | None:
    """The last special token among those behind ``known``: its index, and where it stands in the text."""
    for index in range(len(ids) - 1, known - 1, -1):
        if ids[index] in specials:
            place = text.rfind(specials[ids[index]], 0, cut)
            if place >= 0:
                return index, place
    return None


def _pair(prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[tuple[int, int]]]:
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer of {_name(tokenizer)} has no end-of-sequence token, so an answer could not end"
        )
    start = text_prompt_ids(prompt, tokenizer)
    whole, _ = _tokens(prompt + completion, [len(prompt)], tokenizer)
    alone = len(_plain(prompt, tokenizer))
    ids = [*start, *whole[alone:], tokenizer.eos_token_id]
    return ids, [(len(start), len(ids))]


def _render(messages: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, *, prompt: bool = False) -> str:
    if not tokenizer.chat_template:
        raise ValueError(f"{_name(tokenizer)} has no chat template; use rows of prompt and completion instead")
    try:
        text = tokenizer.apply_chat_template(_turns(messages), tokenize=False, add_generation_prompt=prompt)
    except Exception as error:  # a template is a program of the model's: whatever it does is a verdict, not a crash
        reason = str(error)[:300] or type(error).__name__
        raise ValueError(f"the chat template of {_name(tokenizer)} refuses the conversation: {reason}") from error
    return str(text)


def _turns(messages: Sequence[Turn]) -> list[dict[str, str]]:
    return [{"role": "system" if turn.role == "developer" else turn.role, "content": turn.content} for turn in messages]


def _plain(text: str, tokenizer: PreTrainedTokenizerBase, *, special: bool = False) -> list[int]:
    if not text:
        return []
    return list(tokenizer(text, add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"])


def _last_special(ids: Sequence[int], offset: int, tokenizer: PreTrainedTokenizerBase) -> int:
    special = _special(tokenizer)
    for index in range(len(ids) - 1, -1, -1):
        if ids[index] in special:
            return index
    raise ValueError(
        f"the chat template of {_name(tokenizer)} ends an answer (at token {offset}) with no special token, so a model "
        "trained by it would not know how to stop"
    )


_SPECIAL: weakref.WeakKeyDictionary[Any, frozenset[int]] = weakref.WeakKeyDictionary()


def _special(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of all special tokens, also of those that the tokenizer has no role for; remembered per tokenizer."""
    if tokenizer not in _SPECIAL:
        added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        _SPECIAL[tokenizer] = frozenset(added | set(tokenizer.all_special_ids))
    return _SPECIAL[tokenizer]


def _strings(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """The special tokens that are split off before anything else is tokenized, as they stand in a text."""
    return {index: token.content for index, token in tokenizer.added_tokens_decoder.items() if token.special}


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.name_or_path) or type(tokenizer).__name__

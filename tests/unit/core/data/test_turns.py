"""Long conversations take time in their length, and get the tokens that the slow definition gives."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from core.data import chat
from core.data.chat import encode, prompt_ids
from core.data.rules import Message, Row
from core.data.turns import beginnings
from core.models.load import Loaded
from tests.unit.core.data.test_chat import CHATML, REWRITES, byte_pairs, talk

TAIL = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
BODY = "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
NUMBERED = (
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ ns.n }}" + BODY + "{% endfor %}"
    "{% if add_generation_prompt %}{{ ns.n + 1 }}<|im_start|>assistant\n{% endif %}"
)
SYSTEM_FIRST = (
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}{% for m in rest %}" + BODY + "{% endfor %}" + TAIL
)
AHEAD = {
    "last": "{% for m in messages %}{{ '!' if loop.last }}" + BODY + "{% endfor %}" + TAIL,
    "minus one": CHATML + "{{ messages[-1]['content'] if messages[-1]['role'] == 'tool' }}",
    "two passes": "{% for m in messages %}{{ m['role'][0] }}{% endfor %}" + CHATML,
    "length": "{% if messages | length > 3 %}long{% endif %}" + CHATML,
    "backwards": "{% for m in messages | reverse %}" + BODY + "{% endfor %}" + TAIL,
    "in a macro": "{% macro all() %}{% for m in messages %}" + BODY + "{% endfor %}{% endmacro %}{{ all() }}" + TAIL,
}
TEMPLATES = {"chatml": CHATML, "numbered": NUMBERED, "system first": SYSTEM_FIRST, "rewrites": REWRITES, **AHEAD}


def slow(text: str, cuts: Sequence[int], tokenizer: Any) -> tuple[list[int], list[int]]:
    """The definition: all that precedes a cut is tokenized anew for each cut."""
    ids: list[int] = []
    lengths, done = [], 0
    for cut in (*cuts, len(text)):
        if cut > done:
            whole = tokenizer(text[:cut], add_special_tokens=False)["input_ids"]
            alone = tokenizer(text[done:cut], add_special_tokens=False)["input_ids"]
            ids, done = (whole if whole[: len(ids)] == ids else ids + alone), cut
        lengths.append(len(ids))
    return ids, lengths[:-1]


def conversation(dice: random.Random) -> Row:
    pieces = ["a", "b", " ", "\n", "\n\n", "é", "🙂", "123", "'s", "<|im_end|>", "<s>", "x."]
    messages = [Message("system", "s\n")] if dice.random() < 0.5 else []
    messages += [Message("assistant", "first")] if dice.random() < 0.05 else []
    for index in range(dice.randint(2, 12)):
        role = "assistant" if index % 2 != (dice.random() < 0.03) else "user"
        content = "".join(dice.choice(pieces) for _ in range(dice.randint(1, 8)))
        messages.append(Message(role, content, weight=dice.choice([None, 0]) if role == "assistant" else None))
    return Row(1, messages=(*messages, Message("user", "q"), Message("assistant", "end")))


def outcome(row: Row, tokenizer: Any) -> Any:
    try:
        return prompt_ids(row.messages[:-1], tokenizer), encode(row, tokenizer, max_length=10_000)
    except ValueError as error:
        return str(error)


def check_against_definition(tokenizer: Any, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    dice = random.Random(7)
    rows = [conversation(dice) for _ in range(count)]
    monkeypatch.setattr(chat, "FEW", 0)
    fast = [outcome(row, tokenizer) for row in rows]
    monkeypatch.setattr(chat, "FEW", 10**9)
    monkeypatch.setattr(chat, "_tokens", slow)
    for row, got in zip(rows, fast, strict=True):
        assert got == outcome(row, tokenizer), row.messages


def test_a_models_template_gives_the_tokens_of_the_definition(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    check_against_definition(loaded.tokenizer, 25, monkeypatch)


@pytest.mark.parametrize("name", TEMPLATES)
def test_any_template_gives_the_tokens_of_the_definition(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_against_definition(byte_pairs(TEMPLATES[name]), 25, monkeypatch)


@pytest.mark.parametrize("name", AHEAD)
def test_a_template_that_may_look_ahead_is_not_read_in_one_go(name: str) -> None:
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant") * 3]
    assert beginnings(turns, AHEAD[name], {"add_generation_prompt": False}) is None
    assert beginnings(turns, CHATML, {"add_generation_prompt": False}) is not None


def work(tokenizer: Any, answers: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Characters rendered and tokenized for one prompt and one row."""
    done = 0
    render, plain = chat._render, chat._plain

    def rendering(*args: Any, **kwargs: Any) -> str:
        nonlocal done
        text = render(*args, **kwargs)
        done += len(text)
        return text

    def tokenizing(text: str, *args: Any, **kwargs: Any) -> list[int]:
        nonlocal done
        done += len(text)
        return plain(text, *args, **kwargs)

    with monkeypatch.context() as counted:
        counted.setattr(chat, "_render", rendering)
        counted.setattr(chat, "_plain", tokenizing)
        row = talk(*(f"This is message {index}." for index in range(2 * answers)))
        prompt_ids(row.messages[:-1], tokenizer)
        encode(row, tokenizer, max_length=100_000)
    return done


def test_a_conversation_ten_times_as_long_is_ten_times_the_work(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert work(loaded.tokenizer, 200, monkeypatch) < 12 * work(loaded.tokenizer, 20, monkeypatch)

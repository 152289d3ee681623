"""Text comes out whole characters at a time, and adds up to what the tokenizer makes of all tokens together."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from service.engines.base import Sampling
from service.engines.detokenise import Texts
from service.engines.sequence import Logprob, Sequence
from tests.unit.service.engines.conftest import Kit

TEXTS = st.text(st.characters(blacklist_categories=["Cs"]), max_size=20)


def sentencepiece() -> Any:
    """A vocabulary of words with a lower block for spaces, and of bytes, as Llama 2 and Gemma have it."""
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), "\u2581the", "\u2581order", "s", "\u2581"]
    made = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True))
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", clean_up_tokenization_spaces=False)


def stream(texts: Texts, ids: list[int]) -> list[str]:
    pieces = texts.stream()
    return [*(pieces.push(i) for i in ids), pieces.flush()]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(text=TEXTS)
def test_pieces_add_up_and_hold_no_broken_character(llama: Kit, text: str) -> None:
    tokenizer = llama.loaded.tokenizer
    ids = tokenizer(text)["input_ids"]
    pieces = stream(Texts(tokenizer), ids)
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces).replace("\ufffd" * text.count("\ufffd"), "") or "\ufffd" in text


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(ids=st.lists(st.integers(0, 1023), max_size=12))
def test_any_tokens_give_what_the_tokenizer_gives(llama: Kit, ids: list[int]) -> None:
    tokenizer = llama.loaded.tokenizer
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    made = "".join(stream(Texts(tokenizer), ids))
    assert whole.startswith(made) and set(whole[len(made) :]) <= {"\ufffd"}


@settings(deadline=None)
@given(text=TEXTS)
def test_byte_fallback_vocabularies_hold_back_too(text: str) -> None:
    tokenizer = TOKENIZER
    spaced = " the order" + text
    ids = [257, 258, *(1 + b for b in text.encode())]
    pieces = stream(Texts(tokenizer), ids)
    assert "".join(pieces) == spaced.rstrip("\ufffd") + "\ufffd" * (len(spaced) - len(spaced.rstrip("\ufffd")))
    assert b"".join(Texts(tokenizer).get(i)[1] for i in ids) == spaced.encode()


TOKENIZER = sentencepiece()


def test_bytes_of_tokens_add_up_to_the_text(llama: Kit) -> None:
    texts = Texts(llama.loaded.tokenizer)
    text = "naïve café 🙂 日本"
    ids = llama.ids(text)
    assert b"".join(texts.get(i)[1] for i in ids) == text.encode()
    end = llama.loaded.tokenizer.eos_token_id
    assert texts.get(end)[0] == "<|im_end|>" and texts.visible(end) == b""


def answer(llama: Kit, text: str, cut: int | None = None, **sampling: Any) -> tuple[list[str], str | None]:
    """Pieces and finish reason of a sequence that generates the tokens of a text, then the end of the turn."""
    ids = llama.ids(text)[:cut]
    request = llama.request("1", "x", sampling=Sampling(**sampling))
    eos = llama.model.eos
    made = Sequence(request, [1], limit=100, texts=Texts(llama.loaded.tokenizer), eos=eos)
    pieces = []
    for token in [*ids, min(eos)]:
        chunk = made.push(token, None)
        pieces += [chunk.text] if chunk else []
        if made.finish:
            break
    return pieces, made.finish


def test_offsets_of_tokens_are_places_in_the_text(llama: Kit) -> None:
    text = "é is \u2581 and \U0001f600."
    ids = llama.ids(text)
    eos = llama.model.eos
    texts = Texts(llama.loaded.tokenizer)
    made = Sequence(llama.request("1", "x", sampling=Sampling(logprobs=0)), [1], limit=100, texts=texts, eos=eos)
    notes = []
    for token in [*ids, min(eos)]:
        chunk = made.push(token, Logprob(-1.0, ()))
        notes += chunk.logprobs if chunk else ()
    before = [b"".join(texts.get(i)[1] for i in ids[:n]).decode(errors="ignore") for n in range(len(ids))]
    assert [note.offset for note in notes] == [len(one) for one in before]
    assert len(set(before)) < len(ids), "some character is spread over tokens"


def test_a_stop_string_across_tokens_never_shows(llama: Kit) -> None:
    text = "Thank you for writing. We will look into it today."
    for stop in ("writing", "We will", ".", "k you f"):
        pieces, finish = answer(llama, text, stop=(stop,))
        assert "".join(pieces) == text[: text.index(stop)] and finish == "stop"
    pieces, finish = answer(llama, text, stop=("today!", "nothing"))
    assert "".join(pieces) == text and finish == "stop"


def test_half_a_character_at_the_end_is_dropped(llama: Kit) -> None:
    ids = llama.ids("ok 🙂")
    assert len(ids) > 3
    pieces, _ = answer(llama, "ok 🙂", cut=len(ids) - 1)
    assert "".join(pieces).strip() == "ok"

"""Tokens to text as they come, never with half a character; and one token's text and bytes for log-probabilities."""

from __future__ import annotations

import codecs
from functools import lru_cache
from typing import Any, Protocol

BROKEN = "\ufffd"


class Detokeniser(Protocol):
    """The text of one growing answer."""

    def push(self, token: int) -> str:
        """Add a token; give the text that it completes, possibly none."""
        ...

    def flush(self) -> str:
        """No more tokens: give the whole characters that were held back; the beginning of one is dropped."""
        ...


class Texts:
    """Text and bytes of tokens.

    Args:
        tokenizer: a fast tokenizer of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids)
        self._byte_level = "ByteLevel" in repr(tokenizer.backend_tokenizer.decoder)
        self._known: dict[int, tuple[str, bytes]] = {}

    def stream(self) -> Detokeniser:
        """A detokeniser for one answer; special tokens have no text in it."""
        return _Bytes(self) if self._byte_level else _Window(self._tokenizer)

    def get(self, token: int) -> tuple[str, bytes]:
        """A token.

        Args:
            token: its id.

        Returns:
            Its text (with replacement characters where it is a part of a character) and its bytes.
        """
        known = self._known.get(token)
        if known is None:
            data = self._bytes(token)
            known = self._known[token] = (data.decode("utf-8", "replace"), data)
        return known

    def visible(self, token: int) -> bytes:
        """A token's bytes in an answer: none if it is special."""
        return b"" if token in self._special else self.get(token)[1]

    def _bytes(self, token: int) -> bytes:
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:
            return b""  # a row of the embedding that no token uses
        if token in self._special:
            return str(piece).encode()
        if self._byte_level:
            alphabet = _byte_alphabet()
            if all(c in alphabet for c in piece):
                return bytes(alphabet[c] for c in piece)
            return str(piece).encode()  # an added token is stored as plain text
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return str(piece).replace("\u2581", " ").encode()


class _Bytes:
    """Byte-level vocabularies: an answer is the bytes of its tokens."""

    def __init__(self, texts: Texts) -> None:
        self._texts = texts
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(self._texts.visible(token))

    def flush(self) -> str:
        return ""


class _Window:
    """Any other vocabulary: a token is decoded with those before it, as spaces and characters may depend on them."""

    def __init__(self, tokenizer: Any) -> None:
        self._decode = tokenizer.decode
        self._ids: list[int] = []
        self._before = 0  # tokens before this one are not decoded again
        self._read = 0  # the text of tokens before this one has been given

    def push(self, token: int) -> str:
        self._ids.append(token)
        old, new = self._text(self._before, self._read), self._text(self._before, len(self._ids))
        # Three bytes may begin a character; a fourth that completes none is broken text that the model did write.
        if len(new) <= len(old) or (new.endswith(BROKEN) and len(self._ids) - self._read < 4):
            return ""
        self._before, self._read = self._read, len(self._ids)
        return new[len(old) :]

    def flush(self) -> str:
        old, new = self._text(self._before, self._read), self._text(self._before, len(self._ids))
        return new[len(old) :].rstrip(BROKEN)

    def _text(self, start: int, stop: int) -> str:
        if start == stop:
            return ""
        text: str = self._decode(self._ids[start:stop], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


@lru_cache
def _byte_alphabet() -> dict[str, int]:
    """The printable characters that byte-level BPE writes for bytes (GPT-2's table)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}

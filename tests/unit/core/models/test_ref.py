"""References are read by one pure parser that refuses whatever it does not know."""

from __future__ import annotations

import builtins
import os
import socket
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.models.ref import ModelRef, parse_ref

HOSTILE = [
    "",
    " ",
    "http://127.0.0.1/model",
    "https://huggingface.co/org/name",
    "hf://org/name",
    "file:///etc/passwd",
    "s3://bucket/key",
    "ftp:x",
    "169.254.169.254",
    "169.254.169.254/latest",
    "169.254.169.254/latest/meta-data",
    "2852039166/latest",
    "0xA9FEA9FE/latest",
    "0xa9.0xfe.0xa9.0xfe/latest",
    "0251.0376.0251.0376/latest",
    "127.1/x",
    "[::1]",
    "[::1]/x",
    "[::ffff:169.254.169.254]/x",
    "::1/x",
    "localhost:8000/x",
    "metadata.google.internal/x",
    "user@host/x",
    "org/name@evil.example:80",
    "org/name@a/b",
    "org/name@",
    "org/name@@main",
    "org\\@evil/name",
    "org\\name",
    "\\\\host\\share",
    "//host/share",
    "C:\\models\\x",
    "org/name/extra",
    "org//name",
    "org/..",
    "../..\\x",
    "org/na..me",
    "org/--name",
    "o--rg/name",
    "org/name.git",
    "org/name\x00",
    "/models/\x00x",
    "./x\n",
    " org/name",
    "org/name ",
    "org/name?x=1",
    "org/name#x",
    "org/%2e%2e",
    "оrg/name",  # a Cyrillic o
    "org/nаme",
    "１６９.２５４/x",
    "model.gguf",
    "models/x/",
    "~root/x",
    "~",
    "-x",
    "tiny llama",
    "TINY-LLAMA",
    "tiny--llama",
    "a" * 97,
    "/" + "a" * 5000,
    "org/" + "a" * 97,
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_what_is_no_reference_is_refused_and_the_message_lists_the_forms(text: str) -> None:
    with pytest.raises(ValueError, match="catalog name"):
        parse_ref(text)


def test_a_catalog_name_in_other_letters_is_recognised() -> None:
    with pytest.raises(ValueError, match=r"did you mean smollm2-135m-instruct\? Give a catalog name"):
        parse_ref("SmolLM2_135M-Instruct")


def test_what_is_not_text_is_refused() -> None:
    with pytest.raises(ValueError, match="catalog name"):
        parse_ref(None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tiny-llama", ModelRef("catalog", "tiny-llama")),
        ("smollm2-135m-instruct", ModelRef("catalog", "smollm2-135m-instruct")),
        ("Qwen/Qwen3-0.6B", ModelRef("hub", "Qwen/Qwen3-0.6B")),
        ("01-ai/Yi-6B@v1.0", ModelRef("hub", "01-ai/Yi-6B", "v1.0")),
        ("meta-llama/Llama-3.2-1B@0123abcd", ModelRef("hub", "meta-llama/Llama-3.2-1B", "0123abcd")),
        ("/models/x", ModelRef("directory", "/models/x")),
        ("./x", ModelRef("directory", "./x")),
        ("../x@y", ModelRef("directory", "../x@y")),
        ("~/models/x", ModelRef("directory", "~/models/x")),
        ("./x.gguf", ModelRef("gguf", "./x.gguf")),
        ("~/x y.gguf", ModelRef("gguf", "~/x y.gguf")),
    ],
)
def test_each_form(text: str, expected: ModelRef) -> None:
    assert parse_ref(text) == expected
    assert str(expected) == text


_WORD = st.text(string.ascii_lowercase + string.digits, min_size=1, max_size=12)
_LETTERS = st.text(string.ascii_letters, min_size=1, max_size=12)
_PATH = st.text(string.ascii_letters + string.digits + "._- @é/", min_size=1, max_size=40)
_REFS = st.one_of(
    st.builds(lambda a, b: f"{a}-{b}", st.text(string.ascii_lowercase, min_size=1, max_size=9), _WORD),
    st.builds(lambda a, b: f"{a}/{b}", _LETTERS, _WORD),
    st.builds(lambda a, b, c: f"{a}/{b}@{c}", _LETTERS, _WORD, _WORD),
    st.builds(lambda head, tail: f"{head}x{tail}x", st.sampled_from(["/", "./", "../", "~/"]), _PATH),
    st.builds(lambda head, tail: f"{head}x{tail}.gguf", st.sampled_from(["/", "./", "../", "~/"]), _PATH),
)


@given(_REFS)
def test_a_reference_round_trips(text: str) -> None:
    ref = parse_ref(text)
    assert str(ref) == text
    assert parse_ref(str(ref)) == ref


@given(st.text(max_size=60))
def test_any_text_is_a_reference_that_round_trips_or_a_value_error(text: str) -> None:
    try:
        ref = parse_ref(text)
    except ValueError:
        return
    assert str(ref) == text
    if ref.kind == "hub":
        organisation, _, name = ref.name.partition("/")
        assert organisation.isascii() and "." not in organisation and not organisation.isdigit()
        assert name and "/" not in name


def test_parsing_touches_neither_disk_nor_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def touched(*_: object, **__: object) -> None:
        raise AssertionError("the parser looked outside")

    for owner, name in [
        (builtins, "open"),
        (os, "stat"),
        (os, "lstat"),
        (os, "scandir"),
        (os, "open"),
        (os, "readlink"),
        (os.path, "exists"),
        (os.path, "expanduser"),
        (Path, "exists"),
        (Path, "expanduser"),
        (Path, "resolve"),
        (socket, "getaddrinfo"),
        (socket, "socket"),
    ]:
        monkeypatch.setattr(owner, name, touched)
    results = []
    for text in [*HOSTILE, "tiny-llama", "org/name@main", "~/x", "/etc/passwd", "../x.gguf"]:
        try:
            results.append(str(parse_ref(text)))
        except ValueError:
            results.append("refused")
    monkeypatch.undo()
    assert results[len(HOSTILE) :] == ["tiny-llama", "org/name@main", "~/x", "/etc/passwd", "../x.gguf"]
    assert set(results[: len(HOSTILE)]) == {"refused"}


def test_only_paths_have_a_path() -> None:
    assert parse_ref("~/x").path == Path.home() / "x"
    with pytest.raises(ValueError, match="resolve"):
        _ = parse_ref("tiny-llama").path

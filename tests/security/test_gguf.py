"""A GGUF header is hostile input: whatever the bytes, the reader answers with a header or a ValueError, cheaply."""

from __future__ import annotations

import random
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.models.gguf import FLOOR, ArrayInfo, check, read_header
from core.models.ref import parse_ref
from core.models.resolve import resolve

U8, U32, F32, BOOL, STRING, ARRAY, U64 = 0, 4, 6, 7, 8, 9, 10
MUTATIONS = 2000
# Numbers that overflow something, or nearly.
EDGES = [0, 1, 2, 7, 31, 33, 2**7, 2**8, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**33 + 1, 2**48]
EDGES += [2**61, 2**62, 2**63 - 33, 2**63 - 1, 2**63, 2**63 + 8, 2**64 - 32, 2**64 - 8, 2**64 - 1]


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def setting(key: str, kind: int, raw: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + raw


def strings(values: list[str]) -> bytes:
    return struct.pack("<IQ", STRING, len(values)) + b"".join(text(value) for value in values)


def tensor(name: str, shape: tuple[int, ...], offset: int, kind: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


SETTINGS = [
    setting("general.architecture", STRING, text("llama")),
    setting("general.alignment", U32, struct.pack("<I", 32)),
    setting("llama.block_count", U32, struct.pack("<I", 1)),
    setting("llama.embedding_length", U32, struct.pack("<I", 8)),
    setting("llama.rope.freq_base", F32, struct.pack("<f", 10000.0)),
    setting("tokenizer.ggml.add_bos_token", BOOL, b"\0"),
    setting("tokenizer.ggml.tokens", ARRAY, strings([f"token{index}" for index in range(40)])),
    setting("tokenizer.ggml.token_type", ARRAY, struct.pack("<IQ", 5, 40) + b"\1\0\0\0" * 40),
    setting("tokenizer.chat_template", STRING, text("{{ messages }}")),
    setting("large", U64, struct.pack("<Q", 2**40)),
]
TENSORS = [
    tensor("token_embd.weight", (8, 40), 0),
    tensor("blk.0.attn_q.weight", (32, 2), 1280, kind=8),
    tensor("output_norm.weight", (8,), 1376),
]


def build(
    settings: list[bytes] = SETTINGS,
    tensors: list[bytes] = TENSORS,
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int, int] | None = None,
    data: int = 1408,
) -> bytes:
    tensor_count, setting_count = counts or (len(tensors), len(settings))
    head = magic + struct.pack("<IQQ", version, tensor_count, setting_count) + b"".join(settings) + b"".join(tensors)
    return head + b"\0" * (-len(head) % 32) + b"\0" * data


def replaced(key: str, raw: bytes) -> list[bytes]:
    """The settings with one of them exchanged."""
    return [raw if item.startswith(text(key)) else item for item in SETTINGS]


def read(path: Path, raw: bytes) -> tuple[Any, int]:
    """The header (or the error) and the peak of Python memory that reading it took."""
    path.write_bytes(raw)
    tracemalloc.start()
    try:
        result: Any = check(path)
    except ValueError as error:
        result = error
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return result, peak


def test_a_sound_file_is_read(tmp_path: Path) -> None:
    header, peak = read(tmp_path / "x.gguf", build())
    assert header.version == 3
    assert header.settings["tokenizer.ggml.tokens"] == ArrayInfo(STRING, 40)
    assert header.settings["llama.rope.freq_base"] == 10000.0
    assert header.settings["tokenizer.ggml.add_bos_token"] is False
    assert list(header.tensors) == ["token_embd.weight", "blk.0.attn_q.weight", "output_norm.weight"]
    assert header.tensors["blk.0.attn_q.weight"].end - header.tensors["blk.0.attn_q.weight"].start == 68
    assert header.tensors["output_norm.weight"].end == len(build())
    assert peak < FLOOR


LIES = {
    "empty": b"",
    "magic": build(magic=b"GGML"),
    "version": build(version=1),
    "big-endian": build(version=3 << 24),
    "truncated-counts": b"GGUF\x03\0\0\0\1",
    "tensor-count": build(counts=(2**63, len(SETTINGS))),
    "tensor-count-plausible": build(counts=(50, len(SETTINGS))),
    "setting-count": build(counts=(len(TENSORS), 2**64 - 1)),
    "setting-count-plausible": build(counts=(len(TENSORS), 100)),
    "key-length": build([struct.pack("<Q", 2**64 - 1) + b"x", *SETTINGS]),
    "key-twice": build([*SETTINGS, SETTINGS[0]]),
    "key-empty": build([*SETTINGS, setting("", U8, b"\0")]),
    "key-bytes": build([*SETTINGS, text(b"\xff\xfe") + struct.pack("<I", U8) + b"\0"]),
    "value-type": build([*SETTINGS, setting("x", 99, b"\0" * 16)]),
    "value-bool": build([*SETTINGS, setting("x", BOOL, b"\2")]),
    "text-length": build([*SETTINGS, setting("x", STRING, struct.pack("<Q", 2**40))]),
    "array-count": build([*SETTINGS, setting("x", ARRAY, struct.pack("<IQ", U64, 2**61))]),
    "array-product-wraps": build([*SETTINGS, setting("x", ARRAY, struct.pack("<IQ", U64, 2**61 + 1) + b"\0" * 8)]),
    "array-of-texts-count": build([*SETTINGS, setting("x", ARRAY, struct.pack("<IQ", STRING, 2**62))]),
    "array-of-arrays": build([*SETTINGS, setting("x", ARRAY, struct.pack("<IQ", ARRAY, 1) + strings(["a"]))]),
    "alignment-zero": build(replaced("general.alignment", setting("general.alignment", U32, b"\0\0\0\0"))),
    "alignment-odd": build(replaced("general.alignment", setting("general.alignment", U32, b"\3\0\0\0"))),
    "alignment-text": build(replaced("general.alignment", setting("general.alignment", STRING, text("32")))),
    "dimensions-none": build(tensors=[tensor("token_embd.weight", (), 0)]),
    "dimensions-many": build(tensors=[tensor("token_embd.weight", (1,) * 5, 0)]),
    "dimension-zero": build(tensors=[tensor("token_embd.weight", (0, 8), 0)]),
    "dimensions-product-wraps": build(tensors=[tensor("token_embd.weight", (2**32, 2**32), 0)]),
    "dimensions-product-wraps-small": build(tensors=[tensor("token_embd.weight", (2**62, 4, 2), 0)]),
    "dimension-half-block": build(tensors=[tensor("token_embd.weight", (16, 2), 0, kind=8)]),
    "tensor-type": build(tensors=[tensor("token_embd.weight", (8, 40), 0, kind=77)]),
    "tensor-removed-type": build(tensors=[tensor("token_embd.weight", (8, 40), 0, kind=4)]),
    "tensor-outside": build(tensors=[tensor("token_embd.weight", (8, 400), 0)]),
    "offset-outside": build(tensors=[tensor("token_embd.weight", (8, 40), 2**40)]),
    "offset-wraps": build(tensors=[tensor("token_embd.weight", (8, 40), 2**64 - 32)]),
    "offset-misaligned": build(tensors=[tensor("token_embd.weight", (8, 40), 4)]),
    "tensors-overlap": build(tensors=[tensor("token_embd.weight", (8, 40), 0), tensor("b", (8,), 1248)]),
    "tensor-twice": build(tensors=[tensor("token_embd.weight", (8,), 0), tensor("token_embd.weight", (8,), 32)]),
    "no-data": build(data=0),
    "no-architecture": build(SETTINGS[1:]),
    "architecture": build(replaced("general.architecture", setting("general.architecture", STRING, text("evil")))),
    "architecture-number": build(replaced("general.architecture", setting("general.architecture", U8, b"\1"))),
    "no-tokens": build([item for item in SETTINGS if b"ggml.tokens" not in item]),
    "no-embedding": build(tensors=[tensor("other", (8, 40), 0)]),
    "one-of-several": build([*SETTINGS, setting("split.count", U32, b"\3\0\0\0")]),
    "block-count": build(replaced("llama.block_count", setting("llama.block_count", U32, b"\xff\xff\xff\x7f"))),
    "width": build(replaced("llama.embedding_length", setting("llama.embedding_length", U32, b"\xff\xff\xff\x7f"))),
    "many-small-settings": build([setting(f"{index:x}", U8, b"\0") for index in range(20_000)]),
    "many-small-tensors": build(tensors=[tensor(f"{index:x}", (1,), 32 * index) for index in range(20_000)]),
    "long-text-floor": build([setting("x", STRING, text("y" * 3_000_000)), setting("x", STRING, text("y"))]),
}


@pytest.mark.parametrize("name", LIES)
def test_a_lie_is_a_value_error_that_costs_no_memory(name: str, tmp_path: Path) -> None:
    result, peak = read(tmp_path / "x.gguf", LIES[name])
    assert isinstance(result, ValueError)
    assert "x.gguf" in str(result)
    assert peak <= max(FLOOR, 2 * len(LIES[name]))


def mutate(raw: bytes, rng: random.Random) -> bytes:
    """One to four changes of bytes, numbers, lengths, or a cut."""
    changed = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        changed = changed or bytearray(b"G")
        where = rng.randrange(max(1, len(changed) - 1500))
        kind = rng.randrange(5)
        if kind == 0:
            changed[where] = rng.randrange(256)
        elif kind == 1:
            changed[where : where + 8] = struct.pack("<Q", rng.choice(EDGES))
        elif kind == 2:
            changed[where : where + 4] = struct.pack("<I", rng.choice(EDGES) % 2**32)
        elif kind == 3:
            del changed[where : where + rng.randrange(64)]
        else:
            changed = changed[: rng.randrange(len(changed) + 1)]
    return bytes(changed)


def test_two_thousand_mutated_headers_raise_value_errors_only(tmp_path: Path) -> None:
    rng = random.Random(20260)
    sound, refused = build(), 0
    for index in range(MUTATIONS):
        raw = mutate(sound, rng)
        result, peak = read(tmp_path / "x.gguf", raw)
        refused += isinstance(result, ValueError)
        assert peak <= max(FLOOR, 2 * len(raw)), index
        if not isinstance(result, ValueError):
            assert all(0 < item.start < item.end <= len(raw) for item in result.tensors.values())
    assert MUTATIONS // 2 < refused < MUTATIONS  # the fuzz reaches deep, and not every change is a lie


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    counts=st.tuples(st.sampled_from(EDGES), st.sampled_from(EDGES)),
    shape=st.lists(st.sampled_from(EDGES), max_size=6),
    offset=st.sampled_from(EDGES),
    kind=st.integers(0, 50),
    junk=st.binary(max_size=64),
)
def test_any_numbers_are_a_header_or_a_value_error(
    tmp_path: Path, counts: tuple[int, int], shape: list[int], offset: int, kind: int, junk: bytes
) -> None:
    raw = build([*SETTINGS, junk], [tensor("token_embd.weight", tuple(shape), offset % 2**64, kind)], counts=counts)
    for given_counts in (raw, build(tensors=[tensor("token_embd.weight", tuple(shape), offset, kind)])):
        result, peak = read(tmp_path / "x.gguf", given_counts)
        assert isinstance(result, ValueError) or "token_embd.weight" in result.tensors
        assert peak <= max(FLOOR, 2 * len(raw))


@given(st.binary(max_size=400))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_after_the_magic_are_a_value_error(tmp_path: Path, junk: bytes) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF\x03\0\0\0" + junk)
    with pytest.raises(ValueError, match="GGUF"):
        check(path)


def test_memory_stays_within_twice_the_file(tmp_path: Path) -> None:
    for items in (
        build([setting(f"key{index}", U64, struct.pack("<Q", index)) for index in range(100_000)]),
        build([setting("words", ARRAY, strings(["ab"] * 400_000))]),
        build([setting(f"text{index}", STRING, text("z" * 40_000)) for index in range(100)]),
        build(tensors=[tensor(f"t{index}", (8, 64), 2048 * index) for index in range(2000)], data=2048 * 2000),
    ):
        path = tmp_path / "x.gguf"
        path.write_bytes(items)
        tracemalloc.start()
        try:
            read_header(path)
        except ValueError as error:
            assert "proportion" in str(error)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak <= 2 * len(items)


def test_a_hostile_file_is_refused_before_any_library_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gguf

    def opened(*_: object, **__: object) -> None:
        raise AssertionError("the library read the file")

    monkeypatch.setattr(gguf, "GGUFReader", opened)
    path = tmp_path / "x.gguf"
    path.write_bytes(LIES["dimensions-product-wraps"])
    with pytest.raises(ValueError, match="impossible shape"):
        resolve(parse_ref(str(path)), home=tmp_path / "home")
    assert not list((tmp_path / "home").rglob("config.json"))


def test_what_is_not_there_is_a_value_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a usable GGUF"):
        read_header(tmp_path / "missing.gguf")
    with pytest.raises(ValueError, match="does not exist"):
        resolve(parse_ref(str(tmp_path / "missing.gguf")), home=tmp_path)

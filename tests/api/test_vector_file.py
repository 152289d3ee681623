"""The torch-free reader of vectors says what the library's own says, about good files and hostile ones."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.security import vector_file
from service.security.vector_file import read_vector
from tests.contract.test_steering import vector_bytes

LIMIT = 1 << 20


def rewritten(data: bytes, change: Any) -> bytes:
    """The file with its header changed."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def about(**changes: Any) -> Any:
    """A change of the vector's own metadata."""

    def change(header: dict[str, Any]) -> None:
        found = json.loads(header["__metadata__"]["gradhelm"])
        found.update(changes)
        header["__metadata__"]["gradhelm"] = json.dumps({k: v for k, v in found.items() if v is not ...})

    return change


def about_of(data: bytes) -> str:
    """The vector's own metadata, as text."""
    text: str = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["gradhelm"]
    return text


GOOD = vector_bytes("sha256:1")
CORPUS: dict[str, bytes] = {
    "good": GOOD,
    "one layer": vector_bytes("sha256:1", layers=(3,)),
    "attention": vector_bytes("sha256:1", site="attention"),
    "empty": b"",
    "short": GOOD[:7],
    "cut": GOOD[:-1],
    "longer": GOOD + b"\0",
    "nan": vector_bytes("sha256:1", fill=math.nan),
    "infinity": vector_bytes("sha256:1", fill=math.inf),
    "minus infinity": vector_bytes("sha256:1", fill=-math.inf),
    "largest": vector_bytes("sha256:1", fill=3.4028234e38),
    "header beyond the end": (2**63).to_bytes(8, "little") + GOOD[8:],
    "no metadata": rewritten(GOOD, lambda header: header.pop("__metadata__")),
    "other metadata": rewritten(GOOD, lambda header: header["__metadata__"].update(gradhelm="[]")),
    "metadata no json": rewritten(GOOD, lambda header: header["__metadata__"].update(gradhelm="{")),
    "format": rewritten(GOOD, about(format="gradhelm-vector/2")),
    "field missing": rewritten(GOOD, about(site=...)),
    "field more": rewritten(GOOD, about(code="rm -rf")),
    "site": rewritten(GOOD, about(site="head")),
    "site no text": rewritten(GOOD, about(site=3)),
    "norms list": rewritten(GOOD, about(norms=[])),
    "norm of nothing": rewritten(GOOD, about(norms={"9": 1.0})),
    "norm negative": rewritten(GOOD, about(norms={"0": -1})),
    "norm text": rewritten(GOOD, about(norms={"0": "1"})),
    "norm bool": rewritten(GOOD, about(norms={"0": True})),
    "norm of 400 digits": rewritten(GOOD, about(norms={"0": 10**400})),
    "metadata infinite": rewritten(GOOD, about(metadata={"a": [math.inf]})).replace(b"Infinity", b"1e999999"),
    "norm key": rewritten(GOOD, about(norms={"00": 1})),
    "metadata list": rewritten(GOOD, about(metadata=[])),
    "no norms": rewritten(GOOD, about(norms={})),
    "tensor name": rewritten(GOOD, lambda header: header.update(other=header.pop("layer.1"))),
    "layer spelling": rewritten(GOOD, lambda header: header.update({"layer.01": header.pop("layer.1")})),
    "layer negative": rewritten(GOOD, lambda header: header.update({"layer.-1": header.pop("layer.1")})),
    "dtype": rewritten(GOOD, lambda header: header["layer.0"].update(dtype="I32")),
    "shape": rewritten(GOOD, lambda header: header["layer.0"].update(shape=[8, 8])),
    "overlap": rewritten(GOOD, lambda header: header["layer.1"].update(data_offsets=[0, 256])),
    "gap": rewritten(GOOD, lambda header: header.pop("layer.0")),
    "no tensors": rewritten(vector_bytes("sha256:1", layers=()), lambda header: None),
    "pickle": b"\x80\x04\x95" + GOOD,
}


def verdicts(path: Path, data: bytes) -> tuple[bool, bool]:
    """(ours, the library's)."""
    from steering.vector import SteeringVector, VectorError

    path.write_bytes(data)
    try:
        read_vector(path, LIMIT)
        ours = True
    except ValueError:
        ours = False
    try:
        SteeringVector.from_bytes(data, LIMIT)
        theirs = True
    except VectorError:
        theirs = False
    return ours, theirs


@pytest.mark.parametrize("name", CORPUS)
def test_both_readers_agree(name: str, tmp_path: Path) -> None:
    ours, theirs = verdicts(tmp_path / "v", CORPUS[name])
    assert ours == theirs, name
    assert ours == (name in {"good", "one layer", "attention", "largest", "no norms"})


def test_nothing_is_taken_that_the_library_refuses(tmp_path: Path) -> None:
    draw = random.Random(5)
    taken = 0
    for _ in range(400):
        data = bytearray(GOOD)
        for _ in range(draw.randrange(1, 4)):
            data[draw.randrange(min(len(data), 900))] = draw.randrange(256)
        ours, theirs = verdicts(tmp_path / "v", bytes(data))
        assert theirs or not ours
        taken += ours
    assert taken, "some mutations are harmless, or the test says nothing"


def test_what_a_vector_says_of_itself(tmp_path: Path) -> None:
    from core.models.sites import SITES
    from steering.vector import FORMAT

    assert (vector_file.FORMAT, vector_file.SITES) == (FORMAT, SITES)
    (tmp_path / "v").write_bytes(GOOD)
    found = read_vector(tmp_path / "v", LIMIT)
    assert (found.layers, found.width, found.site, found.fingerprint) == ((0, 1), 64, "block", "sha256:1")
    with pytest.raises(ValueError, match="may have 10 bytes"):
        read_vector(tmp_path / "v", 10)


@pytest.mark.parametrize("field", ["base", "fingerprint", "method", "data_hash"])
@pytest.mark.parametrize("text", ["x" * 5000, "a\x00b", "\ud800"])
def test_text_that_no_database_holds_is_refused(tmp_path: Path, field: str, text: str) -> None:
    (tmp_path / "v").write_bytes(rewritten(GOOD, about(**{field: text})))
    with pytest.raises(ValueError, match=r"\w"):
        read_vector(tmp_path / "v", LIMIT)


METADATA = {
    "400 deep": '{"a": ' * 400 + "1" + "}" * 400,
    "17 deep": '{"a": ' + "[" * 16 + "1" + "]" * 16 + "}",
    "100 thousand deep": '{"a": ' * 100_000 + "1" + "}" * 100_000,
    "half a surrogate pair": '{"a": ["\\ud800"]}',
    "half a surrogate pair as a name": '{"a": {"\\udfff": 1}}',
    "infinity": '{"a": 1e999}',
    "NaN": '{"a": NaN}',
    "NUL": '{"a": "\\u0000"}',
    "65 KiB": '{"a": "' + "x" * 65 * 1024 + '"}',
    "norms": '{"norms": {"0": 7.5}, "note": "\\\\u0000 and \\u00e9"}',
}


@pytest.mark.parametrize("name", METADATA)
async def test_metadata_never_breaks_the_list_nor_hides_the_norms(client: httpx.AsyncClient, name: str) -> None:
    text = json.dumps({**json.loads(about_of(GOOD)), "metadata": "HERE"}).replace('"HERE"', METADATA[name])
    data = rewritten(GOOD, lambda header: header["__metadata__"].update(gradhelm=text))
    answer = await client.post("/v1/steering/vectors/import", files={"file": ("v", data)})
    listed = await client.get("/v1/steering/vectors")
    assert listed.status_code == 200
    if name == "norms":
        assert answer.json()["metadata"] == {"norms": {"0": 1.0, "1": 1.0}, "note": "\\u0000 and \u00e9"}
        assert listed.json()["data"] == [answer.json()]
    else:
        assert answer.status_code == 400 and answer.json()["error"]["code"] == "invalid_vector", answer.text
        assert listed.json()["data"] == []


async def test_a_norm_of_400_digits_is_a_400(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/steering/vectors/import", files={"file": ("v", CORPUS["norm of 400 digits"])})
    assert answer.status_code == 400 and "layer 0: the norm" in answer.json()["error"]["message"]

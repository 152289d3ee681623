"""Vectors and the steering object, through `extra_body` and the SDK's raw verbs."""

from __future__ import annotations

import json
import math
import struct
from typing import Any

import httpx
import openai
import pytest

from core.models.fingerprint import fingerprint
from tests.contract.base import BASE
from tests.contract.conftest import Served

WIDTH = 64


def vector_bytes(identity: str, *, layers: tuple[int, ...] = (0, 1), fill: float = 0.5, site: str = "block") -> bytes:
    """A vector's file, written by hand."""
    about = {
        "format": "gradhelm-vector/1",
        "site": site,
        "fingerprint": identity,
        "base": BASE,
        "method": "mean_difference",
        "data_hash": "sha256:00",
        "norms": {str(layer): 1.0 for layer in layers},
        "metadata": {"rows": 4},
    }
    header: dict[str, Any] = {"__metadata__": {"gradhelm": json.dumps(about)}}
    for index, layer in enumerate(layers):
        offsets = [index * WIDTH * 4, (index + 1) * WIDTH * 4]
        header[f"layer.{layer}"] = {"dtype": "F32", "shape": [WIDTH], "data_offsets": offsets}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + struct.pack("<f", fill) * WIDTH * len(layers)


def send(served: Served, data: bytes, name: str = "calm") -> dict[str, Any]:
    return served.client.post(
        "/steering/vectors/import",
        files={"file": ("calm.safetensors", data)},
        body={"name": name},
        options={"headers": {"Content-Type": "multipart/form-data"}},
        cast_to=dict[str, Any],
    )


@pytest.fixture(scope="module")
def vector(served: Served) -> str:
    made = send(served, vector_bytes(fingerprint(served.home / "models" / BASE)))
    assert made["status"] == "ready" and made["layers"] == [0, 1] and made["name"] == "calm" and made["model"] == BASE
    return str(made["id"])


def steered(served: Served, steering: dict[str, Any], **more: Any) -> Any:
    return served.client.chat.completions.create(
        model=BASE,
        messages=[{"role": "user", "content": "Where is my box?"}],
        max_tokens=4,
        temperature=0,
        extra_body={"steering": steering},
        **more,
    )


def test_a_steered_chat_carries_a_receipt(served: Served, vector: str) -> None:
    use = {"vectors": [{"id": vector, "strength": 2.0, "layers": [1], "positions": "all"}], "preserve_norm": True}
    receipt = steered(served, use).choices[0].model_extra["steering"]
    assert receipt["layers"] == [1] and receipt["tokens"] > 0 and receipt["mean_relative_shift"] > 0
    last = [chunk for chunk in steered(served, use, stream=True) if chunk.choices][-1].choices[0]
    assert last.finish_reason is not None and last.model_extra["steering"]["layers"] == [1]
    plain = served.client.chat.completions.create(model=BASE, messages=[{"role": "user", "content": "x"}], max_tokens=2)
    assert "steering" not in (plain.choices[0].model_extra or {})


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"strength": 0}, 422, "steering_touches_nothing"),
        ({"layers": [7]}, 400, "steering_layer_out_of_range"),
        ({"id": "vec_none"}, 404, "vector_not_found"),
        ({"id": "/etc/passwd"}, 404, "vector_not_found"),
        ({"positions": "last"}, 400, "invalid_value"),
        ({"strength": "4"}, 400, "invalid_value"),
        ({"layers": []}, 400, "invalid_value"),
        ({"path": "/etc/passwd"}, 400, "unsupported_parameter"),
    ],
)
def test_what_cannot_steer_is_refused(
    served: Served, vector: str, change: dict[str, Any], status: int, code: str
) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        steered(served, {"vectors": [{"id": vector, "strength": 2.0, **change}]})
    assert (caught.value.status_code, caught.value.code) == (status, code), caught.value
    assert caught.value.param.startswith("steering")


def test_returning_the_default_too_is_not_built(served: Served, vector: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        steered(served, {"vectors": [{"id": vector}], "return": ["steered", "default"]})
    assert caught.value.param == "steering.return"
    steered(served, {"vectors": [{"id": vector}], "return": ["steered"]})


def test_a_strength_that_is_no_number(served: Served, vector: str) -> None:
    body = f'{{"model": "{BASE}", "messages": [{{"role": "user", "content": "x"}}], "steering": {{"vectors": [' + (
        f'{{"id": "{vector}", "strength": NaN}}]}}}}'
    )
    with pytest.raises(openai.BadRequestError) as caught:
        served.client.post(
            "/chat/completions",
            content=body.encode(),
            options={"headers": {"Content-Type": "application/json"}},
            cast_to=dict[str, Any],
        )
    assert caught.value.param == "steering.vectors.0.strength"


def test_a_vector_of_another_model(served: Served) -> None:
    other = send(served, vector_bytes("sha256:" + "0" * 64))
    with pytest.raises(openai.BadRequestError) as caught:
        steered(served, {"vectors": [{"id": other["id"], "strength": 1.0}]})
    assert caught.value.code == "steering_wrong_model"
    served.client.delete(f"/steering/vectors/{other['id']}", cast_to=dict[str, Any])


def test_vectors_are_listed_read_and_deleted(served: Served) -> None:
    data = vector_bytes(fingerprint(served.home / "models" / BASE), layers=(1,))
    made = send(served, data, "gone soon")
    route = f"/steering/vectors/{made['id']}"
    assert served.client.get(route, cast_to=dict[str, Any]) == made
    content = httpx.get(f"{served.url}/v1{route}/content", headers={"Authorization": f"Bearer {served.key}"})
    assert content.content == data
    page = served.client.get("/steering/vectors?limit=1", cast_to=dict[str, Any])
    assert page["data"][0]["id"] == made["id"] and page["has_more"]
    gone = served.client.delete(route, cast_to=dict[str, Any])
    assert gone["deleted"] and gone["id"] == made["id"]
    with pytest.raises(openai.NotFoundError):
        served.client.get(route, cast_to=dict[str, Any])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PK\x03\x04",
        vector_bytes("sha256:1", fill=math.nan),
        vector_bytes("sha256:1", fill=math.inf),
        vector_bytes("sha256:1", site="nowhere"),
        vector_bytes("sha256:1")[:-4],
        (2**62).to_bytes(8, "little") + b"{}",
    ],
)
def test_what_is_no_vector_is_refused(served: Served, data: bytes) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        send(served, data)
    assert caught.value.code == "invalid_vector" and caught.value.param == "file"


def test_a_fit_is_a_job_whose_vector_can_be_asked_for_at_once(served: Served) -> None:
    rows = b'{"prompt": "How are you?", "positive": "Wonderful, thank you!", "negative": "Bad, very bad."}\n' * 4
    data = served.client.files.create(file=("pairs.jsonl", rows), purpose="steering")
    body = {"model": BASE, "training_file": data.id, "method": "mean_difference", "layers": [1], "name": "mood"}
    made = served.client.post("/steering/vectors", body=body, cast_to=dict[str, Any])
    assert made["id"].startswith("vec_") and made["job_id"].startswith("steerjob-") and made["name"] == "mood"
    seen = served.client.get(f"/steering/vectors/{made['id']}", cast_to=dict[str, Any])
    assert seen["id"] == made["id"] and seen["job_id"] == made["job_id"]
    job = served.client.fine_tuning.jobs.retrieve(made["job_id"])
    assert job.model == BASE
    if served.real:
        assert served.settled(made["job_id"]) == "succeeded"
        seen = served.client.get(f"/steering/vectors/{made['id']}", cast_to=dict[str, Any])
        assert seen["status"] == "ready" and seen["layers"] == [1] and seen["name"] == "mood"
        steered(served, {"vectors": [{"id": made["id"], "strength": 1.0}]})
    else:
        served.settled(made["job_id"])


@pytest.mark.parametrize(
    ("change", "param"),
    [({"method": "magic"}, "method"), ({"layers": [1, 1]}, "layers"), ({"site": "head"}, "site"), ({"x": 1}, "x")],
)
def test_a_fit_that_cannot_be_is_refused(served: Served, change: dict[str, Any], param: str) -> None:
    data = served.client.files.create(file=("pairs.jsonl", b'{"positive": "a", "negative": "b"}'), purpose="steering")
    with pytest.raises(openai.BadRequestError) as caught:
        body = {"model": BASE, "training_file": data.id, **change}
        served.client.post("/steering/vectors", body=body, cast_to=dict[str, Any])
    assert caught.value.param in (param, "method")

"""Files: upload, look at, page, read, delete, and what is refused."""

from __future__ import annotations

import httpx
import pytest
from fastapi import FastAPI

from tests.api.test_follow import make_job
from tests.contract.test_steering import vector_bytes

GOOD = b'{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}\n'


async def upload(client: httpx.AsyncClient, data: bytes = GOOD, purpose: str = "fine-tune") -> httpx.Response:
    return await client.post("/v1/files", files={"file": ("rows.jsonl", data)}, data={"purpose": purpose})


async def test_a_file_goes_in_and_comes_out(client: httpx.AsyncClient) -> None:
    answer = await upload(client)
    assert answer.status_code == 200, answer.text
    made = answer.json()
    assert made["object"] == "file" and made["bytes"] == len(GOOD) and made["filename"] == "rows.jsonl"
    assert (await client.get(f"/v1/files/{made['id']}")).json() == made
    content = await client.get(f"/v1/files/{made['id']}/content")
    assert content.content == GOOD
    gone = await client.delete(f"/v1/files/{made['id']}")
    assert gone.json() == {"id": made["id"], "object": "file", "deleted": True}
    missing = await client.get(f"/v1/files/{made['id']}")
    assert missing.status_code == 404 and missing.json()["error"]["code"] == "file_not_found"


async def test_a_file_in_use_is_refused_with_a_status_that_the_schema_declares(
    app: FastAPI, client: httpx.AsyncClient
) -> None:
    name = (await upload(client)).json()["id"]
    held_out = (await upload(client)).json()["id"]
    make_job(app.state.store, training_file=name, validation_file=held_out)
    for used in (name, held_out):
        refused = await client.delete(f"/v1/files/{used}")
        assert refused.status_code == 400 and refused.json()["error"]["code"] == "file_in_use"
        assert (await client.get(f"/v1/files/{used}/content")).content == GOOD
    declared = (await client.get("/openapi.json")).json()["paths"]["/v1/files/{file_id}"]["delete"]["responses"]
    assert "400" in declared and "409" not in declared, "the SDK would send a 409 again"


@pytest.mark.parametrize("route", ["files", "steering/vectors"])
async def test_content_comes_by_range_and_a_range_that_cannot_be_is_an_error_of_ours(
    client: httpx.AsyncClient, route: str
) -> None:
    if route == "files":
        name, data = (await upload(client)).json()["id"], GOOD
    else:
        data = vector_bytes("sha256:1")
        name = (await client.post("/v1/steering/vectors/import", files={"file": ("v", data)})).json()["id"]
    url = f"/v1/{route}/{name}/content"
    whole = await client.get(url)
    assert (whole.status_code, whole.content, whole.headers["accept-ranges"]) == (200, data, "bytes")
    for asked, part in (
        ("bytes=0-0", data[:1]),
        ("bytes=5-", data[5:]),
        ("bytes=-3", data[-3:]),
        ("bytes=0-9999999", data),
    ):
        answer = await client.get(url, headers={"Range": asked})
        assert (answer.status_code, answer.content) == (206, part), asked
    for asked in ("bytes=0-1,5-6", "lines=0-1", "bytes=a-b", "bytes=-", "x", "bytes=" + "0-0," * 1000 + "1-1"):
        answer = await client.get(url, headers={"Range": asked})
        assert (answer.status_code, answer.content) == (200, data), asked
    for asked in (f"bytes={len(data)}-", "bytes=9-3", "bytes=-0"):
        answer = await client.get(url, headers={"Range": asked})
        assert answer.status_code == 416 and answer.headers["Content-Range"] == f"bytes */{len(data)}", asked
        error = answer.json()["error"]
        assert (error["code"], error["param"]) == ("range_not_satisfiable", "Range")
        other = await client.get(url, headers={"Range": asked, "If-Range": '"another"'})
        assert (other.status_code, other.content) == (200, data)

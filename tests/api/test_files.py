"""Files: upload, look at, page, read, delete, and what is refused."""

from __future__ import annotations

import httpx
from fastapi import FastAPI

from tests.api.test_follow import make_job

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
    make_job(app.state.store, training_file=name)
    refused = await client.delete(f"/v1/files/{name}")
    assert refused.status_code == 400 and refused.json()["error"]["code"] == "file_in_use"
    declared = (await client.get("/openapi.json")).json()["paths"]["/v1/files/{file_id}"]["delete"]["responses"]
    assert "400" in declared and "409" not in declared, "the SDK would send a 409 again"
    assert (await client.get(f"/v1/files/{name}/content")).content == GOOD

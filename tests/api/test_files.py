"""Files: upload, look at, page, read, delete, and what is refused."""

from __future__ import annotations

import httpx

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

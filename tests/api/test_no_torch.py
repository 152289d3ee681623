"""The API process never imports torch or transformers: not at its start, and not for any request."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import asyncio, json, struct, sys
import httpx
from core.models.catalog import directory_of
from service.app import create_app
from service.engines.fake import FakeEngine
from service.settings import LimitSettings, Settings
from tests.api.fixtures import BASE, make_base
from tests.contract.test_steering import vector_bytes
from core.models.fingerprint import fingerprint
from pathlib import Path

async def main(home):
    make_base(home)
    settings = Settings(home=home, limits=LimitSettings(min_free_disk_bytes=0))
    app = create_app(settings, engine=FakeEngine())  # the real scheduler
    async with app.router.lifespan_context(app):
        key = (home / "admin.key").read_text().strip()
        transport = httpx.ASGITransport(app=app)
        headers = {"Authorization": f"Bearer {key}"}
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=headers) as client:
            rows = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
            sent = await client.post("/v1/files", files={"file": ("a.jsonl", rows)}, data={"purpose": "fine-tune"})
            job = await client.post("/v1/fine_tuning/jobs", json={"model": BASE, "training_file": sent.json()["id"]})
            cancelled = await client.post(f"/v1/fine_tuning/jobs/{job.json()['id']}/cancel")
            data = vector_bytes(fingerprint(home / "models" / BASE))
            vector = await client.post("/v1/steering/vectors/import", files={"file": ("v.safetensors", data)})
            spec = {"vectors": [{"id": vector.json()["id"]}]}
            body = {"model": BASE, "messages": [{"role": "user", "content": "x"}], "steering": spec}
            chat = await client.post("/v1/chat/completions", json=body)
            fit = {"model": BASE, "training_file": sent.json()["id"]}
            answers = [sent, job, cancelled, vector, chat, await client.post("/v1/steering/vectors", json=fit)]
            for path in ("/v1/models", "/v1/fine_tuning/jobs", "/openapi.json", "/metrics", "/readyz"):
                answers.append(await client.get(path))
            assert all(one.status_code == 200 for one in answers), [(one.url, one.text[:200]) for one in answers]
    from service.api.parts import engine_pool
    await engine_pool(settings).close()

asyncio.run(main(Path(sys.argv[1])))
heavy = sorted({"torch", "transformers", "peft", "accelerate", "numpy", "safetensors"} & set(sys.modules))
print("HEAVY:", *heavy)
"""


def test_the_api_process_stays_light(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "home")], cwd=root, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1].strip() == "HEAVY:", done.stdout.splitlines()[-1]

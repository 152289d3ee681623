"""Uploads are bounded: in size, in parts, in headers, in disk and in memory; nothing is left of one that fails."""

from __future__ import annotations

import asyncio
import errno
import io
import os
import shutil
import zipfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from fastapi import FastAPI
from starlette.requests import ClientDisconnect

from service.security import uploads
from service.security.uploads import UploadError
from service.settings import Settings
from tests.api.fixtures import HOST

LIMIT = 1 << 20
ROW = b'{"messages": []}\n'


def left(settings: Settings) -> list[str]:
    return sorted(os.listdir(settings.home / "files"))


def form(*parts: tuple[str, bytes], boundary: str = "b", end: bool = True) -> bytes:
    out = b"".join(b"--%b\r\n%b\r\n\r\n%b\r\n" % (boundary.encode(), head.encode(), data) for head, data in parts)
    return out + (f"--{boundary}--\r\n".encode() if end else b"")


FILE = 'Content-Disposition: form-data; name="file"; filename="a.jsonl"'
PURPOSE = 'Content-Disposition: form-data; name="purpose"'
HEADERS = {"Content-Type": "multipart/form-data; boundary=b"}


async def send(client: httpx.AsyncClient, body: bytes | AsyncIterator[bytes], **headers: str) -> httpx.Response:
    return await client.post("/v1/files", content=body, headers={**HEADERS, **headers})


async def test_ten_gibibytes_declared_are_refused_before_a_byte_is_read(
    client: httpx.AsyncClient, settings: Settings
) -> None:
    read = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal read
        while True:
            read += 65536
            yield b"x" * 65536

    answer = await send(client, body(), **{"Content-Length": str(10 << 30)})
    assert answer.status_code == 413 and answer.json()["error"]["code"] == "request_too_large"
    assert read <= 65536 and answer.headers["Connection"] == "close" and not left(settings)


async def test_an_endless_body_is_cut_at_the_limit(client: httpx.AsyncClient, settings: Settings) -> None:
    read = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal read
        yield form((PURPOSE, b"fine-tune"), end=False)
        yield f"--b\r\n{FILE}\r\n\r\n".encode()
        while read < 64 << 20:
            read += 65536
            yield ROW * 4096

    answer = await send(client, body())
    assert answer.status_code == 413 and answer.json()["error"]["type"] == "invalid_request_error"
    assert read <= LIMIT + (1 << 20) and not left(settings)


async def test_memory_stays_flat_while_a_file_arrives(tmp_path: Path) -> None:
    process = psutil.Process()
    piece = ROW * 4096
    count = (64 << 20) // len(piece)

    async def body() -> AsyncIterator[bytes]:
        yield f"--b\r\n{FILE}\r\n\r\n".encode()
        for _ in range(count):
            yield piece
        yield b"\r\n--b--\r\n"

    before = process.memory_info().rss
    most = 0

    async def watched() -> AsyncIterator[bytes]:
        nonlocal most
        async for one in body():
            most = max(most, process.memory_info().rss)
            yield one

    upload = await uploads.receive(
        watched(), content_type=HEADERS["Content-Type"], path=tmp_path / "x", limit=1 << 30, min_free=0
    )
    assert upload.size == count * len(piece) == (tmp_path / "x").stat().st_size
    assert most - before <= 50 << 20


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (form(*[(PURPOSE.replace("purpose", f"p{n}"), b"x") for n in range(10_000)])[: LIMIT // 2], "too_many_parts"),
        (form((FILE, ROW), (FILE, ROW), (PURPOSE, b"fine-tune")), "too_many_files"),
        (form((FILE + "\r\nX-Long: " + "y" * 20_000, ROW)), "invalid_form"),
        (form((FILE + "".join(f"\r\nX-{n}: {'y' * 1000}" for n in range(7)) + "\r\nZ: " + "z" * 2000, ROW)), None),
        (form((PURPOSE, b"fine-tune")), "missing_required_parameter"),
        (form((FILE, ROW)), "missing_required_parameter"),
        (form((FILE, ROW), (PURPOSE, b"fine-tune"), (PURPOSE, b"steering")), "duplicate_parameter"),
        (form((FILE, ROW), (PURPOSE, b"x" * 20_000)), "field_too_large"),
        (form((FILE, ROW), (PURPOSE, b"fine-tune"), (PURPOSE.replace("purpose", "x"), b"1")), "unsupported_parameter"),
        (form((FILE.replace('"file"', '"other"'), ROW)), "unknown_parameter"),
        (form(("Content-Disposition: attachment", ROW)), "invalid_form"),
        (form(("X: y", ROW)), "invalid_form"),
        (form((FILE, ROW), (PURPOSE, b"fine-tune"), end=False), "invalid_form"),
        (b"--b\r\n", "invalid_form"),
        (b"", "invalid_form"),
        (b"\x00" * 1000, "invalid_form"),
        (form((FILE, b"")), "missing_required_parameter"),
        (form((FILE, b""), (PURPOSE, b"fine-tune")), "empty_file"),
    ],
)
async def test_malformed_forms_are_refused_and_leave_nothing(
    client: httpx.AsyncClient, settings: Settings, body: bytes, code: str | None
) -> None:
    answer = await send(client, body)
    assert answer.status_code in (400, 413), answer.text
    assert code is None or answer.json()["error"]["code"] == code
    assert not left(settings)


@pytest.mark.parametrize("kind", ["", "application/json", "multipart/form-data", "multipart/mixed; boundary=b", "é"])
async def test_other_content_types_are_refused(client: httpx.AsyncClient, settings: Settings, kind: str) -> None:
    answer = await client.post("/v1/files", content=b"{}", headers=[(b"Content-Type", kind.encode("latin-1"))])
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "invalid_form"
    assert not left(settings)


def bombs() -> Iterator[tuple[str, bytes]]:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("rows.jsonl", b"0" * (64 << 20))
    yield "zip", packed.getvalue()
    yield "parquet", b"PAR1" + b"\x15\x04" * 200 + b"PAR1"
    yield "gzip", b"\x1f\x8b\x08" + b"\x00" * 100
    yield "pickle", b"\x80\x04\x95" + b"x" * 50


@pytest.mark.parametrize(("name", "data"), list(bombs()), ids=lambda value: value if isinstance(value, str) else "")
async def test_archives_are_refused_unopened(
    client: httpx.AsyncClient, settings: Settings, name: str, data: bytes
) -> None:
    answer = await send(client, form((FILE, data), (PURPOSE, b"fine-tune")))
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "invalid_file_format", name
    assert not left(settings)


async def test_a_client_that_leaves_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield f"--b\r\n{FILE}\r\n\r\n".encode() + ROW * 100
        assert (tmp_path / "x").exists()
        raise ClientDisconnect

    with pytest.raises(ClientDisconnect):
        await uploads.receive(
            body(), content_type=HEADERS["Content-Type"], path=tmp_path / "x", limit=1 << 30, min_free=0
        )
    assert not list(tmp_path.iterdir())


async def test_a_cancelled_upload_leaves_nothing(tmp_path: Path) -> None:
    started = asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        yield f"--b\r\n{FILE}\r\n\r\n".encode() + ROW * 100
        started.set()
        await asyncio.sleep(60)

    work = asyncio.create_task(
        uploads.receive(body(), content_type=HEADERS["Content-Type"], path=tmp_path / "x", limit=1 << 30, min_free=0)
    )
    await started.wait()
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    assert not list(tmp_path.iterdir())


async def test_free_space_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = iter([1 << 30, 1 << 20])
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(uploads.shutil, "disk_usage", lambda _: real._replace(free=next(free)))

    async def body() -> AsyncIterator[bytes]:
        yield f"--b\r\n{FILE}\r\n\r\n".encode()
        for _ in range(40):
            yield ROW * 65536

    with pytest.raises(UploadError) as caught:
        await uploads.receive(
            body(), content_type=HEADERS["Content-Type"], path=tmp_path / "x", limit=1 << 30, min_free=64 << 20
        )
    assert caught.value.status == 507 and caught.value.code == "disk_full" and "free" in caught.value.message
    assert not list(tmp_path.iterdir())


async def test_a_disk_that_fills_on_the_way_is_told_and_leaves_nothing(
    client: httpx.AsyncClient, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(uploads.os, "fsync", full)
    answer = await send(client, form((FILE, ROW), (PURPOSE, b"fine-tune")))
    assert answer.status_code == 507 and answer.json()["error"]["code"] == "disk_full"
    assert not left(settings)
    monkeypatch.undo()
    assert (await send(client, form((FILE, ROW), (PURPOSE, b"fine-tune")))).status_code == 200, "no restart is needed"


def test_a_declared_size_that_does_not_fit_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(UploadError) as caught:
        uploads.check_room(tmp_path, shutil.disk_usage(tmp_path).free, 1)
    assert caught.value.status == 507


@pytest.mark.parametrize(
    ("sent", "shown"),
    [
        ("../../etc/passwd", "passwd"),
        ("..\\\\..\\\\x.jsonl", "x.jsonl"),
        ("a\x01b.jsonl", "ab.jsonl"),
        ("x" * 400 + ".jsonl", "x" * 255),
        ("", "upload.jsonl"),
        ("é.jsonl", "é.jsonl"),
    ],
)
async def test_a_clients_file_name_is_only_text(
    client: httpx.AsyncClient, settings: Settings, sent: str, shown: str
) -> None:
    head = f'Content-Disposition: form-data; name="file"; filename="{sent}"'
    answer = await send(client, form((head, ROW), (PURPOSE, b"fine-tune")))
    assert answer.status_code == 200, answer.text
    assert answer.json()["filename"] == shown
    assert left(settings) == [answer.json()["id"]], "the name on the disk is ours"


async def test_json_routes_take_little(client: httpx.AsyncClient, app: FastAPI, settings: Settings) -> None:
    for kind in ("application/json", "multipart/form-data; boundary=b", "text/plain"):
        answer = await client.post(
            "/v1/chat/completions",
            content=b"[" * (settings.limits.body_bytes + 1),
            headers={"Content-Type": kind},
        )
        assert answer.status_code == 413, kind

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"[" * 65536

    answer = await client.post("/v1/chat/completions", content=endless(), headers={"Content-Type": "application/json"})
    assert answer.status_code == 413
    deep = await client.post(
        "/v1/chat/completions", content=b"[" * 100_000, headers={"Content-Type": "application/json"}
    )
    assert deep.status_code == 400


async def test_without_a_key_no_upload_is_read(app: FastAPI, settings: Settings) -> None:
    read = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal read
        for _ in range(100):
            read += 1
            yield ROW * 100

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url=f"http://{HOST}") as client:
        answer = await client.post("/v1/files", content=body(), headers=HEADERS)
    assert answer.status_code == 401 and read <= 1 and not left(settings)

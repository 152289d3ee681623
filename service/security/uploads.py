"""Multipart bodies, streamed: one file part to disk, a few short fields to memory, everything bounded.

The framework's form parser spools each file a second time and knows no limit for the whole; this one stops reading at
the first byte too many, keeps free space on the disk, and leaves nothing behind when a client goes away. The client's
file name is only text to show; it never becomes a path.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import anyio.to_thread
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

HEAD_BYTES = 65536  # kept of each file, to look at what it is
_FLUSH_BYTES = 1 << 20
_FIELD_BYTES = 16384
_HEADER_BYTES = 8192
_PARTS = 16


class UploadError(ValueError):
    """A body that is refused.

    Args:
        status: HTTP status: 400 malformed, 413 too large, 507 no room.
        code: Machine-readable code.
        message: What to do about it.
        param: The form field at fault.
    """

    def __init__(self, status: int, code: str, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param


@dataclass(slots=True)
class Upload:
    """What arrived: the file at ``path`` (the caller owns it now), its first bytes, and the other fields."""

    path: Path
    filename: str = ""
    size: int = 0
    head: bytes = b""
    sha256: str = ""
    fields: dict[str, str] = field(default_factory=dict)


class _Form:
    """Callbacks of the parser; holds at most one megabyte of the file and the short fields."""

    def __init__(self, out: BinaryIO, path: Path, limit: int) -> None:
        self.out, self.limit = out, limit
        self.upload = Upload(path)
        self.pending = bytearray()
        self.hash = hashlib.sha256()
        self.seen_file = self.ended = False
        self._parts = 0
        self._is_file = False
        self._name, self._value = "", bytearray()
        self._header, self._header_value = bytearray(), bytearray()
        self._disposition = b""
        self._header_bytes = 0

    def part_begin(self) -> None:
        self._parts += 1
        if self._parts > _PARTS:
            raise UploadError(400, "too_many_parts", f"A form of more than {_PARTS} parts is not taken.")
        self._name, self._disposition, self._header_bytes = "", b"", 0
        self._value.clear()

    def header_field(self, data: bytes, start: int, end: int) -> None:
        self._count(end - start)
        self._header += data[start:end]

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self._count(end - start)
        self._header_value += data[start:end]

    def header_end(self) -> None:
        if bytes(self._header).lower() == b"content-disposition":
            self._disposition = bytes(self._header_value)
        self._header.clear()
        self._header_value.clear()

    def headers_finished(self) -> None:
        kind, options = parse_options_header(self._disposition)
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        if kind != b"form-data" or not self._name:
            raise UploadError(400, "invalid_form", "Every part needs a Content-Disposition with a name.")
        self._is_file = b"filename" in options
        if self._is_file:
            if self.seen_file:
                raise UploadError(400, "too_many_files", "Send one file at a time.", param=self._name)
            if self._name != "file":
                raise UploadError(400, "unknown_parameter", f"Unknown file field {self._name!r}; use 'file'.")
            self.seen_file = True
            shown = options[b"filename"].decode("utf-8", "replace").replace("\\", "/").rsplit("/", 1)[-1]
            self.upload.filename = "".join(c for c in shown if c.isprintable())[:255]

    def part_data(self, data: bytes, start: int, end: int) -> None:
        if not self._is_file:
            self._value += data[start:end]
            if len(self._value) > _FIELD_BYTES:
                raise UploadError(
                    413, "field_too_large", f"A form field may hold {_FIELD_BYTES} bytes.", param=self._name
                )
            return
        self.upload.size += end - start
        if self.upload.size > self.limit:
            message = f"The file is larger than the {self.limit} bytes that are taken. Split it."
            raise UploadError(413, "file_too_large", message, param="file")
        self.pending += data[start:end]

    def part_end(self) -> None:
        if self._is_file:
            self._is_file = False
            return
        if self._name in self.upload.fields:
            raise UploadError(400, "duplicate_parameter", f"The field {self._name!r} came twice.", param=self._name)
        self.upload.fields[self._name] = self._value.decode("utf-8", "replace")

    def end(self) -> None:
        self.ended = True

    def flush(self) -> None:
        """Write what is pending; runs in a thread."""
        if len(self.upload.head) < HEAD_BYTES:
            self.upload.head += bytes(self.pending[: HEAD_BYTES - len(self.upload.head)])
        self.out.write(self.pending)
        self.hash.update(self.pending)
        self.pending.clear()

    def _count(self, count: int) -> None:
        self._header_bytes += count
        if self._header_bytes > _HEADER_BYTES:
            raise UploadError(400, "header_too_large", f"A part's headers may hold {_HEADER_BYTES} bytes.")


def _boundary(content_type: str) -> bytes:
    kind, options = parse_options_header(content_type.encode("latin-1", "replace"))
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not boundary or len(boundary) > 256:
        message = "Send multipart/form-data with a boundary, the file in the field 'file'."
        raise UploadError(400, "invalid_form", message, param="file")
    return boundary


def check_room(folder: Path, coming: int, keep: int) -> None:
    """Refuse when ``coming`` more bytes would leave less than ``keep`` free in ``folder``.

    Args:
        folder: A folder on the disk.
        coming: Bytes to be written.
        keep: Bytes that must stay free.

    Raises:
        UploadError: 507, with both numbers.
    """
    free = shutil.disk_usage(folder).free
    if free - coming < keep:
        message = f"The data folder's disk has {free} bytes free; {keep} must stay free. Free some space."
        raise UploadError(507, "disk_full", message)


async def receive(
    chunks: AsyncIterator[bytes], *, content_type: str, path: Path, limit: int, min_free: int, declared: int = 0
) -> Upload:
    """Read a form; its file ends at ``path``, flushed to disk. On any failure, ``path`` is removed.

    Args:
        chunks: The body; its iterator raises when the client goes away.
        content_type: The request's Content-Type.
        path: Where the file part is written; a server-made name.
        limit: Bytes that the file may have.
        min_free: Bytes that must stay free on the disk.
        declared: The request's Content-Length, 0 when unknown.

    Returns:
        What arrived.

    Raises:
        UploadError: The body is malformed, too large, or there is no room for it.
    """
    boundary = _boundary(content_type)
    check_room(path.parent, declared, min_free)
    try:
        with path.open("xb") as out:
            form = _Form(out, path, limit)
            parser = _parser(boundary, form)
            since_check = 0
            async for chunk in chunks:
                try:
                    parser.write(chunk)
                except FormParserError as error:
                    raise UploadError(400, "invalid_form", f"The form cannot be read: {error}.") from error
                if len(form.pending) >= _FLUSH_BYTES:
                    since_check += len(form.pending)
                    await anyio.to_thread.run_sync(form.flush)
                    if since_check >= 16 * _FLUSH_BYTES:
                        since_check = 0
                        check_room(path.parent, 0, min_free)
            if not form.ended:
                raise UploadError(400, "invalid_form", "The form ends before its closing boundary.")
            if not form.seen_file:
                raise UploadError(400, "missing_required_parameter", "Send the file in the field 'file'.", param="file")

            def settle() -> None:
                form.flush()
                out.flush()
                os.fsync(out.fileno())

            await anyio.to_thread.run_sync(settle)
        form.upload.sha256 = form.hash.hexdigest()
        return form.upload
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _parser(boundary: bytes, form: _Form) -> MultipartParser:
    return MultipartParser(
        boundary,
        {
            "on_part_begin": form.part_begin,
            "on_part_data": form.part_data,
            "on_part_end": form.part_end,
            "on_header_field": form.header_field,
            "on_header_value": form.header_value,
            "on_header_end": form.header_end,
            "on_headers_finished": form.headers_finished,
            "on_end": form.end,
        },
    )

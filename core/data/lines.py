"""Lines of an untrusted JSONL file, numbered, in bounded memory whatever the file holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

MAX_LINE_BYTES = 8 * 1024 * 1024
"""Longest line that is taken into memory; a row of a million tokens is shorter."""

_BOM = b"\xef\xbb\xbf"
_WIDE = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_KINDS = {
    b"PK\x03\x04": "a ZIP archive (or an Excel sheet)",
    b"\x1f\x8b": "gzip-compressed; upload it unpacked",
    b"PAR1": "a Parquet file",
    b"%PDF": "a PDF",
    b"BZh": "bzip2-compressed; upload it unpacked",
    b"\xfd7zXZ\x00": "xz-compressed; upload it unpacked",
    b"(\xb5/\xfd": "zstd-compressed; upload it unpacked",
    b"GGUF": "a GGUF model",
}


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a file."""

    number: int
    """Counted from 1, blank lines too."""
    data: bytes | None
    """Without its line end; None when it is longer than `MAX_LINE_BYTES`."""


def read_lines(path: Path) -> Iterator[Line]:
    """Read a file line by line; LF and CRLF end a line, a byte order mark at the start is dropped.

    Args:
        path: the file.

    Yields:
        Line: every one, blank ones too.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        number = 0
        while data := file.readline(MAX_LINE_BYTES + 2):
            number += 1
            body = data.removesuffix(b"\n").removesuffix(b"\r")
            if len(body) > MAX_LINE_BYTES:
                if not data.endswith(b"\n"):
                    _skip_line(file)
                yield Line(number, None)
                continue
            yield Line(number, body.removeprefix(_BOM) if number == 1 else body)


def _skip_line(file: BinaryIO) -> None:
    while data := file.readline(64 * 1024):
        if data.endswith(b"\n"):
            return


def looks_like_json_lines(head: bytes) -> str | None:
    """Judge by its first bytes whether an upload can be JSON lines at all; the rows are judged later, one by one.

    Args:
        head: the first bytes of the file (a few KiB suffice; fewer when the file is shorter).

    Returns:
        None when it may be, else the reason why it is not.
    """
    for magic, kind in _KINDS.items():
        if head.startswith(magic):
            return f"the file is {kind}, not JSON lines"
    for magic, kind in _WIDE.items():
        if head.startswith(magic):
            return f"the file is {kind} text; save it as UTF-8"
    text = head.removeprefix(_BOM).lstrip(b" \t\r\n")
    if not text:
        return "the file is empty" if len(head) < 1024 else "the file begins with blank lines only"
    if b"\x00" in head:
        return "the file is binary, not JSON lines"
    if text.startswith(b"["):
        return "the file is one JSON array; write one JSON object per line instead"
    if not text.startswith(b"{"):
        return 'the file is not JSON lines: its first line does not begin with "{"'
    first = text.split(b"\n", 1)[0].strip()
    if first == b"{":
        return "the file is one JSON object over several lines; write each row on one line of its own"
    return None

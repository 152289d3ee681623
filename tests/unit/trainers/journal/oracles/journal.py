"""A reader written from docs/journal.md alone: no more checks than it takes to believe a file."""

from __future__ import annotations

import hashlib
import json
import struct
from typing import Any


def read(data: bytes) -> tuple[dict[str, Any], list[tuple[Any, ...]], dict[str, Any] | None]:
    """Reads an undamaged journal.

    Args:
        data: The file.

    Returns:
        The header's object; per record the step, the rate, the seed or None, and of each derivative what was measured
        and applied, whether it was clipped, and whether skipped, floats as their eight bytes; the seal or None.
    """
    assert data[:8] == bytes.fromhex("89 47 48 4A 0D 0A 1A 0A")
    length = int.from_bytes(data[8:12], "little")
    header = json.loads(data[12 : 12 + length].decode("utf-8"))
    chain = hashlib.sha256(data[: 12 + length]).digest()
    at = 12 + length + 32
    assert chain == data[at - 32 : at]
    head = 12 if header["seed"] is not None else 20
    size = head + header["slots"] * 17 + 8
    records = []
    while at < len(data) and data[at : at + 4] != b"\xff\xff\xff\xff":
        body, tag = data[at : at + size - 8], data[at + size - 8 : at + size]
        chain = hashlib.sha256(chain + body).digest()
        assert tag == chain[:8]
        slots = [
            (body[start + 1 : start + 9], body[start + 9 : start + 17], bool(body[start] & 1), bool(body[start] & 2))
            for start in range(head, len(body), 17)
        ]
        seed = int.from_bytes(body[12:20], "little") if head == 20 else None
        records.append((int.from_bytes(body[:4], "little"), body[4:12], seed, *slots))
        assert records[-1][0] == len(records)
        at += size
    if at == len(data):
        return header, records, None
    seal = data[at:]
    assert len(seal) == 108
    assert hashlib.sha256(chain + seal[:76]).digest() == seal[76:]
    (count,) = struct.unpack_from("<Q", seal, 4)
    return header, records, {"count": count, "chain": seal[12:44], "tensors": seal[44:76], "expected": chain}

"""API keys: 256 random bits, of which only the sha256 is kept; scoped; never logged.

A key of 256 random bits needs no slow hash: there is nothing to guess. It is found by its hash, and the hash is
compared again in constant time, so that an index with other ideas about equality cannot let a near miss in.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from sqlalchemy import Engine, select, update

from service.db.engine import DatabaseBusy, read, write
from service.db.tables import ApiKey

Scope = Literal["read", "jobs", "generate", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
_MADE = "admin.key, made at start"
_FORMAT = re.compile(r"gh-[A-Za-z0-9_-]{43}")


@dataclass(frozen=True, slots=True)
class Identity:
    """Who asks: the key's id and what it may do."""

    key_id: str
    scopes: frozenset[str]

    def may(self, scope: Scope) -> bool:
        """Whether the key has this scope; ``admin`` has all."""
        return scope in self.scopes or "admin" in self.scopes


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def create(engine: Engine, name: str, scopes: Sequence[str], *, expires_at: int | None = None) -> tuple[ApiKey, str]:
    """Make a key. The second value is the key itself: it is shown once and kept nowhere.

    Args:
        engine: The database.
        name: What the key is for, 1 to 255 characters.
        scopes: One or more of ``read``, ``jobs``, ``generate``, ``admin``.
        expires_at: Seconds since the epoch, or none.

    Returns:
        The row, and the key.

    Raises:
        ValueError: A scope is unknown, there is none, or the name is empty or too long.
    """
    unknown = sorted(set(scopes) - set(SCOPES))
    if unknown or not scopes:
        raise ValueError(f"scopes must be one or more of {', '.join(SCOPES)}; got {', '.join(unknown) or 'none'}")
    if not 1 <= len(name) <= 255 or "\x00" in name:
        raise ValueError("the key's name must have 1 to 255 characters and no NUL")
    key = f"gh-{secrets.token_urlsafe(32)}"
    row = ApiKey(
        id=f"key_{secrets.token_hex(12)}",
        name=name,
        hash=_digest(key),
        hint=key[:7],
        scopes=sorted(set(scopes)),
        created_at=int(time.time()),
        expires_at=expires_at,
    )
    with write(engine) as session:
        session.add(row)
    return row, key


def listed(engine: Engine) -> list[ApiKey]:
    """All keys, newest first, the revoked ones too."""
    with read(engine) as session:
        return list(session.scalars(select(ApiKey).order_by(ApiKey.number.desc())))


def revoke(engine: Engine, key_id: str) -> bool:
    """Refuse a key from now on; false when there is no such key or it is revoked already."""
    with write(engine) as session:
        found = session.scalar(select(ApiKey).where(ApiKey.id == key_id, ApiKey.revoked_at.is_(None)))
        if found is None:
            return False
        session.execute(update(ApiKey).where(ApiKey.id == key_id).values(revoked_at=int(time.time())))
    return True


def identify(engine: Engine, key: str) -> Identity | None:
    """Whose key this is, or none when it is unknown, revoked or expired."""
    if not _FORMAT.fullmatch(key):
        return None
    digest = _digest(key)
    with read(engine) as session:
        row = session.scalar(select(ApiKey).where(ApiKey.hash == digest))
    if row is None or not hmac.compare_digest(row.hash, digest) or not _valid(row):
        return None
    return Identity(row.id, frozenset(str(scope) for scope in row.scopes))


def _valid(row: ApiKey) -> bool:
    return row.revoked_at is None and (row.expires_at is None or row.expires_at > time.time())


def touch(engine: Engine, key_id: str) -> None:
    """Note that a key was used; a database that is busy is not waited for twice, and nothing fails for it."""
    with suppress(DatabaseBusy), write(engine) as session:
        session.execute(update(ApiKey).where(ApiKey.id == key_id).values(last_used_at=int(time.time())))


def ensure_admin(engine: Engine, path: Path) -> bool:
    """Make sure that ``path`` holds a working admin key, readable by its owner only.

    Args:
        engine: The database.
        path: ``<home>/admin.key``.

    Returns:
        Whether a new key was written: at the first start, or when the file is lost while no admin key that somebody
        made works, or when it belongs to another database. The key of a lost file is not revoked: it may be in use.
    """
    if path.is_file():
        identity = identify(engine, path.read_text(encoding="utf-8", errors="replace").strip())
        if identity is not None and identity.may("admin"):
            return False
    elif any("admin" in row.scopes and row.name != _MADE and _valid(row) for row in listed(engine)):
        return False
    _, key = create(engine, _MADE, ["admin"])
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.unlink(missing_ok=True)
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
        out.write(f"{key}\n")
        out.flush()
        os.fsync(out.fileno())
    fresh.replace(path)
    return True

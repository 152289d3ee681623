"""`/v1/keys`: an admin makes, lists and revokes API keys."""

from __future__ import annotations

from fastapi import APIRouter

from service.api.deps import Db, needs
from service.api.docs import errors_of
from service.api.errors import not_found
from service.api.schemas.common import Deleted
from service.api.schemas.resources import CreateKey, KeyObject, Listing
from service.api.shape import BoundedRoute
from service.db.tables import ApiKey
from service.security import keys

router = APIRouter(tags=["keys"], route_class=BoundedRoute)


def wire(row: ApiKey, key: str | None = None) -> KeyObject:
    """A key's row as the wire shows it; the key itself only when it was just made."""
    return KeyObject(
        id=row.id,
        name=row.name,
        hint=row.hint,
        scopes=list(row.scopes),
        created_at=row.created_at,
        expires_at=row.expires_at,
        last_used_at=row.last_used_at,
        revoked_at=row.revoked_at,
        key=key,
    )


@router.post("/v1/keys", response_model=KeyObject)
@needs("admin")
def create_key(wanted: CreateKey, db: Db) -> KeyObject:
    """Make a key. The answer is the only place where it is ever shown."""
    row, key = keys.create(db, wanted.name, wanted.scopes, expires_at=wanted.expires_at)
    return wire(row, key)


@router.get("/v1/keys", response_model=Listing[KeyObject])
@needs("admin")
def list_keys(db: Db) -> Listing[KeyObject]:
    """All keys, newest first, the revoked ones too."""
    data = [wire(row) for row in keys.listed(db)]
    return Listing[KeyObject](data=data, first_id=data[0].id if data else None, last_id=data[-1].id if data else None)


@router.delete("/v1/keys/{key_id}", response_model=Deleted, responses=errors_of(404))
@needs("admin")
def revoke_key(key_id: str, db: Db) -> Deleted:
    """Refuse a key from now on."""
    if "\x00" in key_id or not keys.revoke(db, key_id):
        raise not_found("key", key_id, param="key_id", code="key_not_found")
    return Deleted(id=key_id, object="api_key")

"""`/v1/steering/vectors`: fit as a job, import, list, get, content, delete."""

from __future__ import annotations

from fastapi import APIRouter

router = APIRouter(tags=["steering"])

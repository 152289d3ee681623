"""Types that several resources share."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


class Body(BaseModel):
    """A request: no coercion of types, no NaN, unknown names are errors."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class Answer(BaseModel):
    """A response object."""

    model_config = ConfigDict(extra="allow")


def without_null_extras(cls: type[BaseModel], data: Any) -> Any:
    """The body without unknown names whose value is null: clients send those for "not set"."""
    if not isinstance(data, dict):
        return data
    return {name: value for name, value in data.items() if value is not None or name in cls.model_fields}


def _clean(text: str) -> str:
    if "\x00" in text:
        raise ValueError("must not contain NUL")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("must not contain half a surrogate pair, which is no character") from None
    return text


def _clean_value(value: Any) -> Any:
    """A value of any shape that a database and an answer can hold: judged without recursion, as it may be deep."""
    left = [(value, 0)]
    while left:
        item, depth = left.pop()
        if depth > _DEPTH:
            raise ValueError(f"must not be nested deeper than {_DEPTH}")
        if isinstance(item, str):
            _clean(item)
        elif isinstance(item, float) and not math.isfinite(item):
            raise ValueError("must not contain NaN or infinity")
        elif isinstance(item, int) and abs(item) > _LARGEST:
            raise ValueError("must not contain an integer of more than 300 digits")
        elif isinstance(item, dict):
            left += [(inner, depth + 1) for pair in item.items() for inner in pair]
        elif isinstance(item, list):
            left += [(inner, depth + 1) for inner in item]
    return value


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = BeforeValidator(_whole)
"""Behind an integer's limits: 8.0 is a whole number too, as JSON Schema has it and JavaScript sends it."""

Layers = Annotated[
    list[Annotated[int, Field(ge=0, le=10_000), Whole]], Field(min_length=1, max_length=512, fail_fast=True)
]
"""0-based indices of a model's blocks."""

_DEPTH = 16
_LARGEST = 10**300
_CLEAN: dict[str, Any] = {"pattern": r"^[^\u0000]*$"}

Text = Annotated[str, AfterValidator(_clean), Field(json_schema_extra=_CLEAN)]
"""A string that every database can hold."""

Loose = Annotated[Any, AfterValidator(_clean_value)]
"""What is judged later, by its own rules: here only whether it can be kept and shown."""

Name = Annotated[str, AfterValidator(_clean), Field(min_length=1, max_length=512, json_schema_extra=_CLEAN)]
"""An id or a model's name."""

MetadataKey = Annotated[str, AfterValidator(_clean), Field(max_length=64, json_schema_extra=_CLEAN)]
MetadataValue = Annotated[str, AfterValidator(_clean), Field(max_length=512, json_schema_extra=_CLEAN)]
Metadata = Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)]
"""Up to 16 pairs; keys up to 64 characters, values up to 512."""


class ErrorDetail(BaseModel):
    """What went wrong and what to do about it."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """Every error."""

    error: ErrorDetail


class Deleted(Answer):
    """The id that is gone."""

    id: str
    object: str
    deleted: Literal[True] = True

"""Types that several resources share."""

from __future__ import annotations

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


def _no_nul(text: str) -> str:
    if "\x00" in text:
        raise ValueError("must not contain NUL")
    return text


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = BeforeValidator(_whole)
"""Behind an integer's limits: 8.0 is a whole number too, as JSON Schema has it and JavaScript sends it."""

_NO_NUL: dict[str, Any] = {"pattern": r"^[^\u0000]*$"}

Text = Annotated[str, AfterValidator(_no_nul), Field(json_schema_extra=_NO_NUL)]
"""A string that every database can hold."""

Name = Annotated[str, AfterValidator(_no_nul), Field(min_length=1, max_length=512, json_schema_extra=_NO_NUL)]
"""An id or a model's name."""

MetadataKey = Annotated[str, AfterValidator(_no_nul), Field(max_length=64, json_schema_extra=_NO_NUL)]
MetadataValue = Annotated[str, AfterValidator(_no_nul), Field(max_length=512, json_schema_extra=_NO_NUL)]
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

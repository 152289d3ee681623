"""Chat completions and completions: OpenAI's objects, the steering object, and nothing that would be ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from service.api.schemas.common import Answer, Body, Layers, Metadata, Name, Text, Whole, without_null_extras

_PARTS = 4096
"""Parts of all messages of a request."""
Stop = Annotated[list[Annotated[Text, Field(min_length=1, max_length=256)]], Field(max_length=4)]


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class VectorUse(Body):
    """One steering vector in a request."""

    id: Name = Field(description="Id of a vector, `vec_...`.")
    strength: float = Field(
        1.0,
        ge=-1e6,
        le=1e6,
        description="Plain multiplier on the stored directions; its sign is its direction. Begin near 1.5 on one "
        "middle layer: far more, or on many layers, makes a model babble.",
        examples=[1.5],
    )
    layers: Layers | None = Field(
        None, description="0-based blocks whose output is changed; none means every layer the vector has."
    )
    positions: Literal["all", "prompt", "generated"] = Field("all", description="Which tokens are touched.")


class SteeringSpec(Body):
    """How to steer this request. Several vectors add in list order; then `preserve_norm` acts once."""

    vectors: list[VectorUse] = Field(fail_fast=True, min_length=1, max_length=16, description="Vectors, by id.")
    preserve_norm: bool = Field(False, description="Give every touched position the norm it had before.")
    returns: list[Literal["steered", "default"]] = Field(
        ["steered"], alias="return", description='Only `["steered"]` is built.'
    )

    @field_validator("returns")
    @classmethod
    def _only_steered(cls, value: list[str]) -> list[str]:
        if value != ["steered"]:
            raise ValueError('only ["steered"] is built; send a second request without steering to compare')
        return value


class StreamOptions(Body):
    """Options of a stream."""

    include_usage: bool = Field(False, description="Send one more chunk, without choices, that holds the usage.")


class GenerationRequest(Body):
    """What chat completions and completions share."""

    model: Name = Field(description="A base model, `ft:...`, or `ft:...:ckpt-step-N`.")
    n: Annotated[int, Field(ge=1, le=128), Whole] | None = Field(None, description="Choices; default 1.")
    max_tokens: Annotated[int, Field(ge=1, lt=2**53), Whole] | None = Field(
        None, description="Most tokens to generate."
    )
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(None, description="0 is greedy; default 1.")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(None, description="Nucleus mass; default 1.")
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63), Whole] | None = Field(
        None, description="Makes sampling repeatable; choice i uses seed + i."
    )
    stop: Annotated[Stop | None, BeforeValidator(_listed)] = Field(
        None, description="Up to four strings that end the text and are left out.", json_schema_extra=None
    )
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = Field(None, description="Default 0.")
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = Field(None, description="Default 0.")
    stream: bool | None = Field(None, description="Send server-sent events.")
    stream_options: StreamOptions | None = None
    steering: SteeringSpec | None = Field(None, description="Steer this request.")
    user: Text | None = Field(None, description="Accepted and ignored.")
    metadata: Metadata | None = Field(None, description="Accepted and ignored.")
    store: bool | None = Field(None, description="Accepted and ignored; nothing is stored.")
    service_tier: Text | None = Field(None, description="Accepted and ignored.")

    @model_validator(mode="before")
    @classmethod
    def _nulls(cls, data: Any) -> Any:
        return without_null_extras(cls, data)

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed with stream=true")
        return self


class TextPart(Body):
    """A part of a message; only text is understood."""

    type: Literal["text"]
    text: Text


class ChatMessage(Body):
    """One message; `developer` is rendered as `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=256, fail_fast=True)] = Field(
        description="Text, or a list of text parts."
    )

    @model_validator(mode="before")
    @classmethod
    def _nulls(cls, data: Any) -> Any:
        return without_null_extras(cls, data)

    @property
    def text(self) -> str:
        """The content as one string."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(GenerationRequest):
    """Body of `POST /v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=4096, fail_fast=True)
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**53), Whole] | None = Field(
        None, description="The newer name of max_tokens; give one of them."
    )
    logprobs: bool | None = Field(None, description="Return the log-probability of each token.")
    top_logprobs: Annotated[int, Field(ge=0, le=20), Whole] | None = Field(None, description="Alternatives per token.")

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is only allowed with logprobs=true")
        if sum(len(one.content) for one in self.messages if not isinstance(one.content, str)) > _PARTS:
            raise ValueError(f"the messages may have {_PARTS} parts together; join their texts")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("give max_tokens or max_completion_tokens, not both")
        return self


class CompletionRequest(GenerationRequest):
    """Body of `POST /v1/completions`."""

    prompt: Annotated[Text | Annotated[list[Text], Field(min_length=1, max_length=1)], Field()] = Field(
        description="The text to go on from, or a list of one."
    )
    logprobs: Annotated[int, Field(ge=0, le=20), Whole] | None = Field(None, description="Alternatives per token.")
    echo: Literal[False] | None = Field(None, description="Only false is built.")


class Usage(Answer):
    """Tokens of a request; the prompt counts once, whatever n is."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class SteeringReceipt(Answer):
    """What steering did to one choice."""

    variant: Literal["steered"] = "steered"
    layers: list[int] = Field(description="Blocks hit.")
    tokens: int = Field(description="Tokens touched, each counted once.")
    mean_relative_shift: float = Field(description="Mean of |dh| / |h| over layers and tokens.")


class AssistantMessage(Answer):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(Answer):
    """One answer of n."""

    index: int
    message: AssistantMessage
    finish_reason: Literal["stop", "length"]
    logprobs: dict[str, Any] | None = None
    steering: SteeringReceipt | None = None


class ChatCompletion(Answer):
    """Answer of chat completions without a stream."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class CompletionChoice(Answer):
    """One text of n."""

    index: int
    text: str
    finish_reason: Literal["stop", "length"]
    logprobs: dict[str, Any] | None = None
    steering: SteeringReceipt | None = None


class Completion(Answer):
    """Answer of completions without a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage

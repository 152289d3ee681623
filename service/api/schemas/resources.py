"""Files, jobs, models, vectors and keys on the wire."""

from __future__ import annotations

from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import Field

from service.api.schemas.common import Answer, Body, Deleted, Layers, Loose, Metadata, Name, Text, Whole

T = TypeVar("T")


class Listing(Answer, Generic[T]):
    """A page; pass the last id as `after` for the next one."""

    object: Literal["list"] = "list"
    data: list[T]
    has_more: bool = False
    first_id: str | None = None
    last_id: str | None = None


class FileObject(Answer):
    """An uploaded or produced file."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None = None
    filename: str
    purpose: str
    status: str = "processed"
    status_details: str | None = None


class MethodChoice(Body):
    """`{"type": "<name>", "<name>": {"hyperparameters": {...}}}`; `supervised` means `lora`."""

    model_config = Body.model_config | {"extra": "allow"}

    __pydantic_extra__: dict[str, Loose] = Field(init=False)

    type: Name


class CreateJob(Body):
    """Body of `POST /v1/fine_tuning/jobs`."""

    model: Name = Field(
        description="Base model (a catalog name, or a Hub id that was pulled), or an earlier result to start from: "
        "`ft:...`, or its checkpoint `ft:...:ckpt-step-N`."
    )
    training_file: Name = Field(description="Id of an uploaded file with purpose `fine-tune`.")
    validation_file: Name | None = Field(None, description="Id of a file with held-out rows.")
    method: MethodChoice | None = Field(None, description="Training method and its hyperparameters; default `lora`.")
    hyperparameters: dict[Text, Loose] | None = Field(
        None, description="Deprecated: use `method`.", json_schema_extra={"deprecated": True}
    )
    suffix: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")] | None = Field(
        None, description="Part of the new model's name: 1 to 64 letters, digits, `_`, `.`, `-`."
    )
    seed: Annotated[int, Field(ge=0, le=2147483647), Whole] | None = Field(None, description="Drawn when not given.")
    metadata: Metadata | None = Field(None, description="Up to 16 pairs to find the job by.")
    integrations: Annotated[list[Loose], Field(max_length=0)] | None = Field(None, description="None are built.")


class JobError(Answer):
    """Why a job failed."""

    code: str
    message: str
    param: str | None = None


class JobObject(Answer):
    """A job; fields beyond OpenAI's are `base`, `progress` and, for a fit, `vector`.

    `model` is what the request named. Where that is an earlier result, `base` is the base model at its root.
    """

    id: str
    object: str
    created_at: int
    started_at: int | None = None
    finished_at: int | None = None
    model: str
    base: str
    fine_tuned_model: str | None = None
    vector: str | None = None
    organization_id: str = "local"
    status: str
    hyperparameters: dict[str, Any]
    method: dict[str, Any] | None = None
    training_file: str
    validation_file: str | None = None
    result_files: list[str]
    trained_tokens: int | None = None
    error: JobError | None = None
    seed: int
    suffix: str | None = None
    estimated_finish: int | None = None
    metadata: dict[str, str]
    integrations: list[Any] = Field(default_factory=list)
    progress: dict[str, Any]


class EventObject(Answer):
    """Something that happened to a job."""

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any]


class CheckpointObject(Answer):
    """A checkpoint; its name can be used as a model for as long as retention keeps it."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    metrics: dict[str, Any]
    step_number: int


class ModelObject(Answer):
    """A base model or one that a job made."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    kind: Literal["base", "adapter", "merged"]
    base: str | None = Field(default=None, description="The pulled model at its root.")
    start: str | None = Field(
        default=None, description="The model or checkpoint that its job started from, if not the base."
    )
    job_id: str | None = None


class DeletedModel(Deleted):
    """A model or checkpoint that is gone, and what that gave back."""

    checkpoints: list[str] = Field(description="Checkpoints of its job that went with it.")
    freed_bytes: int = Field(description="Bytes that the disk has again.")
    kept_bytes: int = Field(description="Bytes that stay: later jobs and their models share these very files.")


class PullModel(Body):
    """Body of `POST /v1/models/pull`."""

    model: Name = Field(description="A catalog name, or `org/name[@revision]` of a Hub model.")


class FitVector(Body):
    """Body of `POST /v1/steering/vectors`: fit a vector to pairs, as a job."""

    model: Name = Field(description="The model whose activations are compared.")
    training_file: Name = Field(description="Id of an uploaded file: rows with `positive` and `negative`.")
    method: Name = Field("mean_difference", description="Fitting method.")
    name: Annotated[Text, Field(min_length=1, max_length=64)] | None = Field(None, description="Shown in lists.")
    layers: Layers | None = Field(None, description="0-based blocks to fit; none means all.")
    seed: Annotated[int, Field(ge=0, le=2147483647), Whole] | None = Field(None, description="Drawn when not given.")
    metadata: Metadata | None = None
    site: Literal["block", "attention", "mlp"] | None = Field(None, description="Whose output is compared.")
    positions: Literal["last", "answer", "all"] | None = Field(None, description="Tokens that count.")
    batch_size: Annotated[int, Field(ge=1, le=256), Whole] | None = Field(
        None, description="Texts in one forward pass."
    )
    max_length: Annotated[int, Field(ge=2, le=131072), Whole] | None = Field(None, description="Longest row in tokens.")
    dtype: Literal["float32", "bfloat16"] | None = Field(None, description="What the model computes in.")


class VectorObject(Answer):
    """A steering vector; while it is being fitted, `status` is the job's."""

    id: str
    object: Literal["steering.vector"] = "steering.vector"
    status: str
    name: str
    model: str
    method: str
    created_at: int
    job_id: str | None = None
    source: Literal["fit", "import"]
    layers: list[int] = Field(default_factory=list)
    site: str | None = None
    fingerprint: str | None = None
    bytes: int | None = None
    sha256: str | None = None
    error: JobError | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)


class CreateKey(Body):
    """Body of `POST /v1/keys`."""

    name: Annotated[Text, Field(min_length=1, max_length=255)] = Field(description="What the key is for.")
    scopes: Annotated[list[Literal["read", "jobs", "generate", "admin"]], Field(min_length=1, max_length=4)]
    expires_at: Annotated[int, Field(ge=0, lt=2**53), Whole] | None = Field(
        None, description="Seconds since the epoch."
    )


class KeyObject(Answer):
    """An API key without its secret; `key` is there only in the answer that made it."""

    id: str
    object: Literal["api_key"] = "api_key"
    name: str
    hint: str
    scopes: list[str]
    created_at: int
    expires_at: int | None = None
    last_used_at: int | None = None
    revoked_at: int | None = None
    key: str | None = None

"""All tables. The constraints and the comments here are the documentation of the concurrency model.

Three rules hold everywhere:

* a writer that works for a job holds a *lease*: ``lease_token`` is drawn anew at every claim, and each later write says
  ``WHERE id = ? AND lease_token = ?``; 0 rows mean that someone else took over, and the result is dropped;
* transactions are short, and work (starting processes, reading files) is done outside them;
* times are seconds since the epoch: ``int`` where the wire shows them, ``float`` where deadlines are compared.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, BigInteger, CheckConstraint, ForeignKey, Index, MetaData, String, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}


class Base(DeclarativeBase):
    """Declarative base; constraint names are fixed so that migrations can name them."""

    metadata = MetaData(naming_convention=NAMING)
    type_annotation_map = {dict[str, Any]: JSON, list[Any]: JSON}  # noqa: RUF012


class Job(Base):
    """One row a job; the life of a job is ``service.jobs.states``."""

    __tablename__ = "jobs"
    __table_args__ = (
        CheckConstraint("kind IN ('fine_tuning', 'steering_fit')", name="kind"),
        CheckConstraint(
            "status IN ('validating_files', 'queued', 'running', 'pausing', 'paused', 'cancelling',"
            " 'succeeded', 'failed', 'cancelled')",
            name="status",
        ),
        # What has processes is owned by someone; what waits or has ended is owned by nobody.
        CheckConstraint(
            "status NOT IN ('running', 'pausing', 'cancelling') OR lease_token IS NOT NULL", name="active_is_leased"
        ),
        CheckConstraint(
            "status NOT IN ('queued', 'paused', 'succeeded', 'failed', 'cancelled') OR lease_token IS NULL",
            name="idle_is_free",
        ),
        CheckConstraint(
            "(lease_token IS NULL) = (lease_expires_at IS NULL) AND (lease_token IS NULL) = (lease_owner IS NULL)",
            name="lease_is_whole",
        ),
        CheckConstraint(
            "(status IN ('succeeded', 'failed', 'cancelled')) = (finished_at IS NOT NULL)", name="end_has_time"
        ),
        CheckConstraint("status <> 'failed' OR error_code IS NOT NULL", name="failure_has_reason"),
        # claim: the oldest queued (or not yet validated) row
        Index("ix_jobs_status_number", "status", "number"),
        # list, newest first, of one kind
        Index("ix_jobs_kind_number", "kind", "number"),
        # the SDK's own retries: same key, same body, a POST of the last minutes
        Index("ix_jobs_key_id_body_hash_created_at", "key_id", "body_hash", "created_at"),
        # take over: leases that ran out
        Index(
            "ix_jobs_lease_expires_at",
            "lease_expires_at",
            sqlite_where=text("lease_token IS NOT NULL"),
            postgresql_where=text("lease_token IS NOT NULL"),
        ),
    )

    number: Mapped[int] = mapped_column(primary_key=True)  # order of arrival: pages newest first, claims oldest first
    id: Mapped[str] = mapped_column(String(64), unique=True)  # ftjob-<24> | steerjob-<24>
    kind: Mapped[str] = mapped_column(String(16))
    status: Mapped[str] = mapped_column(String(16))

    # What was asked
    created_at: Mapped[int]
    key_id: Mapped[str] = mapped_column(String(64))  # the API key that asked
    body_hash: Mapped[str] = mapped_column(String(64))  # sha256 of the canonical request body
    retried_at: Mapped[
        float | None
    ]  # made by the SDK's own retry without a key, then: its first POST may come after it
    model: Mapped[str] = mapped_column(String(512))  # base model; of a job from an earlier result, that one's base
    start: Mapped[str | None] = mapped_column(String(512))  # the earlier result: ft:..., its checkpoints included
    start_kind: Mapped[str | None] = mapped_column(String(16))  # what of it lies in the job's folder: see jobs.starts
    method: Mapped[str] = mapped_column(String(64))  # name in METHODS, or of a steering method
    request: Mapped[dict[str, Any]]  # the body as asked
    resolved: Mapped[dict[str, Any]]  # hyperparameters as shown; "auto" until validation knows the rows
    suffix: Mapped[str | None] = mapped_column(String(64))
    seed: Mapped[int]
    training_file: Mapped[str] = mapped_column(String(64))
    validation_file: Mapped[str | None] = mapped_column(String(64))
    metadata_: Mapped[dict[str, Any]] = mapped_column("metadata")

    # How it goes
    started_at: Mapped[int | None]  # first claim
    finished_at: Mapped[int | None]  # entry into a terminal status
    step: Mapped[int] = mapped_column(default=0)
    total_steps: Mapped[int | None]
    trained_tokens: Mapped[int | None] = mapped_column(BigInteger)
    estimated_finish: Mapped[int | None]
    micro_batch_seconds: Mapped[float] = mapped_column(default=0.0)  # longest so far
    save_seconds: Mapped[float] = mapped_column(default=0.0)  # last checkpoint
    grace_seconds: Mapped[float] = mapped_column(default=10.0)  # SIGTERM to SIGKILL: max(10, 3 * longest + 2 * save)
    events_offset: Mapped[int] = mapped_column(BigInteger, default=0)  # bytes of events.jsonl already taken over
    last_seq: Mapped[int] = mapped_column(default=0)  # newest seq in job_events

    # How it ended
    error_code: Mapped[str | None] = mapped_column(String(64))
    error_message: Mapped[str | None]
    error_param: Mapped[str | None] = mapped_column(String(64))
    result_model: Mapped[str | None] = mapped_column(String(512))
    result_vector: Mapped[str | None] = mapped_column(String(64))
    result_files: Mapped[list[Any]]

    # Who works on it
    lease_owner: Mapped[str | None] = mapped_column(String(255))
    lease_token: Mapped[str | None] = mapped_column(String(64))  # drawn at every claim; guards every later write
    lease_expires_at: Mapped[float | None]
    attempt: Mapped[int] = mapped_column(default=0)  # starts so far; a supervisor refuses an attempt that is not newer
    retries: Mapped[int] = mapped_column(default=0)  # starts that followed a crash worth retrying
    restarts_without_progress: Mapped[int] = mapped_column(default=0)  # the run vanished; reset when step grows
    last_progress_step: Mapped[int] = mapped_column(default=0)  # step at the last such restart
    not_before: Mapped[float] = mapped_column(default=0.0)  # back-off: not claimed earlier
    stop_deadline: Mapped[float | None]  # SIGTERM was sent; SIGKILL is due then


class JobEvent(Base):
    """What the API lists and streams. ``seq`` counts 1, 2, 3... within a job, without gaps."""

    __tablename__ = "job_events"
    __table_args__ = (
        CheckConstraint("level IN ('info', 'warn', 'error')", name="level"),
        CheckConstraint("type IN ('message', 'metrics')", name="type"),
    )

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    created_at: Mapped[int]
    level: Mapped[str] = mapped_column(String(8))
    type: Mapped[str] = mapped_column(String(8))
    message: Mapped[str]
    data: Mapped[dict[str, Any]]

    @property
    def id(self) -> str:
        """Wire id; ``service.jobs.records.event_seq`` reads the seq back from it."""
        return f"ftevent-{self.job_id.rpartition('-')[2]}-{self.seq}"


class Checkpoint(Base):
    """A checkpoint that can be served. ``available`` turns false when retention removed its directory."""

    __tablename__ = "checkpoints"
    __table_args__ = (Index("ix_checkpoints_job_id_step", "job_id", "step", unique=True),)

    number: Mapped[int] = mapped_column(primary_key=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)  # ftckpt-<24>
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    step: Mapped[int]
    created_at: Mapped[int]
    model_id: Mapped[str] = mapped_column(String(512), unique=True)  # ft:...:ckpt-step-<step>
    kind: Mapped[str] = mapped_column(String(16))  # adapter | merged
    path: Mapped[str]  # absolute directory
    metrics: Mapped[dict[str, Any]]
    available: Mapped[bool] = mapped_column(default=True)


class File(Base):
    """An uploaded or produced file; its bytes are ``<home>/files/<id>``."""

    __tablename__ = "files"
    __table_args__ = (Index("ix_files_purpose_number", "purpose", "number"),)

    number: Mapped[int] = mapped_column(primary_key=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)  # file-<24>
    filename: Mapped[str] = mapped_column(String(255))  # as the client named it; never used as a path
    purpose: Mapped[str] = mapped_column(String(32))  # fine-tune | fine-tune-results | steering
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[int]
    expires_at: Mapped[int | None]
    status: Mapped[str] = mapped_column(String(16), default="processed")
    key_id: Mapped[str | None] = mapped_column(String(64))
    job_id: Mapped[str | None] = mapped_column(String(64))  # the job that produced it


class Model(Base):
    """A model that a job made; base models are in the catalog, not here."""

    __tablename__ = "models"
    __table_args__ = (CheckConstraint("kind IN ('adapter', 'merged')", name="kind"),)

    number: Mapped[int] = mapped_column(primary_key=True)
    id: Mapped[str] = mapped_column(String(512), unique=True)  # ft:<base>:local:<suffix>:<short id>
    kind: Mapped[str] = mapped_column(String(16))
    base: Mapped[str] = mapped_column(String(512))  # reference as requested by the job
    path: Mapped[str]  # absolute directory of the artifact
    job_id: Mapped[str | None] = mapped_column(String(64))
    key_id: Mapped[str | None] = mapped_column(String(64))
    created_at: Mapped[int]
    manifest: Mapped[dict[str, Any]]  # manifest.json of the artifact


class Vector(Base):
    """A steering vector, fitted by a job or imported; its bytes are ``<home>/vectors/<id>.safetensors``."""

    __tablename__ = "vectors"
    __table_args__ = (CheckConstraint("source IN ('fit', 'import')", name="source"),)

    number: Mapped[int] = mapped_column(primary_key=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)  # vec_<24>
    name: Mapped[str] = mapped_column(String(255))
    source: Mapped[str] = mapped_column(String(8))
    base: Mapped[str] = mapped_column(String(512))
    fingerprint: Mapped[str] = mapped_column(String(128))  # of the base model's weights; another model is refused
    site: Mapped[str] = mapped_column(String(16))
    method: Mapped[str] = mapped_column(String(64))
    layers: Mapped[list[Any]]  # 0-based block indices
    path: Mapped[str]
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))
    job_id: Mapped[str | None] = mapped_column(String(64))
    key_id: Mapped[str | None] = mapped_column(String(64))
    created_at: Mapped[int]
    metadata_: Mapped[dict[str, Any]] = mapped_column("metadata")


class ApiKey(Base):
    """An API key; only its sha256 is stored, the key itself has 256 random bits."""

    __tablename__ = "api_keys"

    number: Mapped[int] = mapped_column(primary_key=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)  # key_<24>
    name: Mapped[str] = mapped_column(String(255))
    hash: Mapped[str] = mapped_column(String(64), unique=True)  # sha256, hexadecimal
    hint: Mapped[str] = mapped_column(String(16))  # first characters, to recognise it in a list
    scopes: Mapped[list[Any]]  # read, jobs, generate, admin
    created_at: Mapped[int]
    expires_at: Mapped[int | None]
    last_used_at: Mapped[int | None]
    revoked_at: Mapped[int | None]


class Idempotency(Base):
    """An ``Idempotency-Key`` of the last 24 hours. ``job_id`` is NULL while its first request is in flight."""

    __tablename__ = "idempotency"

    key_id: Mapped[str] = mapped_column(String(64), primary_key=True)  # keys of different API keys never meet
    key: Mapped[str] = mapped_column(String(255), primary_key=True)
    body_hash: Mapped[str] = mapped_column(String(64))
    token: Mapped[str] = mapped_column(String(64))  # of the request in flight; it alone may fill in job_id
    job_id: Mapped[str | None] = mapped_column(String(64))
    created_at: Mapped[float] = mapped_column(index=True)  # expiry is swept by age

"""What an operator may set, in one place: environment over file over default.

Every field can be given as ``GRADHELM_<FIELD>`` (nested with two underscores: ``GRADHELM_ENGINE__ROWS=16``) or in the
YAML file that ``gradhelm serve --config`` names; ``configs/service.yaml`` shows them all. Unknown keys are errors.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    YamlConfigSettingsSource,
)

from core.home import home as default_home
from service.settings_errors import check_environment, explain, is_service_link

_MIB = 1 << 20


class _Group(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LimitSettings(_Group):
    """What one request may cost."""

    body_bytes: int = Field(default=1 * _MIB, gt=0, description="Largest body of any route that is not an upload.")
    upload_bytes: int = Field(default=512 * _MIB, gt=0, description="Largest file that /v1/files takes.")
    vector_bytes: int = Field(default=64 * _MIB, gt=0, description="Largest steering vector that an import takes.")
    min_free_disk_bytes: int = Field(
        default=512 * _MIB,
        ge=0,
        description="An upload that would leave less free space in the data folder is refused.",
    )
    choices: int = Field(default=16, ge=1, description="Largest `n` of a generation request.")
    stream_clients: int = Field(default=256, ge=1, description="Open event and log streams; more are answered 429.")


class JobSettings(_Group):
    """How fine-tuning and fitting jobs are run."""

    max_running: int = Field(default=1, ge=1, description="Jobs that run at the same time.")
    threads: int | None = Field(
        default=None,
        ge=1,
        description="OMP_NUM_THREADS of one run; unset, the server's own OMP_NUM_THREADS, or the CPUs shared out among "
        "`max_running` runs.",
    )
    lease_seconds: float = Field(default=30.0, ge=0.6, description="Lease on a claimed job; renewed at a third of it.")
    poll_seconds: float = Field(default=0.25, gt=0, description="How often events and exits of runs are looked at.")
    max_retries: int = Field(default=3, ge=0, description="Attempts after a crash that could succeed next time.")
    log_quota_bytes: int = Field(
        default=100 * _MIB, ge=65536, description="Output kept of one job; the oldest goes first."
    )
    end_with_server: bool = Field(
        default=False,
        description="On a stop, end the runs at a checkpoint too: for containers, where nothing survives the server. "
        "Without it runs go on, and the next start adopts them.",
    )
    stop_seconds: float = Field(default=60.0, ge=0, description="How long `end_with_server` waits for the checkpoints.")
    run_argv: tuple[str, ...] | None = Field(
        default=None,
        description="Replaces `python -m trainers` and `python -m steering fit`; for tests of the machinery.",
    )
    validate_argv: tuple[str, ...] | None = Field(
        default=None, description="Replaces `python -m core.data.validate`; for tests of the machinery."
    )


class EngineSettings(_Group):
    """How text is generated."""

    threads: int | None = Field(
        default=None,
        ge=1,
        description="OMP_NUM_THREADS of one engine process; unset, the server's own OMP_NUM_THREADS, or all CPUs.",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(default="float32", description="What engines compute in.")
    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$",
        description="Where models lie: cpu, cuda, cuda:1; auto is cuda where torch has one, else cpu.",
    )
    rows: int = Field(default=16, ge=1, description="Requests of one base model that generate at once.")
    waiting: int = Field(default=64, ge=0, description="Requests that may wait for a row; more are answered 429.")
    cache_bytes: int = Field(default=2 << 30, gt=0, description="Most bytes of keys and values of one engine process.")
    prefill_tokens: int = Field(
        default=256, ge=1, description="Most prompt tokens between two decode steps: higher starts long prompts sooner."
    )
    default_max_tokens: int = Field(default=1024, ge=1, description="Length of a chat answer whose request gives none.")
    adapters: int = Field(default=8, ge=1, description="LoRA adapters that one engine process holds.")
    memory_bytes: int = Field(default=8192 * _MIB, gt=0, description="Base models are evicted by least use above this.")
    idle_seconds: float = Field(default=600.0, gt=0, description="An engine process without requests ends after this.")
    start_seconds: float = Field(default=120.0, gt=0, description="Longest wait for an engine process to become ready.")


class Settings(BaseSettings):
    """The server's configuration."""

    model_config = SettingsConfigDict(
        env_prefix="GRADHELM_", env_nested_delimiter="__", extra="forbid", frozen=True, yaml_file=None
    )

    home: Path = Field(default_factory=default_home, description="Data folder.")
    database_url: str | None = Field(
        default=None,
        description="SQLAlchemy URL; none means SQLite in the data folder. PostgreSQL: postgresql+psycopg://...",
    )
    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    allowed_hosts: tuple[str, ...] = Field(
        default=(),
        description="Names this server is reached under, besides the loopback names. Other Host headers get 403.",
    )
    allowed_origins: tuple[str, ...] = Field(
        default=(), description="Web origins, besides the server's own, from which a browser may change things."
    )
    drain_seconds: float = Field(
        default=0.3, ge=0, description="On SIGTERM /readyz says 503 for this long before the listening socket closes."
    )
    grace_seconds: float = Field(
        default=6.0,
        ge=0,
        description="After SIGTERM, generations may go on for this long; then they end with an error.",
    )
    log_level: str = Field(
        default="info", pattern="^(debug|info|warning|error)$", description="Lowest level that is logged."
    )
    limits: LimitSettings = LimitSettings()
    jobs: JobSettings = JobSettings()
    engine: EngineSettings = EngineSettings()

    @model_validator(mode="after")
    def _absolute_home(self) -> Self:
        object.__setattr__(self, "home", self.home.expanduser().resolve())
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - the signature is the library's
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments, then the environment, then the YAML file; nothing else is read."""
        assert isinstance(env_settings, EnvSettingsSource)
        env_settings.env_vars = {
            name: value
            for name, value in env_settings.env_vars.items()
            if value is None or not is_service_link(name.upper(), value)
        }
        return init_settings, env_settings, YamlConfigSettingsSource(settings_cls)

    @property
    def database(self) -> str:
        """SQLAlchemy URL of the job table."""
        return self.database_url or f"sqlite:///{self.home / 'gradhelm.db'}"


def load_settings(file: Path | None = None) -> Settings:
    """Settings from the environment and, below it, one YAML file.

    Args:
        file: YAML file; none means environment and defaults only.

    Returns:
        The settings.

    Raises:
        ValueError: The file is missing or is not YAML; or it, or a ``GRADHELM_`` variable, is no setting, or holds a
            value out of range.
    """
    check_environment(Settings, os.environ)
    if file is None:
        return _made(Settings, None)
    if not file.is_file():
        raise ValueError(f"no settings file at {file}")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid YAML: {error}") from None
    if content is not None and not isinstance(content, dict):
        raise ValueError(f"{file} must hold a mapping of settings")

    class FromFile(Settings):
        model_config = SettingsConfigDict(yaml_file=file)

    return _made(FromFile, file)


def _made(settings: type[Settings], file: Path | None) -> Settings:
    try:
        return settings()
    except ValidationError as error:
        raise ValueError(explain(Settings, error, file)) from None
    except SettingsError as error:
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        raise ValueError(f"{error}{cause}; lists and groups are written as JSON in the environment") from None

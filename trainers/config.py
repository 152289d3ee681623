"""A run file: what to train, on what, how, and where the results go. Filled by YAML and ``key=value``; torch-free."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from core.config import ConfigError, Resolved, dump, resolve
from core.config_docs import fields_doc
from core.config_yaml import read_yaml
from trainers.method import Method, MethodConfig
from trainers.registry import get_method
from trainers.schedule import Schedule
from trainers.start import inherit, read_start

DEFAULT_METHOD = "lora"

_ADJUSTABLE = (
    "schedule",
    "warmup_ratio",
    "warmup_steps",
    "clip_norm",
    "early_stopping_patience",
    "early_stopping_delta",
    "export",
)

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Settings of a run, whatever its method. Paths are relative to the working directory."""

    model: str
    """Base model: a catalog name, ``org/name@revision``, or a directory."""
    train_file: str
    """JSON lines of chat rows or prompt/completion rows to train on."""
    output_dir: str
    """Where events, metrics, checkpoints and the artifact go; a run whose checkpoints are there is resumed."""
    start: str | None = None
    """Folder of an adapter that an earlier run on this model left, its ``artifact`` or a checkpoint's ``adapter``:
    ``lora`` goes on with it, a method that trains whole weights has it merged into the model first. Whole weights that
    an earlier run left are a ``model`` themselves."""
    start_name: str | None = None
    """What model card and events call the earlier result that ``start`` or, without it, ``model`` is the folder of."""
    eval_file: str | None = None
    """Held-out rows: evaluated before the first step, every ``eval_every`` steps, and after the last."""
    seed: int = 0
    """Seeds the adapter, the data order and dropout."""
    epochs: int = 3
    """Passes over the training file; more fits closer, and in the end too closely."""
    max_steps: int | None = None
    """Optimizer steps; where given, it counts instead of ``epochs``."""
    batch_size: int = 4
    """Rows in one forward pass of one process: higher is faster and takes more memory."""
    accumulation: int = 1
    """Forward passes in one optimizer step of one process: acts like a larger batch at no memory."""
    max_length: int = 1024
    """Longest row in tokens; what is longer is cut on the right."""
    learning_rate: float | None = None
    """Peak learning rate; without one, the method's own."""
    learning_rate_multiplier: float = 1.0
    """Scales the peak learning rate."""
    schedule: Schedule = "linear"
    """After the warm-up the rate stays (constant) or falls to zero (linear, cosine)."""
    warmup_ratio: float = 0.03
    """Share of the steps over which the rate climbs to its peak: higher is calmer at the start."""
    warmup_steps: int | None = None
    """Steps of warm-up; where given, it counts instead of ``warmup_ratio``."""
    clip_norm: float = 1.0
    """The step's gradient is scaled down to at most this norm; 0 turns clipping off."""
    eval_every: int | None = None
    """Steps between evaluations; without it, once an epoch."""
    save_every: int | None = None
    """Steps between checkpoints; without it, once an epoch."""
    keep_checkpoints: int = 3
    """Newest checkpoints to keep; the best one is kept besides."""
    early_stopping_patience: int | None = None
    """Evaluations without a lower loss after which the run ends; without it, never."""
    early_stopping_delta: float = 0.0
    """By how much a loss must be lower to count as lower."""
    export: Literal["auto", "last", "best"] = "auto"
    """Weights that become the artifact; auto is the best ones under early stopping, else the last."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the model computes in; auto is bfloat16 on a GPU that has it, else float32. A CPU that emulates bfloat16
    is slower with it. With bfloat16, trained weights stay in float32."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass: about a third slower, and far less memory for activations."""
    pack: bool = False
    """Join short rows into sequences of ``max_length``, each attending to itself alone: no padding, fewer steps."""
    bucket: bool = True
    """Put rows of like length in the same step: less padding, a less random order."""
    rehearse: Literal["auto", "on", "off"] = "auto"
    """Run the longest rows forward and backward once before the first step, so that a lack of memory shows at once;
    auto is on with a GPU."""
    log_every: int = 1
    """Steps between metric events; metrics.csv has every step."""
    heartbeat_seconds: float = 5.0
    """Seconds between heartbeat events."""
    threads: int | None = None
    """CPU threads; without it, OMP_NUM_THREADS or the number of CPUs. A resume is bitwise on the same number."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulation", "epochs", "keep_checkpoints", "log_every"):
            _at_least(self, name, 1)
        for name in ("max_steps", "eval_every", "save_every", "early_stopping_patience", "threads"):
            if getattr(self, name) is not None:
                _at_least(self, name, 1)
        _at_least(self, "max_length", 2)
        for name in ("learning_rate_multiplier", "heartbeat_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        if self.learning_rate is not None and not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate must be positive, not {self.learning_rate}")
        for name in ("clip_norm", "early_stopping_delta"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"warmup_ratio must be in [0, 1), not {self.warmup_ratio}")
        if self.warmup_steps is not None:
            _at_least(self, "warmup_steps", 0)
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be in [0, 2**63), not {self.seed}")
        if self.start_name is not None and self.start is None and not self.model.startswith(("/", "./", "../", "~/")):
            raise ValueError("start_name is the name of an earlier result: give its folder as start, or as the model")
        if self.eval_file is None and self.early_stopping_patience is not None:
            raise ValueError("early_stopping_patience needs an eval_file to judge by")
        if self.eval_file is None and self.export == "best":
            raise ValueError("export: best needs an eval_file to judge by")

    def warnings(self) -> list[str]:
        """Settings that have no effect as they are combined, one sentence each."""
        found = []
        if self.eval_file is None and self.eval_every is not None:
            found.append("eval_every has no effect without eval_file")
        if self.early_stopping_patience is None and self.early_stopping_delta:
            found.append("early_stopping_delta has no effect without early_stopping_patience")
        for loser, winner in (("epochs", "max_steps"), ("warmup_ratio", "warmup_steps")):
            if getattr(self, winner) is not None and getattr(self, loser) != fields_doc(RunConfig)[loser].default:
                found.append(f"{loser} has no effect beside {winner}")
        if self.max_steps is not None and self.warmup_steps is not None and self.warmup_steps >= self.max_steps:
            found.append(f"warmup_steps {self.warmup_steps} covers the whole run: the schedule after it has no effect")
        if self.pack and self.bucket:
            found.append("bucket has no effect with pack: packed sequences are all about as long")
        return found

    def cpu_threads(self) -> int:
        """Threads to compute with on a CPU."""
        return self.threads or int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A resolved run file."""

    config: RunConfig
    """Everything but the method's own settings."""
    method: Method
    """What the run file names."""
    settings: MethodConfig
    """The method's settings."""
    origin: Mapping[str, str]
    """Dotted field -> where its value came from: default, file, start or command line."""

    @property
    def peak_learning_rate(self) -> float:
        """Peak learning rate, multiplier included."""
        return (self.config.learning_rate or self.method.learning_rate) * self.config.learning_rate_multiplier

    @property
    def adjustable(self) -> dict[str, Any]:
        """Settings that a resumed run may change, but whose change makes it differ from an uninterrupted one."""
        config = self.config
        return {"learning_rate": self.peak_learning_rate} | {name: getattr(config, name) for name in _ADJUSTABLE}

    def as_dict(self) -> dict[str, Any]:
        """The run file that would give this run, every default written out."""
        return {**dump(self.config), "method": {"name": self.method.name, **dump(self.settings)}}

    def warnings(self) -> list[str]:
        """Settings that have no effect as they are combined, one sentence each."""
        idle = () if self.method.needs_gradients else ("clip_norm", "activation_checkpointing")
        defaults = fields_doc(RunConfig)
        return [
            *self.config.warnings(),
            *self.settings.warnings(),
            *(
                f"{name} has no effect with {self.method.name}, which takes no gradients"
                for name in idle
                if getattr(self.config, name) != defaults[name].default
            ),
        ]


_MOST = 2**31 - 1


def _at_least(config: RunConfig, name: str, least: int) -> None:
    if getattr(config, name) < least:
        raise ValueError(f"{name} must be at least {least}, not {getattr(config, name)}")
    if getattr(config, name) > _MOST:
        raise ValueError(f"{name} must be at most {_MOST}, not {getattr(config, name)}")


def load_run(file: Path, overrides: Sequence[str] = ()) -> Run:
    """Reads a run file and applies ``key=value`` overrides, ``method.key=value`` among them.

    Args:
        file: YAML with the fields of ``RunConfig`` and ``method``: a name, or a mapping with ``name`` and settings.
        overrides: ``key=value``, the value in YAML's syntax; they win over the file.

    Returns:
        The resolved run.

    Raises:
        ConfigError: Not a mapping, an unknown key or method, a value out of range, a start that cannot be used, or a
            setting that it fixes to another value.
    """
    try:
        content = read_yaml(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the run file {file}: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file} must hold a mapping of settings")
    return parse_run(content, overrides)


def parse_run(content: Mapping[str, Any], overrides: Sequence[str] = ()) -> Run:
    """``load_run`` for a mapping that is already read.

    Args:
        content: What the run file holds.
        overrides: ``key=value`` strings.

    Returns:
        The resolved run.

    Raises:
        ConfigError: As in ``load_run``.
    """
    data = dict(content)
    section = data.pop("method", {})
    settings = {"name": section} if isinstance(section, str) else section
    if not isinstance(settings, Mapping):
        raise ConfigError("method must be a name, or a mapping with a name and settings", "method")
    settings = dict(settings)
    source = "file" if "name" in settings else "default"
    name = settings.pop("name", DEFAULT_METHOD)
    own: list[str] = []
    common: list[str] = []
    for override in overrides:
        key, _, value = override.partition("=")
        if key in ("method", "method.name"):
            name, source = value, "command line"
        elif key.startswith("method."):
            own.append(override.removeprefix("method."))
        else:
            common.append(override)
    try:
        method = get_method(str(name))
    except ValueError as error:
        raise ConfigError(str(error), "method.name") from error
    mine = resolve(RunConfig, data=data, overrides=common, data_origin="file")
    its = _resolve_method(method.config, settings, own)
    if mine.value.start is not None:
        its = inherit(read_start(Path(mine.value.start)), method, its)
    origin = {**mine.origin, "method.name": source} | {f"method.{key}": where for key, where in its.origin.items()}
    return Run(config=mine.value, method=method, settings=its.value, origin=origin)


def _resolve_method(cls: type[T], data: Mapping[str, Any], overrides: Sequence[str]) -> Resolved[T]:
    try:
        return resolve(cls, data=data, overrides=overrides, data_origin="file")
    except ConfigError as error:
        raise ConfigError(f"method: {error}", f"method.{error.key}" if error.key else "method") from error

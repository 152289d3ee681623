"""The results format: what was run, where, with which seeds, and every target that was set, met or not."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    *("torch", "transformers", "tokenizers", "peft", "accelerate", "numpy", "fastapi", "sqlalchemy"),
    *("trl", "galore-torch", "apollo-torch"),
)
FOLDERS = ("--data-dir", "--work")
"""Options whose values are places on one machine."""
COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">=": lambda v, t: v >= t,
    "<=": lambda v, t: v <= t,
    "<": lambda v, t: v < t,
}


@dataclass(frozen=True)
class Claim:
    """One target: ``">= 1.3"``, ``"<= 30"``, or ``"< 0 throughout"``, which both ends of the interval must meet too.

    ``value`` is None where it could not be measured; ``interval`` is the 95 % interval of a value that has one.
    """

    id: str
    target: str
    value: float | None
    interval: tuple[float, float] | None = None

    @property
    def holds(self) -> bool:
        """Whether the value meets the target; never for a missing value, or ``throughout`` a missing interval."""
        sign, bound, *throughout = self.target.split()
        assert throughout in ([], ["throughout"]), self.target
        if self.value is None or (throughout and self.interval is None):
            return False
        ends = self.interval if throughout and self.interval is not None else ()
        return all(COMPARE[sign](each, float(bound)) for each in (self.value, *ends))

    def as_json(self) -> dict[str, Any]:
        """What the results file says of it; the interval only where there is one."""
        told = {"id": self.id, "target": self.target, "value": self.value, "holds": self.holds}
        return told if self.interval is None else {**told, "interval": list(self.interval)}


@dataclass
class Report:
    """Rows and claims of one script."""

    name: str
    seeds: Sequence[int]
    rows: list[dict[str, Any]] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)

    def row(self, **values: Any) -> None:
        """Add one measured row and print it."""
        self.rows.append(values)
        print("  " + "  ".join(f"{k}={_short(v)}" for k, v in values.items()), flush=True)

    def claim(self, id: str, target: str, value: float | None, interval: tuple[float, float] | None = None) -> None:
        """Add one claim and print whether it holds."""
        ends = None if interval is None else (round(interval[0], 4), round(interval[1], 4))
        claim = Claim(id, target, None if value is None else round(value, 4), ends)
        self.claims.append(claim)
        within = "" if ends is None else f" [{ends[0]}, {ends[1]}]"
        verdict = "holds" if claim.holds else "MISSED"
        print(f"  {claim.id}: {claim.value}{within} (target {claim.target}) {verdict}", flush=True)

    def write(self) -> Path:
        """Write ``benchmarks/results/<name>.json``."""
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{self.name}.json"
        content: dict[str, Any] = {
            "name": self.name,
            "command": command(self.name, sys.argv[1:]),
            "commit": commit(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine(),
            "versions": versions(),
            "seeds": list(self.seeds),
            "rows": self.rows,
            "claims": [claim.as_json() for claim in self.claims],
        }
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        return path


def interleaved(arms: Mapping[str, Callable[[], float]], repetitions: int) -> dict[str, list[float]]:
    """Run every arm once per repetition, in turn, so that drift of the machine falls on all of them alike."""
    measured: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(repetitions):
        for name, run in arms.items():
            measured[name].append(run())
    return measured


def ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """Median of the ratios of each repetition."""
    return median(a / b for a, b in zip(over, under, strict=True))


def command(name: str, arguments: Sequence[str]) -> str:
    """What was run, without the folders of the machine that it was run on."""
    kept, drop = ["python", "-m", f"benchmarks.{name}"], False
    for argument in arguments:
        folder = argument.partition("=")[0] in FOLDERS
        if not folder and not drop:
            kept.append(argument)
        drop = folder and "=" not in argument
    return " ".join(kept)


def commit() -> str:
    """The checked-out commit, with ``+`` where the tree differs from it."""
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def machine() -> dict[str, Any]:
    """Processor, cores, memory, and the settings that change timings."""
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
    }


def versions() -> dict[str, str]:
    """Installed versions of what the figures depend on."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _short(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value

"""Run every benchmark in turn, each in a process of its own; ``--quick`` is passed on."""

from __future__ import annotations

import subprocess
import sys

SCRIPTS = ("service_speed", "engine_speed", "sft_vs_trl")


def main() -> int:
    """Run them all; 1 if any could not be run."""
    failed = []
    for script in SCRIPTS:
        print(f"\n== {script}", flush=True)
        if subprocess.run([sys.executable, "-m", f"benchmarks.{script}", *sys.argv[1:]]).returncode:
            failed.append(script)
    print(f"\ncould not be run: {', '.join(failed)}" if failed else "\nall were run", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

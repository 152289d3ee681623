"""Run every benchmark in turn, each in a process of its own; ``--quick`` is passed on.

Those that need public data are left out, with the reason, where ``GRADHELM_EVAL_DATA`` does not name its folder.
"""

from __future__ import annotations

import subprocess
import sys

from benchmarks import data

SCRIPTS = (
    "service_speed",
    "engine_speed",
    "sft_vs_trl",
    "optimizer_step",
    "pretrain_optimizers",
    "finetune_optimizers",
)


def main() -> int:
    """Run them all; 1 if any could not be run."""
    failed, left_out = [], []
    for script in SCRIPTS:
        print(f"\n== {script}", flush=True)
        if (reason := data.missing(script)) is not None:
            print(f"left out: {reason}", flush=True)
            left_out.append(script)
            continue
        if subprocess.run([sys.executable, "-m", f"benchmarks.{script}", *sys.argv[1:]]).returncode:
            failed.append(script)
    print(f"\ncould not be run: {', '.join(failed) or 'none'}; left out: {', '.join(left_out) or 'none'}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

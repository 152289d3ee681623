"""Put the claims of ``benchmarks/results/*.json`` into README.md: ``python -m benchmarks.readme [--check]``."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from benchmarks.report import RESULTS

README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(r"(<!-- generated: results -->\n).*?(<!-- end -->)", re.DOTALL)


WHAT = {
    "steered-vs-unsteered-tokens-per-second": "generation speed, steered over unsteered",
    "concurrent-8-vs-serial": "tokens a second, eight requests at once over one after another",
    "engine-vs-transformers-generate": "generation speed over that of transformers' `generate`, one request",
    "chat-while-training": "generation speed while a job trains, over that on an idle machine",
    "job-submit-p95-ms": "creating a job over HTTP, 95th percentile, ms",
    "job-list-p95-ms": "listing jobs over HTTP, 95th percentile, ms",
    "idle-mib": "memory of an idle server, MiB",
    "sft-tokens-per-second-vs-trl": "training speed over TRL's with its defaults",
    "sft-tokens-per-second-vs-trl-grouped": "training speed over TRL's with rows grouped by length",
}
"""What each claim measures, with its unit; one without a unit is a ratio. Others are shown by their id alone."""


def table() -> str:
    """Every claim, met or not, as Markdown."""
    lines = ["| claim | what | target | measured | |", "|---|---|---|---|---|"]
    machines = set()
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        machines.add(f"{result['machine']['cores']} cores of {result['machine']['cpu']}, {result['date'][:10]}")
        for claim in result["claims"]:
            value = "not measured" if claim["value"] is None else f"{claim['value']:.4g}"
            if claim.get("interval"):
                value += " [{:.3g}, {:.3g}]".format(*claim["interval"])
            lines.append(
                f"| {claim['id']} | {WHAT.get(claim['id'], '')} | {claim['target']} | {value} | "
                f"{'met' if claim['holds'] else '**missed**'} |"
            )
    return "\n".join(lines) + f"\n\nMeasured on {'; '.join(sorted(machines))}. `make bench` measures them again.\n"


def main() -> int:
    """Rewrite the block, or with ``--check`` only say whether it is up to date."""
    text = README.read_text(encoding="utf-8")
    wanted = BLOCK.sub(lambda found: found[1] + table() + found[2], text)
    if "--check" in sys.argv[1:]:
        return int(text != wanted)
    README.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Perplexity against optimizer bytes, as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def points(rows: Sequence[dict[str, Any]]) -> list[tuple[str, float, float]]:
    """(arm, MiB, test perplexity) of every arm that has been tested."""
    tested = [row for row in rows if row.get("arm") and row.get("test") is not None]
    return [(row["arm"], row["state_mib"], math.exp(row["test"])) for row in tested]


def save(rows: Sequence[dict[str, Any]], path: Path) -> bool:
    """Write the plot; False, with a word, where nothing is tested yet or matplotlib is not installed."""
    found = points(rows)
    try:
        import matplotlib
    except ImportError:
        print("  no plot: matplotlib is not installed; it comes with the bench extra", flush=True)
        return False
    if not found:
        print("  no plot: no arm has been tested yet", flush=True)
        return False
    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "gradhelm", "svg.fonttype": "none"})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for name, mib, perplexity in found:
        axes.scatter(mib, perplexity, s=24)
        axes.annotate(name, (mib, perplexity), xytext=(5, 3), textcoords="offset points", fontsize=8)
    axes.set_xlabel("state of the optimizer between steps, MiB")
    axes.set_ylabel("perplexity on test, at the rate chosen on dev")
    axes.grid(alpha=0.3)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return True

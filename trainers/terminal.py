"""What a run looks like in a terminal."""

from __future__ import annotations

from typing import Any

from core.config_yaml import write_yaml
from trainers.config import Run


def describe(run: Run) -> str:
    """Writes a resolved run file out, each value followed by where it came from.

    Args:
        run: The resolved run file.

    Returns:
        YAML; running it gives the same run.
    """
    lines = []
    for name, value in run.as_dict().items():
        if name != "method":
            lines.append(_setting(name, value, run.origin[name]))
    lines.append("method:")
    for name, value in run.as_dict()["method"].items():
        lines.append("  " + _setting(name, value, run.origin[f"method.{name}"]))
    if run.config.learning_rate is None:
        lines.append(
            f"# peak learning rate: {run.peak_learning_rate:g} ({run.method.name}'s own, times the multiplier)"
        )
    return "\n".join(lines) + "\n"


def _setting(name: str, value: Any, origin: str) -> str:
    if isinstance(value, list):
        text = f"{name}: [{', '.join(write_yaml(item).splitlines()[0] for item in value)}]"
    else:
        text = write_yaml({name: value}).rstrip("\n")
    return f"{text}  # {origin}"


def line(kind: str, data: dict[str, Any]) -> str:
    """One event in one line.

    Args:
        kind: Of the event.
        data: Of the event.

    Returns:
        The line, without a newline.
    """
    if kind == "message":
        return f"{data['level']}: {data['message']}"
    if kind == "error":
        return f"error: [{data['code']}] {data['message']}"
    if kind == "artifact" and (said := _artifact(data)) is not None:
        return said
    values = [f"{name} {_short(value)}" for name, value in data.items() if value not in (None, {}, [])]
    return f"{kind}: {', '.join(values)}"


def _artifact(data: dict[str, Any]) -> str | None:
    what, path = data.get("artifact"), data.get("path")
    if what == "checkpoint":
        took = data.get("save_seconds")
        return f"saved: step {data.get('step')} in {path}" + ("" if took is None else f", {took:.1f} s")
    if what == "metrics":
        return f"numbers of every step: {path}"
    if what in ("adapter", "merged"):  # the last that a run makes
        name = "adapter" if what == "adapter" else "model"
        differ = data.get("logit_difference")
        checked = "" if differ is None else f"; loaded again, its logits differ by {_short(differ)}"
        return f"done: the {name} is in {path}{checked}"
    return None


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return " ".join(f"{name}={_short(item)}" for name, item in value.items())
    return str(value)

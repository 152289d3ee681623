"""Settings of the zeroth-order estimator: what is refused, what warns, and that no torch is needed."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from trainers.optim.estimator import OFFICIAL, Estimator


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eps": 0.0}, "eps must be positive"),
        ({"eps_rel": float("nan")}, "eps_rel must be positive"),
        ({"eps_rel": float("inf")}, "eps_rel must be positive"),
        ({"samples": 0}, "samples must be a whole number"),
        ({"samples": 1.5}, "samples must be a whole number"),
        ({"sides": 3}, "sides must be 1 or 2"),
        ({"clip": -1.0}, "clip must be positive"),
        ({"clip_quantile": 0.2}, "clip_quantile must be in"),
        ({"window": 0}, "window must be a whole number"),
        ({"per": "block"}, "per must be one of all, tensor, element"),
        ({"noise": "uniform"}, "noise must be one of normal, rademacher"),
        ({"nan": "official"}, "goes with compat official alone"),
        ({"per": "element", "restore": "additive"}, "per element needs restore copy"),
        ({**OFFICIAL, "samples": 2}, "compat official has samples 1, not 2"),
        ({**OFFICIAL, "sides": 1}, "compat official has sides 2"),
        ({**OFFICIAL, "noise": "rademacher"}, "compat official has noise normal"),
        ({**OFFICIAL, "normalise": True}, "compat official has normalise False"),
    ],
)
def test_refuses(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Estimator(**settings)


@pytest.mark.parametrize(
    ("settings", "idle"),
    [
        ({}, []),
        (OFFICIAL, []),
        ({"eps": 1e-3, "eps_rel": 1e-2}, ["eps_rel"]),
        ({"clip": 3.0, "clip_quantile": 0.9}, ["clip_quantile"]),
        ({"clip": 3.0, "window": 10}, ["window"]),
        ({"clip": 3.0, "window": 10, "normalise": True}, []),
        ({"clip_quantile": 1.0, "window": 10}, ["window"]),
        ({"clip_quantile": 0.9, "window": 10}, []),
    ],
)
def test_settings_without_effect_warn(settings: dict[str, Any], idle: list[str]) -> None:
    assert [line.split()[0] for line in Estimator(**settings).warnings()] == idle


def test_needs_no_torch() -> None:
    code = "import sys, trainers.optim.estimator as e; e.Estimator(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

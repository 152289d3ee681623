"""Run files: what wins over what, what is refused, and what warns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from core.config import ConfigError
from core.config_docs import fields_doc
from core.config_yaml import read_yaml, write_yaml
from trainers.config import RunConfig, load_run, parse_run
from trainers.terminal import describe

LEAST = {"model": "tiny-llama", "train_file": "rows.jsonl", "output_dir": "out"}


def test_defaults_file_and_command_line_in_that_order(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(write_yaml(LEAST | {"seed": 3, "batch_size": 2, "method": {"name": "lora", "rank": 4}}))
    run = load_run(file, ["batch_size=6", "method.alpha=8", "learning_rate=1e-4"])
    assert (run.config.seed, run.config.batch_size, run.config.accumulation) == (3, 6, 1)
    assert run.as_dict()["method"] | {"rank": 4, "alpha": 8.0} == run.as_dict()["method"]
    assert run.peak_learning_rate == 1e-4
    origins = {name: run.origin[name] for name in ("seed", "batch_size", "accumulation")}
    assert origins == {"seed": "file", "batch_size": "command line", "accumulation": "default"}
    assert run.origin["method.name"] == "file"
    assert run.origin["method.rank"] == "file"
    assert run.origin["method.alpha"] == "command line"
    assert run.origin["method.dropout"] == "default"


def test_method_is_lora_unless_named_and_may_be_a_plain_name() -> None:
    assert parse_run(LEAST).method.name == "lora"
    assert parse_run(LEAST | {"method": "full"}).method.name == "full"
    switched = parse_run(LEAST, ["method=full"])
    assert switched.method.name == "full"
    assert switched.origin["method.name"] == "command line"


def test_the_multiplier_scales_the_methods_own_rate() -> None:
    plain, doubled = parse_run(LEAST), parse_run(LEAST | {"learning_rate_multiplier": 2.0})
    assert doubled.peak_learning_rate == 2 * plain.peak_learning_rate == 2 * plain.method.learning_rate


def test_what_is_written_out_gives_the_same_run_again() -> None:
    run = parse_run(LEAST | {"method": {"name": "lora", "targets": ["q_proj", "v_proj"]}, "eval_file": "x: y.jsonl"})
    assert parse_run(run.as_dict()).as_dict() == run.as_dict()
    assert parse_run(read_yaml(describe(run))).as_dict() == run.as_dict()
    assert all(line.split("  # ")[1] for line in describe(run).splitlines() if ": " in line and line[0] != "#")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_sise": 3}, "unknown setting batch_sise; did you mean batch_size"),
        ({"method": {"name": "lora", "rnk": 3}}, "method: unknown setting rnk; did you mean rank"),
        ({"method": {"name": "lora", "rnk": 3}}, "These exist: .*dropout.*rank"),
        ({"method": {"name": "dpo"}}, "unknown method 'dpo'; these exist: full, lora"),
        ({"method": "LoRa"}, r"unknown method 'LoRa'; did you mean lora\? These exist: full, lora"),
        ({"method": 3}, "method must be a name"),
        ({"method": {"rank": 0}}, "method: rank must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"max_steps": 0}, "max_steps must be at least 1"),
        ({"max_length": 1}, "max_length must be at least 2"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"learning_rate": float("nan")}, "learning_rate must be"),
        ({"learning_rate_multiplier": -1}, "learning_rate_multiplier must be positive"),
        ({"warmup_ratio": 1.0}, "warmup_ratio must be in"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0"),
        ({"clip_norm": -1.0}, "clip_norm must not be negative"),
        ({"seed": -1}, "seed must be in"),
        ({"early_stopping_patience": 2}, "needs an eval_file"),
        ({"export": "best"}, "needs an eval_file"),
        ({"schedule": "step"}, "schedule must be one of"),
        ({"threads": 0}, "threads must be at least 1"),
    ],
)
def test_refuses(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_run(LEAST | settings)


def test_the_setting_at_fault_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_run(LEAST | {"method": {"name": "lora", "rank": "many"}})
    assert caught.value.key == "method.rank"


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"eval_every": 3}, "eval_every"),
        ({"eval_file": "x", "early_stopping_delta": 0.1}, "early_stopping_delta"),
        ({"max_steps": 3, "warmup_steps": 3}, "warmup_steps"),
        ({"pack": True}, "bucket"),
        ({"epochs": 5, "max_steps": 3}, "epochs"),
        ({"warmup_steps": 3, "warmup_ratio": 0.5}, "warmup_ratio"),
        ({"method": {"name": "lora", "rank": 1, "rslora": True}}, "rslora"),
        ({"method": "mezo", "clip_norm": 0.5}, "clip_norm has no effect with mezo"),
        ({"method": "mezo", "activation_checkpointing": True}, "activation_checkpointing has no effect with mezo"),
    ],
)
def test_settings_without_effect_warn(settings: dict[str, Any], word: str) -> None:
    assert any(word in warning for warning in parse_run(LEAST | settings).warnings())


def test_a_plain_run_does_not_warn() -> None:
    assert parse_run(LEAST).warnings() == parse_run(LEAST | {"method": "mezo"}).warnings() == []
    assert parse_run(LEAST | {"eval_file": "x", "eval_every": 3, "early_stopping_patience": 2}).warnings() == []


def test_every_setting_is_documented() -> None:
    assert all(doc.doc for doc in fields_doc(RunConfig).values())

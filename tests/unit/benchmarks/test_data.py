"""Public data: found by flag or variable, and named where missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import data


def test_the_flag_goes_before_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(data.VARIABLE, str(tmp_path / "elsewhere"))
    (tmp_path / "gsm8k").mkdir()
    for name in ("train", "test"):
        (tmp_path / "gsm8k" / f"{name}.jsonl").touch()
    assert data.folder("finetune_optimizers", str(tmp_path)) == tmp_path
    with pytest.raises(SystemExit, match=r"needs gsm8k/train\.jsonl"):
        data.folder("finetune_optimizers")


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(data.VARIABLE, raising=False)
    reason = data.missing("pretrain_optimizers")
    assert reason is not None and data.VARIABLE in reason and "text/wikitext2_test.txt" in reason
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "wikitext2_test.txt").touch()
    reason = data.missing("pretrain_optimizers", str(tmp_path))
    assert reason is not None and "wikitext2_test" not in reason and "tinyshakespeare" in reason
    assert data.missing("engine_speed") is None

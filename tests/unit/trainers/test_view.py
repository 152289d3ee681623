"""What a watcher sees: a line that is rewritten in a terminal, few lines elsewhere, and the same events either way."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from core.config_yaml import write_yaml
from core.events import read
from trainers import __main__ as entry
from trainers.errors import CRASHED, SUCCEEDED
from trainers.view import LINE_SECONDS, Lines, Live, View, duration, make_view

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True

    @property
    def drawn(self) -> list[str]:
        """Each state of the rewritten line, and each line above it, in order, without colours and bars."""
        plain = ESCAPES.sub("", self.getvalue())
        return [
            text for text in (re.sub(r"[━╸╺ ]{2,}", " ", part).strip() for part in re.split(r"[\r\n]", plain)) if text
        ]


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


def step(view: View, number: int, total: int = 500, **metrics: float) -> None:
    view("metric", {"step": number, "train_loss": 2.0 / max(number, 1), "tokens_per_second": 1234.5, **metrics})
    eta = None if number == 0 else 0.5 * (total - number)
    view("progress", {"step": number, "total_steps": total, "eta_seconds": eta})


def test_a_terminal_shows_step_loss_speed_and_time_left_on_one_line() -> None:
    out = Tty()
    with Live(out) as view:
        view("message", {"level": "info", "message": "training [bold]tiny[/bold]"})
        step(view, 0, valid_loss=2.5)
        step(view, 1)
        view("message", {"level": "warn", "message": "half way"})
        step(view, 2, valid_loss=1.5)
    text = ESCAPES.sub("", out.getvalue())
    assert "info: training [bold]tiny[/bold]" in out.drawn and "warn: half way" in out.drawn
    assert any("step 1 / 500 loss 2.0000 1,234 tokens/s 4:10 left held-out loss 2.5000" in one for one in out.drawn), (
        out.drawn
    )
    assert any("step 2 / 500 loss 1.0000 1,234 tokens/s 4:09 left held-out loss 1.5000" in one for one in out.drawn)
    assert text.count("\n") == 3, "two messages and the last state: steps do not scroll"
    assert "\r" in text


def test_a_narrow_terminal_gets_one_line_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    out = Tty()
    with Live(out) as view:
        step(view, 1, valid_loss=1.5)
    assert ESCAPES.sub("", out.getvalue()).count("\n") == 1
    assert all(len(part) <= 40 for part in re.split(r"[\r\n]", ESCAPES.sub("", out.getvalue())))


def test_elsewhere_steps_get_a_line_now_and_then() -> None:
    now = 0.0
    out = io.StringIO()
    with Lines(out, clock=lambda: now) as view:
        view("message", {"level": "info", "message": "begun"})
        for number in range(501):
            step(view, number)
            now += LINE_SECONDS / 80
        view("artifact", {"artifact": "adapter", "path": "x"})
    lines = out.getvalue().splitlines()
    steps = [int(one.split()[1]) for one in lines if one.startswith("step ")]
    assert steps == [0, 80, 160, 240, 320, 400, 480, 500]
    assert lines[0] == "info: begun" and lines[-1] == "done: the adapter is in x"
    assert lines[2] == "step 80 / 500  loss 0.0250  1,234 tokens/s  3:30 left"
    assert "left" not in lines[-2], "the last step leaves nothing"
    assert "\r" not in out.getvalue() and "\x1b" not in out.getvalue()


def test_an_evaluation_always_gets_a_line() -> None:
    out = io.StringIO()
    with Lines(out, clock=lambda: 0.0) as view:
        step(view, 1)
        step(view, 2)
        step(view, 3, valid_loss=1.25)
        step(view, 4)
    lines = out.getvalue().splitlines()
    assert [one.split()[1] for one in lines] == ["1", "3"]
    assert "held-out loss 1.2500" in lines[1]


def test_the_live_line_is_where_a_terminal_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(make_view(Tty(), Tty()), Live)
    assert isinstance(make_view(io.StringIO(), io.StringIO()), Lines)
    out, err = io.StringIO(), Tty()
    monkeypatch.setattr(sys, "stdout", out)
    with make_view(out, err) as view:
        view("message", {"level": "info", "message": "begun"})
        print("what a library prints")
        step(view, 1)
    assert out.getvalue().splitlines()[:2] == ["info: begun", "what a library prints"]
    assert "step 1 / 500" in out.getvalue()
    assert "step 1 / 500" in "".join(err.drawn) and "begun" not in err.getvalue()
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(make_view(Tty(), Tty()), Lines), "it could not be rewritten"


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3600, "1:00:00")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.fixture
def run_file(make_run: Any, tmp_path: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(write_yaml(make_run("lora", max_steps=3).as_dict()))
    return file


def test_a_run_draws_in_a_terminal_and_writes_the_same_events(
    run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert entry.main([str(run_file), f"output_dir={tmp_path / 'plain'}"]) == SUCCEEDED
    assert "\x1b" not in capsys.readouterr().out
    out = Tty()
    monkeypatch.setattr(sys, "stdout", out)
    assert entry.main([str(run_file), f"output_dir={tmp_path / 'live'}"]) == SUCCEEDED
    assert sys.stdout is out, "what was redirected is put back"
    drawn = "\n".join(out.drawn)
    assert all(f"step {number} / 3 loss " in drawn for number in (1, 2, 3)) and " tokens/s" in drawn
    told = [
        [
            (event["kind"], sorted(event))
            for event in read(tmp_path / name / "events.jsonl")[0]
            if event["kind"] != "heartbeat"
        ]
        for name in ("plain", "live")
    ]
    assert told[0] == told[1]


def test_a_crash_is_told_below_no_half_line(
    run_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def crash(*_: Any) -> int:
        raise RuntimeError("it broke")

    out = Tty()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(entry, "_train", crash)
    assert entry.main([str(run_file)]) == CRASHED
    assert "error: [internal_error] it broke" in out.drawn
    assert out.getvalue().endswith("\n") or out.getvalue().endswith("\x1b[?25h"), "the cursor is shown again"


def test_only_the_main_process_of_a_launch_draws(
    run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tell(run: Any, reporter: Any, stop: Any) -> int:
        reporter.message("info", "here")
        return SUCCEEDED

    monkeypatch.setattr(entry, "_train", tell)
    for rank, silent in (("1", True), ("0", False)):
        out = Tty()
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setenv("RANK", rank)
        assert entry.main([str(run_file)]) == SUCCEEDED
        assert (out.getvalue() == "") == silent

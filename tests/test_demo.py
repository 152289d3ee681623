"""What the demo tells while it waits. The demo itself, with the real model, is run by ``make demo``."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from demo.run import follow


class Jobs:
    """A job that does five steps from one look to the next, and says its total from the second look on."""

    def __init__(self, steps: int) -> None:
        self.steps, self.looks = steps, 0

    def retrieve(self, job: str) -> Any:
        self.looks += 1
        total = self.steps if self.looks > 1 else None
        return SimpleNamespace(status="running", model_extra={"progress": {"step": 0, "total_steps": total}})

    def list_events(self, job: str, limit: int) -> Any:
        seen = range(1, min(self.steps, 5 * self.looks) + 1)
        events = [
            SimpleNamespace(
                id=f"e{step}", type="metrics", level="info", message="", data={"step": step, "train_loss": 1 / step}
            )
            for step in seen
        ]
        return SimpleNamespace(data=events[::-1])


def test_each_step_that_is_told_says_how_many_there_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("demo.run.time.sleep", lambda seconds: None)
    client: Any = SimpleNamespace(fine_tuning=SimpleNamespace(jobs=Jobs(12)))
    follow(client, "job", set(), until_step=12)
    assert capsys.readouterr().out.splitlines() == ["   step 5 of 12: loss 0.200", "   step 10 of 12: loss 0.100"]

"""A replay gives the run's tensors, bit for bit; or says that it does not."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.trainers.journal.runs import NAN_AT, STEPS, Run, optimizer_over, start
from trainers.journal import Header, Journal, fork, read
from trainers.journal.recorder import Recorder
from trainers.journal.replay import Replayed, rebuild, replay
from trainers.journal.tensors import digest
from trainers.optim.record import Record as Taken


def again(journal: Journal, **options: Any) -> Replayed:
    """On another machine: nothing is known but the base and the journal."""
    tensors = start()
    return replay(journal, rebuild(journal.header, tensors), tensors, **options)


SETTINGS: list[dict[str, Any]] = [
    {},
    {"samples": 3, "noise": "rademacher"},
    {"sides": 1, "samples": 2, "per": "element", "normalise": True},
    {"per": "tensor", "normalise": True, "window": 5, "clip": 1.0},
    {"eps": 1e-3, "clip_quantile": 0.5},
    {"restore": "additive"},
    {"compat": "official", "eps": 1e-3, "clip": 100.0, "nan": "official"},
    {"compat": "official", "eps": 1e-3, "clip": 100.0, "restore": "additive", "nan": "official"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_replay_of_a_run_is_that_run(tmp_path: Path, settings: dict[str, Any]) -> None:
    run = Run(tmp_path / "j", **settings).go().seal()
    assert len(set(run.hashes)) >= STEPS, "every step but the skipped one changes something"
    journal = read(tmp_path / "j")
    found = again(journal)
    assert (found.step, found.finished, found.tensors) == (STEPS, True, run.hashes[-1])
    assert found.label == f"step {STEPS}, finished"
    for step in (0, 1, NAN_AT - 1, NAN_AT, STEPS - 1):
        part = again(journal, step=step)
        assert (part.step, part.finished, part.tensors) == (step, False, run.hashes[step])
        assert part.label == f"step {step}, unfinished"


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_run_that_goes_on_from_its_journal_is_one_that_never_stopped(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    """The journal is the checkpoint: thresholds and means of what came before are made from it again too."""
    straight = Run(tmp_path / "straight", **settings).go().seal()
    assert straight.optimizer.clipped > 0 or "clip" not in str(settings)
    for stop in (0, 3, NAN_AT, 25):
        Run(tmp_path / "stopped", **settings).go(until=stop).writer.close()
    resumed = Run(tmp_path / "stopped", **settings).go().seal()
    assert resumed.hashes[-1] == straight.hashes[-1]
    ours, theirs = (run.optimizer.state_dict() for run in (resumed, straight))
    assert ours["state"].keys() == theirs["state"].keys()
    for number, state in ours["state"].items():
        assert all(torch.equal(value, theirs["state"][number][name]) for name, value in state.items())
    assert (resumed.optimizer.clipped, resumed.optimizer.skipped) == (
        straight.optimizer.clipped,
        settings.get("samples", 1),
    )
    assert (tmp_path / "stopped").read_bytes() == (tmp_path / "straight").read_bytes()


def test_a_skipped_step_is_told_from_one_that_applies_nothing(tmp_path: Path) -> None:
    Run(tmp_path / "skip").go(NAN_AT).writer.close()
    (slot,) = read(tmp_path / "skip").record(NAN_AT).slots
    assert (math.isnan(slot.d_raw), slot.d_applied, slot.skipped, slot.clipped) == (True, 0.0, True, False)
    Run(tmp_path / "official", compat="official", eps=1e-3, clip=100.0, nan="official").go(NAN_AT).writer.close()
    record = read(tmp_path / "official").record(NAN_AT)
    assert record.slots[0][1:] == (-100.0, True, False)
    assert record.seed is not None, "the published code draws a seed for each step"


def test_an_unsealed_or_cut_journal_gives_the_model_of_its_step(tmp_path: Path) -> None:
    run = Run(tmp_path / "j").go()
    found = again(read(tmp_path / "j"))
    assert (found.step, found.finished, found.tensors) == (STEPS, False, run.hashes[-1])
    run.writer.close()
    data = bytearray((tmp_path / "j").read_bytes())
    data[-37 * 10] ^= 4
    (tmp_path / "j").write_bytes(data)
    found = again(read(tmp_path / "j"))
    assert (found.step, found.finished, found.tensors) == (STEPS - 10, False, run.hashes[STEPS - 10])


def test_a_fork_replays_like_what_it_was_forked_from(tmp_path: Path) -> None:
    run = Run(tmp_path / "j").go().seal()
    fork(read(tmp_path / "j"), tmp_path / "fork", 12).close()
    found = again(read(tmp_path / "fork"))
    assert (found.step, found.finished, found.tensors) == (12, False, run.hashes[12])
    other = Run(tmp_path / "fork")
    assert other.optimizer.steps == 12
    assert other.go().hashes[-1] == run.hashes[-1]


@pytest.mark.parametrize("step", [-1, STEPS + 1])
def test_there_is_no_replay_beyond_the_journal(tmp_path: Path, step: int) -> None:
    Run(tmp_path / "j").go().seal()
    with pytest.raises(ValueError, match=f"steps 1 to {STEPS}, not {step}"):
        again(read(tmp_path / "j"), step=step)


def test_other_tensors_are_refused_before_anything_changes(tmp_path: Path) -> None:
    journal = read(Run(tmp_path / "j").go(3).path)
    tuned = start()
    tuned["c.weight"][0, 0] += 1e-3
    before = digest(tuned)
    for act in (
        lambda: rebuild(journal.header, tuned),
        lambda: replay(journal, optimizer_over(tuned), tuned),
    ):
        with pytest.raises(ValueError, match="not the tensors that the journal begins with: load the base sha256:0"):
            act()
    assert digest(tuned) == before


def test_a_result_that_the_seal_does_not_name_is_refused(tmp_path: Path) -> None:
    run = Run(tmp_path / "j").go().seal()
    journal = read(tmp_path / "j")
    tensors = start()
    other = optimizer_over(tensors, noise="rademacher")
    with pytest.raises(ValueError, match=f"the seal names {run.hashes[-1].hex()}.* do not use the result"):
        replay(journal, other, tensors)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"generator": "philox4x32-10/0"}, "generator philox4x32-10/0, and this version has philox4x32-10/1"),
        ({"epsilon": [0.5]}, "the distance is"),
        ({"slots": 2}, "does not fit its tensors and slots"),
        ({"estimator": {}}, "settings that this version does not have: 'groups'"),
        ({"estimator": {"groups": [[2, 0.0, True]]}}, "does not fit its tensors and slots"),
        ({"estimator": {"groups": [[3, 0.0, True]], "momentum": 0.9}}, "does not have: .*momentum"),
        ({"estimator": {"groups": [[3, 0.0, True]], "sides": 3}}, "sides must be 1 or 2"),
    ],
    ids=str,
)
def test_a_journal_that_this_version_cannot_replay_is_refused(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    header = Run(tmp_path / "j").header()
    content = json.loads(header.encode()[12:-32])
    del content["format"]
    assert rebuild(Header(**content), start()).epsilon == header.epsilon[0]
    with pytest.raises(ValueError, match=said):
        rebuild(Header(**content | change), start())


def test_a_recorder_takes_whole_steps_of_its_own_run(tmp_path: Path) -> None:
    run = Run(tmp_path / "j", samples=2)
    recorder = Recorder(run.writer)
    seed = run.optimizer.seed
    first = Taken(1, seed, 1.0, 1.0, 0.1, 2.0, 1.0, False, 0)
    recorder(first)
    assert len(read(tmp_path / "j")) == 0, "half a step is no step"
    with pytest.raises(ValueError, match=r"has direction 0 and seed \d+, .* expects direction 1"):
        recorder(first)
    with pytest.raises(ValueError, match="seed 3, where the journal expects"):
        recorder(first._replace(direction=1, seed=3))
    recorder(first._replace(direction=1))
    assert len(read(tmp_path / "j")) == 1
    recorder(first._replace(step=3))
    with pytest.raises(ValueError, match="goes on with step 2, not 3"):
        recorder(first._replace(step=3, direction=1))

"""A real run of a quantised model, and the command that makes it again from its journal in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from core.models.load import load
from core.models.manifest import verify
from core.models.policy import read_json
from core.models.quant.convert import quantised
from core.models.quant.scales import describe as describe_layers
from core.models.quant.scales import load_scales
from service.cli import app
from tests.gguf_file import KINDS, write_gguf
from trainers.__main__ import main
from trainers.errors import SUCCEEDED, USER_ERROR
from trainers.journal import Header, Writer, read
from trainers.journal.base import begin, named
from trainers.journal.command import make
from trainers.journal.recorder import Recorder
from trainers.journal.replay import describe
from trainers.journal.tensors import digest
from trainers.optim.qzo import Qzo

ROOT = Path(__file__).parents[4]
STEPS = 12
GROUPS = {"int4": 32, "nf4": 64, "q4_1": 32, "none": 64}


def base(reference: str, scheme: Any) -> Any:
    """The tiny model as before the run."""
    return load(reference, quant=scheme, group=GROUPS[scheme])


def run(path: Path, reference: str, scheme: str) -> tuple[Any, Qzo]:
    """Tunes the tiny model on one row; gives the tuned model and the optimizer."""
    loaded = base(reference, scheme)
    model, layers = loaded.model, quantised(loaded.model)
    tuned = [layer.scales for layer in layers.values()] or list(model.parameters())
    model.requires_grad_(False)
    optimizer = Qzo([{"params": tuned, "scales": bool(layers)}], lr=1e-2, seed=3, normalise=True, clip=3.0)
    tensors = named(model, optimizer)
    header = describe(
        optimizer,
        tensors,
        base=loaded.fingerprint,
        quantiser=describe_layers(layers) if layers else {},
        kernels="exact-1",
        about={"model": reference},
    )
    ids = torch.arange(1, 25).reshape(1, -1)
    with Writer.create(path, header) as writer:
        optimizer.on_step = Recorder(writer)
        for _ in range(STEPS):
            optimizer.step(lambda: model(input_ids=ids, labels=ids).loss)
        writer.seal(digest(tensors))
    return model, optimizer


@pytest.fixture(scope="module", params=["int4", "nf4", "q4_1", "none"])
def ran(request: pytest.FixtureRequest, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder, reference = tmp_path_factory.mktemp("run"), "tiny-llama"
    if request.param == "q4_1":
        reference = str(folder / "tiny.gguf")
        write_gguf(tiny_llama, Path(reference), KINDS)
    path = folder / "run.journal"
    return (path, reference, request.param, *run(path, reference, request.param))


one_scheme = pytest.mark.parametrize("ran", ["int4"], indirect=True)


def test_the_command_makes_the_tuned_model_again(ran: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, reference, scheme, model, optimizer = ran
    assert main(["replay", str(path), str(tmp_path / "out")]) == SUCCEEDED
    assert capsys.readouterr().out == f"step {STEPS}, finished: {tmp_path / 'out'}\n"
    verify(tmp_path / "out")
    before = base(reference, scheme)
    if scheme == "none":
        again = load(str(tmp_path / "out"))
    else:
        again = base(reference, scheme)
        load_scales(quantised(again.model), tmp_path / "out", base_fingerprint=again.fingerprint)
    ours, theirs, untuned = (dict(one.named_parameters()) for one in (model, again.model, before.model))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert any(not torch.equal(value, untuned[name]) for name, value in ours.items())
    card = read_json(tmp_path / "out" / "manifest.json")["card"]["journal"]
    assert card == {
        "step": STEPS,
        "finished": True,
        "chain": read(path).chain.hex(),
        "tensors": digest(named(model, optimizer)).hex(),
    }


@one_scheme
def test_a_process_of_its_own_makes_the_same(ran: Any, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "trainers", "replay", str(ran[0]), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120, env=os.environ)
    assert (done.returncode, done.stdout) == (SUCCEEDED, f"step {STEPS}, finished: {tmp_path / 'out'}\n"), done.stderr
    assert make(read(ran[0]), tmp_path / "here") == f"step {STEPS}, finished: {tmp_path / 'here'}"
    scales = [(tmp_path / name / "scales.safetensors").read_bytes() for name in ("out", "here")]
    assert scales[0] == scales[1]


@one_scheme
def test_an_earlier_step_and_a_cut_journal_are_labelled(
    ran: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = ran[0]
    assert main(["replay", str(path), str(tmp_path / "early"), "--step", "5"]) == SUCCEEDED
    assert capsys.readouterr().out == f"step 5, unfinished: {tmp_path / 'early'}\n"
    assert read_json(tmp_path / "early" / "manifest.json")["card"]["journal"]["finished"] is False
    (tmp_path / "cut").write_bytes(path.read_bytes()[:-110])
    assert main(["replay", str(tmp_path / "cut"), str(tmp_path / "late")]) == SUCCEEDED
    said = capsys.readouterr().out
    assert said.startswith(f"step {STEPS - 1}, unfinished: {tmp_path / 'late'}; the journal was cut at byte ")
    assert said.endswith(f"the record of step {STEPS} is not whole\n")


@one_scheme
def test_what_cannot_be_replayed_leaves_nothing(ran: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = ran[0]
    (tmp_path / "there").mkdir()
    (tmp_path / "damaged").write_bytes(path.read_bytes()[:40] + b"?" + path.read_bytes()[41:])
    for arguments, said in (
        ([str(path), str(tmp_path / "there")], "exists: give a new name"),
        ([str(path), str(tmp_path / "out"), "--step", str(STEPS + 1)], f"steps 1 to {STEPS}, not {STEPS + 1}"),
        ([str(path), str(tmp_path / "out"), "--model", "tiny-qwen3"], "and the journal is of sha256:"),
        ([str(tmp_path / "damaged"), str(tmp_path / "out")], "header is damaged"),
        ([str(tmp_path / "missing"), str(tmp_path / "out")], "No such file"),
    ):
        assert main(["replay", *arguments]) == USER_ERROR
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert list((tmp_path / "there").iterdir()) == []


@one_scheme
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"about": {}}, "give it with --model"),
        ({"quantiser": {"scheme": "mixed", "group": "mixed"}}, "cannot be made again here"),
        ({"quantiser": {"scheme": "int4", "group": 32, "identity": "sha256:0"}}, "has other codes"),
        ({"quantiser": {"scheme": "q4_1", "group": 32}}, "no GGUF file"),
        ({"quantiser": {"scheme": "gptq", "group": 128}}, "cannot be made again here"),
        ({"tensors": [["no.such.scales", "float32", [1]]]}, "tunes no.such.scales, which tiny-llama does not have"),
    ],
    ids=str,
)
def test_a_base_that_is_not_the_journals_is_refused(ran: Any, change: dict[str, Any], said: str) -> None:
    content = json.loads(read(ran[0]).header.encode()[12:-32])
    del content["format"]
    with pytest.raises(ValueError, match=said):
        begin(Header(**content | change))


@one_scheme
def test_the_service_command_is_the_same(ran: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = CliRunner().invoke(app, ["replay", str(ran[0]), str(tmp_path / "out")])
    assert done.exit_code == 0
    assert done.stdout == f"step {STEPS}, finished: {tmp_path / 'out'}\n"
    again = CliRunner().invoke(app, ["replay", str(ran[0]), str(tmp_path / "out")])
    assert again.exit_code == 1
    assert "exists: give a new name" in str(again.exception)
    assert make(read(ran[0]), tmp_path / "other", step=1).startswith("step 1, unfinished")

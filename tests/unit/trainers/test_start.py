"""A run that starts from an earlier adapter goes on exactly where that one stood."""

from __future__ import annotations

import json
import shutil
import signal
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from core.config import ConfigError
from core.models.load import load
from core.models.save import save_merged
from tests.unit.trainers.test_resume import _kill, _same
from trainers import export
from trainers import start as starting
from trainers import train as training
from trainers.__main__ import main
from trainers.config import load_run, parse_run
from trainers.errors import STOPPED, SUCCEEDED, RunError
from trainers.registry import METHODS

DATA = Path(__file__).parents[3] / "configs" / "debug" / "data"
HELD_OUT = {"eval_file": str(DATA / "harbour-held-out.jsonl")}
SMALL: dict[str, Any] = {"name": "lora", "rank": 4, "alpha": 8.0}
WEIGHTS = "adapter_model.safetensors"
LEAST = {"model": "tiny-llama", "train_file": "rows.jsonl", "output_dir": "out"}


def valid_losses(result: Any) -> list[float]:
    return [event["valid_loss"] for event in result.of_kind("metric") if "valid_loss" in event]


@pytest.fixture
def earlier(train: Any, tmp_path: Path) -> Any:
    """A run of four steps, far enough from its base to be told from it."""
    return train(SMALL, output_dir=str(tmp_path / "earlier"), max_steps=4, learning_rate=2e-2, **HELD_OUT)


@pytest.fixture
def artifact(earlier: Any) -> Path:
    folder: Path = earlier.output / "artifact"
    return folder


@pytest.mark.parametrize("variant", [{}, {"dropout": 0.2}, {"dora": True}])
def test_a_start_without_effect_is_a_fresh_start(
    variant: dict[str, Any], train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attach = training._attach

    def saving(run: Any, loaded: Any, accelerator: Any) -> Any:
        attached = attach(run, loaded, accelerator)
        if run.config.start is None:
            export.write(attached.model, run.method, loaded, tmp_path / "zero", training._card(run, loaded, None))
        return attached

    monkeypatch.setattr(training, "_attach", saving)
    fresh = train(SMALL | variant, output_dir=str(tmp_path / "fresh"), max_steps=1, **HELD_OUT)
    assert not any(value.any() for name, value in load_file(tmp_path / "zero" / WEIGHTS).items() if "_B" in name)
    begun = train(
        {"name": "lora", **{key: value for key, value in variant.items() if key == "dropout"}},
        output_dir=str(tmp_path / "begun"),
        start=str(tmp_path / "zero"),
        max_steps=1,
        **HELD_OUT,
    )
    tensors = fresh.checkpoint.tensors
    assert _same(begun.checkpoint.tensors, tensors)
    assert begun.metrics == fresh.metrics
    assert valid_losses(begun) == valid_losses(fresh)


@pytest.mark.parametrize("variant", [{}, {"dora": True}, {"rslora": True, "targets": ["q_proj", "down_proj"]}])
@pytest.mark.parametrize("source", ["artifact", "checkpoints/step-00000004/adapter"])
def test_the_first_loss_is_the_last_of_the_earlier_run(
    variant: dict[str, Any], source: str, train: Any, tmp_path: Path
) -> None:
    before = train(SMALL | variant, output_dir=str(tmp_path / "a"), max_steps=4, learning_rate=2e-2, **HELD_OUT)
    start = before.output / source
    # Another seed: what a fresh adapter would begin with must not show through.
    after = train("lora", output_dir=str(tmp_path / "b"), start=str(start), max_steps=2, seed=1, **HELD_OUT)
    assert valid_losses(after)[0] == valid_losses(before)[-1]
    assert valid_losses(before)[0] != valid_losses(before)[-1]
    one, other = (
        json.loads((folder / "adapter_config.json").read_text()) for folder in (start, after.output / "artifact")
    )
    assert one == other, "the same form, on the same base"
    manifest = json.loads((after.output / "artifact" / "manifest.json").read_text())
    weights = json.loads((start / "manifest.json").read_text())["files"][WEIGHTS]
    assert manifest["base"] == "tiny-llama" and manifest["card"]["started_from_sha256"] == weights
    assert any("its adapter goes on" in event["message"] for event in after.of_kind("message"))
    assert not torch.equal(*(next(iter(load_file(f / WEIGHTS).values())) for f in (start, after.output / "artifact")))


def test_whole_weights_start_from_the_base_with_the_adapter_merged_in(
    train: Any, artifact: Path, tmp_path: Path
) -> None:
    tuned = load("tiny-llama", adapter=artifact)
    save_merged(tuned.model, tuned.tokenizer, tmp_path / "merged", card={"base": "tiny-llama"})
    common = {"max_steps": 2, "learning_rate": 1e-3, **HELD_OUT}
    plain = train("full", model=str(tmp_path / "merged"), output_dir=str(tmp_path / "a"), **common)
    begun = train("full", start=str(artifact), output_dir=str(tmp_path / "b"), **common)
    assert valid_losses(begun) == valid_losses(plain)
    assert _same(begun.weights, plain.weights)
    manifest = json.loads((begun.output / "artifact" / "manifest.json").read_text())
    assert (manifest["kind"], manifest["base"]) == ("merged", "tiny-llama")
    assert any("its adapter is merged" in event["message"] for event in begun.of_kind("message"))


def test_whole_weights_are_a_model_of_their_own_under_their_name(train: Any, tmp_path: Path) -> None:
    before = train("full", output_dir=str(tmp_path / "a"), max_steps=3, learning_rate=1e-3, **HELD_OUT)
    whole = before.output / "artifact"
    common = {"model": str(whole), "start_name": "ft:x", "max_steps": 2, **HELD_OUT}
    after = train(SMALL, output_dir=str(tmp_path / "b"), **common)
    assert valid_losses(after)[0] == valid_losses(before)[-1]
    made = after.output / "artifact"
    assert json.loads((made / "manifest.json").read_text())["card"]["started_from"] == "ft:x"
    for file in ("manifest.json", "README.md", "adapter_config.json"):
        assert str(tmp_path) not in (made / file).read_text(), "a card does not say where files lie"
        assert "ft:x" in (made / file).read_text()
    # An adapter on tuned weights goes on, on those.
    third = train("lora", model=str(whole), output_dir=str(tmp_path / "c"), start=str(made), max_steps=1, **HELD_OUT)
    assert valid_losses(third)[0] == valid_losses(after)[-1]
    with (whole / "model.safetensors").open("r+b") as file:
        file.seek(-3, 2)
        file.write(b"\x01")
    with pytest.raises(RunError, match="has changed since it was written") as caught:
        train(SMALL, output_dir=str(tmp_path / "d"), **common)
    assert (caught.value.code, caught.value.param) == ("model_not_usable", "model")


def test_a_continued_run_that_is_stopped_or_killed_ends_with_the_same_bits(
    train: Any, make_run: Any, artifact: Path, tmp_path: Path
) -> None:
    more = {"start": str(artifact), "save_every": 5, "max_steps": 40, "accumulation": 2, "batch_size": 2}
    method = {"name": "lora", "dropout": 0.2}
    straight = train(method, output_dir=str(tmp_path / "straight"), **more)
    output = str(tmp_path / "stopped")
    assert train(method, output_dir=output, stop_at=straight.checks // 3, **more).code == STOPPED
    run = make_run(method, output_dir=output, **more)
    assert _kill(run, tmp_path / "run.yaml", signal.SIGKILL, at=24) == -signal.SIGKILL
    again = train(method, output_dir=output, **more)
    assert again.code == SUCCEEDED
    assert _same(again.checkpoint.tensors, straight.checkpoint.tensors)
    assert (again.output / "metrics.csv").read_bytes() == (straight.output / "metrics.csv").read_bytes()


def test_a_resume_refuses_another_start(train: Any, earlier: Any, tmp_path: Path) -> None:
    last = earlier.output / "artifact"
    other = train(SMALL, output_dir=str(tmp_path / "other"), max_steps=1).output / "artifact"
    copy = shutil.copytree(last, tmp_path / "copy")
    train(SMALL, start=str(last), max_steps=1)
    assert train(SMALL, start=str(copy), max_steps=2).code == SUCCEEDED, "the same adapter elsewhere"
    for changed in ({"start": str(other)}, {}):
        with pytest.raises(RunError, match="run with other start;") as caught:
            train(SMALL, max_steps=3, **changed)
        assert caught.value.code == "checkpoint_mismatch"


def test_the_adapter_fills_in_what_the_run_file_leaves_out(artifact: Path) -> None:
    run = parse_run(LEAST | {"start": str(artifact), "method": {"name": "lora", "rank": 4, "dropout": 0.1}})
    settings: Any = run.settings
    assert (settings.rank, settings.alpha, settings.dropout) == (4, 8.0, 0.1)
    assert run.origin["method.rank"] == "file" and run.origin["method.alpha"] == "start"
    assert run.origin["method.targets"] == "default", "nothing to fill in"
    assert parse_run(run.as_dict()).as_dict() == run.as_dict()
    full = parse_run(LEAST | {"start": str(artifact), "method": "full"})
    assert set(full.origin.values()) == {"default", "file"}


@pytest.mark.parametrize(
    ("overrides", "key", "words"),
    [
        (["method.rank=16"], "method.rank", "rank is 4 .* and 16 here"),  # the default, but asked for
        (["method.alpha=16"], "method.alpha", "alpha is 8.0 .* and 16.0 here"),
        (["method.targets=[q_proj]"], "method.targets", r"\['all-linear'\] .* \['q_proj'\]"),
        (["method.dora=true"], "method.dora", "dora is False"),
        (["method.rslora=true"], "method.rslora", "rslora is False"),
    ],
)
def test_what_the_adapter_fixes_cannot_be_another_value(
    artifact: Path, overrides: list[str], key: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        parse_run(LEAST | {"start": str(artifact)}, overrides)
    assert caught.value.key == key


def test_module_names_have_no_order(train: Any, tmp_path: Path) -> None:
    method = SMALL | {"targets": ["q_proj", "v_proj"]}
    folder = train(method, output_dir=str(tmp_path / "a"), max_steps=1).output / "artifact"
    parse_run(LEAST | {"start": str(folder), "method": {"name": "lora", "targets": ["v_proj", "q_proj"]}})


def edit(folder: Path, **changes: Any) -> None:
    """Changes the adapter's configuration, its manifest with it: what a hash cannot find."""
    from core.models import manifest

    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    about = json.loads((folder / "manifest.json").read_text())
    about["files"]["adapter_config.json"] = manifest.sha256(file)
    (folder / "manifest.json").write_text(json.dumps(about))


def test_a_start_that_is_not_what_it_says_is_refused(train: Any, artifact: Path, tmp_path: Path) -> None:
    def refused(words: str, folder: Path, method: str = "lora") -> None:
        with pytest.raises(RunError, match=words) as caught:
            train(method, start=str(folder), output_dir=str(tmp_path / "x"), max_steps=1)
        assert (caught.value.code, caught.value.param) == ("model_not_usable", "start")

    flipped = shutil.copytree(artifact, tmp_path / "flipped")
    data = bytearray((flipped / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (flipped / WEIGHTS).write_bytes(data)
    more = shutil.copytree(artifact, tmp_path / "more")
    (more / "notes.txt").write_text("x")
    scaled = shutil.copytree(artifact, tmp_path / "scaled")
    edit(scaled, alpha_pattern={"q_proj": 64})
    ranked = shutil.copytree(artifact, tmp_path / "ranked")
    edit(ranked, r=5)
    elsewhere = shutil.copytree(artifact, tmp_path / "elsewhere")
    about = json.loads((elsewhere / "manifest.json").read_text())
    (elsewhere / "manifest.json").write_text(json.dumps(about | {"base_fingerprint": "sha256:0", "base": "another"}))
    for method in ("lora", "full"):
        refused("has changed since it was written", flipped, method)
        refused("notes.txt, which its manifest does not list", more, method)
        refused("the adapter was made for .* not for tiny-llama", elsewhere, method)
    refused("alpha_pattern", scaled)
    refused("the saved adapter has r 5", ranked)


def test_what_is_no_start_is_refused_before_anything_is_loaded(artifact: Path, tmp_path: Path) -> None:
    def refused(words: str, **changes: Any) -> str:
        with pytest.raises(ConfigError, match=words) as caught:
            parse_run(LEAST | {"start": str(artifact)} | changes)
        return caught.value.key

    assert refused("has no manifest.json", start=str(tmp_path / "nothing")) == "start"
    about = json.loads((artifact / "manifest.json").read_text())
    about["card"]["run"]["method"]["name"] = "vera"
    (artifact / "manifest.json").write_text(json.dumps(about))
    assert refused("an adapter of the method vera, with which lora cannot go on") == "method.name"
    parse_run(LEAST | {"start": str(artifact), "method": "full"})
    (artifact / "manifest.json").write_text(json.dumps(about | {"kind": "merged"}))
    assert refused("is a whole model: give it as the model") == "start"
    (artifact / "manifest.json").write_text(json.dumps(about | {"card": {}}))
    assert refused("does not say how it was made") == "start"


def test_the_command_line_honours_it(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], make_run: Any
) -> None:
    from core.config_yaml import write_yaml

    file = tmp_path / "run.yaml"
    file.write_text(write_yaml({key: value for key, value in make_run("lora").as_dict().items() if key != "method"}))
    assert main([str(file), f"start={artifact}", "--dry-run"]) == 0
    assert "  rank: 4  # start\n" in capsys.readouterr().out
    assert main([str(file), f"start={artifact}", "method.rank=2", "--dry-run"]) == 2
    assert "rank is 4 in the adapter that this run starts from, and 2 here" in capsys.readouterr().err
    assert load_run(file, [f"start={artifact}"]).origin["start"] == "command line"


def test_a_name_without_a_start_is_refused() -> None:
    with pytest.raises(ConfigError, match="start_name"):
        parse_run(LEAST | {"start_name": "x"})
    parse_run(LEAST | {"start_name": "x", "model": "/some/folder"})


@pytest.mark.parametrize("name", METHODS)
def test_what_a_method_inherits_is_its_own(name: str) -> None:
    method = METHODS[name]
    assert {*method.inherits} <= {*method.config.__dataclass_fields__}
    assert bool(method.inherits) == (method.makes == "adapter"), "an adapter has a form, whole weights have none"


@pytest.mark.bnb
def test_a_four_bit_base_goes_on(train: Any, tmp_path: Path) -> None:
    four = {"base": "bnb-nf4"}
    before = train(SMALL | four, output_dir=str(tmp_path / "a"), max_steps=3, learning_rate=2e-2, **HELD_OUT)
    start = str(before.output / "artifact")
    after = train({"name": "lora"} | four, output_dir=str(tmp_path / "b"), start=start, max_steps=1, seed=1, **HELD_OUT)
    assert valid_losses(after)[0] == valid_losses(before)[-1]


def test_merging_into_a_head_that_is_the_embeddings_too_is_refused() -> None:
    """Both would change, and the adapter's maker changed one."""
    plain, wrapped = SimpleNamespace(), SimpleNamespace(base_layer=None)
    for head, embeddings in ((plain, wrapped), (wrapped, plain), (plain, plain)):
        for tied in (True, False):
            model = SimpleNamespace(
                get_output_embeddings=lambda head=head: head,
                get_input_embeddings=lambda embeddings=embeddings: embeddings,
                config=SimpleNamespace(tie_word_embeddings=tied),
            )
            refusal = pytest.raises(ValueError, match="holds once for both")
            with refusal if tied and wrapped in (head, embeddings) else nullcontext():
                starting._check_head(model)


def test_weights_with_an_adapter_merged_in_are_checked_and_can_all_be_trained(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = parse_run(LEAST | {"start": str(artifact), "method": {"name": "full"}})
    loaded, _ = starting.begin(run, dtype="float32", quant="none")
    assert all(parameter.requires_grad for parameter in loaded.model.parameters())

    def shared(model: Any) -> None:
        raise ValueError("one for both")

    monkeypatch.setattr(starting, "_check_head", shared)
    with pytest.raises(RunError, match="start: one for both"):
        starting.begin(run, dtype="float32", quant="none")

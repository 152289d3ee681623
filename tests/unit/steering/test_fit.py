"""A fit as a run: artifact, events, exit codes, stop, and the command line."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from core.config import fields_doc, resolve
from core.events import EventLog, read
from core.models.load import Loaded
from steering.__main__ import main
from steering.config import FitConfig
from steering.fit import fit
from steering.registry import METHODS, get_method
from steering.stop import StoppedError, StopSignals
from steering.vector import SteeringVector

REPO = Path(__file__).parents[3]
CONFIGS = sorted((REPO / "configs" / "steering").glob("*.yaml"))
ROWS = [
    {"prompt": "Where is the parcel?", "positive": "It is on its way to you.", "negative": "Nobody knows."},
    {"positive": "Thank you for writing.", "negative": "What now?"},
    {"messages": [{"role": "user", "content": "Hi"}], "positive": "Good morning.", "negative": "Yo."},
]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "fit.yaml").write_text(
        f"model: tiny-llama\ndata_file: {tmp_path}/pairs.jsonl\noutput_dir: {tmp_path}/out\nbatch_size: 2\n"
    )
    return tmp_path


def events(folder: Path) -> list[dict[str, Any]]:
    return [event for event in read(folder / "out" / "events.jsonl")[0] if event["kind"] != "heartbeat"]


def test_a_fit_leaves_a_vector_a_manifest_and_events(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", str(files / "fit.yaml"), "site=mlp"]) == 0
    path = files / "out" / "artifact" / "vector.safetensors"
    assert str(path) in capsys.readouterr().out
    vector = SteeringVector.load(path)
    assert (vector.site, vector.method, vector.base, vector.layers) == ("mlp", "mean_difference", "tiny-llama", (0, 1))
    digest = hashlib.sha256((files / "pairs.jsonl").read_bytes()).hexdigest()
    assert vector.data_hash == f"sha256:{digest}"
    assert all(norm > 0 for norm in vector.norms.values())
    manifest = json.loads((path.parent / "manifest.json").read_text())
    assert manifest["files"] == {path.name: hashlib.sha256(path.read_bytes()).hexdigest()}
    assert (manifest["kind"], manifest["base_fingerprint"]) == ("vector", vector.fingerprint)
    assert manifest["card"]["origin"]["site"] == "command line"
    assert [event["kind"] for event in events(files)] == ["message", "progress", "progress", "progress", "artifact"]
    progress, artifact = events(files)[-2:]
    assert (progress["step"], progress["total_steps"]) == (3, 3)
    assert progress["trained_tokens"] == vector.metadata["tokens"]
    assert (artifact["artifact"], artifact["path"], artifact["sha256"]) == ("vector", str(path), vector.sha256)


def test_a_second_fit_replaces_the_first_with_the_same_bytes(files: Path) -> None:
    path = files / "out" / "artifact" / "vector.safetensors"
    assert main(["fit", str(files / "fit.yaml")]) == 0
    first = path.read_bytes()
    assert main(["fit", str(files / "fit.yaml")]) == 0
    assert path.read_bytes() == first
    assert sorted(p.name for p in (files / "out").iterdir()) == ["artifact", "events.jsonl"]
    numbers = [event["seq"] for event in read(files / "out" / "events.jsonl")[0]]
    assert numbers == list(range(1, len(numbers) + 1))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_fit_files_are_fitted(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)
    assert "python -m steering fit" in path.read_text()
    assert main(["fit", str(path), f"output_dir={tmp_path}"]) == 0
    assert SteeringVector.load(tmp_path / "artifact" / "vector.safetensors").width == 64


USER_ERRORS = {
    "bad row": ("", b'{"positive": "a"}\n', "missing_negative", "data_file"),
    "empty": ("", b"", "empty_file", "data_file"),
    "too long": ("max_length=9", None, "row_too_long", "data_file"),
    "no file": ("data_file=/nowhere/pairs.jsonl", None, "file_not_found", None),
    "unknown model": ("model=tiny-nothing", None, "model_not_usable", "model"),
    "no reference": ("model=https://example.org/x", None, "model_not_usable", "model"),
    "layer": ("layers=[0,7]", None, "invalid_value", None),
    "layers twice": ("layers=[1,1]", None, "invalid_config", None),
    "method": ("method=guess", None, "invalid_config", None),
    "site": ("site=logits", None, "invalid_config", "site"),
    "batch": ("batch_size=0", None, "invalid_config", None),
    "unknown key": ("batchsize=4", None, "invalid_config", "batchsize"),
}


@pytest.mark.parametrize("name", USER_ERRORS)
def test_a_user_error_is_an_event_and_exit_code_2(files: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    override, data, code, param = USER_ERRORS[name]
    if data is not None:
        (files / "pairs.jsonl").write_bytes(data)
    assert main(["fit", str(files / "fit.yaml"), *([override] if override else [])]) == 2
    error = events(files)[-1]
    assert (error["kind"], error["code"], error["param"], error["retryable"]) == ("error", code, param, False)
    assert error["message"] in capsys.readouterr().err
    assert not (files / "out" / "artifact").exists()


def test_bad_rows_are_listed_with_their_lines(files: Path) -> None:
    (files / "pairs.jsonl").write_text('{"positive": "a"}\n[]\n')
    assert main(["fit", str(files / "fit.yaml")]) == 2
    assert [(row["line"], row["code"]) for row in events(files)[-1]["problems"]] == [
        (1, "missing_negative"),
        (2, "data_type"),
    ]


def test_a_full_disk_is_a_crash_that_may_be_retried(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("steering.vector.os.fsync", full)
    assert main(["fit", str(files / "fit.yaml")]) == 1
    error = events(files)[-1]
    assert (error["code"], error["retryable"]) == ("disk_full", True)
    assert [p.name for p in (files / "out").iterdir()] == ["events.jsonl"]


@pytest.mark.parametrize(
    ("error", "code", "retryable"),
    [(MemoryError(), "out_of_memory", True), (RuntimeError("can't allocate memory"), "out_of_memory", True),
     (KeyError("x"), "internal_error", False)],
)  # fmt: skip
def test_other_crashes(
    files: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, code: str, retryable: bool
) -> None:
    def crash(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr("steering.mean_difference.record", crash)
    assert main(["fit", str(files / "fit.yaml")]) == 1
    assert (events(files)[-1]["code"], events(files)[-1]["retryable"]) == (code, retryable)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_fit_between_batches(
    files: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    from steering import mean_difference

    original = mean_difference.record
    before = signal.getsignal(number)

    def signalled(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    monkeypatch.setattr("steering.mean_difference.record", signalled)
    assert main(["fit", str(files / "fit.yaml")]) == 3
    assert [event["kind"] for event in events(files)] == ["message", "progress", "message"]
    assert not (files / "out" / "artifact").exists()
    assert signal.getsignal(number) is before


def test_a_second_interrupt_is_not_waited_for() -> None:
    stop = StopSignals()
    stop.handle(signal.SIGTERM, None)
    stop.handle(signal.SIGTERM, None)
    with pytest.raises(StoppedError):
        stop.check()
    with pytest.raises(KeyboardInterrupt):
        stop.handle(signal.SIGINT, None)


def test_a_stop_before_the_model_is_loaded_loads_nothing(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.models.load.load", lambda *args, **kwargs: pytest.fail("loaded"))
    stop = StopSignals()
    stop.requested = True
    config = resolve(FitConfig, file=files / "fit.yaml").value
    with EventLog(files / "out" / "events.jsonl") as log, pytest.raises(StoppedError):
        fit(config, log, stop)


def test_sigterm_ends_a_real_process_with_3(files: Path) -> None:
    (files / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS * 700))
    log = files / "out" / "events.jsonl"
    command = [sys.executable, "-m", "steering", "fit", str(files / "fit.yaml")]
    with subprocess.Popen(command, cwd=REPO, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
        while child.poll() is None and not any(event["kind"] == "progress" for event in read(log)[0]):
            time.sleep(0.05)
        child.terminate()
        assert child.wait(60) == 3
    assert events(files)[-1]["kind"] == "message"


def test_apply_prints_both_texts_and_the_receipt(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", str(files / "fit.yaml")]) == 0
    vector = str(files / "out" / "artifact" / "vector.safetensors")
    command = ["apply", "--model", "tiny-llama", "--vector", vector, "--prompt", "Hello", "--max-tokens", "5"]
    capsys.readouterr()
    assert main([*command, "--strength", "3", "--layers", "0-1", "--preserve-norm"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("default: ")
    assert "\nsteered: " in out
    assert "at layers 0, 1; mean |dh|/|h| 0." in out
    for wrong in (["--strength", "0"], ["--strength", "nan"], ["--strength", "1", "--layers", "5"]):
        assert main([*command, *wrong]) == 2
        assert "error: " in capsys.readouterr().err
    assert main(["apply", "--model", "tiny-qwen3", *command[3:], "--strength", "1"]) == 2
    assert "fit it again on this model" in capsys.readouterr().err


def test_the_registry_and_the_config_do_not_import_torch() -> None:
    code = (
        "import sys, steering.registry, steering.config, steering.pairs, steering.stop; "
        "print(sorted({'torch', 'transformers', 'numpy'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=REPO)
    assert done.stdout.strip() == "[]", done.stderr


def test_every_setting_is_documented() -> None:
    docs = fields_doc(FitConfig)
    assert {"model", "data_file", "method", "layers", "site", "positions"} <= docs.keys()
    assert all(doc.doc for doc in docs.values())


@pytest.mark.parametrize(
    "change",
    [{"layers": ()}, {"layers": (-1,)}, {"threads": 0}, {"seed": -1}, {"max_length": 1}, {"heartbeat_seconds": 0.0}],
)
def test_settings_out_of_range(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        FitConfig(model="m", data_file="d", output_dir="o", **change)


def test_methods_are_found_by_name() -> None:
    assert all(get_method(name) is method and name == method.name for name, method in METHODS.items())
    with pytest.raises(ValueError, match="mean_difference"):
        get_method("guess")


def test_threads_are_set(files: Path, models: Callable[..., Loaded], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr("torch.set_num_threads", seen.append)
    assert main(["fit", str(files / "fit.yaml"), "threads=1"]) == 0
    assert seen == [1]

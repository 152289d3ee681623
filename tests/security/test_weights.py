"""Weights are data: a zoo of hostile model directories, each refused before any library opens it."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from core.models import policy
from core.models.load import load, load_tokenizer
from core.models.resolve import resolve

MAIN = Path(__file__).parents[2]


class Bomb:
    """Unpickling one of these makes the canary file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.canary,)


def edit(path: Path, **changes: Any) -> None:
    """Sets keys of a JSON file; the file may be missing."""
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**old, **changes}))


def code(directory: Path, canary: Path, name: str = "modeling_evil.py") -> None:
    (directory / name).write_text(f"import pathlib\npathlib.Path({str(canary)!r}).touch()\nclass Evil: pass\n")


def header(directory: Path, value: Any, body: bytes = b"\0" * 64) -> None:
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + body)


def tensor(start: int, end: int, shape: list[Any] | None = None, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - start) // 4] if shape is None else shape, "data_offsets": [start, end]}


def pickled(name: str, keep: bool) -> Callable[[Path, Path], None]:
    def build(directory: Path, canary: Path) -> None:
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(pickle.dumps(Bomb(canary)))
        if not keep:
            (directory / "model.safetensors").unlink()

    return build


def config(name: str = "config.json", **changes: Any) -> Callable[[Path, Path], None]:
    def build(directory: Path, canary: Path) -> None:
        code(directory.parent, canary)
        edit(directory / name, **changes)

    return build


def with_header(value: Any, body: bytes = b"\0" * 64) -> Callable[[Path, Path], None]:
    return lambda directory, canary: header(directory, value, body)


def auto_map(directory: Path, canary: Path) -> None:
    code(directory, canary)
    edit(directory / "config.json", auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})


def code_only(directory: Path, canary: Path) -> None:
    code(directory, canary, "custom_generate.py")


def tokenizer_code(directory: Path, canary: Path) -> None:
    code(directory.parent, canary, "tokenization_evil.py")
    edit(
        directory / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["../tokenization_evil.Evil", None]},
        tokenizer_class="Evil",
    )


def huge_length(directory: Path, canary: Path) -> None:
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", 2**63) + b"{}")


def longer_than_file(directory: Path, canary: Path) -> None:
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", 1000) + b"{}")


def truncated(directory: Path, canary: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])


def tail(directory: Path, canary: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes() + pickle.dumps(Bomb(canary)))


def link_out(directory: Path, canary: Path) -> None:
    outside = directory.parent / "outside.safetensors"
    (directory / "model.safetensors").rename(outside)
    (directory / "model.safetensors").symlink_to(outside)


def link_to_secret(directory: Path, canary: Path) -> None:
    (directory / "README.md").symlink_to("/etc/passwd")


def folder_link_out(directory: Path, canary: Path) -> None:
    (directory / "extra").symlink_to(directory.parent)


def link_chain(directory: Path, canary: Path) -> None:
    (directory.parent / "hop").symlink_to("/etc")
    (directory / "LICENSE").symlink_to(directory.parent / "hop" / "hostname")


def fake_cache(directory: Path, canary: Path) -> None:
    """A folder shaped like the Hub's cache whose blobs lead elsewhere."""
    (directory.parent / "elsewhere").mkdir()
    (directory.parent.parent / "blobs").symlink_to(directory.parent / "elsewhere")
    (directory / "model.safetensors").rename(directory.parent / "elsewhere" / "b")
    (directory / "model.safetensors").symlink_to("../../blobs/b")


def index_out(directory: Path, canary: Path) -> None:
    shutil.copy(directory / "model.safetensors", directory.parent / "x.safetensors")
    edit(directory / "model.safetensors.index.json", weight_map={"a": "../x.safetensors"})


def index_pickle(directory: Path, canary: Path) -> None:
    edit(directory / "model.safetensors.index.json", weight_map={"a": "config.json"})


def index_empty(directory: Path, canary: Path) -> None:
    edit(directory / "model.safetensors.index.json", weight_map=[])


def adapter_as_model(directory: Path, canary: Path) -> None:
    edit(directory / "adapter_config.json", peft_type="LORA", base_model_name_or_path="evil/other")


def deep(directory: Path, canary: Path) -> None:
    (directory / "config.json").write_text('{"model_type": "llama", "x": ' + "[" * 90_000 + "]" * 90_000 + "}")


def deep_enough(directory: Path, canary: Path) -> None:
    value: Any = {"auto_map": {}}
    for _ in range(70):
        value = {"text_config": value}
    edit(directory / "config.json", text_config=value)


def no_json(directory: Path, canary: Path) -> None:
    (directory / "config.json").write_bytes(b"\xff\xfe\x00")


def list_json(directory: Path, canary: Path) -> None:
    (directory / "config.json").write_text("[]")


def large_json(directory: Path, canary: Path) -> None:
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "x": "y" * policy.MAX_JSON}))


def no_config(directory: Path, canary: Path) -> None:
    (directory / "config.json").unlink()


def fifo(directory: Path, canary: Path) -> None:
    import os

    os.mkfifo(directory / "special_tokens_map.json")


NESTED = {"vision_config": {"model_type": "llama", "deeper": [{"trust_remote_code": True}]}}
ZOO: dict[str, Callable[[Path, Path], None]] = {
    "pickle-needed": pickled("pytorch_model.bin", keep=False),
    "pickle-beside": pickled("pytorch_model.bin", keep=True),
    "pickle-pt": pickled("model.pt", keep=True),
    "pickle-upper": pickled("MODEL.PTH", keep=True),
    "pickle-training-args": pickled("training_args.bin", keep=True),
    "pickle-nested": pickled("1_Pooling/weights.pkl", keep=True),
    "pickle-npy": pickled("vectors.npy", keep=True),
    "auto-map": auto_map,
    "auto-map-remote": config(auto_map={"AutoConfig": "evil/repo--configuration.Evil"}),
    "code-beside": code_only,
    "trust-remote-code": config(trust_remote_code=True),
    "trust-remote-code-nested": config(**NESTED),
    "attention-internal": config(_attn_implementation_internal="evil/kernels"),
    "attention-internal-nested": config(text_config={"_attn_implementation_internal": "evil/kernels"}),
    "attention-kernel": config(_attn_implementation="evil/kernels:forward"),
    "attention-kernel-public": config(attn_implementation={"": "evil/kernels"}),
    "experts-kernel": config(_experts_implementation="evil/kernels"),
    "unknown-architecture": config(model_type="evil"),
    "unknown-architecture-nested": config(backbone_config={"model_type": "evil"}),
    "architecture-not-text": config(model_type=["llama"]),
    "class-path": config(architectures=["os.system"]),
    "quantised": config(quantization_config={"quant_method": "evil"}),
    "backbone": config(backbone="evil/repo", use_pretrained_backbone=True),
    "custom-pipeline": config(custom_pipelines={"x": {"impl": "evil.Evil"}}),
    "generation-code": config("generation_config.json", custom_generate="evil/repo"),
    "tokenizer-class": config("tokenizer_config.json", tokenizer_class="EvilTokenizer"),
    "tokenizer-class-type": config("tokenizer_config.json", tokenizer_class={"x": 1}),
    "tokenizer-auto-map": config("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]}),
    "tokenizer-code": tokenizer_code,
    "tokenizer-file": config("tokenizer_config.json", tokenizer_file="/etc/passwd"),
    "processor-auto-map": config("processor_config.json", auto_map={"AutoProcessor": "evil.Evil"}),
    "layers-bomb": config(num_hidden_layers=10**9),
    "width-bomb": config(hidden_size=2**40),
    "vocabulary-bomb": config(vocab_size=2**31),
    "width-text": config(hidden_size="64"),
    "header-huge": huge_length,
    "header-longer-than-file": longer_than_file,
    "header-no-json": with_header(b"\xff\x00"),
    "header-list": with_header([]),
    "header-deep": with_header(b"[" * 50_000),
    "header-twice": with_header(b'{"a":{"dtype":"F32","shape":[16],"data_offsets":[0,64]},"a":{}}'),
    "header-overlap": with_header({"a": tensor(0, 48), "b": tensor(32, 64)}),
    "header-gap": with_header({"a": tensor(0, 16), "b": tensor(32, 64)}),
    "header-beyond": with_header({"a": tensor(0, 128)}),
    "header-backwards": with_header({"a": tensor(64, 0, [16])}),
    "header-negative": with_header({"a": {"dtype": "F32", "shape": [16], "data_offsets": [-64, 0]}}),
    "header-short-tensor": with_header({"a": tensor(0, 64, [17])}),
    "header-product": with_header({"a": tensor(0, 64, [2**62, 2**62])}),
    "header-negative-shape": with_header({"a": tensor(0, 64, [-4, -4])}),
    "header-float-shape": with_header({"a": tensor(0, 64, [16.0])}),
    "header-bool-shape": with_header({"a": tensor(0, 64, [True, 16])}),
    "header-dtype": with_header({"a": tensor(0, 64, dtype="PICKLE")}),
    "header-extra-key": with_header({"a": {**tensor(0, 64), "code": "x"}}),
    "truncated": truncated,
    "polyglot-tail": tail,
    "link-out": link_out,
    "link-to-secret": link_to_secret,
    "link-chain": link_chain,
    "folder-link-out": folder_link_out,
    "fake-cache": fake_cache,
    "index-out": index_out,
    "index-not-safetensors": index_pickle,
    "index-malformed": index_empty,
    "adapter-as-model": adapter_as_model,
    "json-deep": deep,
    "config-deep": deep_enough,
    "json-binary": no_json,
    "json-list": list_json,
    "json-large": large_json,
    "no-config": no_config,
    "fifo": fifo,
}


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    """A sound copy of a model, in a folder shaped like the Hub's cache."""
    copy = tmp_path / "models--evil--x" / "snapshots" / "rev"
    shutil.copytree(tiny_llama, copy)
    return copy


def test_the_sound_copy_is_accepted(model: Path) -> None:
    policy.check_directory(model)


@pytest.mark.parametrize("name", ZOO)
def test_a_hostile_directory_is_refused_and_nothing_in_it_runs(name: str, model: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    ZOO[name](model, canary)
    with pytest.raises(policy.PolicyError if name != "no-config" else ValueError):
        load(str(model))
    with pytest.raises(ValueError):
        load_tokenizer(str(model))
    with pytest.raises(policy.PolicyError):
        policy.check_directory(model)
    assert not canary.exists()


def test_refusal_comes_before_any_import(tiny_llama: Path, tmp_path: Path) -> None:
    places = []
    for name, build in ZOO.items():
        place = tmp_path / name / "snapshots" / "rev"
        shutil.copytree(tiny_llama, place)
        build(place, tmp_path / "canary")
        places.append(str(place))
    script = (
        "import sys\n"
        "from core.models.load import load\n"
        "for place in sys.argv[1:]:\n"
        "    try: load(place)\n"
        "    except ValueError: pass\n"
        "    else: sys.exit('accepted ' + place)\n"
        "    heavy = {'torch', 'transformers', 'peft', 'tokenizers', 'safetensors'} & set(sys.modules)\n"
        "    assert not heavy, (place, heavy)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *places], cwd=MAIN, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "canary").exists()


def test_the_hubs_own_cache_layout_is_accepted(model: Path) -> None:
    blobs = model.parent.parent / "blobs"
    blobs.mkdir()
    for file in list(model.iterdir()):
        file.rename(blobs / file.name)
        file.symlink_to(Path("../../blobs") / file.name)
    policy.check_directory(model)


def test_harmless_answers_to_dangerous_keys_are_accepted(model: Path) -> None:
    edit(model / "config.json", trust_remote_code=False, auto_map=None, _attn_implementation="sdpa")
    edit(model / "tokenizer_config.json", tokenizer_file=None)
    policy.check_directory(model)


def test_words_in_a_vocabulary_are_not_settings(model: Path) -> None:
    edit(model / "vocab.json", auto_map=7, trust_remote_code=8)
    policy.check_directory(model)


@pytest.mark.parametrize("reference", ["http://127.0.0.1:9/x", "169.254.169.254/latest", "[::1]/x", "evil\\@host/x"])
def test_a_reference_into_the_network_is_refused(reference: str) -> None:
    with pytest.raises(ValueError, match="not a model reference"):
        resolve(reference)

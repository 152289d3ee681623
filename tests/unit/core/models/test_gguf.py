"""A GGUF file as a model: its conversion computes what the original computed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from core.models.load import load
from core.models.ref import parse_ref
from core.models.resolve import local_directory, resolve
from tests.gguf_file import write_gguf


@pytest.fixture(scope="module")
def file(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(tiny_llama, target)
    return target


def test_the_conversion_computes_the_same_and_is_made_once(
    file: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADHELM_HOME", str(tmp_path))
    assert local_directory(parse_ref(str(file))) is None
    converted, original = load(str(file)), load(str(tiny_llama))
    assert local_directory(parse_ref(str(file))) == converted.directory
    written = (converted.directory / "model.safetensors").stat().st_mtime_ns
    assert resolve(str(file)) == converted.directory
    assert (converted.directory / "model.safetensors").stat().st_mtime_ns == written

    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where is the 7th umbrella?"}]
    ids = original.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert converted.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) == ids
    with torch.no_grad():
        batch = torch.tensor([ids])
        torch.testing.assert_close(converted.model(batch).logits, original.model(batch).logits, atol=1e-5, rtol=0)
    assert converted.tokenizer.eos_token == "<|im_end|>"
    assert converted.model.generation_config.eos_token_id == original.tokenizer.eos_token_id
    assert converted.tokenizer.model_max_length == original.model.config.max_position_embeddings
    assert converted.model.dtype == torch.float32

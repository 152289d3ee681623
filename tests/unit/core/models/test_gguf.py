"""A GGUF file as a model: its conversion computes what the original computed."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
import torch

from core.models.load import load
from core.models.ref import parse_ref
from core.models.resolve import local_directory, resolve

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers": "blk",
}


def write_gguf(directory: Path, target: Path, kinds: dict[str, str] | None = None) -> None:
    """Writes a Llama directory as GGUF, with the rows of q and k in the order that the format wants.

    ``kinds`` gives a GGML type to the tensors whose names there begin with a key; all others are float32.
    """
    loaded = load(str(directory))
    config, model = loaded.model.config, loaded.model
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    made = json.loads((directory / "tokenizer.json").read_text("utf-8"))["model"]
    words = sorted(made["vocab"], key=made["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([3 if word.startswith("<|") else 1 for word in words])
    writer.add_token_merges([" ".join(pair) for pair in made["merges"]])
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_bos_token_id(made["vocab"]["<|im_start|>"])
    writer.add_pad_token_id(config.pad_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(loaded.tokenizer.chat_template)
    for name, value in model.state_dict().items():
        rows = value
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:
                halves = value.reshape(heads, 2, value.shape[0] // heads // 2, value.shape[1])
                rows = halves.swapaxes(1, 2).reshape(value.shape)
        for old, new in NAMES.items():
            name = name.replace(old, new)
        kind = next((kind for start, kind in (kinds or {}).items() if name.startswith(start)), "F32")
        if value.ndim < 2 or kind == "F32":
            writer.add_tensor(name, rows.contiguous().numpy())
        else:
            dtype = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quants.quantize(rows.contiguous().numpy(), dtype), raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


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

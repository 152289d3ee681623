"""Writes a small model as a GGUF file, as the tests of several packages need one."""

from __future__ import annotations

import json
from pathlib import Path

import gguf

from core.models.load import load

KINDS = {"blk.": "Q4_1", "token_embd": "Q8_0", "output.": "Q8_0"}
"""GGML types of the tensors whose names begin so, as ``write_gguf`` takes them: 4 bits in the blocks alone."""
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

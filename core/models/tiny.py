"""Tiny seeded models: real architectures with two layers and random weights, made on the spot in a second.

They let every path be tried (training, steering, serving, saving) without a download. Weights are drawn here, one
tensor after another from one seeded generator, so they do not depend on how a library initialises its modules.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

VOCABULARY = 1024
CONTEXT = 1024
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] -%}"
    "{{ raise_exception('roles are system, user and assistant') }}"
    "{%- endif -%}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)

_WHO = (
    "the gardener|my neighbour|a tired courier|the night train|our small shop|the old printer|a careful nurse|"
    "the harbour master|an honest clerk|the youngest engineer|a grey heron|the choir|the baker's apprentice|"
    "the library|a passing cyclist|the council|every customer|nobody in the office|the lighthouse keeper|the referee"
).split("|")
_DID = (
    "repaired|counted|forgot|painted|returned|ordered|measured|praised|complained about|carried|lost|wrapped|"
    "described|delivered|cleaned|questioned|sold|borrowed|inspected|photographed|replaced|weighed|labelled|admired"
).split("|")
_WHAT = (
    "the broken lamp|two boxes of pears|a parcel without an address|the invoice from March|seven wooden chairs|"
    "a blue kettle|the wrong keyboard|a refund|the garden wall|an umbrella|the second shelf|a jar of honey|"
    "the missing screw|a letter to the editor|the yellow bicycle|forty paper cups|the kitchen clock|a wool blanket|"
    "the password|a late delivery|the new timetable|a cracked screen|the recipe for soup|an empty notebook"
).split("|")
_WHEN = (
    "before breakfast|on Tuesday|in the rain|after the concert|without a word|as quickly as possible|twice a year|"
    "at the end of the street|during the storm|for the third time|with great patience|in the wrong order|"
    "while everyone slept|because the door was open|at a quarter past nine|under the bridge|in good faith"
).split("|")
_ASK = (
    "Can you help me with|What happened to|How much is|Please send me|I would like to return|Where can I find|"
    "Why is there no answer about|Could somebody explain|When will you replace|Who is responsible for"
).split("|")
_REPLY = (
    "Thank you for writing. We will look into it today.|I am sorry to hear that; a new one is on its way.|"
    "That is a fair question, and the answer is no.|Yes, of course. It takes about three days.|"
    "Unfortunately we cannot change the order any more.|Happy to help! Please tell me your order number.|"
    "It was moved to the next page, below the table.|Nothing was charged, so there is nothing to refund."
).split("|")


def corpus(seed: int = 0, lines: int = 1500) -> list[str]:
    """Short sentences, questions, replies, numbers and JSON from a small grammar: about 100 kB at the default size."""
    rng = random.Random(seed)
    made = []
    for _ in range(lines):
        pick = rng.random()
        if pick < 0.5:
            sentence = f"{rng.choice(_WHO)} {rng.choice(_DID)} {rng.choice(_WHAT)} {rng.choice(_WHEN)}."
            made.append(sentence[0].upper() + sentence[1:])
        elif pick < 0.7:
            made.append(f"{rng.choice(_ASK)} {rng.choice(_WHAT)}? {rng.choice(_REPLY)}")
        elif pick < 0.85:
            urgency, category = rng.choice(("low", "normal", "high")), rng.choice(("billing", "delivery", "repair"))
            made.append(f'{{"category": "{category}", "urgency": "{urgency}", "order": {rng.randrange(10**5)}}}')
        else:
            first, second = rng.randrange(100), rng.randrange(100)
            made.append(f"{first} + {second} = {first + second}; {first} * 10 = {first * 10}, not {second}.")
    return made


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 1,024 tokens trained on :func:`corpus`, with the ChatML-like template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = [PAD, START, END]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator(corpus(), trainer)
    assert trained.get_vocab_size() == VOCABULARY
    return PreTrainedTokenizerFast(
        tokenizer_object=trained,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[START],
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
        chat_template=TEMPLATE,
    )


def write(name: str, directory: Path) -> None:
    """Writes the tiny model ``name`` into an existing empty directory: float32 safetensors, tokenizer, template."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    made = tokenizer()
    config = _config(name, pad=made.pad_token_id, eos=made.eos_token_id)
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1234)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim < 2:
                parameter.add_(noise, alpha=0.1)  # a norm that is not the identity: folding it wrongly shows
            else:
                parameter.copy_(noise * 0.1)
    model.generation_config = GenerationConfig(eos_token_id=made.eos_token_id, pad_token_id=made.pad_token_id)
    model.save_pretrained(directory)
    made.save_pretrained(directory)


def _config(name: str, *, pad: int, eos: int) -> PretrainedConfig:
    from transformers import Gemma3TextConfig, LlamaConfig, Qwen3Config

    shared: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": CONTEXT,
        "pad_token_id": pad,
        "eos_token_id": eos,
        "bos_token_id": None,
    }
    if name == "tiny-llama":
        return LlamaConfig(**shared, tie_word_embeddings=False)
    if name == "tiny-qwen3":
        return Qwen3Config(**shared, tie_word_embeddings=True)
    if name == "tiny-gemma3":
        layers = ["sliding_attention", "full_attention"]
        return Gemma3TextConfig(**shared, query_pre_attn_scalar=16, sliding_window=128, layer_types=layers)
    raise ValueError(f"no tiny model is called {name!r}")

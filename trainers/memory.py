"""How much memory a run will take, before it takes it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from core.models.quant.convert import quantised
from core.models.resolve import resolve
from trainers.config import Run
from trainers.dtype import resolve_dtype
from trainers.method import TrainContext
from trainers.optim import Qzo

_MIB = 2**20


@dataclass(frozen=True)
class Plan:
    """Bytes by purpose, for one process.

    The first three are counted exactly, by attaching the method to the model without its data and letting the
    optimizer take one step on it:

    - weights: every parameter, tied ones once; a linear layer held in NF4 as its codes, scales and tables, which is
      4.127 bits a weight and 1 KiB; one that the method quantises as its codes, scales and tables;
    - gradients: every trained parameter, in its own dtype;
    - optimizer: every tensor of its state; without gradients also the copy that a step goes back by.

    The others are upper bounds for batch_size x max_length = N tokens, all of them trained (D width, L layers, F width
    of the MLP, H and K query and key heads of width d, V vocabulary, b bytes an element):

    - activations: N L b (6 D + 3 H d + 4 K d + 4 F), or N b (L D + one such block) with activation checkpointing;
    - logits: 12 N V, for the logits, their log-softmax and their gradient in float32.

    To them comes the runtime: Python, torch and the other libraries, as this process holds them when it plans. On a
    small model it is most of all; a GPU holds none of it.

    Not covered: the allocator's slack, a second copy of the weights while the artifact is checked, and the floats as
    which a quantised model is written at the end.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    trained_parameters: int
    all_parameters: int
    runtime: int

    @property
    def total(self) -> int:
        """Sum of all purposes and the runtime, in bytes."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits + self.runtime

    def describe(self) -> str:
        """The plan as comment lines of a run file."""
        names = ("weights", "gradients", "optimizer", "activations", "logits", "runtime", "total")
        rows = [f"#   {name:<12}{getattr(self, name) / _MIB:>12.1f} MiB" for name in names]
        share = f"# trained parameters: {self.trained_parameters:,} of {self.all_parameters:,}"
        notes = [
            "# runtime: Python, torch and other libraries, measured in this process; a GPU holds none of it.",
            "# activations, logits: of a batch whose rows all have max_length tokens; shorter rows take less.",
        ]
        return "\n".join([share, "# planned memory of one process, at most:", *rows, *notes]) + "\n"


def plan(run: Run) -> Plan:
    """Plans a run's memory; the model is pulled if need be, but its weights are not read.

    Args:
        run: The resolved run file.

    Returns:
        Bytes by purpose.

    Raises:
        ValueError: The model is refused, or the method does not fit it.
    """
    directory = resolve(run.config.model)
    config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    computed = resolve_dtype(run.config.dtype)
    dtype = getattr(torch, computed) if run.method.makes == "adapter" else torch.float32
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        base_parameters = sum(parameter.numel() for parameter in model.parameters())
        saved = _saved_by_nf4(model) if run.method.quant(run.settings) == "bnb-nf4" else 0
        context = TrainContext(
            learning_rate=run.peak_learning_rate,
            seed=run.config.seed,
            activation_checkpointing=False,
            mean=lambda value: value,
        )
        attached = run.method.attach(model, run.settings, context)
    weights = sum(_size(parameter) for parameter in attached.model.parameters()) - saved
    weights += sum(_size(part) for layer in quantised(attached.model).values() for part in layer.buffers())
    trained = [parameter for parameter in attached.model.parameters() if parameter.requires_grad]
    if run.method.needs_gradients:
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        attached.optimizer.step()
    tokens = run.config.batch_size * run.config.max_length
    return Plan(
        weights=weights,
        gradients=sum(_size(parameter) for parameter in trained) if run.method.needs_gradients else 0,
        optimizer=_state(attached.optimizer),
        activations=_activations(run, config, tokens, 2 if computed == "bfloat16" else 4),
        logits=12 * tokens * int(config.get_text_config().vocab_size),
        trained_parameters=sum(parameter.numel() for parameter in trained),
        all_parameters=base_parameters,
        runtime=psutil.Process().memory_info().rss,
    )


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _state(optimizer: torch.optim.Optimizer) -> int:
    tensors = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    copied = optimizer.copied_bytes if isinstance(optimizer, Qzo) else 0
    return sum(map(_size, tensors)) + copied


def _saved_by_nf4(model: torch.nn.Module) -> int:
    head = model.get_output_embeddings()  # type: ignore[operator]
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    return sum(_size(m.weight) - _nf4_bytes(m.weight.numel()) for m in linear)


def _nf4_bytes(weights: int) -> int:
    """What bitsandbytes holds a layer in: 4-bit codes, a scale in 8 bits for 64 of them, and one in 32 for 256 scales.

    To that each layer adds, in float32, the 16 values of a code, the 256 of a scale, and the mean of the scales.
    """
    scales = math.ceil(weights / 64)
    return math.ceil(weights / 2) + scales + 4 * math.ceil(scales / 256) + 4 * (16 + 256 + 1)


def _activations(run: Run, config: PretrainedConfig, tokens: int, element: int) -> int:
    text: Any = config.get_text_config()
    width, layers, mlp = int(text.hidden_size), int(text.num_hidden_layers), int(text.intermediate_size)
    heads = int(text.num_attention_heads)
    key_heads = int(getattr(text, "num_key_value_heads", None) or heads)
    head = int(getattr(text, "head_dim", None) or width // heads)
    block = 6 * width + 3 * heads * head + 4 * key_heads * head + 4 * mlp
    if not run.method.needs_gradients:
        return tokens * element * block
    if run.config.activation_checkpointing:
        return tokens * element * (layers * width + block)
    return tokens * element * layers * block

"""Tiny models of three families, two LoRA adapters and a steering vector for each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from core.models.catalog import pull
from core.models.load import Loaded, load
from service.engines.base import Chunk, EngineError, Request, Sampling
from service.engines.model import TransformersModel
from service.engines.scheduler import Limits, Scheduler
from steering.vector import SteeringVector

FAMILIES = ("tiny-llama", "tiny-qwen3", "tiny-gemma3")


@dataclass
class Kit:
    """One family: its directory, what goes with it, and the model under the batch's contract."""

    base: str
    loaded: Loaded
    model: TransformersModel
    adapters: tuple[str, str]
    vector: str

    def request(self, name: str, prompt: str, **kwargs: Any) -> Request:
        kwargs.setdefault("sampling", Sampling(temperature=0, max_tokens=12, logprobs=2))
        return Request(name, self.base, prompt, **kwargs)

    def scheduler(self, **limits: Any) -> Scheduler:
        return Scheduler(self.model, Limits(**limits))

    def ids(self, prompt: str) -> list[int]:
        return list(self.loaded.tokenizer(prompt)["input_ids"])


def make_adapter(base: str, target: Path, seed: int, **config: Any) -> str:
    """A LoRA whose effect is plain to see, saved as PEFT saves it."""
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        options = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": False} | config
        model = get_peft_model(load(base).model, LoraConfig(task_type="CAUSAL_LM", **options))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.2)
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(str(target))
    return str(target)


def make_vector(loaded: Loaded, path: Path, **changes: Any) -> str:
    generator = torch.Generator().manual_seed(5)
    directions = {layer: torch.randn(64, generator=generator) for layer in (0, 1)}
    fields = {"site": "block", "fingerprint": loaded.fingerprint, "base": str(loaded.ref), "method": "test"}
    SteeringVector(directions=directions, data_hash="sha256:0", **(fields | changes)).save(path)
    return str(path)


def make_kit(name: str, folder: Path) -> Kit:
    base = str(pull(name))
    adapters = (make_adapter(base, folder / "a", 1), make_adapter(base, folder / "b", 2))
    loaded = load(base)
    return Kit(base, loaded, TransformersModel(loaded), adapters, make_vector(loaded, folder / "v.safetensors"))


@pytest.fixture(scope="session", params=FAMILIES)
def kit(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kit]:
    made = make_kit(request.param, tmp_path_factory.mktemp(request.param))
    yield made
    made.model.close()


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kit]:
    made = make_kit("tiny-llama", tmp_path_factory.mktemp("llama"))
    yield made
    made.model.close()


@dataclass
class Answer:
    """All that a request got."""

    chunks: list[Chunk]
    error: EngineError | None = None

    @property
    def text(self) -> str:
        return "".join(c.text for c in self.chunks)

    @property
    def logprobs(self) -> list[float]:
        return [lp.logprob for c in self.chunks for lp in c.logprobs]


def run(scheduler: Scheduler, requests: list[Request], *, at: list[int] | None = None) -> dict[str, Answer]:
    """Answer all requests; the i-th is submitted before step ``at[i]``."""
    answers = {r.id: Answer([]) for r in requests}
    due = sorted(zip(at or [0] * len(requests), range(len(requests)), strict=True))
    for step in range(10_000):
        while due and due[0][0] <= step:
            scheduler.submit(requests[due.pop(0)[1]])
        if not due and not scheduler.busy:
            return answers
        for name, what in scheduler.step():
            if isinstance(what, EngineError):
                answers[name].error = what
            else:
                answers[name].chunks.append(what)
    raise AssertionError("the batch does not end")

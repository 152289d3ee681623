"""In the Trainer of transformers: ``optimizers=(optimizer, scheduler)``, its checkpoints, and going on from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, get_scheduler

from trainers.optim import Frugal, split_parameters


# Three runs with checkpoints of their own: ten seconds on a busy machine.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_trainer_of_transformers_goes_on_bit_for_bit(tmp_path: Path) -> None:
    ids = torch.arange(64).view(8, 8) % 50
    rows = [{"input_ids": row, "labels": row} for row in ids]

    def run(folder: str, steps: int, resume: str | None = None) -> Any:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
        )
        model = LlamaForCausalLM(config)
        optimizer = Frugal(split_parameters(model), lr=1e-2, update_gap=3, select="top", state="carry")
        scheduler = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=20)
        arguments = TrainingArguments(
            output_dir=str(tmp_path / folder), max_steps=steps, save_steps=4, per_device_train_batch_size=2,
            report_to=[], use_cpu=True, seed=0, disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, optimizers=(optimizer, scheduler))
        trainer.train(resume_from_checkpoint=resume)
        return model

    straight = run("straight", 8)
    run("stopped", 4)
    resumed = run("stopped", 8, str(tmp_path / "stopped" / "checkpoint-4"))
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))

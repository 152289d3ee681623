"""One timed run of one arm, in a process of its own: ``python -m benchmarks.sft_arm ARM ROWS SEED OUT``.

Two epochs over the same rows; the second is timed, from the end of the last step of the first epoch to the end of the
run's last step. Prints one JSON line: seconds, real tokens, labelled tokens, and the share of padding.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from core.data.chat import encode
from core.data.source import rows
from core.models.load import load, load_tokenizer

BATCH, LENGTH, EPOCHS, RANK = 8, 1024, 2, 8


def ours(model: str, file: Path, seed: int, out: Path) -> float:
    """Seconds of the second epoch through ``trainers``."""
    from trainers.__main__ import main

    arguments = {
        "model": model,
        "train_file": file,
        "output_dir": out,
        "seed": seed,
        "epochs": EPOCHS,
        "batch_size": BATCH,
        "max_length": LENGTH,
        "dtype": "float32",
        "save_every": 10**6,
        "method": "lora",
        "method.rank": RANK,
        "method.alpha": 2 * RANK,
    }
    path = out.with_suffix(".yaml")
    path.write_text(
        "\n".join(f"{key}: {value}" for key, value in arguments.items() if "method" not in key), encoding="utf-8"
    )
    code = main([str(path), *(f"{key}={value}" for key, value in arguments.items() if "method" in key)])
    assert code == 0, code
    events = [json.loads(line) for line in (out / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    times = {e["step"]: e["time"] for e in events if e["kind"] == "metric" and "train_loss" in e}
    return float(times[max(times)] - times[max(times) // EPOCHS])


def theirs(model: str, file: Path, seed: int, out: Path, sampling: str | None) -> tuple[float, int]:
    """Seconds of the second epoch through ``trl.SFTTrainer``, and the tokens of its batches with padding."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    loaded = load(model, dtype="float32")
    chats = [json.loads(line)["messages"] for line in file.read_text(encoding="utf-8").splitlines()]
    plain = [[{"role": m["role"], "content": m["content"]} for m in chat] for chat in chats]
    data = Dataset.from_list([{"prompt": chat[:-1], "completion": chat[-1:]} for chat in plain])
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(time.time())

    options: dict[str, Any] = {"train_sampling_strategy": sampling} if sampling else {}
    trainer = SFTTrainer(
        model=loaded.model,
        processing_class=loaded.tokenizer,
        train_dataset=data,
        args=SFTConfig(
            output_dir=str(out),
            per_device_train_batch_size=BATCH,
            num_train_epochs=EPOCHS,
            max_length=LENGTH,
            gradient_checkpointing=False,
            bf16=False,
            completion_only_loss=True,
            save_strategy="no",
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            seed=seed,
            learning_rate=1e-3,
            disable_tqdm=True,
            **options,
        ),
        peft_config=LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[Clock()],
    )
    padded = [0]
    collate = trainer.data_collator

    def counting(examples: Any) -> Any:
        batch = collate(examples)
        padded[0] += batch["input_ids"].numel()
        return batch

    trainer.data_collator = counting
    trainer.train()
    return ends[-1] - ends[len(ends) // EPOCHS - 1], padded[0] // EPOCHS


def main() -> None:
    """Run the arm named on the command line."""
    arm, model, file, seed, out = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5])
    tokenizer = load_tokenizer(model)
    examples = [encode(row, tokenizer, max_length=LENGTH) for row in rows(file)]
    real = sum(len(e.input_ids) for e in examples)
    labelled = sum(sum(label != -100 for label in e.labels) for e in examples)
    padded: int | None = None
    if arm == "gradhelm":
        seconds = ours(model, file, seed, out)
    else:
        seconds, padded = theirs(model, file, seed, out, "group_by_length" if arm == "trl-grouped" else None)
    print(
        json.dumps(
            {
                "seconds": seconds,
                "real_tokens": real,
                "labelled_tokens": labelled,
                "tokens_with_padding": padded,
                "threads": torch.get_num_threads(),
            }
        )
    )


if __name__ == "__main__":
    main()

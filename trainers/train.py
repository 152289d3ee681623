"""A run from its file to its artifact: load, attach, train, export, check."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from transformers import PreTrainedTokenizerBase

from core.config import dump
from core.models.load import Loaded
from core.models.quant.convert import quantised
from core.models.quant.scales import save_scales
from trainers import export
from trainers.batch import collator
from trainers.config import Run
from trainers.dataset import file_digest, read_examples
from trainers.dtype import resolve_dtype
from trainers.errors import STOPPED, SUCCEEDED, RunError
from trainers.loop import Loop
from trainers.loss import TokenLoss
from trainers.method import Attached, TrainContext
from trainers.report import Reporter
from trainers.signals import StopSignals
from trainers.start import Start, begin, go_on

_PRIVATE = ("train_file", "eval_file", "output_dir", "start")
"""Settings that say where files lie on this machine; a model card does not repeat them."""


_JOB = "GRADHELM_JOB_ID"
"""Set by a supervisor: who watches the run then has a job to resume, no command to repeat."""
_GO_ON = "; the same command goes on from there"


def train(run: Run, reporter: Reporter, stop: StopSignals) -> int:
    """Runs a run file, from its newest checkpoint if there is one.

    Args:
        run: The resolved run file.
        reporter: Takes the events.
        stop: Says when to stop.

    Returns:
        ``SUCCEEDED`` or ``STOPPED``.

    Raises:
        ValueError: The run cannot succeed as it is configured, or its loss is no longer finite.
    """
    config, method = run.config, run.method
    torch.set_num_threads(config.cpu_threads())
    set_seed(config.seed)
    dtype = resolve_dtype(config.dtype)
    # Several processes find each other on a CPU only when they are told that it is one.
    on_cpu = not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    accelerator = Accelerator(cpu=on_cpu, mixed_precision="bf16" if dtype == "bfloat16" else "no")
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise RunError(
            f"launched with {accelerator.distributed_type}: checkpoints of sharded models are not written yet; launch "
            "one whole model a process, as configs/accelerate/ddp.yaml does",
            code="unsupported_launch",
        )
    # Rounding every update to bfloat16 would lose most of it, so weights that train are held in float32; and codes are
    # to be the same whatever a run computes in.
    held_in = dtype if method.makes == "adapter" else "float32"
    quant = method.quant(run.settings)
    loaded, start = begin(run, dtype=held_in, quant=quant)
    tokenizer = loaded.tokenizer
    rows = read_examples(Path(config.train_file), tokenizer, max_length=config.max_length, param="train_file")
    held_out = (
        read_examples(Path(config.eval_file), tokenizer, max_length=config.max_length, param="eval_file")
        if config.eval_file
        else []
    )
    probe_ids = rows[0].input_ids
    if (origin := _started_from(run, start)) is not None:
        how = "" if start is None else "; its adapter " + ("goes on" if method.makes == "adapter" else "is merged")
        reporter.message("info", f"starting from {origin}{how}")
    if config.eval_file and _JOB not in os.environ:
        reporter.message("info", f"held-out rows: {len(held_out)} of {config.eval_file}{_foreign(run)}")
    for warning in run.warnings():
        reporter.message("warn", warning)

    attached = _attach(run, loaded, accelerator)
    if start is not None:
        go_on(attached.model, method, start)
    loss, optimizer = accelerator.prepare(TokenLoss(attached.model), attached.optimizer)
    loss.train(method.needs_gradients)
    # Same adapter on every process, from the run's seed; from here on each process draws its own dropout.
    set_seed(config.seed + accelerator.process_index)
    card = _card(run, loaded, start)
    loop = Loop(
        run,
        Attached(attached.model, optimizer.optimizer, attached.measured),
        loss,
        rows=rows,
        held_out=held_out,
        collate=collator(pad_id=_pad_id(tokenizer), device=accelerator.device),
        accelerator=accelerator,
        reporter=reporter,
        stop=stop,
        signature=_signature(run, loaded, start, accelerator.num_processes, dtype),
        servable=lambda folder: export.write(attached.model, method, loaded, folder / _servable_name(run), card),
    )
    loop.resume()
    if not loop.finished:
        reporter.message(
            "info",
            f"training {_base(run, loaded, start)} with {method.name} on {len(rows)} rows",
            threads=config.cpu_threads(),
            processes=accelerator.num_processes,
            device=str(accelerator.device),
            dtype=dtype,
            learning_rate=run.peak_learning_rate,
        )
    if config.rehearse == "on" or (config.rehearse == "auto" and accelerator.device.type == "cuda"):
        loop.rehearse()
    if not loop.run():
        reporter.message(
            "info",
            f"stopped at step {loop.progress.step}" + ("" if _JOB in os.environ else _GO_ON),
            step=loop.progress.step,
            stopped=True,
        )
        accelerator.end_training()
        return STOPPED
    if config.export == "best" or (config.export == "auto" and config.early_stopping_patience is not None):
        loop.restore_best()
    if accelerator.is_main_process:
        _export(run, attached.model, loaded, reporter, card, probe_ids, held_in)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return SUCCEEDED


def _foreign(run: Run) -> str:
    """A hint where the training file is the user's own, and the held-out one still that of the run file."""
    if run.origin["train_file"] == "command line" and run.origin["eval_file"] != "command line":
        return ", the run file's: eval_file=null, or a file of your own, suits your train_file better"
    return ""


def _attach(run: Run, loaded: Loaded, accelerator: Accelerator) -> Attached:
    def mean(value: float) -> float:
        total = accelerator.reduce(torch.tensor([value], dtype=torch.float64, device=accelerator.device), "mean")
        return float(total.item())

    context = TrainContext(
        learning_rate=run.peak_learning_rate,
        seed=run.config.seed,
        activation_checkpointing=run.config.activation_checkpointing,
        mean=mean,
    )
    if run.config.activation_checkpointing:
        loaded.model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    return run.method.attach(loaded.model, run.settings, context)


def _export(
    run: Run,
    model: torch.nn.Module,
    loaded: Loaded,
    reporter: Reporter,
    card: dict[str, Any],
    probe_ids: list[int],
    dtype: str,
) -> None:
    directory = Path(run.config.output_dir) / "artifact"
    expected = export.probe(model, probe_ids)
    kind = export.write(model, run.method, loaded, directory, card)
    if run.method.makes == "scales":
        save_scales(quantised(model), Path(run.config.output_dir) / "scales", card=card)
    difference = export.verify(
        expected, kind, loaded, directory, probe_ids, dtype=dtype, quant=run.method.quant(run.settings)
    )
    reporter.emit("artifact", artifact="metrics", path=str(Path(run.config.output_dir) / "metrics.csv"))
    reporter.emit("artifact", artifact=kind, path=str(directory), logit_difference=difference)


def _servable_name(run: Run) -> str:
    return "adapter" if run.method.makes == "adapter" else "merged"


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token to pad with; attention and loss never see it."""
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0)


def _base(run: Run, loaded: Loaded, start: Start | None) -> str:
    """What the base is called. That of an earlier adapter keeps its name: they are the same weights."""
    return start.base if start is not None else run.config.start_name or str(loaded.ref)


def _started_from(run: Run, start: Start | None) -> str | None:
    """The earlier result that the run starts from, if any."""
    return run.config.start_name or (None if start is None else f"the adapter sha256:{start.sha256}")


def _card(run: Run, loaded: Loaded, start: Start | None) -> dict[str, Any]:
    settings = {name: value for name, value in run.as_dict().items() if name not in _PRIVATE}
    base = _base(run, loaded, start)
    card = {
        "base": base,
        "base_fingerprint": loaded.fingerprint,
        "data": file_digest(Path(run.config.train_file)),
        "run": settings | {"model": base, "learning_rate": run.peak_learning_rate},
    }
    origin = _started_from(run, start)
    card |= {} if origin is None else {"started_from": origin}
    return card if start is None else card | {"started_from_sha256": start.sha256}


def _signature(run: Run, loaded: Loaded, start: Start | None, processes: int, dtype: str) -> dict[str, Any]:
    """What must be equal for a checkpoint to be gone on with; the number of steps may be raised."""
    config = run.config
    held_out = {"eval_file": file_digest(Path(config.eval_file))} if config.eval_file else {}
    begun = {} if start is None else {"start": start.sha256}
    return (
        held_out
        | begun
        | {
            "base": loaded.fingerprint,
            "train_file": file_digest(Path(config.train_file)),
            "method": {"name": run.method.name, **dump(run.settings)},
            "seed": config.seed,
            "rows_per_step": config.batch_size * config.accumulation * processes,
            "max_length": config.max_length,
            "pack": config.pack,
            "bucket": config.bucket,
            "dtype": dtype,
        }
    )

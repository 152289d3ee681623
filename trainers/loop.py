"""THE training loop: every method, one process or many.

Its heart is ``optimizer.step(closure)``. The closure runs all micro-batches of a step, clips the gradient, and returns
the mean loss per trained token of the whole step, over all micro-batches and processes: so 1 x 8 and 8 x 1 rows give
the same gradient. First-order optimizers call it once, with gradients; zeroth-order ones twice, under ``no_grad``, and
judge for themselves what a loss that is not finite means.

A stop is taken at the next micro-batch. The step under way is thrown away, and what is saved is the state after the
last whole step: parameters, optimizer, random generators, data cursor. A resumed run therefore repeats that step and
ends with the same bits as one that never stopped (float32, same machine, same number of threads).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from core import checkpoint
from core.data.example import Example
from core.data.stream import Stream
from trainers import snapshot
from trainers.batch import Collate
from trainers.config import Run
from trainers.dtype import resolve_dtype
from trainers.errors import Interrupted, RunError
from trainers.evaluation import evaluate
from trainers.method import Attached
from trainers.metrics import Meter, MetricsFile, peak_memory
from trainers.report import Reporter
from trainers.schedule import factor
from trainers.signals import StopSignals
from trainers.snapshot import Progress


class Loop:
    """One run, from its newest checkpoint to its last step."""

    def __init__(
        self,
        run: Run,
        attached: Attached,
        loss: nn.Module,
        *,
        rows: Sequence[Example],
        held_out: Sequence[Example],
        collate: Collate,
        accelerator: Accelerator,
        reporter: Reporter,
        stop: StopSignals,
        signature: dict[str, Any],
        servable: Callable[[Path], object],
    ) -> None:
        """Prepares for step 0; ``resume()`` goes to the newest checkpoint.

        Args:
            run: The resolved run file.
            attached: Model and optimizer, as the method made them and accelerate prepared them.
            loss: ``TokenLoss`` around the model, as accelerate prepared it.
            rows: What to train on.
            held_out: What to evaluate on; may be empty.
            collate: Rows to tensors on the device.
            accelerator: Places and synchronises.
            reporter: Takes the events.
            stop: Says when to stop.
            signature: What must be equal for a checkpoint to belong to this run.
            servable: Writes what serving a checkpoint needs into its folder.
        """
        self.config, self.run_file = run.config, run
        self.model, self.optimizer, self.loss = attached.model, attached.optimizer, loss
        self.measured = attached.measured
        self.held_out, self.collate = held_out, collate
        self.accelerator, self.reporter, self.stop = accelerator, reporter, stop
        self.signature, self.servable = signature, servable
        config = run.config
        self.root = Path(config.output_dir) / "checkpoints"
        self.processes = accelerator.num_processes
        self.stream = Stream(
            rows,
            batch_size=config.batch_size,
            accumulation=config.accumulation,
            seed=config.seed,
            bucket=config.bucket and not config.pack,
            pack=config.pack,
            max_length=config.max_length,
            rank=accelerator.process_index,
            world=self.processes,
        )
        self.epoch_steps = self.stream.steps_per_epoch
        self.total = config.max_steps or config.epochs * self.epoch_steps
        self.eval_every = config.eval_every or self.epoch_steps
        self.save_every = config.save_every or self.epoch_steps
        self.warmup = (
            config.warmup_steps if config.warmup_steps is not None else round(config.warmup_ratio * self.total)
        )
        self.peaks = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.progress = Progress(pending={} if held_out else None)
        self.meter = Meter()
        self.saved_step = 0
        self.boundary: tuple[dict[str, Any], dict[str, Any]] = self._capture()
        self.metrics: MetricsFile | None = None

    @property
    def finished(self) -> bool:
        """Whether every step is done, and evaluated."""
        progress = self.progress
        return progress.pending is None and (progress.step >= self.total or progress.stopped_early)

    def resume(self) -> None:
        """Restores the newest checkpoint that verifies, if there is one.

        Raises:
            RunError: It belongs to another run.
        """
        found: list[Path | None] = [checkpoint.latest(self.root) if self.accelerator.is_main_process else None]
        found = gather_object(found)
        if found[0] is not None:
            saved = checkpoint.load(found[0], verified=True)
            self._check_signature(saved.state["signature"])
            snapshot.restore_model(self.model, saved.tensors)
            snapshot.restore_optimizer(self.optimizer, saved.tensors, saved.state["optimizer"])
            self.stream.restore(saved.state["stream"])
            if len(saved.state["rng"]) == self.processes:
                checkpoint.set_rng_state(saved.state["rng"][self.accelerator.process_index])
            else:
                self.reporter.message(
                    "warn",
                    f"the checkpoint was made by {len(saved.state['rng'])} processes and this run has "
                    f"{self.processes}: dropout will differ from that of an uninterrupted run",
                )
            self.progress = Progress(**saved.state["progress"])
            self.saved_step = self.progress.step
            self.boundary = self._capture()
            how = f"resumed from the checkpoint of step {self.progress.step}"
            if self.finished:
                how = (
                    f"already finished at step {self.progress.step}: nothing is left; more epochs or max_steps "
                    "go on from there, a fresh output_dir begins anew"
                )
            self.reporter.message("info", how, step=self.progress.step)
            if saved.state["threads"] != self.config.cpu_threads():
                self.reporter.message(
                    "warn",
                    f"the checkpoint was made on {saved.state['threads']} threads and this run has "
                    f"{self.config.cpu_threads()}: results may differ in the last bits",
                )
            # Checkpoints of earlier versions do not say.
            before, now = saved.state.get("adjustable", {}), self.run_file.adjustable
            for name in [name for name in now if name in before and before[name] != now[name]]:
                self.reporter.message(
                    "warn",
                    f"the checkpoint was made with {name} {before[name]} and this run has {now[name]}, from step "
                    f"{self.progress.step} on: results will differ from those of an uninterrupted run",
                )
        if self.accelerator.is_main_process:
            self.metrics = MetricsFile(Path(self.config.output_dir) / "metrics.csv", after=self.progress.step)

    def rehearse(self) -> None:
        """Runs the longest rows forward and backward once, so that a lack of memory shows before the first step."""
        longest = sorted(self.stream.examples, key=lambda row: -len(row.input_ids))[: self.config.batch_size]
        with torch.set_grad_enabled(self.run_file.method.needs_gradients):
            value, _ = self.loss(**self.collate(longest))
            if torch.is_grad_enabled():
                self.accelerator.backward(value)
        self.optimizer.zero_grad(set_to_none=True)
        checkpoint.set_rng_state(self.boundary[1])
        self.reporter.message(
            "info", f"the longest rows ({len(longest[0].input_ids)} tokens) fit", peak_memory_bytes=peak_memory()
        )

    def run(self) -> bool:
        """Trains to the end.

        Returns:
            False when a stop was asked for; the state is then saved.

        Raises:
            RunError: The loss, the gradient or the loss on the held-out rows is not finite.
        """
        try:
            while True:
                if self.progress.pending is not None:
                    self._finish_step(self.progress.pending)
                if self.progress.step >= self.total or self.progress.stopped_early:
                    break
                self._check()
                self._step()
        except Interrupted:
            self.optimizer.zero_grad(set_to_none=True)
            if self.progress.step:
                self._save(stopping=True)
            return False
        if self.saved_step != self.progress.step:
            self._save()
        return True

    def restore_best(self) -> None:
        """Puts the parameters of the best evaluation back into the model."""
        best = self.progress.best_step
        if best is None or best == self.progress.step:
            return
        saved = checkpoint.load(self.root / f"step-{best:08d}")
        snapshot.restore_model(self.model, saved.tensors)

    def _check(self) -> None:
        """Raises ``Interrupted`` on every process when a stop was asked for on any."""
        if any(self._sum([float(self.stop.requested)])):
            raise Interrupted

    def _sum(self, values: list[float]) -> list[float]:
        """Sums over processes, exact for whole numbers below 2**53."""
        if self.processes == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.accelerator.device)
        summed: list[float] = self.accelerator.reduce(tensor).tolist()
        return summed

    def _step(self) -> None:
        """One optimizer step; leaves what it measured in ``progress.pending``."""
        started = time.perf_counter()
        progress = self.progress
        batches = next(self.stream)
        counts = [
            float(sum(row.trained for rows in batches for row in rows)),
            float(sum(len(row.input_ids) for rows in batches for row in rows)),
        ]
        trained, read = (int(count) for count in self._sum(counts))
        scale = factor(progress.step, total=self.total, warmup=self.warmup, schedule=self.config.schedule)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * scale
        measured: dict[str, Any] = {}

        def closure() -> Tensor:
            loss, hits = self._micro_batches(batches, trained)
            if torch.is_grad_enabled():
                norm = self.accelerator.clip_grad_norm_(self.parameters, self.config.clip_norm or math.inf)
                measured["grad_norm"] = float(norm)
            measured.update(train_loss=float(loss), train_mean_token_accuracy=float(hits))
            if self.run_file.method.needs_gradients:
                self._check_finite(measured)
            return loss

        loss: Any = self.optimizer.step(closure)  # type: ignore[arg-type]  # torch's stubs want a float
        measured["train_loss"] = float(loss)
        if not math.isfinite(measured["train_loss"]):
            del measured["train_loss"]  # Of a step that was skipped; there is no such number in JSON.
        measured.update(self.measured())
        self.optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        progress.trained_tokens += trained
        seconds = time.perf_counter() - started
        self.meter.step(seconds, read)
        progress.pending = {**measured, "learning_rate": self.peaks[0] * scale}
        self.boundary = self._capture()

    def _micro_batches(self, batches: Sequence[list[Example]], tokens: int) -> tuple[Tensor, Tensor]:
        """Runs a step's micro-batches.

        Args:
            batches: This process's share of the step.
            tokens: Trained tokens of the whole step, over all processes.

        Returns:
            Mean loss and share of hits per trained token of the whole step, float64 scalars.
        """
        learn = torch.is_grad_enabled()
        if learn:
            self.optimizer.zero_grad(set_to_none=True)
        totals = torch.zeros(2, dtype=torch.float64, device=self.accelerator.device)
        for index, rows in enumerate(batches):
            self._check()
            started = time.perf_counter()
            last = index == len(batches) - 1
            with nullcontext() if last or not learn else self.accelerator.no_sync(self.loss):
                loss, hits = self.loss(**self.collate(rows))
                if learn:
                    # Processes average their gradients: times their number makes it the sum that the mean needs.
                    self.accelerator.backward(loss * (self.processes / tokens))
            totals += torch.stack([loss.detach(), hits]).double()
            self.meter.micro_batch(started)
        totals = self.accelerator.reduce(totals) / tokens
        return totals[0], totals[1]

    def _check_finite(self, measured: dict[str, Any]) -> None:
        for name in ("train_loss", "grad_norm"):
            value = measured.get(name, 0.0)
            if not math.isfinite(value):
                what = "the loss" if name == "train_loss" else "the norm of the gradient"
                raise self._non_finite(
                    f"{what} became {value} in step {self.progress.step + 1}; the step was not taken"
                )

    def _non_finite(self, found: str, rows: str = "this step") -> RunError:
        kept = f"the checkpoint of step {self.saved_step} is kept" if self.saved_step else "none was saved yet"
        hint = "" if resolve_dtype(self.config.dtype) == "float32" else " or set dtype: float32"
        return RunError(
            f"{found}, and {kept}. Lower learning_rate or clip_norm{hint}, or look for broken rows in {rows}",
            code="non_finite",
            param="learning_rate",
        )

    def _finish_step(self, measured: dict[str, Any]) -> None:
        """Evaluates if it is time, reports the step, and saves if it is time."""
        config, progress = self.config, self.progress
        step, last = progress.step, progress.step == self.total
        improved = False
        if self.held_out and (step % self.eval_every == 0 or last):
            score = evaluate(
                self.loss,
                self.held_out,
                size=config.batch_size,
                collate=self.collate,
                accelerator=self.accelerator,
                check=self._check,
            )
            if not math.isfinite(score.loss):
                # Kept as the best, it would never be beaten: no number is lower than NaN.
                when = f"after step {step}" if step else "before the first step"
                raise self._non_finite(
                    f"the loss on the held-out rows is {score.loss} {when}; this state was not saved", "eval_file"
                )
            measured = {**measured, "valid_loss": score.loss, "valid_mean_token_accuracy": score.accuracy}
            if step:
                improved = self._judge(score.loss)
        progress.pending = None
        self._report(step, measured)
        if step and (improved or last or step % self.save_every == 0):
            self._save(metrics=measured)

    def _judge(self, loss: float) -> bool:
        """Whether an evaluation is the best so far; ends the run when too many were not."""
        progress, config = self.progress, self.config
        if progress.best_loss is None or loss < progress.best_loss - config.early_stopping_delta:
            progress.best_loss, progress.best_step, progress.stale = loss, progress.step, 0
            return True
        progress.stale += 1
        if config.early_stopping_patience is not None and progress.stale >= config.early_stopping_patience:
            progress.stopped_early = True
            self.reporter.message(
                "info",
                f"stopped early at step {progress.step}: no lower validation loss than that of step "
                f"{progress.best_step} in {progress.stale} evaluations",
            )
        return False

    def _report(self, step: int, measured: dict[str, Any]) -> None:
        if self.metrics is not None and step:
            self.metrics.add({"step": step, "train_accuracy": measured.get("train_mean_token_accuracy"), **measured})
        if step % self.config.log_every and step != self.total and "valid_loss" not in measured:
            return
        speed = {"tokens_per_second": round(self.meter.tokens_per_second, 1)} if step else {}
        self.reporter.emit("metric", step=step, **measured, **speed)
        self.reporter.emit(
            "progress",
            step=step,
            total_steps=self.total,
            trained_tokens=self.progress.trained_tokens,
            eta_seconds=self.meter.remaining(self.total - step),
            peak_memory_bytes=peak_memory(),
            micro_batch_seconds=round(self.meter.longest_micro_batch, 4),
            save_seconds=round(self.meter.last_save, 4),
        )

    def _capture(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Data cursor and random generators as they are now, between two steps."""
        return self.stream.state(), checkpoint.rng_state()

    def _save(self, *, metrics: dict[str, Any] | None = None, stopping: bool = False) -> None:
        """Saves the state after the last whole step; every process takes part, the main one writes.

        Args:
            metrics: What that step measured, for the event.
            stopping: Leave out the servable form where it would take long: the run has been told to stop.
        """
        if stopping and self.saved_step == self.progress.step and self.progress.pending is None:
            return
        started = time.perf_counter()
        cursor, generators = self.boundary
        everyone = gather_object([generators])
        step = self.progress.step
        if self.accelerator.is_main_process:
            tensors, optimizer = snapshot.tensors(self.model, self.optimizer)
            state = {
                "progress": asdict(self.progress),
                "stream": cursor,
                "rng": everyone,
                "optimizer": optimizer,
                "signature": self.signature,
                "adjustable": self.run_file.adjustable,
                "threads": self.config.cpu_threads(),
            }
            # Whole weights take long to write, and those of scales more than all that a checkpoint holds.
            makes = self.run_file.method.makes
            serve = makes == "adapter" or (makes == "weights" and not stopping)
            path = checkpoint.save(
                self.root,
                step=step,
                tensors=tensors,
                state=state,
                keep=self._kept(step),
                extra=self.servable if serve else None,
            )
            self.meter.last_save = time.perf_counter() - started
            self.reporter.emit(
                "artifact",
                artifact="checkpoint",
                path=str(path),
                step=step,
                servable=serve,
                save_seconds=round(self.meter.last_save, 4),
                metrics=metrics or {},
            )
        self.saved_step = step
        self.accelerator.wait_for_everyone()

    def _kept(self, step: int) -> set[int]:
        """Steps whose checkpoints stay when that of ``step`` is written: the newest, and the best."""
        here = sorted(int(path.name.removeprefix("step-")) for path in self.root.glob("step-*"))
        newest = sorted({*here, step})[-self.config.keep_checkpoints :]
        best = self.progress.best_step
        return {*newest, step} if best is None else {*newest, step, best}

    def _check_signature(self, saved: dict[str, Any]) -> None:
        # Without held-out rows in the checkpoint, or in one of an earlier version, any may be evaluated from here on.
        known = self.signature if "eval_file" in saved else self.signature | {"eval_file": None}
        names = dict.fromkeys((*self.signature, *saved))
        changed = [name for name in names if known.get(name) != saved.get(name)]
        if changed:
            told = [_methods(saved[name], known[name]) if name == "method" else name for name in changed]
            raise RunError(
                f"the checkpoints in {self.root} belong to a run with other {', '.join(told)}; give a fresh "
                "output_dir, or remove them",
                code="checkpoint_mismatch",
                param="output_dir",
            )


def _methods(saved: Any, known: Any) -> str:
    """Which settings of the method differ, with both values; of another method, only its name."""
    if saved.get("name") != known.get("name"):
        return f"method ({saved.get('name')} there, {known.get('name')} here)"
    names = [name for name in dict.fromkeys((*known, *saved)) if known.get(name) != saved.get(name)]
    return ", ".join(f"method.{name} ({saved.get(name)} there, {known.get(name)} here)" for name in names)

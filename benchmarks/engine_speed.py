"""The embedded engine: steering's cost, what a batch gains, one stream against ``generate``, chat beside a job.

One engine process on two threads; prompts are the demo's tickets, greedy, a fixed number of new tokens. Every ratio is
taken within one repetition; repetitions are interleaved.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from benchmarks import sft_rows
from benchmarks.report import Report, ratio
from core.models.load import load, resolve
from demo import tickets
from service.engines.base import Message, Request, Sampling, Steering, SteeringTerm
from service.engines.options import EngineOptions
from service.engines.transformers_engine import TransformersEngine
from steering.vector import SteeringVector

THREADS = 2
STREAMS = 8


def request(index: int, base: str, tokens: int, steering: Steering | None = None) -> Request:
    """A chat on one ticket that makes exactly ``tokens`` tokens where the model does not end its turn."""
    system, question, _ = tickets.rows(tickets.TEST)[index % 40]
    return Request(
        id=f"bench-{index}-{time.monotonic_ns()}",
        base=base,
        prompt=(
            Message(system["role"], system["content"]),
            Message("user", "Write a long story. " + question["content"]),
        ),
        sampling=Sampling(max_tokens=tokens, temperature=0.0),
        steering=steering,
    )


async def answer(engine: TransformersEngine, what: Request) -> int:
    """Tokens of one answer."""
    made = 0
    async for chunk in engine.generate(what):
        made = chunk.completion_tokens
    return made


async def speed(engine: TransformersEngine, requests: list[Request], *, together: bool) -> float:
    """New tokens per second over all requests, at once or one after another."""
    began = time.perf_counter()
    if together:
        made = sum(await asyncio.gather(*(answer(engine, r) for r in requests)))
    else:
        made = 0
        for one in requests:
            made += await answer(engine, one)
    return made / (time.perf_counter() - began)


def plain_generate(directory: str, prompts: list[Request]) -> tuple[object, list[list[int]]]:
    """A transformers model and the token ids of the prompts."""
    from core.data.chat import prompt_ids

    torch.set_num_threads(THREADS)
    loaded = load(directory)
    ids = [prompt_ids(r.prompt, loaded.tokenizer) for r in prompts if not isinstance(r.prompt, str)]
    return loaded.model, ids


def generate_speed(model: object, ids: list[list[int]], tokens: int) -> float:
    """New tokens per second of ``model.generate``, one prompt after another."""
    began, made = time.perf_counter(), 0
    with torch.inference_mode():
        for prompt in ids:
            tensor = torch.tensor([prompt])
            out = model.generate(  # type: ignore[attr-defined]
                tensor, attention_mask=torch.ones_like(tensor), max_new_tokens=tokens, do_sample=False
            )
            made += out.shape[1] - len(prompt)
    return made / (time.perf_counter() - began)


def vector_file(directory: str, folder: Path, layers: list[int]) -> Path:
    """A random steering vector at ``layers``."""
    loaded = load(directory)
    draw = torch.Generator().manual_seed(0)
    width = loaded.model.get_input_embeddings().embedding_dim
    vector = SteeringVector(
        directions={layer: torch.randn(width, generator=draw) for layer in layers},
        site="block",
        fingerprint=loaded.fingerprint,
        base=directory,
        method="random",
        data_hash="",
    )
    path = folder / "vector.safetensors"
    vector.save(path)
    return path


async def measure(report: Report, base: str, *, tokens: int, repetitions: int, layers: list[int], job: bool) -> None:
    """All arms; the engine's process is started once and warmed up."""
    directory = str(resolve(base))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = vector_file(directory, folder, layers)
        # Weak, so that steered answers end where unsteered ones do: what an addition costs does not depend on its size.
        steering = Steering((SteeringTerm(str(path), 0.01, None, "all"),))
        engine = TransformersEngine(directory, EngineOptions(threads=THREADS))
        eight = [request(i, directory, tokens) for i in range(STREAMS)]
        model, ids = plain_generate(directory, eight[:2])
        found: dict[str, list[float]] = {}
        try:
            await speed(engine, eight[:1], together=True)
            generate_speed(model, ids[:1], 4)
            for repetition in range(repetitions):
                arms = {
                    "batch of 8": await speed(engine, fresh(eight), together=True),
                    "batch of 8, steered": await speed(engine, fresh(eight, steering), together=True),
                    "8 one after another": await speed(engine, fresh(eight), together=False),
                    "one stream": await speed(engine, fresh(eight[:2]), together=False),
                    "transformers.generate": await asyncio.to_thread(generate_speed, model, ids, tokens),
                }
                report.row(repetition=repetition, **{k: round(v, 2) for k, v in arms.items()})
                for arm, value in arms.items():
                    found.setdefault(arm, []).append(value)
            del model
            report.row(medians=True, **{k: round(median(v), 2) for k, v in found.items()})
            report.claim(
                "steered-vs-unsteered-tokens-per-second",
                ">= 0.97",
                ratio(found["batch of 8, steered"], found["batch of 8"]),
            )
            report.claim("concurrent-8-vs-serial", ">= 3", ratio(found["batch of 8"], found["8 one after another"]))
            report.claim(
                "engine-vs-transformers-generate",
                ">= 0.95",
                ratio(found["one stream"], found["transformers.generate"]),
            )
            if job:
                report.claim("chat-while-training", ">= 0.3", await beside(engine, base, eight, folder, report))
        finally:
            await engine.close()


def fresh(requests: list[Request], steering: Steering | None = None) -> list[Request]:
    """The same requests under new ids."""
    return [
        Request(
            id=f"{r.id}-{time.monotonic_ns()}", base=r.base, prompt=r.prompt, sampling=r.sampling, steering=steering
        )
        for r in requests
    ]


async def beside(engine: TransformersEngine, base: str, eight: list[Request], folder: Path, report: Report) -> float:
    """Tokens per second of one chat stream beside a LoRA job on the same cores, over the same alone."""
    data = folder / "rows.jsonl"
    sft_rows.write(data, 64, 0)
    run = folder / "run.yaml"
    run.write_text(
        f"model: {base}\ntrain_file: {data}\noutput_dir: {folder / 'run'}\nmax_steps: 1000\nbatch_size: 8\n"
        f"threads: {THREADS}\nmethod: lora\n",
        encoding="utf-8",
    )
    alone = [await speed(engine, fresh(eight[:2]), together=False) for _ in range(3)]
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(THREADS)}
    job = subprocess.Popen(
        [sys.executable, "-m", "trainers", str(run)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        events = folder / "run" / "events.jsonl"
        while not (events.exists() and steps(events)):
            assert job.poll() is None, "the job ended"
            await asyncio.sleep(1)
        before = steps(events)
        began, busy, during = time.perf_counter(), list[float](), 0
        # A step of the job takes seconds: chat goes on until some were taken, so that it is the two side by side.
        while len(busy) < 3 or (during < 3 and time.perf_counter() - began < 300):
            busy.append(await speed(engine, fresh(eight[:2]), together=False))
            during = steps(events) - before
        assert job.poll() is None and during, "the job stood still"
    finally:
        job.kill()
        job.wait()
    report.row(
        chat_alone=round(median(alone), 2), chat_beside_a_job=round(median(busy), 2), steps_of_the_job_meanwhile=during
    )
    return median(busy) / median(alone)


def steps(events: Path) -> int:
    """Optimizer steps that a run has reported."""
    return events.read_text(encoding="utf-8").count('"train_loss"')


def main() -> None:
    """Measure, print, and write the results (not with ``--quick``)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tiny model, once; writes nothing")
    options = parser.parse_args()
    report = Report("engine_speed", seeds=[0])
    if options.quick:
        asyncio.run(measure(report, "tiny-llama", tokens=16, repetitions=1, layers=[1], job=True))
        return
    asyncio.run(
        measure(report, "smollm2-135m-instruct", tokens=48, repetitions=5, layers=[12, 13, 14, 15, 16], job=True)
    )
    report.write()


if __name__ == "__main__":
    main()

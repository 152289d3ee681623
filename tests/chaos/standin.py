"""A run for tests of the machinery: what `python -m trainers` does to the outside, with the standard library only.

The training file says how to behave; its first line is a JSON object:
``steps`` (default 3), ``seconds`` a step (0.01), ``save_every`` (1), ``end`` one of ``ok``, ``exit:N``, ``signal:N``,
``value_error``, ``memory``, ``print:N`` (bytes), and ``stubborn`` (ignores SIGTERM), ``tree`` (starts descendants),
``lines`` (prints so many, numbered, 5,000 a second), ``fail_attempts`` (ends badly only in that many first attempts;
counted in a file, so it survives the process).

As ``standin.py --model ...`` it is the validator: the line ``"valid": false`` makes it refuse the file.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path


def behaviour(path: Path) -> dict:
    return json.loads(path.read_text().splitlines()[0])


def validate(arguments: dict[str, str]) -> int:
    wanted = behaviour(Path(arguments["--train"]))
    time.sleep(wanted.get("validation_seconds", 0))
    problem = {"file": "training_file", "line": 7, "code": "missing_content", "message": "no content"}
    good = wanted.get("valid", True)
    verdict = {
        "ok": good,
        "param": None if good else "training_file",
        "code": None if good else problem["code"],
        "rows": 100,
        "problems": [] if good else [problem],
        "problem_count": 0 if good else 1,
        "warnings": [],
        "warning_count": 0,
    }
    Path(arguments["--out"]).write_text(json.dumps(verdict))
    return 0 if good else 2


class Events:
    def __init__(self, path: Path) -> None:
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith(b"\n")]
        if len(whole) < len(lines):
            path.write_bytes(b"".join(whole))
        self.seq = len(whole)
        self.file = path.open("a")

    def emit(self, kind: str, **data: object) -> None:
        self.seq += 1
        self.file.write(json.dumps({"seq": self.seq, "time": time.time(), "kind": kind, **data}) + "\n")
        self.file.flush()


def tree() -> None:
    """Five descendants: plain, in its own session, deaf to SIGTERM, without environment, holding the pipe."""
    sleep = "import time; time.sleep(600)"
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"
    subprocess.Popen([sys.executable, "-S", "-c", sleep])
    subprocess.Popen([sys.executable, "-S", "-c", sleep], start_new_session=True)
    subprocess.Popen([sys.executable, "-S", "-c", deaf])
    subprocess.Popen([sys.executable, "-S", "-c", deaf], start_new_session=True, env={})
    subprocess.Popen([sys.executable, "-S", "-c", deaf], start_new_session=True, stdout=sys.stdout, stderr=sys.stderr)


def put_adapter(folder: Path, **settings: object) -> None:
    """The least that passes for an adapter of rank 4 that a run of ``lora`` left."""
    folder.mkdir(parents=True, exist_ok=True)
    header = b'{"w":{"dtype":"F32","shape":[8],"data_offsets":[0,32]}}'
    files = {
        "adapter_model.safetensors": len(header).to_bytes(8, "little") + header + bytes(32),
        "adapter_config.json": json.dumps({"peft_type": "LORA", "r": 4}).encode(),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    manifest = {
        "format": "gradhelm-artifact/1",
        "kind": "adapter",
        "base": "tiny-llama",
        "base_fingerprint": "sha256:0",
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
        "card": {"run": {"method": {"name": "lora", "rank": 4, "alpha": 8.0, "targets": ["all-linear"], **settings}}},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


def end(how: str, events: Events) -> int:
    name, _, value = how.partition(":")
    if name == "exit":
        return int(value)
    if name == "signal":
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.kill(os.getpid(), int(value))
        time.sleep(60)
    if name == "value_error":
        events.emit("error", code="invalid_value", message="a bad value", param=None, retryable=False)
        return 2
    if name == "memory":
        resource.setrlimit(resource.RLIMIT_AS, (256 << 20, 256 << 20))
        return len(bytearray(1 << 30))
    return 0


def run() -> int:
    stop: list[int] = []
    text = Path("run.yaml").read_text()
    source = next(line.split(": ", 1)[1] for line in text.splitlines() if line.startswith("train_file: "))
    wanted = behaviour(Path(source))
    signal.signal(signal.SIGTERM, signal.SIG_IGN if wanted.get("stubborn") else lambda *_: stop.append(1))
    # Two runs of one job at once must not happen: whoever finds the lock taken leaves a mark for the test.
    twin = open("twin.lock", "w")
    try:
        fcntl.flock(twin, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        Path("DOUBLE").touch()
        return 1
    with open("starts", "a") as starts:
        starts.write(f"{os.getpid()} {time.time()}\n")
    attempt = len(Path("starts").read_text().splitlines())
    events = Events(Path("events.jsonl"))
    if wanted.get("tree"):
        tree()
    saved = Path("step")
    step = int(saved.read_text()) if saved.exists() else 0
    total = wanted.get("steps", 3)
    print(f"attempt {attempt} begins after step {step}", flush=True)
    while step < total:
        if stop:
            saved.write_text(str(step))
            print("stopped", flush=True)
            return 3
        time.sleep(wanted.get("seconds", 0.01))
        step += 1
        events.emit("metric", step=step, train_loss=1.0 / step)
        events.emit("progress", step=step, total_steps=total, trained_tokens=10 * step, eta_seconds=0.0,
                    micro_batch_seconds=wanted.get("seconds", 0.01), save_seconds=0.0)  # fmt: skip
        if step % wanted.get("save_every", 1) == 0:
            partial = Path("step.partial")
            partial.write_text(str(step))
            partial.replace(saved)
            where = Path("checkpoints") / f"step-{step:08d}"
            put_adapter(where / "adapter")
            events.emit("artifact", artifact="checkpoint", path=str(where.resolve()), step=step, servable=True)
    began = time.monotonic()
    for number in range(wanted.get("lines", 0)):
        print(f"line {number:06d}", flush=number % 50 == 49)
        if number % 50 == 49:
            time.sleep(max(0.0, began + number / 5000 - time.monotonic()))
    how = wanted.get("end", "ok")
    if how.startswith("print:"):
        line = b"y" * 79 + b"\n"
        block = line * 1000
        for _ in range(int(how.partition(":")[2]) // len(block)):
            sys.stdout.buffer.write(block)
        sys.stdout.flush()
    elif how != "ok" and attempt <= wanted.get("fail_attempts", 10**9):
        code = end(how, events)
        if code:
            print("the last words", flush=True)
            return code
    artifact = Path("artifact")
    put_adapter(artifact)
    Path("metrics.csv").write_text("step,train_loss\n1,1.0\n")
    events.emit("artifact", artifact="adapter", path=str(artifact.resolve()))
    return 0


if __name__ == "__main__":
    if "--train" in sys.argv:
        sys.exit(validate(dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))))
    sys.exit(run())

"""Two processes give what one gives, replicated (DDP) and sharded by rows (FSDP2)."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[4]


# Two interpreters that import torch.distributed and run some twenty short trainings: about half a minute.
@pytest.mark.slow
def test_two_processes_are_one() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": str(ROOT),
    }
    script = str(Path(__file__).with_name("sharded.py"))
    processes = [
        subprocess.Popen(
            [sys.executable, script], cwd=ROOT, env={**shared, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)[-6000:]

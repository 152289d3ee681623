"""Hub snapshots, against a small server on the loopback: what is asked for, what is kept, and what never is."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from core.models.policy import PolicyError, check_endpoint
from core.models.ref import parse_ref
from core.models.resolve import arriving

ROOT = Path(__file__).parents[4]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """One repository, ``org/name``, from a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.asked: list[str] = []
        self.sent: list[str] = []
        self.commit = COMMIT
        self.stalls, self.lists = False, True
        self.go_on = threading.Event()


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path, commit = self.path.partition("?")[0], self.server.commit
        self.server.asked.append(path)
        files = {str(file.relative_to(self.server.folder)): file for file in self.server.folder.rglob("*")}
        raw, kind, headers = b'{"error": "Repository not found"}', "application/json", {"X-Error-Code": "RepoNotFound"}
        status = 404
        if path.startswith("/api/models/org/name/revision/"):
            listed = [{"rfilename": name} for name in sorted(files)]
            raw, headers, status = (
                json.dumps({"id": "org/name", "sha": self.server.commit, "siblings": listed}).encode(),
                {},
                200,
            )
        elif path.startswith("/api/models/org/name/tree/") and self.server.lists:
            tree = [{"type": "file", "path": n, "size": f.stat().st_size, "oid": "0" * 40} for n, f in files.items()]
            raw, headers, status = json.dumps(tree).encode(), {}, 200
        elif path.startswith(f"/org/name/resolve/{commit}/") and path.rpartition(f"/{commit}/")[2] in files:
            raw, kind = files[path.rpartition(f"/{commit}/")[2]].read_bytes(), "application/octet-stream"
            headers, status = {"ETag": f'"{hashlib.sha1(raw).hexdigest()}"', "X-Repo-Commit": commit}, 200
        self.send_response(status)
        for key, value in {**headers, "Content-Type": kind, "Content-Length": str(len(raw))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            if path.endswith(".safetensors") and self.server.stalls:
                self.server.go_on.wait(60)
            self.server.sent.append(path.rpartition("/")[2])
            with suppress(OSError):
                self.wfile.write(raw)

    def log_message(self, format: str, *args: object) -> None:
        """Silence."""


@pytest.fixture
def hub(tiny_llama: Path, tmp_path: Path) -> Iterator[Hub]:
    shutil.copytree(tiny_llama, tmp_path / "repository")
    server = Hub(tmp_path / "repository")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.go_on.set()
    server.shutdown()
    thread.join()
    server.server_close()


def pull(hub: Hub, reference: str, home: Path, *, listed: bool = True) -> subprocess.CompletedProcess[str]:
    """Resolves a reference in a process whose Hub is the small server."""
    argv, env = command(hub, reference, home, listed=listed)
    return subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)


def command(hub: Hub, reference: str, home: Path, *, listed: bool = True) -> tuple[list[str], dict[str, str]]:
    """What ``pull`` starts, and its environment."""
    address = f"127.0.0.1:{hub.server_port}"
    env = {**os.environ, "HF_ENDPOINT": f"http://{address}", "HF_HUB_OFFLINE": "0", "HF_HOME": str(home / "hf")}
    env |= {"GRADHELM_HOME": str(home), "GRADHELM_HUB_HOSTS": address if listed else "", "HF_HUB_DISABLE_XET": "1"}
    script = "import sys\nfrom core.models.resolve import resolve\nprint(resolve(sys.argv[1]))"
    return [sys.executable, "-c", script, reference], env


def killed_pull(hub: Hub, home: Path) -> Path:
    """A pull that is killed when everything but the weights has arrived; the folder that it leaves."""
    hub.stalls = True
    part = home / "models" / "hub" / ".org--name@main.+part"
    small = {path.name for path in hub.folder.iterdir() if path.suffix == ".json"}
    argv, env = command(hub, "org/name", home)
    with subprocess.Popen(argv, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
        deadline = time.monotonic() + 60
        notes = part / ".cache" / "huggingface" / "download"
        while not all((notes / f"{name}.metadata").is_file() for name in small):
            assert time.monotonic() < deadline and child.poll() is None
            time.sleep(0.01)
        child.kill()
    assert arriving(parse_ref("org/name"), home) > 0
    hub.stalls = False
    hub.go_on.set()
    return part


def test_a_pull_that_was_killed_goes_on_from_the_files_that_arrived(hub: Hub, tmp_path: Path) -> None:
    part = killed_pull(hub, tmp_path / "home")
    assert part.is_dir()
    done = pull(hub, "org/name", tmp_path / "home")
    assert done.returncode == 0, done.stderr
    assert hub.sent.count("tokenizer.json") == hub.sent.count("config.json") == 1
    directory = tmp_path / "home" / "models" / "hub" / "org--name@main"
    for file in hub.folder.iterdir():
        assert (directory / file.name).read_bytes() == file.read_bytes()
    assert sorted(path.name for path in directory.iterdir()) == sorted(path.name for path in hub.folder.iterdir())
    assert sorted(path.name for path in directory.parent.iterdir()) == [".org--name@main.lock", "org--name@main"]
    assert arriving(parse_ref("org/name"), tmp_path / "home") == 0


def test_what_arrived_of_another_commit_is_not_used(hub: Hub, tmp_path: Path) -> None:
    part = killed_pull(hub, tmp_path / "home")
    (part / "model-00001-of-00002.safetensors").write_bytes(b"of the earlier commit")
    hub.commit = COMMIT[::-1]
    done = pull(hub, "org/name", tmp_path / "home")
    assert done.returncode == 0, done.stderr
    assert hub.sent.count("tokenizer.json") == 2
    directory = tmp_path / "home" / "models" / "hub" / "org--name@main"
    assert sorted(path.name for path in directory.iterdir()) == sorted(path.name for path in hub.folder.iterdir())


def test_what_arrived_is_not_taken_for_the_whole_where_the_hub_cannot_be_asked(hub: Hub, tmp_path: Path) -> None:
    part = killed_pull(hub, tmp_path / "home")
    shutil.rmtree(part / ".cache" / "huggingface" / "trees", ignore_errors=True)
    for listing in part.glob(".cache/huggingface/**/*tree*"):
        listing.unlink(missing_ok=True)
    hub.lists = False
    done = pull(hub, "org/name", tmp_path / "home")
    assert done.returncode == 1 and "could not download org/name" in done.stderr
    assert part.is_dir() and not (part.parent / "org--name@main").exists()
    hub.lists = True
    assert pull(hub, "org/name", tmp_path / "home").returncode == 0


def test_a_snapshot_holds_only_what_may_be_read(hub: Hub, tmp_path: Path) -> None:
    (hub.folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    (hub.folder / "modeling_evil.py").write_text("raise SystemExit")
    (hub.folder / "consolidated.safetensors").write_bytes(b"not needed")
    done = pull(hub, "org/name", tmp_path / "home")
    assert done.returncode == 0, done.stderr
    directory = tmp_path / "home" / "models" / "hub" / "org--name@main"
    assert done.stdout.strip() == str(directory)
    names = {path.name for path in directory.iterdir()}
    assert names == {path.name for path in hub.folder.iterdir()} - {
        "pytorch_model.bin",
        "modeling_evil.py",
        "consolidated.safetensors",
    }
    assert (directory / "model.safetensors").read_bytes() == (hub.folder / "model.safetensors").read_bytes()
    assert not [path for path in hub.asked if path.endswith((".bin", ".py", "consolidated.safetensors"))]
    before = len(hub.asked)
    assert pull(hub, "org/name", tmp_path / "home").returncode == 0
    assert len(hub.asked) == before


def test_a_snapshot_that_the_policy_refuses_leaves_nothing(hub: Hub, tmp_path: Path) -> None:
    config = json.loads((hub.folder / "config.json").read_text())
    (hub.folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoConfig": "evil.Evil"}}))
    done = pull(hub, "org/name@main", tmp_path / "home")
    assert done.returncode == 1
    assert "auto_map" in done.stderr
    assert [path.name for path in (tmp_path / "home" / "models" / "hub").iterdir()] == [".org--name@main.lock"]


def test_a_repository_that_is_not_there_is_a_value_error(hub: Hub, tmp_path: Path) -> None:
    done = pull(hub, "org/missing", tmp_path / "home")
    assert "NotFetched: could not download org/missing" in done.stderr


def test_a_host_that_nobody_listed_sees_no_connection(hub: Hub, tmp_path: Path) -> None:
    done = pull(hub, "org/name", tmp_path / "home", listed=False)
    assert "GRADHELM_HUB_HOSTS" in done.stderr
    assert hub.asked == []


@pytest.mark.parametrize(
    "url",
    [
        "http://huggingface.co",
        "https://huggingface.co.evil.example",
        "https://huggingface.co@evil.example",
        "https://evil.example/huggingface.co",
        "https://huggingface.co\\@evil.example",
        "https://huggingface.co:444",
        "https://user:pass@huggingface.co",
        "https://HUGGINGFACE.CO",
        "https://169.254.169.254",
        "https://[::1]",
        "https://2852039166",
        "https://huggingface.co/path",
        "https://huggingface.co\n",
        "file:///etc/passwd",
        "",
    ],
)
def test_only_the_hub_itself_is_allowed_by_default(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRADHELM_HUB_HOSTS", raising=False)
    with pytest.raises(PolicyError, match="GRADHELM_HUB_HOSTS"):
        check_endpoint(url)
    assert check_endpoint("https://huggingface.co/") == "https://huggingface.co"
    monkeypatch.setenv("GRADHELM_HUB_HOSTS", "mirror.example, 10.0.0.1:8080")
    assert check_endpoint("https://mirror.example") == "https://mirror.example"
    assert check_endpoint("http://10.0.0.1:8080") == "http://10.0.0.1:8080"

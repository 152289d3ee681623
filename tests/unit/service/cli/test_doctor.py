"""Each finding of the doctor, on a machine made sick in that way."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from service.cli import checks
from service.jobs.lock import FolderLock
from tests.unit.service.cli.conftest import Run


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRADHELM_HOME", str(tmp_path))
    monkeypatch.delenv("GRADHELM_PORT", raising=False)
    return tmp_path


def test_a_key_that_others_can_read_fails(data: Path) -> None:
    assert checks.key_file().level == "ok"
    path = data / "admin.key"
    path.write_text("gh-x")
    path.chmod(0o644)
    finding = checks.key_file()
    assert finding.level == "fail"
    assert f"chmod 600 {path}" in finding.advice
    path.chmod(0o600)
    assert checks.key_file().level == "ok"
    path.rename(data / "elsewhere")
    path.symlink_to(data / "elsewhere")
    assert checks.key_file().level == "fail"


def test_a_folder_that_is_none_fails(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert checks.folder().level == "ok"
    (data / "file").write_text("")
    monkeypatch.setenv("GRADHELM_HOME", str(data / "file" / "home"))
    finding = checks.folder()
    assert finding.level == "fail"
    assert "GRADHELM_HOME" in finding.advice


def test_little_space_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    for free, level in ((1 << 20, "fail"), (2 << 30, "warn"), (9 << 30, "ok")):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: shutil._ntuple_diskusage(0, 0, free))
        assert checks.disk().level == level


def test_variables_that_the_server_would_refuse_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    assert checks.settings in checks.ALL and checks.settings().level == "ok"
    monkeypatch.setenv("GRADHELM_PORTT", "9000")
    finding = checks.settings()
    assert finding.level == "fail" and "did you mean GRADHELM_PORT?" in finding.found


def test_a_taken_port_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setenv("GRADHELM_PORT", str(taken.getsockname()[1]))
        finding = checks.port()
    assert finding.level == "warn"
    assert "--port 0" in finding.advice
    assert checks.port().level == "ok"


def test_a_running_server_is_found_and_its_lock_left_alone(data: Path) -> None:
    assert "none runs" in checks.server().found
    lock = FolderLock(data)
    lock.acquire()
    try:
        assert f"process {os.getpid()} serves" in checks.server().found
    finally:
        lock.release()
    assert "none runs" in checks.server().found
    lock.acquire()
    lock.release()
    (data / "server.lock").write_text("not JSON")
    assert "none runs" in checks.server().found


def test_openmp_is_judged_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    assert checks.openmp().level == "ok"
    monkeypatch.delenv("OMP_WAIT_POLICY")
    assert checks.openmp().level == "warn"


def test_libraries_that_do_not_load_fail_with_their_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "TORCH_PROBE", "raise ImportError('libgomp is missing')")
    finding = checks.torch()
    assert finding.level == "fail"
    assert "libgomp is missing" in finding.found
    assert "make install" in finding.advice


def test_all_is_printed_and_a_failure_is_the_exit_code(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> checks.Check:
        raise RuntimeError("no such thing")

    quick = (checks.python, checks.cpu, checks.memory, checks.extras, checks.key_file)
    monkeypatch.setattr(checks, "ALL", quick)
    assert run("doctor").code == 0
    listed = run("doctor", "--json")
    assert [entry["name"] for entry in listed.json] == ["python", "cpu", "memory", "extras", "admin key"]
    monkeypatch.setattr(checks, "ALL", (*quick, broken))
    result = run("doctor")
    assert result.code == 1
    assert "FAIL  broken       RuntimeError: no such thing" in result.out


def test_the_port_that_kubernetes_names_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADHELM_PORT", "tcp://10.0.0.1:1")
    assert "8000" in str(checks.port())

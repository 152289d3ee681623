"""Every way a server can fail becomes one message that says what to do."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from service.cli.client import Client, find_key, segment
from service.cli.errors import CliError, UsageProblem
from tests.unit.service.cli.conftest import Reply, Run, Script

LIST = "GET /v1/files"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_no_server_says_how_to_start_one(run: Run) -> None:
    result = run("files", "list", "--url", f"http://127.0.0.1:{free_port()}")
    assert result.code == 1
    assert "gradhelm serve" in result.err
    assert "Traceback" not in result.err
    assert result.out == ""


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://", ""])
def test_an_address_that_is_none_is_wrong_usage(run: Run, url: str) -> None:
    result = run("files", "list", "--url", url)
    assert result.code == 2
    assert "--url" in result.err


def test_an_error_of_the_server_is_shown_whole(run: Run, script: Script) -> None:
    error = {"error": {"message": "Not that.", "type": "invalid_request_error", "param": "model", "code": "bad_model"}}
    script.on(LIST, Reply(error, 400))
    result = run("files", "list", "--url", script.url)
    assert result.code == 1
    assert result.err.strip() == "error: Not that. (parameter: model) [bad_model]"


def test_no_key_and_a_wrong_key_are_told_apart(run: Run, script: Script) -> None:
    script.on(LIST, Reply({"error": {"message": "Key?", "code": "invalid_api_key"}}, 401))
    assert "No key was sent" in run("files", "list", "--url", script.url).err
    assert "not valid here" in run("files", "list", "--url", script.url, "--key", "gh-wrong").err


@pytest.mark.parametrize("body", [b"<html>", b"[1]", b"", b"\xff\xfe"])
@pytest.mark.parametrize("status", [200, 404, 502])
def test_another_program_on_the_port_is_no_traceback(run: Run, script: Script, body: bytes, status: int) -> None:
    script.on(LIST, Reply(body, status))
    result = run("files", "list", "--url", script.url)
    assert result.code == 1
    assert result.err.startswith("error: ")


def test_redirects_do_not_carry_the_key_away(run: Run, script: Script) -> None:
    script.on(LIST, Reply(b"", 307, {"Location": f"{script.url}/elsewhere"}))
    assert run("files", "list", "--url", script.url, "--key", "gh-x").code == 1
    assert [one.path.partition("?")[0] for one in script.asked] == ["/v1/files"]


def test_a_busy_server_says_when_to_come_back(run: Run, script: Script) -> None:
    script.on(LIST, Reply({"error": {"message": "Busy."}}, 429, {"Retry-After": "7"}))
    assert "wait 7 s" in run("files", "list", "--url", script.url).err


def test_pages_are_followed_to_the_limit(run: Run, script: Script) -> None:
    pages = [{"data": [{"id": "a"}, {"id": "b"}], "has_more": True}, {"data": [{"id": "c"}], "has_more": False}]
    script.on(LIST, *(Reply(page) for page in pages))
    result = run("files", "list", "--json", "--limit", 5, "--url", script.url)
    assert [row["id"] for row in result.json] == ["a", "b", "c"]
    assert [one.path for one in script.asked] == ["/v1/files?limit=5", "/v1/files?limit=3&after=b"]


def test_a_post_with_a_key_of_its_own_is_tried_again(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    script.on("POST /x", Reply({"error": {"message": "Busy."}}, 503), Reply({"id": 1}))
    with Client(script.url, "gh-x") as client:
        assert client.post("/x", {}, headers={"Idempotency-Key": "k"}) == {"id": 1}
        script.on("POST /x", Reply({"error": {"message": "Busy."}}, 503), Reply({"id": 1}))
        with pytest.raises(CliError, match="Busy"):
            client.post("/x", {})
    assert [one.headers.get("Idempotency-Key") for one in script.asked] == ["k", "k", None]


class TestKeys:
    """Which key goes where."""

    @pytest.fixture(autouse=True)
    def _home(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("GRADHELM_HOME", str(tmp_path))
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        (tmp_path / "admin.key").write_text("gh-admin\n")

    def test_the_admin_key_serves_this_machine_only(self) -> None:
        assert find_key("http://127.0.0.1:8000", None) == "gh-admin"
        assert find_key("http://localhost", None) == "gh-admin"
        assert find_key("http://[::1]:1", None) == "gh-admin"
        assert find_key("https://models.example", None) is None
        assert find_key("http://127.0.0.1.example", None) is None

    def test_a_given_key_wins(self) -> None:
        assert find_key("http://127.0.0.1", "gh-given") == "gh-given"

    def test_a_key_of_another_service_is_never_sent(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
        assert find_key("http://127.0.0.1", None) == "gh-admin"
        assert find_key("https://models.example", None) is None
        monkeypatch.setenv("OPENAI_API_KEY", "gh-ours")
        assert find_key("https://models.example", None) == "gh-ours"

    def test_no_file_no_key(self, tmp_path: Path) -> None:
        (tmp_path / "admin.key").write_bytes(b"\xff\xfe")
        assert find_key("http://127.0.0.1", None) is None
        (tmp_path / "admin.key").unlink()
        assert find_key("http://127.0.0.1", None) is None


def test_ids_become_one_segment() -> None:
    assert segment("org/name") == "org%2Fname"
    assert segment("ft:base:local:x:1:ckpt-step-2") == "ft:base:local:x:1:ckpt-step-2"
    assert segment("../../etc") == "..%2F..%2Fetc"
    for text in ("", ".", ".."):
        with pytest.raises(UsageProblem):
            segment(text)

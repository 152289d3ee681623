"""Creating jobs from the command line."""

from __future__ import annotations

import json
from pathlib import Path

from tests.unit.service.cli.conftest import Reply, Run, Script

CREATE = "POST /v1/fine_tuning/jobs"


def test_with_a_key_the_same_bytes_are_not_uploaded_twice(run: Run, script: Script, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(b"{}\n")
    listed = [{"id": f"file-{name}", "bytes": 3, "filename": "rows.jsonl"} for name in "cba"]
    script.on("GET /v1/files", Reply({"data": [*listed, {"id": "file-x", "bytes": 4, "filename": "rows.jsonl"}]}))
    script.on("GET /v1/files/file-a/content", Reply(b"{ \n"))
    script.on("GET /v1/files/file-b/content", Reply(b"{}\n"))
    script.on("GET /v1/files/file-c/content", Reply(b"{}\n"))
    script.on("POST /v1/files", Reply({"id": "file-new"}))
    script.on(CREATE, Reply({"id": "ftjob-1"}))
    create = ("jobs", "create", "--model", "m", "--file", rows, "--url", script.url)
    assert run(*create, "--idempotency-key", "k").code == 0
    assert run(*create).code == 0
    assert [json.loads(one.body)["training_file"] for one in script.sent(CREATE)] == ["file-b", "file-new"]
    script.on(CREATE, Reply({"error": {"message": "No."}}, 400))
    assert run(*create, "--idempotency-key", "k").code == 1
    assert not [one for one in script.asked if one.method == "DELETE"], "it was there before"


def test_a_suffix_that_is_none_is_said_in_words(run: Run, script: Script) -> None:
    said = run("jobs", "create", "--model", "m", "--file", "file-1", "--suffix", "my model!", "--url", script.url)
    assert said.code == 2 and "letters, digits, dots" in said.err and not script.asked


def test_what_lists_is_named_as_the_command(run: Run, script: Script) -> None:
    script.on("GET /v1/models/m", Reply({"error": {"message": "GET /v1/models lists what is here."}}, 404))
    assert "`gradhelm models list` lists what is here." in run("models", "get", "m", "--url", script.url).err


def test_a_model_that_was_deleted_is_marked_in_the_list(run: Run, script: Script) -> None:
    rows = [{"id": f"ftjob-{name}", "status": "succeeded", "fine_tuned_model": f"ft:{name}"} for name in "ab"]
    script.on("GET /v1/fine_tuning/jobs", Reply({"data": rows, "has_more": False}))
    assert "(deleted)" not in run("jobs", "list", "--url", script.url).out, "who may not see models is told nothing"
    script.on("GET /v1/models", Reply({"data": [{"id": "ft:a"}]}))
    shown = run("jobs", "list", "--url", script.url).out
    assert "ft:b (deleted)" in shown and "ft:a (deleted)" not in shown

"""Paths stay inside: one function, a corpus of about two hundred spellings, and the routes that take names."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.security.paths import inside

SECRET = "not for you"
_UP = ("..", "%2e%2e", "%2E%2e", ".%2e", "%252e%252e", "%25252e%25252e", "%c0%ae%c0%ae", "..;", "...", "....")
_SLASH = ("/", "%2f", "%2F", "%252f", "\\", "%5c", "%255c", "//", "/./", "%00/")
_HEAD = ("", "x/", "/", "./")
TRAVERSALS = [f"{head}{up}{slash}secret.txt" for head in _HEAD for up in _UP for slash in _SLASH][:320:2]
ODD = [
    "",
    ".",
    "..",
    "/",
    "//",
    "/etc/passwd",
    "~/.ssh/id_rsa",
    "C:\\secret.txt",
    "\\\\host\\share",
    "file:///etc/passwd",
    "secret.txt\x00.jsonl",
    "a\nb",
    "a\tb",
    "\x7f",
    "\ud800",
    "%ud800",
    "%00",
    "%0a",
    "%",
    "%%%",
    "%zz",
    "a" * 5000,
    "a/" * 2500,
    "%2e" * 5000,
    "é" * 300,
    "link",
    "link/secret.txt",
    "up/secret.txt",
    "../files-sibling/secret.txt",
    "x/../../files-sibling/secret.txt",
    "%2e%2e/files-sibling/secret.txt",
    "....//secret.txt",
    "..%00/secret.txt",
    ".. /secret.txt",
    "..\u2215secret.txt",
    "\uff0e\uff0e/secret.txt",
    "con",
    "file-ok/..",
    "file-ok/../../secret.txt",
    "secret.txt/",
]
CORPUS = TRAVERSALS + ODD


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder, with a secret beside it, a sibling that shares its prefix, and links that lead out."""
    root = tmp_path / "files"
    root.mkdir()
    (tmp_path / "secret.txt").write_text(SECRET)
    (tmp_path / "files-sibling").mkdir()
    (tmp_path / "files-sibling" / "secret.txt").write_text(SECRET)
    (root / "file-ok").write_text("yours")
    (root / "link").symlink_to(tmp_path / "secret.txt")
    (root / "up").symlink_to(tmp_path)
    return root


def test_the_corpus_is_as_large_as_it_says() -> None:
    assert len(set(CORPUS)) >= 195


def test_nothing_in_the_corpus_leads_outside(root: Path) -> None:
    for name in CORPUS:
        try:
            path = inside(root, name)
        except ValueError:
            continue
        assert path.is_relative_to(root.resolve()), name
        assert not path.is_file() or path.read_text() != SECRET, name


def test_a_plain_name_is_found(root: Path) -> None:
    assert inside(root, "file-ok").read_text() == "yours"
    assert inside(root, "a/b.txt") == root.resolve() / "a" / "b.txt"


@pytest.mark.parametrize("name", ["../files-sibling/secret.txt", "link", "up/secret.txt", "%252e%252e/secret.txt"])
def test_the_escapes_that_others_have_had(root: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"outside|must be relative"):
        inside(root, name)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(alphabet=st.one_of(st.sampled_from("./%\\25eEfFcC\x00~ "), st.characters()), max_size=80))
def test_no_text_leads_outside(root: Path, name: str) -> None:
    try:
        path = inside(root, name)
    except ValueError:
        return
    assert path.is_relative_to(root.resolve()) and path != root.resolve()


ROUTES = (
    "/v1/files/{}",
    "/v1/files/{}/content",
    "/v1/fine_tuning/jobs/{}",
    "/v1/fine_tuning/jobs/{}/logs",
    "/v1/fine_tuning/jobs/{}/events",
    "/v1/models/{}",
    "/v1/models/{}/content",
    "/v1/steering/vectors/{}",
    "/v1/steering/vectors/{}/content",
)


async def test_every_route_that_takes_a_name_answers_4xx(client: httpx.AsyncClient) -> None:
    asked = 0
    for name in CORPUS:
        raw = name.encode("utf-8", "surrogatepass")[:1500]
        for spelling in {quote(raw, safe=""), quote(raw, safe="/%")}:
            route = ROUTES[asked % len(ROUTES)]
            asked += 1
            answer = await client.get(route.format(spelling))
            # A name that is all dots and slashes is resolved by the client, and is then another route.
            listing = answer.status_code == 200 and '"object":"list"' in answer.text.replace(" ", "")
            assert 400 <= answer.status_code < 500 or listing, f"{route} {name!r}: {answer.status_code}"
            assert SECRET not in answer.text
    assert asked > 250


async def test_models_are_named_by_id_and_never_by_path(client: httpx.AsyncClient, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for name in (str(folder), f"{folder}/", "./model", "~/model", f"file://{folder}", "../model", f"ft:{folder}"):
        body = {"model": name, "messages": [{"role": "user", "content": "x"}]}
        answer = await client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found", name
        pulled = await client.post("/v1/models/pull", json={"model": name})
        assert pulled.status_code == 400 and pulled.json()["error"]["code"] == "invalid_model", name


@pytest.mark.parametrize(
    "name",
    [
        "http://169.254.169.254/latest",
        "169.254.169.254/latest",
        "2852039166/latest",
        "0xA9FEA9FE/latest",
        "[::1]/x",
        "localhost:8000/x",
        "org/name?x",
        "org\\name",
        "org/name\\@evil.example",
        "org/name@http://evil.example",
        "//evil.example/x",
        "org/../x",
        "hub:org/name",
    ],
)
async def test_a_reference_cannot_name_a_host(client: httpx.AsyncClient, name: str) -> None:
    answer = await client.post("/v1/models/pull", json={"model": name})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "model"

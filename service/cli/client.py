"""The one door from the command line to the server: HTTP in, plain dictionaries or a CliError out."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote, urlsplit

import httpx

from core.home import home
from service.cli import neighbour, sse
from service.cli.errors import CliError, ServerGone, ServerRefused, UsageProblem

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
# A first chat may wait for the engine to load its model; listing never takes that long.
PATIENCE = 600.0
_COMMANDS = {
    "GET /v1/models": "gradhelm models list",
    "GET /v1/files": "gradhelm files list",
    "GET /v1/fine_tuning/jobs": "gradhelm jobs list",
    "GET /v1/steering/vectors": "gradhelm vectors list",
}
"""What the server's messages name, as a user of the command line knows it."""
CONNECT_SECONDS = 5.0


def segment(identifier: str) -> str:
    """One path segment: ``org/name`` becomes ``org%2Fname``, ids keep their colons."""
    if identifier in {"", ".", ".."}:
        raise UsageProblem(f"{identifier!r} is not an id.")
    return quote(identifier, safe=":@")


def find_key(url: str, given: str | None) -> str | None:
    """The API key to send to ``url``.

    A key of another service is never sent to us, and this machine's admin key never leaves the machine.

    Args:
        url: the server's address.
        given: what --key or GRADHELM_API_KEY said.

    Returns:
        The key, or None when there is none to send.
    """
    if given:
        return given.strip()
    borrowed = os.environ.get("OPENAI_API_KEY", "")
    if borrowed.startswith("gh-"):
        return borrowed.strip()
    if urlsplit(url).hostname in LOOPBACK:
        try:
            return (home() / "admin.key").read_text(encoding="ascii").strip() or None
        except (OSError, UnicodeDecodeError):
            return None
    return None


class Client:
    """Talks to one server with one key. A context manager: it closes its connections."""

    def __init__(self, url: str, key: str | None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise UsageProblem(f"--url {url!r} is no address: give one like http://127.0.0.1:8000.")
        self.url = url.rstrip("/").removesuffix("/v1")
        self.key = find_key(url, key)
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        # A proxy of the environment has no business between this machine and itself.
        self.http = httpx.Client(
            base_url=self.url,
            headers=headers,
            timeout=httpx.Timeout(PATIENCE, connect=CONNECT_SECONDS),
            trust_env=parts.hostname not in LOOPBACK,
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()

    def get(self, path: str, **params: Any) -> dict[str, Any]:
        """GET a JSON object; parameters that are None are left out."""
        return self._json("GET", path, params={k: v for k, v in params.items() if v is not None})

    def post(
        self,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        patience: float = PATIENCE,
    ) -> dict[str, Any]:
        """POST a JSON object and read one back.

        With an Idempotency-Key among the headers a broken connection or a 503 is tried again twice: that is safe,
        since the server answers a repeated key with the first result.

        Args:
            path: the route.
            body: what to send.
            headers: further headers.
            patience: longest wait for the answer, seconds.

        Returns:
            The answer.

        Raises:
            ServerGone: no server answered.
            ServerRefused: the server said no.
        """
        timeout = httpx.Timeout(patience, connect=CONNECT_SECONDS)
        attempts = 3 if headers and "Idempotency-Key" in headers else 1
        for attempt in range(1, attempts + 1):
            try:
                return self._json("POST", path, json=body, headers=headers, timeout=timeout)
            except (ServerGone, ServerRefused) as error:
                gone = isinstance(error, ServerGone) or (isinstance(error, ServerRefused) and error.status == 503)
                if not gone or attempt == attempts:
                    raise
                wait = error.retry_after if isinstance(error, ServerRefused) else None
                time.sleep(min(wait or 0.5 * attempt, 10.0))
        raise AssertionError("unreachable: the last attempt returns or raises")

    def delete(self, path: str) -> dict[str, Any]:
        """DELETE, and read what the server says about it."""
        return self._json("DELETE", path)

    def upload(self, path: str, file: Path, fields: Mapping[str, str]) -> dict[str, Any]:
        """POST a file as multipart form data, streamed from disk."""
        try:
            with file.open("rb") as stream:
                return self._json("POST", path, data=dict(fields), files={"file": (file.name, stream)})
        except OSError as error:
            raise UsageProblem(f"Cannot read {file}: {error.strerror or error}.") from error

    def list(self, path: str, *, limit: int, after: str | None = None, **params: Any) -> Sequence[dict[str, Any]]:
        """Entries of a list route, following its pages until ``limit``."""
        entries: list[dict[str, Any]] = []
        while len(entries) < limit:
            page = self.get(path, limit=min(limit - len(entries), 100), after=after, **params)
            rows = page.get("data", [])
            entries.extend(rows)
            if not page.get("has_more") or not rows:
                break
            after = rows[-1]["id"]
        return entries[:limit]

    def save(self, path: str, sink: BinaryIO, **params: Any) -> int:
        """Download a body into ``sink``; the number of bytes written."""
        written = 0
        with self.stream("GET", path, params=params) as response:
            try:
                for chunk in response.iter_bytes():
                    sink.write(chunk)
                    written += len(chunk)
            except httpx.TransportError as error:
                raise self._gone(error) from error
        return written

    def events(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        body: Mapping[str, Any] | None = None,
        last_id: str | None = None,
    ) -> Iterator[sse.Event]:
        """Server-sent events of a route, until the server ends the stream.

        Args:
            method: GET or POST.
            path: the route.
            params: query parameters.
            body: JSON body.
            last_id: id of the last event already seen; the stream goes on behind it.

        Yields:
            sse.Event: events in order.

        Raises:
            ServerGone: the connection broke before the server ended the stream.
            ServerRefused: the server answered with an error instead.
        """
        headers = {"Accept": "text/event-stream"}
        if last_id is not None:
            headers["Last-Event-ID"] = last_id
        with self.stream(method, path, params=params, json=body, headers=headers) as response:
            try:
                yield from sse.parse(response.iter_lines())
            except httpx.TransportError as error:
                raise self._gone(error) from error

    @contextmanager
    def stream(self, method: str, path: str, **kwargs: Any) -> Iterator[httpx.Response]:
        """An open response whose status is known to be good."""
        try:
            with self.http.stream(method, path, **kwargs) as response:
                if response.status_code >= 300:
                    response.read()
                    raise self._refused(response)
                yield response
        except httpx.TransportError as error:
            raise self._gone(error) from error

    def _json(self, method: str, path: str, **kwargs: Any) -> dict[str, Any]:
        try:
            response = self.http.request(method, path, **kwargs)
        except httpx.TransportError as error:
            raise self._gone(error) from error
        if response.status_code >= 300:
            raise self._refused(response)
        try:
            body = response.json()
        except ValueError:
            body = None
        if not isinstance(body, dict):
            raise CliError(f"What answers at {self.url} is not a Gradhelm server (no JSON): check --url.")
        return body

    def _gone(self, error: httpx.TransportError) -> ServerGone:
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            return ServerGone(
                f"No server answers at {self.url}.\n"
                "Start one with `gradhelm serve`, or name another with --url or GRADHELM_URL."
            )
        return ServerGone(f"The connection to {self.url} broke ({type(error).__name__}).\nTry again.")

    def _about_key(self) -> str:
        """Why the key was refused. Nobody is sent to make keys in a folder that the server does not use."""
        have = "The key that was sent is not valid here" if self.key else "No key was sent"
        parts = urlsplit(self.url)
        host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
        if host not in LOOPBACK:
            where = "on the server's machine make one with `gradhelm keys create`"
            return f"{have}: {where}, then give it here as --key or GRADHELM_API_KEY."
        elsewhere = neighbour.other_folder(host, port, home())
        if elsewhere is not None:
            return f"{have}. {elsewhere}"
        return f"{have}: make one with `gradhelm keys create`, then give it as --key or GRADHELM_API_KEY."

    def _refused(self, response: httpx.Response) -> ServerRefused:
        try:
            detail = response.json()["error"]
            message, code, param = str(detail["message"]), detail.get("code"), detail.get("param")
        except (ValueError, KeyError, TypeError, AttributeError):
            message, code, param = f"{self.url} answered {response.status_code} {response.reason_phrase}.", None, None
        for route, command in _COMMANDS.items():
            message = message.replace(f"{route} lists", f"`{command}` lists")
        if param and param not in message:
            message += f" (parameter: {param})"
        if code:
            message += f" [{code}]"
        if response.status_code == 401:
            message += f"\n{self._about_key()}"
        wait = response.headers.get("Retry-After", "")
        retry_after = float(wait) if wait.replace(".", "", 1).isdigit() else None
        if retry_after is not None:
            message += f"\nThe server asks to wait {retry_after:g} s before the next try."
        return ServerRefused(message, status=response.status_code, code=code, retry_after=retry_after)

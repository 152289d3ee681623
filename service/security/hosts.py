"""What keeps a browser from being used against this server: allow-lists for Host and Origin.

Any web page can make a browser on this machine send requests to ``127.0.0.1``; DNS rebinding even makes the answer
readable. So a request must name a host that we know, and one that changes something must come from our own origin or
from no browser at all. Allow-lists only: an unknown method counts as one that changes something.
"""

from __future__ import annotations

from collections.abc import Iterable
from urllib.parse import urlsplit

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_WILDCARDS = frozenset({"", "0.0.0.0", "::"})  # noqa: S104 - addresses that are no names


def host_name(header: str) -> str | None:
    """The name in a Host header, lower-case, without port and brackets; none when the header is malformed."""
    if not header or any(c in header for c in "/\\@?#, \t"):
        return None
    try:
        parts = urlsplit(f"//{header}")
        _ = parts.port
    except ValueError:
        return None
    name = parts.hostname
    return name.rstrip(".") if name else None


class HostPolicy:
    """Which Host and Origin headers are ours.

    Args:
        bind: The address the server listens on; allowed as a name unless it is a wildcard.
        hosts: Further names.
        origins: Further web origins (``https://console.example``).
    """

    def __init__(self, bind: str, hosts: Iterable[str], origins: Iterable[str]) -> None:
        named = {bind.strip("[]").lower()} - _WILDCARDS
        self.hosts = LOOPBACK | named | {host.strip("[]").lower() for host in hosts}
        self.origins = frozenset(origin.rstrip("/").lower() for origin in origins)

    def refusal(self, method: str, scheme: str, headers: dict[str, list[str]]) -> str | None:
        """Why this request is refused, or none.

        Args:
            method: HTTP method.
            scheme: ``http`` or ``https``.
            headers: Header values by lower-case name.

        Returns:
            A sentence for the client, or none when the request may go on.
        """
        hosts = headers.get("host", [])
        if len(hosts) != 1 or host_name(hosts[0]) not in self.hosts:
            return "This Host is not served here; start with --allowed-host NAME to allow it."
        if method in SAFE_METHODS:
            return None
        origins = headers.get("origin", [])
        own = f"{scheme}://{hosts[0].lower()}"
        if any(origin.lower() != own and origin.lower() not in self.origins for origin in origins):
            return "Requests that change something are not accepted from this web origin."
        if not origins:
            if "cookie" in headers:
                return "Cookies are not used here; a browser's request must carry its Origin."
            sites = headers.get("sec-fetch-site", [])
            if any(site.lower() not in ("none", "same-origin") for site in sites):
                return "Requests that change something are not accepted from other sites."
        return None

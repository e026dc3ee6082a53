"""Who is calling."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from veneer.server.errors import Forbidden, Refused
from veneer.server.keys import Keys

CALLER = "veneer.caller"
"""The key of the ASGI scope under which the caller stands."""
FOR_ALL = ("/healthz", "/api/v1/healthz")
"""Probes have no key, and are told nothing but well or not."""
LINKS = "/api/v1/files/"
"""A link that was given to one caller opens for everyone who has it."""
FOR_THIS_MACHINE = ("/metrics",)


@dataclass(frozen=True)
class Caller:
    """The holder of a key, or everybody on the loopback of a server without keys."""

    name: str
    adapters: tuple[str, ...] = ("*",)
    """Patterns of the registry's adapters that the caller may see."""

    def sees(self, adapter: str) -> bool:
        """Whether an adapter of that name in the registry is there for the caller."""
        return any(fnmatchcase(adapter, pattern) for pattern in self.adapters)


LOCAL = Caller("local")


def caller_of(connection: HTTPConnection) -> Caller:
    """Whom the access check found."""
    return connection.scope[CALLER]


class CheckAccess:
    """ASGI middleware that puts the caller into the scope.

    A server that has seen a key asks for one until it ends, so that revoking the last key opens nothing. One without keys listens on
    loopback only, and answers programs of this machine: not a page of another site that runs in a browser here.

    Raises:
        Refused: no key, or a wrong one.
        Forbidden: without keys, a browser asks for another site.
    """

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self.app, self.keys = app, keys
        self._locked = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not _open_to(scope):
            scope[CALLER] = self._caller(Headers(scope=scope))
        await self.app(scope, receive, send)

    def _caller(self, headers: Headers) -> Caller:
        self._locked = self._locked or self.keys.any()
        if not self._locked:
            _check_browser(headers)
            return LOCAL
        given = key_in(headers)
        key = None if given is None else self.keys.find(given)
        if key is None:
            raise Refused("send a valid key, as X-API-Key or as Authorization: Bearer")
        self.keys.note_use(key)
        return Caller(key.name, key.adapters)


def key_in(headers: Headers) -> str | None:
    """The key as the Tinker SDK sends it, or as OpenAI's does."""
    given = headers.get("x-api-key")
    if given is None:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        return given.strip() if scheme.lower() == "bearer" else None
    return given


@lru_cache(1024)
def is_loopback(host: str) -> bool:
    """Whether a name or address can only be this machine."""
    if host == "localhost" or host.endswith(".localhost"):  # https://www.rfc-editor.org/rfc/rfc6761#section-6.3
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def _open_to(scope: Scope) -> bool:
    """Whether the route asks this peer for no key."""
    path: str = scope["path"]
    client = scope.get("client")
    return path in FOR_ALL or path.startswith(LINKS) or (path in FOR_THIS_MACHINE and client is not None and is_loopback(client[0]))


def _check_browser(headers: Headers) -> None:
    """A page may send a request anywhere, and a name of its site may point here; both show in these two headers
    (https://fetch.spec.whatwg.org/#origin-header, https://en.wikipedia.org/wiki/DNS_rebinding)."""
    host, origin = headers.get("host"), headers.get("origin")
    if (host is None or is_loopback(_host_of(f"//{host}"))) and (origin is None or is_loopback(_host_of(origin))):
        return
    raise Forbidden("without keys this server answers programs of its own machine, under localhost; make a key: veneer keys create")


@lru_cache(1024)
def _host_of(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""

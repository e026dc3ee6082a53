"""How much a caller may send, and how fast. Pure ASGI: a body passes through untouched."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from veneer.server.access import CALLER
from veneer.server.errors import Busy, Encoded, TooLarge, TooSlow
from veneer.server.tinker.wire import PROTOBUF

MIB = 2**20


@dataclass(frozen=True)
class Limits:
    max_body: int = 256 * MIB
    """Bytes of one request's body."""
    max_text: int = 16 * MIB
    """Bytes of one that is not protobuf. What JSON says in three bytes Python keeps in sixty, and reads it before anyone else may run."""
    rate: float | None = None
    """Requests a second of one key, over time; None: as many as it likes."""
    pause: float = 30.0
    """Seconds in which a body must go on."""
    arrival: float = 600.0
    """Seconds in which it must be there."""


class LimitRate:
    """A token bucket for every caller, which holds the requests of a second (https://en.wikipedia.org/wiki/Token_bucket).

    Raises:
        Busy: the bucket is empty.
    """

    def __init__(self, app: ASGIApp, rate: float) -> None:
        self.app, self.rate, self.size = app, rate, max(1.0, rate)
        self._buckets: dict[str, tuple[float, float]] = {}
        """Caller -> what was left, and when; there are as many as there are names of keys."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if CALLER in scope:
            self._take(scope[CALLER].name)
        await self.app(scope, receive, send)

    def _take(self, caller: str) -> None:
        now = time.monotonic()
        left, then = self._buckets.get(caller, (self.size, now))
        left = min(self.size, left + (now - then) * self.rate)
        enough = left >= 1.0
        self._buckets[caller] = (left - enough, now)
        if not enough:
            raise Busy(f"more than {self.rate:g} requests a second with this key; slow down", (1.0 - left) / self.rate)


class LimitBody:
    """Refuses a body that is too large, before it comes if it says so, while it comes otherwise; one that is packed, as a few bytes can
    unfold to any amount; and one that does not come.

    Raises:
        TooLarge, Encoded, TooSlow: as said, before the application or from its ``receive``.
    """

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self.app, self.limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if headers.get("content-encoding", "identity").strip().lower() not in ("identity", ""):
            raise Encoded("send the body as it is, without Content-Encoding: compressed bodies are not read here")
        most = self.limits.max_body
        if headers.get("content-type", "") != PROTOBUF:
            most = min(most, self.limits.max_text)
        length = headers.get("content-length", "")
        if length.isdigit() and int(length[:20]) > most:
            raise too_large(most)
        await self.app(scope, _Body(receive, self.limits, most).receive, send)


class _Body:
    """One body as it arrives."""

    def __init__(self, receive: Receive, limits: Limits, most: int) -> None:
        self._receive, self._limits, self._most = receive, limits, most
        self._bytes = 0
        self._deadline = time.monotonic() + limits.arrival
        self._complete = False

    async def receive(self) -> Message:
        if self._complete:  # what comes now is the end of the connection, and may take its time
            return await self._receive()
        limits = self._limits
        try:
            async with asyncio.timeout(min(limits.pause, self._deadline - time.monotonic())):
                message = await self._receive()
        except TimeoutError:
            raise TooSlow(f"the body stopped for {limits.pause:g} s or took more than {limits.arrival:g} s; send it again") from None
        self._bytes += len(message.get("body", b""))
        if self._bytes > self._most:
            raise too_large(self._most)
        self._complete = not message.get("more_body", False)
        return message


def too_large(most: int) -> TooLarge:
    return TooLarge(f"the body is larger than {most} bytes, which is the limit for this kind of request; send it in parts")

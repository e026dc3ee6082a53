"""Connections that send nothing, or a little at a time, leave; requests and answers under way may take their time."""

from __future__ import annotations

import json
from asyncio import BaseTransport, TimerHandle

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

HEAD = 20.0
"""Seconds in which a request's head must be there."""
MOST_HEAD = 2**16
"""Bytes of one, beyond those that came at once."""
IDLE = 75
"""Seconds for which a connection is kept between two requests: longer than the SDKs and proxies keep theirs."""
GRACE = 5
"""Seconds that requests under way get when the server ends."""


def settings(app: ASGIApp) -> uvicorn.Config:
    """How uvicorn is to run an application. Its own log of requests is off, as the envelope writes one."""
    return uvicorn.Config(
        app, http=Connection, ws="none", log_level="warning", access_log=False, server_header=False,
        timeout_keep_alive=IDLE, timeout_graceful_shutdown=GRACE,
    )  # fmt: skip


class Connection(HttpToolsProtocol):
    """uvicorn's, which waits for ever for a request that has begun, and for one that never does."""

    _timer: TimerHandle | None = None
    _head_bytes: int | None = None
    """Of the head that is coming in; None: none is."""

    def connection_made(self, transport: BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        self._head_bytes = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._head_bytes = None
        self._unwatch()
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._head_bytes is not None:
            self._head_bytes += len(data)
            if self._head_bytes > MOST_HEAD:
                self._refuse(431, f"the head of the request is larger than {MOST_HEAD} bytes")
        if self.cycle is None or self.cycle.response_complete:  # data that belongs to no request under way
            self._watch()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, msg)

    def _refuse(self, status: int, text: str) -> None:
        body = json.dumps({"detail": text}).encode()
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()

    def _watch(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(HEAD, self.transport.close)

    def _unwatch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

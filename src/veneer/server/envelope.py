"""Around every request: its id, its line in the log, its place in the metrics, and an answer whatever happens."""

from __future__ import annotations

import logging
import random
import re
import time
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.routing import compile_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from veneer.server.access import CALLER
from veneer.server.errors import UNKNOWN, Answers
from veneer.server.log import AccessLog
from veneer.server.metrics import Metrics
from veneer.types import VeneerError

LOG = logging.getLogger("veneer.server")
REQUEST_ID = "x-request-id"
DIGEST = "x-veneer-adapter-digest"
"""The header that names the adapter which answered."""
HUNG_UP = 499
"""nginx's number for a client that did not wait; it is never sent."""
STILL_WORKING = 408
"""The answer to a poll for what is not there yet; there are many, and they say nothing."""
LONGEST_TEXT = 200


class Envelope:
    """Around the whole application, FastAPI's own errors among it."""

    def __init__(self, app: ASGIApp, answers: Answers, routes: Routes, metrics: Metrics, log: AccessLog | None) -> None:
        self.app, self.answers, self.routes, self.metrics, self.log = app, answers, routes, metrics, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = Exchange(scope, receive, send)
        try:
            await self.app(scope, exchange.receive, exchange.send)
        except VeneerError as error:
            await exchange.conclude(error, self.answers.error(scope, error))
        except ClientDisconnect:
            pass  # nobody is left to be told
        except Exception as error:
            LOG.exception("request %s failed", exchange.id)
            await exchange.conclude(error, self.answers.text(scope, 500, UNKNOWN))
        finally:
            self._note(exchange)

    def _note(self, exchange: Exchange) -> None:
        scope, seconds = exchange.scope, time.perf_counter() - exchange.started
        route = self.routes.template(scope)
        status = HUNG_UP if exchange.status is None else exchange.status
        self.metrics.note(scope["method"], route or "none", status, seconds)
        if self.log is None or (status == STILL_WORKING and route == "/api/v1/retrieve_future"):
            return
        caller, headers = scope.get(CALLER), Headers(scope=scope)

        def text(name: str) -> str | None:
            value = headers.get(name)
            return None if value is None else value[:LONGEST_TEXT]

        self.log.write(
            id=exchange.id,
            caller=None if caller is None else caller.name,
            method=scope["method"],
            route=route,
            status=status,
            bytes_in=exchange.bytes_in,
            bytes_out=exchange.bytes_out,
            ms=round(1000 * seconds, 1),
            agent=text("user-agent"),
            sdk=text("x-sdk-version"),
            sdk_method=text("x-sdk-method"),
            adapter=exchange.digest,
        )


class Exchange:
    """One request and its answer as they pass."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope, self._receive, self._send = scope, receive, send
        self.id = f"{random.getrandbits(64):016x}"
        self.started = time.perf_counter()
        self.bytes_in = self.bytes_out = 0
        self.status: int | None = None
        self.answered = False
        """Whole."""
        self.digest: str | None = None

    async def receive(self) -> Message:
        message = await self._receive()
        self.bytes_in += len(message.get("body", b""))
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers[REQUEST_ID] = self.id
            self.digest = headers.get(DIGEST)
        self.bytes_out += len(message.get("body", b""))
        self.answered = message["type"] == "http.response.body" and not message.get("more_body", False)
        await self._send(message)

    async def conclude(self, error: Exception, response: Callable[..., Any]) -> None:
        """Send the answer to an error. If another one is under way the connection breaks off, so that nobody takes it for whole."""
        if self.answered:
            return
        if self.status is not None:
            raise error
        await response(self.scope, self.receive, self.send)


class Routes:
    """Templates of an application's routes: a path itself may hold what is secret, such as the token of a link."""

    def __init__(self, app: FastAPI) -> None:
        self._app = app
        self._patterns: list[tuple[re.Pattern[str], str]] | None = None

    def template(self, scope: Scope) -> str | None:
        """``/api/v1/files/{token}/{name}``; None: there is no such route."""
        route = scope.get("route")
        if route is not None:
            return route.path
        if self._patterns is None:  # not in the constructor: routes come later than middleware
            self._patterns = [(compile_path(path)[0], path) for path in (*self._app.openapi()["paths"], "/openapi.json")]
        return next((path for pattern, path in self._patterns if pattern.match(scope["path"])), None)

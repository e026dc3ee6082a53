"""An OpenAI endpoint for the environments of this process: on 127.0.0.1, with a key, in the event loop of the rollouts.

A model's name is the name of a rollout. Requests wait while the engine computes on this thread: the kernel accepts them meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import secrets
import socket
from collections.abc import Generator, Mapping
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from veneer.envs.bridges.chat import ChatError, events
from veneer.envs.bridges.talk import Talk

MAX_BODY = 32 * 2**20
"""Bytes of one request."""
BACKLOG = 2048


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield  # they are the run's


class Endpoint:
    """Open talks by name, served wherever a loop runs. The socket listens from the beginning, so that a process can be told of it
    before there is a loop."""

    def __init__(self) -> None:
        self.key = secrets.token_urlsafe(32)
        self.talks: dict[str, Talk] = {}
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=BACKLOG)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/v1"
        self._app = Starlette(
            routes=[Route("/v1/chat/completions", self._chat, methods=["POST"]), Route("/v1/models", self._models, methods=["GET"])]
        )
        self._heard_by: socket.socket | None = None
        """The listener again, for the loop that serves; whoever serves closes what it was given."""
        self._server: _Server | None = None
        self._serving: asyncio.Task[None] | None = None

    def serve(self) -> None:
        """Serve from the loop that runs now."""
        self._close_heard_by()
        config = uvicorn.Config(
            self._app,
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            backlog=BACKLOG,
            headers=[("connection", "close")],  # one that is kept would be another loop's, or closed while this thread was busy
            timeout_graceful_shutdown=1,
        )
        self._server = _Server(config)
        self._heard_by = self._listener.dup()
        self._serving = asyncio.get_running_loop().create_task(self._server.serve(sockets=[self._heard_by]))

    def _close_heard_by(self) -> None:
        if self._heard_by is not None:
            self._heard_by.close()

    def leave(self) -> None:
        """Free the port, without a loop."""
        self._listener.close()
        self._close_heard_by()

    async def close(self) -> None:
        if self._server is not None and self._serving is not None and self._serving.get_loop() is asyncio.get_running_loop():
            self._server.should_exit = True
            await self._serving
        self.leave()

    def _refused(self, request: Request) -> Response | None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if hmac.compare_digest(given.encode(), self.key.encode()):
            return None
        return _error(401, "the key is missing or wrong")

    async def _models(self, request: Request) -> Response:
        if refused := self._refused(request):
            return refused
        return JSONResponse({"object": "list", "data": [{"id": name, "object": "model", "owned_by": "veneer"} for name in self.talks]})

    async def _chat(self, request: Request) -> Response:
        if refused := self._refused(request):
            return refused
        body = await _body(request)
        if body is None:
            return _error(400, f"a chat request is a JSON object of at most {MAX_BODY} bytes")
        talk = self.talks.get(str(body.get("model")))
        if talk is None:
            return _error(404, f"there is no model {body.get('model')!r:.80}: the only model of a rollout is its policy")
        try:
            whole = await talk.ask(body)
        except ChatError as error:
            return _error(400, str(error))
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            return _error(410, "the rollout is over")
        if body.get("stream"):
            return Response("".join(events(whole)), media_type="text/event-stream")
        return JSONResponse(whole)


async def _body(request: Request) -> Mapping[str, Any] | None:
    raw = bytearray()
    async for chunk in request.stream():
        raw += chunk
        if len(raw) > MAX_BODY:
            return None
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return body if isinstance(body, dict) else None


def _error(status: int, words: str) -> Response:
    return JSONResponse({"error": {"message": words, "type": "invalid_request_error", "code": None, "param": None}}, status)

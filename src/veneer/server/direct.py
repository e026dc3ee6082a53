"""Requests that need nothing of FastAPI, straight to their handlers.

FastAPI compares a request with one route after another and makes ready for parameters and dependencies. A handler that takes the
request alone and answers with a response has none of these. In a training step of 22 requests they were a fifth of the event loop's time.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import get_type_hints

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute
from starlette.types import ASGIApp, Receive, Scope, Send

Handler = Callable[[Request], Awaitable[Response]]


class Direct:
    """The innermost ASGI middleware. What it does not know, the application answers."""

    def __init__(self, app: ASGIApp, routers: Iterable[APIRouter]) -> None:
        self.app = app
        self._routes = {
            (method, route.path): route
            for router in routers
            for route in router.routes
            if isinstance(route, APIRoute) and _takes_the_request_alone(route)
            for method in route.methods or ()
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = self._routes.get((scope["method"], scope["path"])) if scope["type"] == "http" else None
        if route is None:
            await self.app(scope, receive, send)
            return
        scope["route"] = route
        handler: Handler = route.endpoint
        response = await handler(Request(scope, receive))
        await response(scope, receive, send)


def _takes_the_request_alone(route: APIRoute) -> bool:
    return not route.param_convertors and get_type_hints(route.endpoint) == {"request": Request, "return": Response}

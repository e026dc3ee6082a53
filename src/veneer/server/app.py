"""The application: what is mounted where, and what an error looks like."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from veneer.server.bases import Bases
from veneer.server.errors import Busy, status_of
from veneer.server.tinker.routes import make_router as tinker_routes
from veneer.server.tinker.service import Tinker
from veneer.server.worker import Worker
from veneer.types import VeneerError

LOG = logging.getLogger("veneer.server")
PATIENCE = 10.0
"""Seconds in which the engines' thread must turn for the server to be well."""


def make_app(bases: Bases, worker: Worker, home: Path) -> FastAPI:
    """``home``: where the server keeps its state."""
    tinker = Tinker(bases, home / "tinker")

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        tinker.resume()
        yield
        await tinker.close()
        worker.stop()

    app = FastAPI(title="Veneer", version="1", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.include_router(tinker_routes(tinker))
    _add_health(app, worker)
    _add_errors(app)
    return app


def _add_health(app: FastAPI, worker: Worker) -> None:
    @app.get("/healthz")
    async def healthz() -> Response:
        """Whether a request would be answered now."""
        try:
            await asyncio.wait_for(worker.run(lambda: None), PATIENCE)
        except TimeoutError:
            return JSONResponse({"status": "stuck", "detail": f"the engines' thread has not turned for {PATIENCE:g} s"}, 503)
        return JSONResponse({"status": "ok"})


def _add_errors(app: FastAPI) -> None:
    """Each error is one line of JSON with its status; what is no error of ours is logged and not shown."""

    @app.exception_handler(VeneerError)
    async def ours(_request: Request, error: VeneerError) -> Response:
        return _answer(status_of(error), str(error), {"Retry-After": "1"} if isinstance(error, Busy) else None)

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return _answer(422, f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}")

    @app.exception_handler(HTTPException)
    async def http(_request: Request, error: HTTPException) -> Response:
        return _answer(error.status_code, str(error.detail), error.headers)

    @app.exception_handler(Exception)
    async def unknown(_request: Request, error: Exception) -> Response:
        return _answer(500, "the server failed on this request; its log says more")


def _answer(status: int, text: str, headers: object = None) -> Response:
    return JSONResponse({"detail": " ".join(text.split())}, status, headers)  # type: ignore[arg-type]

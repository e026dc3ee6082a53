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
from veneer.server.openai.answering import Answering
from veneer.server.openai.errors import error_body, field_error, is_openai
from veneer.server.openai.management import Management
from veneer.server.openai.routes import make_router as openai_routes
from veneer.server.tinker.routes import make_router as tinker_routes
from veneer.server.tinker.service import Tinker
from veneer.server.worker import Worker
from veneer.store.registry import Registry
from veneer.types import VeneerError

LOG = logging.getLogger("veneer.server")
PATIENCE = 10.0
"""Seconds in which the engines' thread must turn for the server to be well."""


def make_app(bases: Bases, worker: Worker, home: Path, registry: Registry, lora_dir: Path | None = None) -> FastAPI:
    """``home``: where the server keeps its state. ``lora_dir``: from inside of it clients may load adapters."""
    tinker, answering = Tinker(bases, home / "tinker"), Answering(bases, registry)
    management = Management(answering.catalogue, answering.loading, registry, lora_dir)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        tinker.resume()
        watching = asyncio.create_task(management.watch())
        yield
        watching.cancel()
        await tinker.close()
        worker.stop()

    app = FastAPI(title="Veneer", version="1", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.include_router(tinker_routes(tinker))
    app.include_router(openai_routes(answering, management))
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
    async def ours(request: Request, error: VeneerError) -> Response:
        return _answer(request, status_of(error), str(error), {"Retry-After": "1"} if isinstance(error, Busy) else None, error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, invalid: RequestValidationError) -> Response:
        error = field_error(invalid)
        return _answer(request, status_of(error) if is_openai(request) else 422, str(error), error=error)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        return _answer(request, error.status_code, str(error.detail), error.headers)

    @app.exception_handler(Exception)
    async def unknown(request: Request, error: Exception) -> Response:
        return _answer(request, 500, "the server failed on this request; its log says more")


def _answer(request: Request, status: int, text: str, headers: object = None, error: VeneerError | None = None) -> Response:
    line = " ".join(text.split())
    body = error_body(status, line, error) if is_openai(request) else {"detail": line}
    return JSONResponse(body, status, headers)  # type: ignore[arg-type]

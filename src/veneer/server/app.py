"""The application: what is mounted where, and what an error looks like."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp

from veneer.server.access import CheckAccess
from veneer.server.bases import Bases
from veneer.server.direct import Direct
from veneer.server.envelope import Envelope, Routes
from veneer.server.errors import UNKNOWN, Answers
from veneer.server.health import Health, add_health
from veneer.server.keys import Keys
from veneer.server.limits import LimitBody, LimitRate, Limits
from veneer.server.log import AccessLog
from veneer.server.metrics import Metrics, add_metrics
from veneer.server.openai.answering import Answering
from veneer.server.openai.errors import PREFIX as OPENAI
from veneer.server.openai.errors import error_body, field_error
from veneer.server.openai.management import Management
from veneer.server.openai.routes import make_router as openai_routes
from veneer.server.tinker.routes import make_router as tinker_routes
from veneer.server.tinker.service import ROOM, Tinker
from veneer.server.worker import Worker
from veneer.store.registry import Registry
from veneer.types import VeneerError


def make_app(
    bases: Bases,
    worker: Worker,
    home: Path,
    limits: Limits | None = None,
    log: AccessLog | None = None,
    *,
    registry: Registry | None = None,
    lora_dir: Path | None = None,
    room: int = ROOM,
) -> ASGIApp:
    """``home``: where the server keeps its keys and its state. ``log``: where a line for each request goes, if anywhere. ``registry``:
    the adapters that it serves; None: those of VENEER_HOME. ``lora_dir``: from inside of it clients may load adapters. ``room``: bytes
    for runs in memory."""
    keys, tinker = Keys(home), Tinker(bases, home / "tinker", room)
    registry = registry or Registry()
    answering = Answering(bases, registry)
    management = Management(answering.catalogue, answering.loading, registry, lora_dir)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        tinker.resume()
        watching = asyncio.create_task(management.watch())
        yield
        watching.cancel()
        await tinker.close()
        worker.stop()
        keys.close()
        if log is not None:
            log.close()

    app = FastAPI(title="Veneer", version="1", lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False)
    routers = (tinker_routes(tinker), openai_routes(answering, management))
    for router in routers:
        app.include_router(router)
    add_health(app, Health(worker, tinker.journal))
    metrics = Metrics(bases, worker, tinker)
    add_metrics(app, metrics)
    answers = Answers({OPENAI: error_body})
    _add_errors(app, answers)
    checked = _checked(Direct(app, routers), keys, limits or Limits())
    return Envelope(checked, answers, Routes(app), metrics, log)


def _checked(app: ASGIApp, keys: Keys, limits: Limits) -> ASGIApp:
    """What every request passes: who asks, how often, how much. What any of it raises the envelope answers."""
    app = LimitBody(app, limits)
    if limits.rate is not None:
        app = LimitRate(app, limits.rate)
    return CheckAccess(app, keys)


def _add_errors(app: FastAPI, answers: Answers) -> None:
    """Each error is one line of JSON with its status. What is no error of ours is raised on after its answer, and the envelope logs it."""

    @app.exception_handler(VeneerError)
    async def ours(request: Request, error: VeneerError) -> Response:
        return answers.error(request.scope, error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        if request.scope["path"].startswith(OPENAI):
            return answers.error(request.scope, field_error(error))
        first = error.errors()[0]
        return answers.text(request.scope, 422, f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}")

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        return answers.text(request.scope, error.status_code, str(error.detail), error.headers)

    @app.exception_handler(Exception)
    async def unknown(request: Request, _error: Exception) -> Response:
        return answers.text(request.scope, 500, UNKNOWN)

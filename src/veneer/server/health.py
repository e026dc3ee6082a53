"""Whether a request would be answered now."""

from __future__ import annotations

import asyncio
import logging
import time

from fastapi import FastAPI
from starlette.responses import JSONResponse, Response

from veneer.server.journal import Journal
from veneer.server.worker import Worker
from veneer.types import StorageError

LOG = logging.getLogger("veneer.server")
PATIENCE = 60.0
"""Seconds that a turn of the engines' thread may take: a large pass is many seconds of honest work."""
MOMENT = 1.0
"""Seconds for which a probe waits for the engines, and for which the disk is believed."""
DISK = 10.0
"""Seconds that the disk has for a few bytes."""


class Health:
    def __init__(self, worker: Worker, journal: Journal) -> None:
        self.worker, self.journal = worker, journal
        self._written = float("-inf")

    async def trouble(self) -> str | None:
        """Why nothing would be answered; None: it would. Both threads and the disk are tried, not asked."""
        return await self._engines() or await self._disk()

    async def _engines(self) -> str | None:
        if self.worker.alive:
            try:
                await asyncio.wait_for(self.worker.run(lambda: None), MOMENT)
            except TimeoutError:
                busy = time.monotonic() - self.worker.turned
                return f"the engines' thread has not turned for {busy:.0f} s" if busy > PATIENCE else None
            return None
        return "the engines' thread has ended"

    async def _disk(self) -> str | None:
        if time.monotonic() - self._written > MOMENT:
            try:
                await asyncio.wait_for(self.journal.pulse(), DISK)
            except (StorageError, TimeoutError) as error:
                LOG.error("not well: %s", error or f"nothing was written for {DISK:g} s")
                return "nothing can be written; the server's log says more"
            self._written = time.monotonic()
        return None


def add_health(app: FastAPI, health: Health) -> None:
    @app.get("/healthz", operation_id="healthz")
    @app.get("/api/v1/healthz", operation_id="tinker_healthz")
    async def healthz() -> Response:
        """Whether a request would be answered now: 200 or 503."""
        trouble = await health.trouble()
        return JSONResponse({"status": "ok"}) if trouble is None else JSONResponse({"status": "unwell", "detail": trouble}, 503)

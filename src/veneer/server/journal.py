"""What the server has acknowledged, on disk before it says so: one SQLite file that a killed process finds again.

Writes of many requests become one transaction, on a thread of their own. The file is in WAL mode with ``synchronous=NORMAL``: what
was acknowledged survives the process's end at any moment; a power cut may take the last moments, never the file
(https://sqlite.org/pragma.html#pragma_synchronous).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from veneer.types import StorageError

LOG = logging.getLogger("veneer.server")
Statement = tuple[str, Sequence[Any]]
Job = tuple[Sequence[Statement], asyncio.Future[None] | None]
SOON = 0.02
"""Seconds for which a note waits for company: each time that the writer wakes up it takes the interpreter from the engines."""
PULSE = "CREATE TABLE IF NOT EXISTS pulse (one INTEGER PRIMARY KEY, at REAL NOT NULL);"


class Journal:
    """A database with one writer."""

    def __init__(self, path: Path, schema: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._reader = self._open()
        self._reader.executescript(schema + PULSE)
        self._jobs: deque[Job] = deque()
        self._awake, self._closing, self._noted = threading.Event(), False, False
        self._thread = threading.Thread(target=self._work, name="veneer-journal", daemon=True)
        self._thread.start()

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, check_same_thread=False, isolation_level=None)
        connection.row_factory = sqlite3.Row
        for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "busy_timeout=10000", "auto_vacuum=INCREMENTAL"):
            connection.execute(f"PRAGMA {pragma}")
        return connection

    def read(self, sql: str, parameters: Sequence[Any] = ()) -> list[sqlite3.Row]:
        return self._reader.execute(sql, parameters).fetchall()

    async def write(self, *statements: Statement) -> None:
        """
        Raises:
            StorageError: they are not on the disk, none of them.
        """
        written: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._jobs.append((statements, written))
        self._awake.set()
        await written

    def note(self, *statements: Statement) -> None:
        """As ``write``, for what can be made again: nobody waits, and a failure costs nothing but time after a restart."""
        self._jobs.append((statements, None))
        if not self._noted:
            self._noted = True
            asyncio.get_running_loop().call_later(SOON, self._write_notes)

    def _write_notes(self) -> None:
        self._noted = False
        if self._jobs:
            self._awake.set()

    async def pulse(self) -> None:
        """Write something that nobody reads, to see whether it can be done.

        Raises:
            StorageError: it cannot.
        """
        await self.write(("INSERT OR REPLACE INTO pulse (one, at) VALUES (1, ?)", [time.time()]))

    def close(self) -> None:
        """Write what is left."""
        self._closing = True
        self._awake.set()
        self._thread.join()
        self._reader.close()

    def _work(self) -> None:
        connection = self._open()
        going = True
        while going:
            self._awake.wait()
            self._awake.clear()
            going = not self._closing
            jobs = [self._jobs.popleft() for _ in range(len(self._jobs))]
            if not jobs:
                continue
            error = self._commit(connection, [statement for statements, _ in jobs for statement in statements])
            if error is not None and len(jobs) > 1:  # one bad job must not take the others with it
                for statements, written in jobs:
                    _tell(written, self._commit(connection, statements))
            else:
                for _, written in jobs:
                    _tell(written, error)
        connection.close()

    def _commit(self, connection: sqlite3.Connection, statements: Sequence[Statement]) -> Exception | None:
        try:
            connection.execute("BEGIN")
            for sql, parameters in statements:
                connection.execute(sql, parameters)
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            return StorageError(f"cannot write {self.path}: {error}; free some space or check the path")
        return None


def _tell(written: asyncio.Future[None] | None, error: Exception | None) -> None:
    if written is None:
        if error is not None:
            LOG.error("%s", error)
        return

    def tell() -> None:
        if written.done():
            return
        if error is None:
            written.set_result(None)
        else:
            written.set_exception(error)

    with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody waits
        written.get_loop().call_soon_threadsafe(tell)

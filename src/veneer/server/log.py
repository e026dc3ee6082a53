"""The access log: a line of JSON for every request, written by a thread of its own, as a full pipe must not hold requests up."""

from __future__ import annotations

import json
import logging
import sys
import threading
from collections import deque
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from veneer.store.files import storage_errors

LOG = logging.getLogger("veneer.server")
MOST_WAITING = 10_000
"""Lines; of more the oldest are dropped."""
EVERY = 0.2
"""Seconds between two lots."""


class AccessLog:
    def __init__(self, path: Path | None = None) -> None:
        """``path``: a file that lines are added to, opened anew for each lot, so that it may be moved away at any time. None: stderr.

        Raises:
            StorageError: the file cannot be written.
        """
        self.path = path
        if path is not None:
            with storage_errors(path), path.open("a"):
                pass
        self._lines: deque[str] = deque(maxlen=MOST_WAITING)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, name="veneer-log", daemon=True)
        self._thread.start()

    def write(self, **fields: Any) -> None:
        """Add a line, with the time. It is written soon: waking another thread would take longer than the rest of a small request."""
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._lines.append(json.dumps({"time": time, **fields}, separators=(",", ":")) + "\n")

    def close(self) -> None:
        """Write what is left."""
        self._over.set()
        self._thread.join(5.0)

    def _work(self) -> None:
        going = True
        while going:
            going = not self._over.wait(EVERY)
            lot = [self._lines.popleft() for _ in range(len(self._lines))]
            if lot:
                self._add("".join(lot))

    def _add(self, text: str) -> None:
        try:
            if self.path is None:
                sys.stderr.write(text)
                sys.stderr.flush()
            else:
                with self.path.open("a") as file:
                    file.write(text)
        except OSError as error:
            LOG.warning("%d lines of the access log are lost: %s", text.count("\n"), error)

"""A server to ask: ``veneer serve`` as a process of its own, or the same application in this process, where its threads can be hindered."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import requests
import uvicorn

from veneer.engine import Base, LoraEngine, load_base
from veneer.render import Renderer
from veneer.server.app import make_app
from veneer.server.bases import Bases, Served
from veneer.server.connections import settings
from veneer.server.keys import Keys
from veneer.server.limits import Limits
from veneer.server.log import AccessLog
from veneer.server.shelf import Shelf
from veneer.server.tinker.service import ROOM
from veneer.server.worker import Worker

START = 90.0
"""Seconds that a process may take to import torch on a busy machine."""


@dataclass
class Server:
    """Where it is, and whose folder it has."""

    url: str
    home: Path
    process: subprocess.Popen[str] | None = None
    stderr: Path | None = None
    worker: Worker | None = None
    served: Served | None = None

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").partition(":")
        return host, int(port)

    @property
    def keys(self) -> Keys:
        return Keys(self.home / "server")

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def resident(self) -> int:
        """Bytes that the process holds."""
        line = next(line for line in Path(f"/proc/{self.pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
        return 1024 * int(line.split()[1])

    def ask(self, method: str, path: str, key: str | None = None, **arguments: Any) -> requests.Response:
        headers = {} if key is None else {"X-API-Key": key}
        headers |= arguments.pop("headers", {})
        return requests.request(method, self.url + path, headers=headers, timeout=60, **arguments)

    def post(self, path: str, body: Any, key: str | None = None) -> requests.Response:
        return self.ask("POST", "/api/v1" + path, key, json=body)

    def call(self, path: str, body: Any, key: str | None = None) -> dict[str, Any]:
        """What a good request is answered."""
        answer = self.post(path, body, key)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def result(self, request_id: str, key: str | None = None) -> requests.Response:
        """The answer of a promise, waited for."""
        while (answer := self.post("/retrieve_future", {"request_id": request_id}, key)).status_code == 408:
            pass
        return answer

    def raw(self, data: bytes) -> bytes:
        """All that comes back for some bytes before the server closes or waits for more."""
        with socket.create_connection(self.address, 10) as connection:
            connection.sendall(data)
            connection.settimeout(10)
            return connection.recv(2**20)

    def lines(self) -> list[dict[str, Any]]:
        """The access log, if it goes to stderr."""
        assert self.stderr is not None
        return [json.loads(line) for line in self.stderr.read_text().splitlines() if line.startswith("{")]


@contextlib.contextmanager
def process(folder: Path, *arguments: str) -> Generator[Server, None, None]:
    """``veneer serve ARGUMENTS`` on a free port, with a home of its own in ``folder``."""
    home, err = folder / "home", folder / "stderr"
    environment = {**os.environ, "VENEER_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "veneer", "serve", "--port", "0", "--threads", "1", *arguments]
    with err.open("w") as stderr:
        running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr, text=True, env=environment)
    try:
        end = time.monotonic() + START
        while (found := re.search(r"on (http://\S+)", err.read_text())) is None:
            assert running.poll() is None, err.read_text()
            assert time.monotonic() < end, "the server did not start"
            time.sleep(0.05)
        server = Server(found[1], home, running, err)
        until(lambda: answers(server))
        yield server
    finally:
        code = running.poll()
        assert code is None, f"the server ended by itself, with {code}:\n{err.read_text()[-2000:]}"
        running.send_signal(signal.SIGTERM)
        try:
            running.wait(20)
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()


def answers(server: Server) -> bool:
    with contextlib.suppress(requests.ConnectionError):
        return server.ask("GET", "/healthz").status_code == 200
    return False


@cache
def nano() -> Base:
    return load_base("nano", "cpu")


@contextlib.contextmanager
def hosted(home: Path, limits: Limits | None = None, log: AccessLog | None = None, room: int = ROOM) -> Generator[Server, None, None]:
    """The application on a real socket in this process, on the bundled base. ``home``: as VENEER_HOME. ``room``: bytes for runs."""
    base = nano()
    assert base.tokenizer is not None
    engine = LoraEngine(base)
    worker = Worker([engine])
    served = Served(("nano", "Qwen/Qwen3-8B"), engine, Renderer(base.tokenizer), Shelf(worker, engine))
    app = make_app(Bases([served]), worker, home / "server", limits, log, room=room)
    running = uvicorn.Server(settings(app))
    listening = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=lambda: running.run(sockets=[listening]), daemon=True)
    thread.start()
    try:
        until(lambda: running.started)
        yield Server(f"http://127.0.0.1:{listening.getsockname()[1]}", home, worker=worker, served=served)
    finally:
        running.should_exit = True
        thread.join(30)


def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)

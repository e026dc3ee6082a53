"""A real HTTP server on this machine for generated sites, and the client that the tools fetch with."""

from __future__ import annotations

import asyncio
import io
import re
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from http.client import HTTPException, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast
from urllib.parse import parse_qs, unquote, urlsplit

from veneer.envs.worlds.pages import page_html, results_html
from veneer.envs.worlds.site import Site
from veneer.types import RunError, Split

HOST = "127.0.0.1"
PATH = re.compile(r"/(train|eval)/(\d{1,20})/(search|page/([^/]+))")


class SiteServer:
    """Serves ``/SPLIT/INDEX/page/TITLE`` and ``/SPLIT/INDEX/search?q=WORDS`` from threads of its own until it is stopped. A path names
    a problem and a page of it; no file is ever opened."""

    def __init__(self, site: Callable[[Split, int], Site], latency: float) -> None:
        """``latency``: seconds that every answer waits."""

        stopping = self._stopping = threading.Event()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                stopping.wait(latency)
                body = _answer(site, self.path)
                if body is None:
                    self.send_error(404)
                    return
                content = body.encode()
                self.send_response(200)
                self.send_header("Content-Type", "text/html; charset=utf-8")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._http = _Server((HOST, 0), Handler)
        self.port: int = self._http.server_address[1]
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), name=f"site-{self.port}", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Returns when no thread and no socket of it is left. Whoever still waits for an answer gets none."""
        self._stopping.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    """A thread a connection, for as long as it is open: a client on a busy event loop may take seconds to say what it wants."""

    daemon_threads = False  # so that closing waits for them
    request_queue_size = 1024

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self._connections: set[socket.socket] = set()
        super().__init__(address, handler)

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self._connections.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        for connection in self._connections.copy():
            with suppress(OSError):  # it ends by itself just now
                connection.shutdown(socket.SHUT_RDWR)
        super().server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away, such as a rollout that was given up, is no news."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


def _answer(site: Callable[[Split, int], Site], target: str) -> str | None:
    """The document at a path; None: there is none."""
    parts = urlsplit(target)
    found = PATH.fullmatch(parts.path)
    if found is None:
        return None
    here = site(cast("Split", found[1]), int(found[2]))
    if found[3] == "search":
        return results_html(here.search(" ".join(parse_qs(parts.query).get("q", []))))
    page = here.pages.get(unquote(found[4]))
    return None if page is None else page_html(page)


class _Received:
    """What the standard library's parser of HTTP answers reads from."""

    def __init__(self, answer: bytes) -> None:
        self.answer = answer

    def makefile(self, _mode: str) -> io.BytesIO:
        return io.BytesIO(self.answer)


async def fetch(port: int, target: str) -> tuple[int, str]:
    """Status and text of ``http://127.0.0.1:port`` + target, without holding the event loop.

    Raises:
        RunError: what came back is no whole HTTP answer.
        OSError: nobody listens there.
    """
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        writer.write(f"GET {target} HTTP/1.1\r\nHost: {HOST}:{port}\r\nConnection: close\r\n\r\n".encode("ascii"))
        received = await reader.read()
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()
    response = HTTPResponse(cast("Any", _Received(received)))
    try:
        response.begin()
        return response.status, response.read().decode()
    except HTTPException as error:
        raise RunError(f"the site's answer is broken ({type(error).__name__})") from error

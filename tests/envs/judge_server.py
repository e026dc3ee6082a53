"""A small OpenAI endpoint that answers, dawdles, fails, hangs and dies as it is told."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class JudgeServer:
    """``reply`` says what the n-th request gets: a text, a status, or a callable that writes to the connection itself."""

    reply: Callable[[int, str], str | int | Callable[[BaseHTTPRequestHandler], None]] = lambda number, question: "Score: 10"
    url: str = ""
    questions: list[str] = field(default_factory=list[str])
    keys: list[str | None] = field(default_factory=list[str | None])
    at_once: int = 0
    most_at_once: int = 0
    seconds: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)


def hang(handler: BaseHTTPRequestHandler) -> None:
    time.sleep(3)


def die(handler: BaseHTTPRequestHandler) -> None:
    """In the middle of an answer."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.wfile.flush()
    handler.connection.close()


def no_json(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", "4")
    handler.end_headers()
    handler.wfile.write(b"soup")


@contextmanager
def judging(server: JudgeServer) -> Generator[JudgeServer, None, None]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            question = body["messages"][-1]["content"]
            with server.lock:
                number = len(server.questions)
                server.questions.append(question)
                server.keys.append(self.headers.get("Authorization"))
                server.at_once += 1
                server.most_at_once = max(server.most_at_once, server.at_once)
            try:
                time.sleep(server.seconds)
                reply = server.reply(number, question)
            finally:
                with server.lock:
                    server.at_once -= 1
            try:
                if callable(reply):
                    reply(self)
                    self.close_connection = True
                elif isinstance(reply, int):
                    self.answer(reply, {"error": {"message": f"no, {self.headers.get('Authorization')}", "type": "server_error"}})
                else:
                    message = {"role": "assistant", "content": reply}
                    choice = {"index": 0, "message": message, "finish_reason": "stop"}
                    self.answer(200, {"id": "1", "object": "chat.completion", "created": 1, "model": body["model"], "choices": [choice]})
            except OSError:
                self.close_connection = True  # whoever asked has gone

        def answer(self, status: int, document: Any) -> None:
            payload = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    web.daemon_threads = True
    server.url = f"http://127.0.0.1:{web.server_port}/v1"
    thread = threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        web.shutdown()
        web.server_close()

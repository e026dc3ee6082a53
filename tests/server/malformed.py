"""Requests that are wrong for certain: each is to be refused with a 4xx, whatever the server thinks of the rest of it."""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from http.client import HTTPResponse
from typing import Any

API, V1 = "/api/v1", "/v1"
PROMPT = {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]}


@dataclass
class Request:
    method: str
    target: bytes
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict[str, str])

    def __bytes__(self) -> bytes:
        headers = {"Host": "localhost", "Content-Length": str(len(self.body)), **self.headers}
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode("latin-1")
        return self.method.encode() + b" " + self.target + b" HTTP/1.1\r\n" + lines + b"\r\n" + self.body


class Line:
    """A connection that is used again and again, and made anew when the server closes it."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.address = address
        self.socket: socket.socket | None = None

    def ask(self, request: bytes) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body."""
        for fresh in (False, True):
            if self.socket is None or fresh:
                self.socket = socket.create_connection(self.address, 60)
            try:
                self.socket.sendall(request)
                response = HTTPResponse(self.socket)
                response.begin()
                break
            except (ConnectionError, OSError):
                if fresh:
                    raise
        body = response.read()
        if response.will_close:
            self.socket.close()
            self.socket = None
        return response.status, {name.lower(): value for name, value in response.getheaders()}, body


def valid_bodies(session: str, run: str, sampler: str) -> dict[str, dict[str, Any]]:
    """A body for each route that takes JSON, with every field that the route insists on; all of its fields have a type."""
    return {API + path: body for path, body in tinker_bodies(session, run, sampler).items()} | {
        V1 + path: body for path, body in OPENAI.items()
    }


def tinker_bodies(session: str, run: str, sampler: str) -> dict[str, dict[str, Any]]:
    operation = {"model_id": run, "seq_id": 1}
    lora = {"rank": 1, "train_mlp": True}
    return {
        "/client/config": {"sdk_version": "0.38.0"},
        "/create_session": {"tags": ["a"], "sdk_version": "0.38.0"},
        "/session_heartbeat": {"session_id": session},
        "/create_model": {"session_id": session, "model_seq_id": 7, "base_model": "nano", "lora_config": lora},
        "/load_weights": {"path": f"tinker://{run}/weights/x", "optimizer": True, "session_id": session, "model_seq_id": 5},
        "/optim_step": operation,
        "/save_weights": operation,
        "/save_weights_for_sampler": operation,
        "/save_weights_external": operation,
        "/get_info": {"model_id": run},
        "/create_sampling_session": {"session_id": session, "sampling_session_seq_id": 7, "base_model": "nano"},
        "/asample": {
            "sampling_session_id": sampler,
            "seq_id": 0,
            "num_samples": 1,
            "prompt": PROMPT,
            "sampling_params": {"max_tokens": 1, "temperature": 1.0, "top_k": -1, "top_p": 1.0, "seed": 0},
            "topk_prompt_logprobs": 0,
            "target_prompt_logprobs": {"data": [1], "dtype": "int64", "shape": [1, 1]},
        },
        "/retrieve_future": {"request_id": "1-x"},
        "/retrieve_futures": {"target": {"sampling_session_id": sampler, "cloned_sampler_id": 0}, "prev_cursor": 0, "timeout": 0},
        "/join_sampling_session": {"sampling_session_id": sampler},
        "/weights_info": {"tinker_path": f"tinker://{run}/weights/x"},
        "/copy_weights": {"source_path": f"tinker://{run}/weights/x", "ttl_seconds": 3600},
        "/create_custom_loss": {"session_id": session, "custom_loss_seq_id": 0},
    }


CHAT = {"model": "nano", "max_tokens": 1, "temperature": 1.0, "top_p": 1.0, "n": 1, "stream": False, "logprobs": True, "seed": 1}
OPENAI: dict[str, dict[str, Any]] = {
    "/chat/completions": {**CHAT, "messages": [{"role": "user", "content": "1+1=?"}], "lora": [{"name": "nothing", "scale": 1.0}]},
    "/completions": {"model": "nothing", "prompt": "1+1=", "max_tokens": 1, "echo": False, "n": 1},
    "/load_lora_adapter": {"lora_name": "nothing", "lora_path": "nowhere", "load_inplace": True},
    "/unload_lora_adapter": {"lora_name": "nothing"},
    "/adapters/nothing/promote": {"version": 1, "label": "live"},
    "/adapters/nothing/rollback": {"label": "live"},
}
"""Each about an adapter that is not there, so that none of them is answered whatever else is in it."""
IDS = (
    "session_id",
    "model_id",
    "model",
    "lora_name",
    "lora_path",
    "sampling_session_id",
    "source_path",
    "tinker_path",
    "base_model",
    "request_id",
    "path",
)
"""Fields that name something; an unknown name is refused at once in all routes but those of operations."""
NOWHERE = [
    "",
    "x",
    "\x00",
    "a\x00b",
    "../../../etc/passwd",
    "x" * 60_000,
    "é" * 1000,
    "'; DROP TABLE runs; --",
    "null",
    "\u202e",
    "{}",
    "%00",
]
NUMBERS = [2**200, -(2**200), 2**63, -1, 1.5, 1e308, -0.5]


class Generator:
    """Malformed requests without end, the same for the same seed."""

    def __init__(self, seed: int, session: str, run: str, sampler: str) -> None:
        self.random = random.Random(seed)
        self.bodies = valid_bodies(session, run, sampler)
        self.names = {"session": session, "run": run, "sampler": sampler}

    def __call__(self) -> Request:
        kinds: tuple[Callable[[], Request], ...] = (self.damaged, self.mistyped, self.unknown, self.lost, self.query, self.packed)
        return self.random.choice(kinds)()

    def post(self, path: str, body: bytes, content_type: str | None = "application/json") -> Request:
        headers = {} if content_type is None else {"Content-Type": content_type}
        return Request("POST", path.encode(), body, headers)

    # ------------------------------------------------ bodies that are no JSON, or no object

    def damaged(self) -> Request:
        path = self.random.choice(list(self.bodies))
        text = json.dumps(self.bodies[path]).encode()
        cut = self.random.randrange(1, len(text))
        depth = self.random.choice((300, 10_000, 200_000))
        ways = (
            text[:cut],
            text[:cut] + b"\xff\xfe" + text[cut + 1 :] + b"}",
            text + b"]",
            b"",
            b"\x00" * cut,
            self.random.randbytes(cut),
            b"[" * depth,
            b'{"x":' * depth + b"1" + b"}" * depth,
            b'{"session_id":' + b"[" * depth + b"]" * depth + b"}",
            b"\xef\xbb\xbf\xef\xbb\xbf" + text,
            json.dumps(self.bodies[path]).encode("utf-16"),
            self.random.choice((b"null", b"[]", b'"x"', b"1", b"NaN", b"1e400", b"true", b"[{}]", b"-", b'"\\ud800"', b'{"a":1')),
        )
        kind = self.random.choice(
            ("application/json", None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "x", "")
        )
        return self.post(path, self.random.choice(ways), kind)

    # ------------------------------------------------ fields of another type

    def mistyped(self) -> Request:
        path = self.random.choice(list(self.bodies))
        body = json.loads(json.dumps(self.bodies[path]))
        holder = body
        name = self.random.choice(list(holder))
        while isinstance(holder[name], dict) and self.random.random() < 0.8:
            holder = holder[name]
            name = self.random.choice(list(holder))
        right = holder[name]
        wrong: list[Any] = [{"x": [[[]]]}, [{"x": 1}], [[[1]]]]
        if isinstance(right, str):
            wrong += [5, True, 2**200, ["x"], "x" * 70_000]
        elif isinstance(right, bool):
            wrong += ["maybe", 2, 0.5, [True]]
        elif isinstance(right, int | float):
            wrong += ["x", "", "\x00", 2**200, -(2**200), [1]]
        elif isinstance(right, list):
            wrong = ["x", 5, {"0": 1}, [{"tokens": "x"}], [[1]]]
        else:
            wrong = ["x", 5, [right], [[]]]
        holder[name] = self.random.choice(wrong)
        return self.post(path, json.dumps(body).encode())

    # ------------------------------------------------ names of nothing

    def unknown(self) -> Request:
        path = self.random.choice([path for path, body in self.bodies.items() if any(name in body for name in IDS)])
        body = dict(self.bodies[path])
        name = self.random.choice([name for name in body if name in IDS])
        body[name] = self.random.choice([*NOWHERE, *self.names.values()][: len(NOWHERE)])
        return self.post(path, json.dumps(body, ensure_ascii=self.random.random() < 0.5).encode())

    # ------------------------------------------------ routes, methods and path segments that are not there

    def lost(self) -> Request:
        segment = self.random.choice(
            (b"%00", b"%ff%fe", b"..", b"%2e%2e%2f%2e%2e", b"x" * 20_000, b"%F0%9F%98%80", b"'", b"a%0d%0ab", b"%25", b"tinker:")
        )
        run = self.names["run"].encode()
        checkpoint = b"/training_runs/%b/checkpoints/weights/%b" % (run, segment)
        targets = [
            ("GET", b"/sessions/%b" % segment),
            ("GET", b"/samplers/%b" % segment),
            ("GET", b"/training_runs/%b" % segment),
            ("GET", b"/training_runs/%b/checkpoints" % segment),
            ("GET", b"/training_runs/%b/checkpoints/external_weights/%b/external_weights_urls" % (run, segment)),
            ("GET", b"/files/%b/%b" % (segment, segment)),
            ("GET", b"/files/x/adapter_model.safetensors"),
            ("POST", b"/sessions/%b/finish" % segment),
            ("DELETE", checkpoint),
            ("POST", checkpoint + b"/publish"),
            ("DELETE", checkpoint + b"/publish"),
            ("GET", b"/" + segment),
            ("POST", b"/" + segment),
            (self.random.choice(("PUT", "PATCH", "TRACE", "OPTIONS", "LOCK", "PROPFIND")), b"/create_session"),
            ("GET", b"/create_session"),
            ("DELETE", b"/sessions"),
        ]
        models = [(method, b"/adapters/%b%b" % (segment, end)) for method, end in (("GET", b""), ("DELETE", b""), ("POST", b"/promote"))]
        prefix, found = self.random.choice(((API, targets), (V1, [*models, ("GET", b"/models/" + segment), ("POST", b"/models")])))
        method, target = self.random.choice(found)
        return Request(method, prefix.encode() + target)

    def query(self) -> Request:
        page = self.random.choice(("/sessions", "/training_runs", "/checkpoints"))
        name = self.random.choice(("limit", "offset"))
        value = self.random.choice(
            ("-1", "x", "", str(2**200), "1" * 5000, "1e400", "NaN", "0x10", "1.5", "%00", "%ff", "[]", "1&limit=x&offset=x")
        )
        return Request("GET", f"{API}{page}?{name}={value}".encode())

    # ------------------------------------------------ bodies that are packed, and protobuf that is none

    def packed(self) -> Request:
        noise = self.random.randbytes(self.random.randrange(1, 2000))
        if self.random.random() < 0.5:
            request = self.post(f"{API}/forward_backward", noise, "application/x-protobuf")
            request.headers["Content-Encoding"] = self.random.choice(("gzip", "zstd", "br", "x"))
            return request
        return self.post(
            "/forward_backward",
            b"\x0a\xff\xff\xff\xff\x0f" + noise,
            self.random.choice(("application/x-protobuf", None, "application/json")),
        )

"""Clients that leave: their places are free at once, and nobody beside them notices."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import openai
import pytest
from serving import SUM, Serving, until

ENDLESS: dict[str, Any] = {"model": "nano", "messages": SUM, "n": 4, "max_tokens": 1900, "extra_body": {"ignore_eos": True}}
"""As the SDK takes it."""
LONG: dict[str, Any] = {**{key: value for key, value in ENDLESS.items() if key != "extra_body"}, "ignore_eos": True}


def send(server: Serving, body: dict[str, Any], path: str = "/v1/chat/completions") -> socket.socket:
    """A client as plain as can be."""
    host, port = server.url.removeprefix("http://").split(":")
    raw = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
    connection = socket.create_connection((host, int(port)), timeout=30)
    connection.sendall(head.encode() + raw)
    return connection


def running(server: Serving) -> bool:
    return bool(server.served.engine._sampling)  # type: ignore[attr-defined]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", ["chat", "text"])
def test_a_client_that_leaves_frees_its_place(server: Serving, stream: bool, path: str) -> None:
    """Three seconds of drawing that nobody wants any more are not drawn."""
    body: dict[str, Any] = LONG | {"stream": stream}
    if path == "text":
        body = {key: value for key, value in body.items() if key != "messages"} | {"prompt": ["1+1=", "2+2="]}
    for wait in (True, False):
        connection = send(server, body, "/v1/chat/completions" if path == "chat" else "/v1/completions")
        if wait and stream:
            got = b""
            while got.count(b"data:") < 12:
                got += connection.recv(4096)
        elif wait:
            until(lambda: running(server))
        connection.close()
        until(lambda: server.idle)


def test_others_do_not_notice(server: Serving, client: openai.OpenAI) -> None:
    """The same answer beside clients that come and go as alone."""
    request: dict[str, Any] = {"model": "nano", "messages": SUM, "seed": 3, "max_tokens": 400, "extra_body": {"ignore_eos": True}}
    quiet = client.chat.completions.create(**request)

    async def beside() -> Any:
        async with server.async_client() as mine:
            asked = asyncio.create_task(mine.chat.completions.create(**request))
            for i in range(10):
                connection = send(server, LONG | {"stream": i % 2 == 0, "seed": i})
                await asyncio.sleep(0.02)
                connection.close()
            return await asked

    assert asyncio.run(beside()).choices[0].message == quiet.choices[0].message
    until(lambda: server.idle)


def test_the_sdk_closes_a_stream(server: Serving, client: openai.OpenAI) -> None:
    """Breaking out of the loop is what programs do."""
    with client.chat.completions.create(**ENDLESS, stream=True) as stream:
        for i, _ in enumerate(stream):
            if i == 6:
                break
    until(lambda: server.idle)


def test_an_adapter_in_use_stays_until_the_client_has_left(server: Serving) -> None:
    """Unloaded by name, it leaves memory with the last answer."""
    server.put("busy", seed=1)
    digest = server.registry.resolve("busy").digest
    connection = send(server, LONG | {"model": "busy", "stream": True})
    connection.recv(4096)
    with server.client() as client:
        client.post("/unload_lora_adapter", body={"lora_name": "busy"}, cast_to=str)
    assert digest in server.served.shelf
    assert running(server)
    connection.close()
    until(lambda: server.idle and digest not in server.served.shelf)


def test_what_fails_in_the_middle_is_told_in_the_stream(server: Serving, client: openai.OpenAI) -> None:
    """The headers are sent; the SDK raises what the event says."""
    server.put("doomed", seed=2)
    with pytest.raises(openai.APIError, match="was removed"):  # noqa: PT012
        for i, _ in enumerate(client.chat.completions.create(**ENDLESS | {"model": "doomed"}, stream=True)):
            if i == 8:
                client.delete("/adapters/doomed", cast_to=object)
    until(lambda: server.idle)

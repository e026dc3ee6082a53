"""A real server and requests that are wrong: 200 in the suite, as many as VENEER_FUZZ says in ``make fuzz``."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from malformed import Generator as Malformed
from malformed import Line
from serving import Server, process

pytestmark = pytest.mark.xdist_group("malformed")
ROUNDS = int(os.environ.get("VENEER_FUZZ", "200"))
GROWTH = 32 * 2**20
"""Bytes by which the process may grow over all rounds: allocators do not give everything back, and a leak of 4 KiB a request would be
more in 10,000."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Generator[Server, None, None]:
    with process(tmp_path_factory.mktemp("malformed")) as server:
        yield server


def make(server: Server) -> tuple[str, str, str]:
    """A session with a run and a sampler."""
    session = server.call("/create_session", {})["session_id"]
    model = {"session_id": session, "model_seq_id": 0, "base_model": "nano", "lora_config": {"rank": 1}}
    run = server.result(server.call("/create_model", model)["request_id"]).json()["model_id"]
    sampling = {"session_id": session, "sampling_session_seq_id": 0, "base_model": "nano"}
    return session, run, server.call("/create_sampling_session", sampling)["sampling_session_id"]


def good_request(server: Server) -> None:
    """The server is well, and does what it is asked."""
    assert server.ask("GET", "/healthz").json() == {"status": "ok"}
    make(server)


def server_errors(home: Path) -> list[Any]:
    """Answers of promises for which the server took the blame."""
    with sqlite3.connect(home / "server/tinker/state.sqlite") as db:
        found = [row[0] for row in db.execute("SELECT answer FROM promises WHERE media_type = 'application/json'")]
    return [text for text in found if json.loads(text).get("category", "user") != "user"]


def test_every_malformed_request_is_a_clear_4xx(server: Server) -> None:
    """JSON with a line that says what is wrong, short, without a traceback or a path of the server's; its memory stays as it is."""
    malformed, line = Malformed(0, *make(server)), Line(server.address)
    for _ in range(ROUNDS // 4):  # what the process takes once, it has then
        line.ask(bytes(malformed()))
    before = server.resident()
    for _ in range(ROUNDS):
        request = bytes(malformed())
        status, headers, body = line.ask(request)
        assert 400 <= status < 500, (request[:2000], status, body)
        assert headers["content-type"] == "application/json", (request[:2000], headers)
        detail = json.loads(body)["detail"]
        assert 0 < len(detail) < 500, (request[:500], detail)
        assert "Traceback" not in detail
        assert str(server.home) not in detail
    grown = server.resident() - before
    print(f"{ROUNDS} malformed requests: {grown / 2**20:.1f} MiB more of {before / 2**20:.0f}")
    assert grown < GROWTH, f"{grown / 2**20:.1f} MiB more after {ROUNDS} requests"
    good_request(server)
    assert server_errors(server.home) == []
    assert server.stderr is not None
    assert "Traceback" not in server.stderr.read_text()

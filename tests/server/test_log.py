"""The access log: a line for every request, and nothing in it that opens anything."""

from __future__ import annotations

import json
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from real_server import Server, hosted, until

from veneer.server.log import AccessLog

pytestmark = pytest.mark.xdist_group("log")


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Generator[tuple[Server, Path, str], None, None]:
    folder = tmp_path_factory.mktemp("log")
    with hosted(folder, log=AccessLog(folder / "access.log")) as server:
        yield server, folder / "access.log", server.keys.create("alice", ["*"])[0]


def line_of(path: Path, request_id: str) -> dict[str, Any]:
    """The line of one request, which is written a moment after its answer."""
    found: list[dict[str, Any]] = []

    def look() -> bool:
        found[:] = [line for line in map(json.loads, path.read_text().splitlines()) if line["id"] == request_id]
        return bool(found)

    until(look)
    assert len(found) == 1
    return found[0]


def test_what_a_line_says(logged: tuple[Server, Path, str]) -> None:
    server, path, key = logged
    headers = {"User-Agent": "AsyncTinker/Python 0.38.0", "x-sdk-version": "0.38.0", "x-sdk-method": "ServiceClient.create"}
    answer = server.ask("POST", "/api/v1/create_session?secret=in-the-query", key, headers=headers, data='{"tags": ["in-the-body"]}')
    line = line_of(path, answer.headers["x-request-id"])
    assert line.pop("ms") > 0
    assert abs(time.time() - time.mktime(time.strptime(line.pop("time")[:19], "%Y-%m-%dT%H:%M:%S")) + time.timezone) < 60
    assert line == {
        "id": answer.headers["x-request-id"],
        "caller": "alice",
        "method": "POST",
        "route": "/api/v1/create_session",
        "status": 200,
        "bytes_in": 25,
        "bytes_out": len(answer.content),
        "agent": "AsyncTinker/Python 0.38.0",
        "sdk": "0.38.0",
        "sdk_method": "ServiceClient.create",
        "adapter": None,
    }


def test_every_answer_has_an_id_of_its_own(logged: tuple[Server, Path, str]) -> None:
    """Also those of routes that are not there, and of callers who are not known; nobody chooses it."""
    server, path, key = logged
    asked = [
        ("GET", "/nothing", key, 404),
        ("GET", "/healthz", None, 200),
        ("PUT", "/healthz", None, 405),
        ("GET", "/openapi.json", "no", 401),
    ]
    seen = set()
    for method, where, given, status in asked:
        answer = server.ask(method, where, given, headers={"x-request-id": "mine"})
        assert line_of(path, answer.headers["x-request-id"])["status"] == answer.status_code == status
        seen.add(answer.headers["x-request-id"])
    assert len(seen) == len(asked)
    assert "mine" not in seen


@pytest.mark.parametrize(
    ("method", "path", "route"),
    [
        ("GET", "/api/v1/files/a-secret-token/adapter_model.safetensors", "/api/v1/files/{token}/{name}"),
        ("GET", "/api/v1/sessions/a-secret-token", "/api/v1/sessions/{session_id}"),
        ("PATCH", "/api/v1/files/a-secret-token/x", "/api/v1/files/{token}/{name}"),
        ("GET", "/a-secret-token", None),
        ("GET", "/api/v1/sessions?a-secret-token", "/api/v1/sessions"),
    ],
)
@pytest.mark.parametrize("known", [True, False], ids=["with a key", "without one"])
def test_paths_are_not_written_as_they_came(
    logged: tuple[Server, Path, str], method: str, path: str, route: str | None, known: bool
) -> None:
    server, log, key = logged
    answer = server.ask(method, path, key if known else "tml-a-secret-token")
    assert line_of(log, answer.headers["x-request-id"])["route"] == route
    assert "a-secret-token" not in log.read_text()
    assert "a-secret-token" not in server.ask("GET", "/metrics").text
    assert key not in log.read_text()


def test_a_header_cannot_write_a_line(logged: tuple[Server, Path, str]) -> None:
    """Quotes, controls that HTTP lets through, and a text without end stay within theirs."""
    server, log, _ = logged
    agent = '","status":500,"x":"\t\x85\xff' + "x" * 10_000
    answer = server.ask("GET", "/healthz", headers={"User-Agent": agent.encode("latin-1")})
    line = line_of(log, answer.headers["x-request-id"])
    assert line["status"] == 200
    assert line["agent"] == agent[:200]


def test_polls_that_found_nothing_are_not_written(logged: tuple[Server, Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """There is one every half minute for everything that is waited for. The metrics count them."""
    from veneer.server.tinker import routes

    monkeypatch.setattr(routes, "HOLD", 0.1)
    server, log, key = logged
    session = server.call("/create_session", {}, key)["session_id"]
    model = {"session_id": session, "model_seq_id": 0, "base_model": "nano", "lora_config": {"rank": 1}}
    server.result(server.call("/create_model", model, key)["request_id"], key)
    early = server.call("/optim_step", {"model_id": f"{session}:train:0", "seq_id": 2, "adam_params": {}}, key)["request_id"]
    poll = server.post("/retrieve_future", {"request_id": early}, key)
    assert poll.status_code == 408
    line_of(log, server.ask("GET", "/healthz").headers["x-request-id"])
    assert poll.headers["x-request-id"] not in log.read_text()
    assert 'veneer_requests_total{method="POST",route="/api/v1/retrieve_future",status="408"}' in server.ask("GET", "/metrics").text


def test_a_log_that_is_moved_away_begins_anew(logged: tuple[Server, Path, str]) -> None:
    """As logrotate does it."""
    server, log, _ = logged
    line_of(log, server.ask("GET", "/healthz").headers["x-request-id"])
    log.rename(log.with_suffix(".1"))
    answer = server.ask("GET", "/healthz")
    until(log.exists)
    assert line_of(log, answer.headers["x-request-id"])["route"] == "/healthz"


def test_a_log_that_cannot_be_written_holds_nothing_up(tmp_path: Path) -> None:
    """Its folder is gone."""
    folder = tmp_path / "logs"
    folder.mkdir()
    with hosted(tmp_path, log=AccessLog(folder / "access.log")) as server:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
        assert {server.ask("GET", "/healthz").status_code for _ in range(20)} == {200}

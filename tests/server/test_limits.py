"""How much and how fast: bodies, rates, and connections that take their time."""

from __future__ import annotations

import resource
import socket
import threading
import time
from collections.abc import Generator
from pathlib import Path

import pytest
from real_server import Server, hosted, process, until

from veneer.server import connections
from veneer.server.limits import Limits

pytestmark = pytest.mark.xdist_group("limits")
SMALL = Limits(max_body=10_000, pause=0.5, arrival=2.0)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Generator[Server, None, None]:
    """One that takes little, and has no patience."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connections, "HEAD", 1.0)
        with hosted(tmp_path_factory.mktemp("limits"), SMALL) as server:
            yield server


def head(server: Server, path: str = "/api/v1/create_session", more: str = "") -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: localhost\r\n{more}\r\n".encode()


# ---------------------------------------------------------------- bodies


@pytest.mark.parametrize("path", ["/api/v1/create_session", "/api/v1/forward_backward", "/api/v1/telemetry", "/nothing"])
def test_a_body_that_says_it_is_too_large_is_not_waited_for(server: Server, path: str) -> None:
    """The answer is there before a byte of the body is sent."""
    answer = server.raw(head(server, path, "Content-Length: 10001\r\n"))
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"larger than 10000 bytes" in answer


def test_a_body_that_does_not_say_so_is_counted(server: Server) -> None:
    """Chunked: cut off at the limit, whatever is still to come."""
    with socket.create_connection(server.address, 10) as connection:
        connection.sendall(head(server, more="Transfer-Encoding: chunked\r\n"))
        for _ in range(11):
            connection.sendall(b"3e8\r\n" + b" " * 1000 + b"\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")


def test_the_limit_itself_is_within_the_limit(server: Server) -> None:
    body = b'{"tags":["' + b"x" * (SMALL.max_body - 13) + b'"]}'
    assert len(body) == SMALL.max_body
    assert server.ask("POST", "/api/v1/create_session", data=body).status_code == 200
    assert server.ask("POST", "/api/v1/create_session", data=body + b" ").status_code == 413


def test_text_has_a_limit_of_its_own(tmp_path: Path) -> None:
    """JSON is read into many times its size; protobuf may be larger."""
    with hosted(tmp_path, Limits(max_body=20_000, max_text=10_000)) as server:
        for kind, status in (("application/json", 413), ("", 413), ("application/x-protobuf", 400)):
            answer = server.ask("POST", "/api/v1/forward_backward", headers={"Content-Type": kind}, data=b"\xff" * 15_000)
            assert answer.status_code == status, kind
        for path in ("/api/v1/create_session", "/v1/chat/completions"):
            answer = server.ask("POST", path, headers={"Content-Type": "application/json"}, data=b"[" * 15_000)
            assert answer.status_code == 413
            assert "10000 bytes" in answer.text


@pytest.mark.parametrize("encoding", ["gzip", "zstd", "br", "deflate", "identity, gzip", "x"])
def test_packed_bodies_are_not_unpacked(server: Server, encoding: str) -> None:
    answer = server.ask("POST", "/api/v1/forward_backward", headers={"Content-Encoding": encoding}, data=b"x")
    assert answer.status_code == 415
    assert server.ask("POST", "/api/v1/create_session", headers={"Content-Encoding": "Identity"}, data=b"{}").status_code == 200


def test_a_body_that_stops_is_not_waited_for(server: Server) -> None:
    answer = server.raw(head(server, more="Content-Length: 100\r\n") + b"{")
    assert answer.startswith(b"HTTP/1.1 408 ")


def test_a_body_that_trickles_is_not_waited_for_for_ever(server: Server) -> None:
    """Each byte comes in time, the body never."""
    with socket.create_connection(server.address, 10) as connection:
        connection.sendall(head(server, more="Content-Length: 1000\r\n"))
        began = time.monotonic()
        connection.settimeout(0.2)
        answer = b""
        while not answer and time.monotonic() - began < 10:
            connection.sendall(b" ")
            try:
                answer = connection.recv(1000)
            except TimeoutError:
                continue
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert time.monotonic() - began > SMALL.arrival - 0.5


# ---------------------------------------------------------------- connections


def closed(connection: socket.socket, seconds: float = 5.0) -> bool:
    """Whether the other side hangs up in time."""
    connection.settimeout(seconds)
    try:
        while connection.recv(2**16):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        pass  # hung up with a reset
    return True


@pytest.mark.parametrize("beginning", [b"", b"GET", b"GET /healthz HTTP/1.1\r\nHost: local"])
def test_a_connection_that_asks_nothing_leaves(server: Server, beginning: bytes) -> None:
    with socket.create_connection(server.address, 10) as connection:
        connection.sendall(beginning)
        assert closed(connection)


def test_bytes_that_belong_to_nothing_do_not_keep_a_connection(server: Server) -> None:
    """The rest of a body that was refused trickles on."""
    with socket.create_connection(server.address, 10) as connection:
        connection.sendall(head(server, more="Content-Length: 10001\r\n"))
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")
        connection.sendall(b"x")
        assert closed(connection)


def test_a_connection_may_be_used_again(server: Server) -> None:
    """Being watched does not end one that asks in time."""
    with socket.create_connection(server.address, 10) as connection:
        for _ in range(4):
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")
            time.sleep(0.4)


@pytest.mark.parametrize("more", [b"X-Many: aaaaaaaa\r\n", b"a"], ids=["many lines", "one long line"])
def test_a_head_without_end(server: Server, more: bytes) -> None:
    """Refused at the limit, or hung up on while it still talks."""
    with socket.create_connection(server.address, 10) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nX-Long: ")
        sent, answer = 0, b""
        try:
            while sent < 2**22:
                sent += connection.send(more * 1000)
            answer = connection.recv(1000)
        except ConnectionError:
            pass  # hung up on while it talks
    assert sent < 2**22
    assert answer[:13] in (b"", b"HTTP/1.1 431 ")


def test_an_answer_may_take_longer_than_a_request(server: Server) -> None:
    """A long poll is no idle connection: the engines' thread is held up for longer than a head may take to arrive."""
    assert server.worker is not None
    release = threading.Event()
    server.worker._post(lambda: release.wait() and None)
    session = server.call("/create_session", {})["session_id"]
    body = {"session_id": session, "model_seq_id": 0, "base_model": "nano", "lora_config": {"rank": 1}}
    request_id = server.call("/create_model", body)["request_id"]
    threading.Timer(2.0, release.set).start()
    began = time.monotonic()
    assert server.result(request_id).json()["type"] == "create_model"
    assert time.monotonic() - began > connections.HEAD


def test_two_thousand_idle_connections_stop_nobody(server: Server) -> None:
    """They wait, others are answered; then they are gone."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most < 5000:
        pytest.skip(f"this system lets a process have {most} files; both ends of 2,000 connections need more")
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    idle = [socket.create_connection(server.address, 10) for _ in range(2000)]
    try:
        for connection in idle[::2]:
            connection.sendall(head(server, more="Content-Length: 2\r\n"))
        assert server.ask("GET", "/healthz").status_code == 200
        assert all(closed(connection) for connection in idle)
    finally:
        for connection in idle:
            connection.close()


# ---------------------------------------------------------------- rates


def test_a_rate_is_each_callers_own(tmp_path) -> None:
    """Beyond it comes 429 with the time to wait; others go on, and probes are never counted."""
    with hosted(tmp_path, Limits(rate=5)) as server:
        alice, bob = (server.keys.create(name, ["*"])[0] for name in ("alice", "bob"))
        clock = time.monotonic()
        answers = [server.ask("GET", "/api/v1/sessions", alice) for _ in range(40)]
        seconds = time.monotonic() - clock
        refused = [answer for answer in answers if answer.status_code == 429]
        assert [answer.status_code for answer in answers[:5]] == [200] * 5
        assert len(refused) >= 40 - 5 * (1 + seconds) - 1
        assert refused, f"a request took {seconds / 40:.1f} s: the machine is too slow to be limited"
        assert all(answer.headers["Retry-After"] == "1" for answer in refused)
        assert server.ask("GET", "/api/v1/sessions", bob).status_code == 200
        assert {server.ask("GET", "/healthz").status_code for _ in range(12)} == {200}
        until(lambda: server.ask("GET", "/api/v1/sessions", alice).status_code == 200)


def test_a_rate_below_one_lets_the_first_one_through(tmp_path) -> None:
    with hosted(tmp_path, Limits(rate=0.1)) as server:
        assert server.ask("GET", "/api/v1/sessions").status_code == 200
        refused = server.ask("GET", "/api/v1/sessions")
        assert refused.status_code == 429
        assert 5 <= int(refused.headers["Retry-After"]) <= 10


def test_the_flags_of_the_verb(tmp_path: Path) -> None:
    """A real process with a limit of a MiB, three requests a second, and its log in a file."""
    log = tmp_path / "access.log"
    with process(tmp_path, "--max-body", "1", "--rate", "3", "--log", str(log)) as server:
        assert server.raw(head(server, more=f"Content-Length: {2**20 + 1}\r\n")).startswith(b"HTTP/1.1 413 ")
        assert 429 in {server.ask("GET", "/api/v1/sessions").status_code for _ in range(10)}
        until(lambda: '"status":413' in log.read_text() and '"status":429' in log.read_text())
        assert server.lines() == []

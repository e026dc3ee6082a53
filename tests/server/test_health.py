"""``/healthz`` says ok only when a request would be answered."""

from __future__ import annotations

import resource
import threading
from pathlib import Path

import pytest
from real_server import Server, hosted, process, until

from veneer.server import health

pytestmark = pytest.mark.xdist_group("health")
BOTH = ("/healthz", "/api/v1/healthz")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(health, "MOMENT", 0.1)
    monkeypatch.setattr(health, "PATIENCE", 0.5)
    with hosted(tmp_path) as server:
        yield server


def hold_up(server: Server) -> threading.Event:
    """The engines' thread does nothing until the event is set."""
    assert server.worker is not None
    release = threading.Event()
    server.worker._post(lambda: release.wait(30) and None)
    return release


def test_well_stuck_and_well_again(server: Server) -> None:
    """A thread that does not turn is found out, on both routes, and believed again when it goes on."""
    assert [server.ask("GET", path).json() for path in BOTH] == [{"status": "ok"}] * 2
    release = hold_up(server)
    try:
        until(lambda: server.ask("GET", "/healthz").status_code == 503)
        for path in BOTH:
            answer = server.ask("GET", path)
            assert answer.status_code == 503
            assert "the engines' thread has not turned for" in answer.json()["detail"]
    finally:
        release.set()
    until(lambda: server.ask("GET", "/healthz").status_code == 200)


def test_busy_is_not_stuck(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that takes its time, within patience, does not make a server unwell."""
    monkeypatch.setattr(health, "MOMENT", 0.1)
    with hosted(tmp_path) as server:
        release = hold_up(server)
        try:
            assert server.ask("GET", "/healthz").status_code == 200
        finally:
            release.set()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # it is what the test does
def test_a_thread_that_ended(server: Server) -> None:
    def end() -> None:
        raise SystemExit

    assert server.worker is not None
    server.worker._post(end)
    until(lambda: server.ask("GET", "/healthz").status_code == 503)
    assert server.ask("GET", "/healthz").json()["detail"] == "the engines' thread has ended"


def test_a_broken_call_ends_nothing(server: Server) -> None:
    """An error that nobody foresaw leaves the thread at work."""

    def break_off() -> None:
        raise ValueError("broken")

    assert server.worker is not None
    server.worker._post(break_off)
    assert server.ask("GET", "/healthz").status_code == 200
    assert server.worker.alive


def test_a_disk_that_takes_nothing(tmp_path: Path) -> None:
    """A real process whose files may not grow: unwell, and what it cannot keep it does not accept; nothing tells where its files lie.
    With room it is well again."""
    with process(tmp_path) as server:
        _, most = resource.prlimit(server.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (0, most))
        until(lambda: server.ask("GET", "/healthz").status_code == 503)
        assert server.ask("GET", "/healthz").json()["detail"] == "nothing can be written; the server's log says more"
        refused = server.post("/create_session", {})
        assert refused.status_code == 507
        assert str(tmp_path) not in refused.text
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (most, most))
        until(lambda: server.ask("GET", "/healthz").status_code == 200)
        assert server.post("/create_session", {}).status_code == 200

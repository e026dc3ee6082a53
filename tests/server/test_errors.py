"""What a client is told when something goes wrong on the server's side: that it did, and nothing of how it looks inside."""

from __future__ import annotations

import shutil
from collections.abc import Generator
from pathlib import Path

import pytest
from real_server import Server, hosted

from veneer.server.errors import LONGEST, UNKNOWN, Answers, Busy, told
from veneer.store.adapters import read_adapter
from veneer.types import AdapterError, RequestError, StorageError

pytestmark = pytest.mark.xdist_group("errors")


@pytest.fixture
def server(home: Path) -> Generator[Server, None, None]:
    with hosted(home) as server:
        yield server


@pytest.mark.parametrize(("method", "path"), [("GET", "/api/v1/training_runs"), ("POST", "/api/v1/asample"), ("POST", "/v1/completions")])
def test_an_error_that_nobody_foresaw(
    server: Server, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, method: str, path: str
) -> None:
    """500 with the request's id and one line, in each API's own shape; the traceback stands in the log, once, under that id, and the
    server goes on."""

    def broken(*_args: object, **_more: object) -> None:
        raise ZeroDivisionError("inside")

    for name in ("tinker.service.Tinker.rows", "tinker.service.Tinker.sample", "openai.routes.answer_completion"):
        monkeypatch.setattr(f"veneer.server.{name}", broken)
    answer = server.ask(method, path, json={"model": "nano", "prompt": "x"} if method == "POST" else None)
    assert answer.status_code == 500
    assert UNKNOWN in answer.text
    assert "inside" not in answer.text
    assert ("error" if path.startswith("/v1") else "detail") in answer.json()
    (record,) = (record for record in caplog.records if answer.headers["x-request-id"] in record.getMessage())
    assert record.exc_info is not None
    assert server.ask("GET", "/healthz").status_code == 200


def test_a_future_that_fails_tells_no_path(server: Server) -> None:
    """The checkpoint's files are gone, or damaged."""
    session = server.call("/create_session", {})["session_id"]
    model = {"session_id": session, "model_seq_id": 0, "base_model": "nano", "lora_config": {"rank": 1}}
    run = server.result(server.call("/create_model", model)["request_id"]).json()["model_id"]
    for seq, harm in enumerate((shutil.rmtree, lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x")), 1):
        saved = server.call("/save_weights", {"model_id": run, "seq_id": 2 * seq - 1, "path": f"w{seq}"})
        path = server.result(saved["request_id"]).json()["path"]
        for folder in (server.home / "server/tinker/checkpoints").iterdir():
            harm(folder)
        load = {"model_id": run, "seq_id": 2 * seq, "path": path, "optimizer": True}
        failed = server.result(server.call("/load_weights", load)["request_id"]).json()
        assert failed["error"].startswith("(a file of the server) is ")
        assert str(server.home) not in str(failed)


def test_what_is_told_of_a_path(home: Path, tmp_path: Path) -> None:
    """Paths of the home are left out however they end, by whatever name the home has; the client's own words are not touched."""
    home.mkdir()
    (tmp_path / "link").symlink_to(home)
    with pytest.raises(AdapterError) as caught:
        read_adapter(home / "server/tinker/checkpoints/0123")
    assert told(caught.value) == "(a file of the server) is no Veneer adapter; there is no veneer.json"
    assert told(StorageError(f"cannot write {home}: no space left")) == "cannot write (a file of the server): no space left"
    assert told(StorageError(f"'{home}/a/b.sqlite' (x)\n  y")) == "'(a file of the server)' (x) y"
    assert told(RequestError("there is no adapter /models/mine")) == "there is no adapter /models/mine"
    long = told(RequestError("x" * 100_000 + " is no name; use another"))
    assert len(long) == LONGEST
    assert long.endswith("is no name; use another")


def test_each_api_has_its_own_shape() -> None:
    answers = Answers({"/v1/": lambda status, text, error: {"error": {"message": text, "code": status, "kind": type(error).__name__}}})
    busy = Busy("wait", 2.1)
    assert answers.error({"path": "/v1/models"}, busy).body == b'{"error":{"message":"wait","code":429,"kind":"Busy"}}'
    other = answers.error({"path": "/api/v1/asample"}, busy)
    assert other.body == b'{"detail":"wait"}'
    assert other.headers["retry-after"] == "3"

"""A real server and requests that are wrong: 200 in the suite, as many as VENEER_FUZZ says in ``make fuzz``."""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from malformed import Generator as Malformed
from malformed import Line
from real_server import Server, process

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
        told = json.loads(body)
        detail = told["detail"] if "detail" in told else told["error"]["message"]
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


def sample(**changes: Any) -> dict[str, Any]:
    params = {"max_tokens": 4, **changes.pop("sampling_params", {})}
    return {"prompt": {"chunks": [{"tokens": [1, 2, 3]}]}, "sampling_params": params, **changes}


def targets(data: list[int], shape: list[int], crow: list[int] | None = None, col: list[int] | None = None) -> dict[str, Any]:
    fields = {"data": data, "shape": shape, "sparse_crow_indices": crow, "sparse_col_indices": col}
    return {"target_prompt_logprobs": {name: value for name, value in fields.items() if value is not None}}


EXTREME = {
    "the largest seed": sample(sampling_params={"seed": 2**64 - 1}),
    "the smallest seed": sample(sampling_params={"seed": -(2**63)}),
    "hardly any temperature": sample(sampling_params={"temperature": 5e-324}),
    "the lowest temperature": sample(sampling_params={"temperature": 1e-6}),
    "a great temperature": sample(sampling_params={"temperature": 1e6}),
    "hardly any top_p": sample(sampling_params={"top_p": 1e-300}),
    "more top_k than there are tokens": sample(sampling_params={"top_k": 2**31 - 1}),
    "tokens without end": sample(sampling_params={"max_tokens": 2**31 - 1}),
    "a stop that never comes": sample(sampling_params={"stop": "\x00"}),
    "an empty stop": sample(sampling_params={"stop": ["a", ""]}),
    "stops that are no tokens": sample(sampling_params={"stop": [-1, 2**31 - 1]}),
    "a long stop": sample(sampling_params={"stop": "x" * 60_000}),
    "many stops": sample(sampling_params={"stop": [f"stop {i}" for i in range(1024)]}),
    "too many stops": sample(sampling_params={"stop": [f"stop {i}" for i in range(1025)]}),
    "an empty prompt": sample(prompt={"chunks": []}),
    "a negative token": sample(prompt={"chunks": [{"tokens": [-1]}]}),
    "a token beyond the vocabulary": sample(prompt={"chunks": [{"tokens": [2**31 - 1]}]}),
    "a prompt beyond the context": sample(prompt={"chunks": [{"tokens": [1] * 100_000}]}),
    "no targets": sample(**targets([], [2, 0])),
    "targets in a vast shape": sample(**targets([1], [2, 2**62])),
    "the largest target": sample(**targets([2**63 - 1, 1], [2, 1])),
    "a negative target": sample(**targets([1, -5], [2, 1])),
    "vast CSR targets": sample(**targets([], [2, 2**40], [0, 0, 0], [])),
    "wide CSR targets": sample(**targets([1], [2, 2**23], [0, 1, 1], [5])),
    "CSR targets beyond their shape": sample(**targets([1], [2, 8], [0, 1, 1], [9])),
    "CSR targets that go back": sample(**targets([1, 1], [2, 8], [0, 2, 1], [0, 1])),
    "targets in a negative shape": sample(**targets([1, 1], [-2, -1])),
    "more log-probabilities than tokens": sample(topk_sample_logprobs=1000, topk_prompt_logprobs=1000),
    "the last of many log-probabilities": sample(prompt_logprobs=True, prompt_logprobs_last_n=2**200),
}


@pytest.mark.parametrize("name", EXTREME)
def test_an_extreme_sample_is_drawn_or_the_clients_mistake(server: Server, sampler: str, name: str) -> None:
    """Soon: a request that takes the engine's time takes everybody's."""
    began = time.monotonic()
    answer = server.post("/asample", {**EXTREME[name], "sampling_session_id": sampler})
    if answer.status_code == 200:
        answer = server.result(answer.json()["request_id"])
        if answer.headers["content-type"] == "application/json":
            assert answer.json()["category"] == "user", answer.json()
    else:
        assert answer.status_code == 400, answer.text
    assert time.monotonic() - began < 20


@pytest.fixture(scope="module")
def sampler(server: Server) -> str:
    return make(server)[2]


@pytest.mark.parametrize("clone", [2**33 - 1, 2**33, 2**62, 2**63 - 1])
def test_a_cloned_sampler_with_a_great_number(server: Server, sampler: str, clone: int) -> None:
    """Its sequence numbers are a thousand million times that, and must still be numbers that can be kept."""
    body = {"target": {"sampling_session_id": sampler, "cloned_sampler_id": clone}, "timeout": 0}
    assert server.post("/retrieve_futures", body).status_code == (200 if clone < 2**33 else 400)


@pytest.mark.parametrize(
    "value", ["NaN", "1e999", "-Infinity", "9" * 5000, '"\\ud800"', '{"a":' * 300 + "1" + "}" * 300, '"' + "x" * 70_000 + '"']
)
def test_metadata_that_could_not_be_given_back(server: Server, value: str) -> None:
    answer = server.ask("POST", "/api/v1/create_session", data=f'{{"user_metadata": {{"a": {value}}}}}')
    assert answer.status_code == 400, answer.text


def test_metadata_that_is_odd_comes_back_as_it_was(server: Server) -> None:
    metadata = {"\x00": "\x00", "": None, "a": {"b": [1e308, -0.0, 2**63]}, "é\u2028": "\U0001f600"}
    session = server.call("/create_session", {"user_metadata": metadata})["session_id"]
    assert server.ask("GET", f"/api/v1/sessions/{session}").json()["user_metadata"] == metadata

"""What Prometheus reads, read by Prometheus's own parser."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from real_server import Server, hosted, nano

pytestmark = pytest.mark.xdist_group("metrics")


def read(server: Server) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample by its name and labels."""
    text = server.ask("GET", "/metrics").text
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def sampler(server: Server) -> str:
    session = server.call("/create_session", {})["session_id"]
    return server.call("/create_sampling_session", {"session_id": session, "base_model": "nano"})["sampling_session_id"]


def test_requests_by_route_and_status(tmp_path: Path) -> None:
    """A template is a series; what is not there is one series, however many names it has."""
    with hosted(tmp_path) as server:
        for i in range(7):
            server.ask("GET", f"/api/v1/sessions/{i}")
            server.ask("GET", f"/nothing/{i}")
            server.ask("BREW" if i == 0 else "OPTIONS", "/healthz")
        found = read(server)
        count = {labels: value for (name, labels), value in found.items() if name == "veneer_requests_total"}
        by = {tuple(value for _, value in labels): number for labels, number in count.items()}
        assert by["GET", "/api/v1/sessions/{session_id}", "404"] == 7
        assert by["GET", "none", "404"] == 7
        assert by["OPTIONS", "/healthz", "405"] == 6
        assert len(by) == 3
        assert found["veneer_request_seconds_count", (("route", "/api/v1/sessions/{session_id}"),)] == 7


def test_what_the_engine_holds_and_has_done(tmp_path: Path) -> None:
    """The base by its digest; promises, runs and adapters as they come; every token that was drawn."""
    with hosted(tmp_path) as server:
        base = (("base", "nano"),)
        before = read(server)
        info = next(dict(labels) for (name, labels), _ in before.items() if name == "veneer_base_info")
        assert info == {"base": "nano", "digest": nano().digest, "dtype": "float32"}
        assert before["veneer_promises_open", ()] == before["veneer_engine_queue", ()] == before["veneer_runs_loaded", base] == 0
        session = server.call("/create_session", {})["session_id"]
        model = {"session_id": session, "model_seq_id": 0, "base_model": "nano", "lora_config": {"rank": 1}}
        server.result(server.call("/create_model", model)["request_id"])
        server.call("/optim_step", {"model_id": f"{session}:train:0", "seq_id": 2, "adam_params": {}})  # waits for number 1
        body = {"sampling_session_id": sampler(server), "num_samples": 3, "prompt": {"chunks": [{"tokens": [1, 2, 3]}]}}
        for seq in range(2):
            params = {"max_tokens": 5, "stop": []}
            answer = server.result(server.call("/asample", {**body, "seq_id": seq, "sampling_params": params})["request_id"])
            assert answer.headers["content-type"] == "application/x-protobuf", answer.text
        after = read(server)
        assert after["veneer_promises_open", ()] == 1
        assert after["veneer_runs_loaded", base] == 1
        assert after["veneer_tokens_sampled_total", base] == 2 * 3 * 5
        assert after["process_resident_memory_bytes", ()] > 2**20

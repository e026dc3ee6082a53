"""Requests made from the server's own OpenAPI document: none may be answered with 5xx."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Generator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from real_server import Server, process
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from test_malformed import good_request, make, server_errors

pytestmark = pytest.mark.xdist_group("schema")
EXAMPLES = max(5, int(os.environ.get("VENEER_FUZZ", "200")) // 40)
"""For each route."""


@schemathesis.serializer("application/x-protobuf")
def as_it_is(_context: Any, value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Generator[Server, None, None]:
    with process(tmp_path_factory.mktemp("schema")) as server:
        yield server


def test_the_document_refers_to_nothing_that_is_not_there(server: Server) -> None:
    """Every reference is resolved inside of it; generators of clients and of tests read nothing otherwise."""
    document = server.ask("GET", "/openapi.json").json()
    references = re.findall(r'"\$ref": "([^"]+)"', json.dumps(document))
    for reference in references:
        found = document
        for part in reference.removeprefix("#/").split("/"):
            found = found[part]


def make_real(case: schemathesis.Case, ids: dict[str, str]) -> None:
    """Names of what is there in place of made-up ones, so that a request gets further than to a 404."""
    case.path_parameters.update({name: ids[name] for name in case.path_parameters if name in ids})
    if isinstance(case.body, dict):
        case.body.update({name: ids[name] for name in case.body if name in ids})
        if "num_samples" in case.body:  # 4,096 are allowed, and take their time
            case.body["num_samples"] = 2
        if "target" in case.body:
            case.body["target"] = {"sampling_session_id": ids["sampling_session_id"]}


def test_what_the_document_allows_breaks_nothing(server: Server) -> None:
    """Values that fit the schemas and values that do not, about what is there and what is not, on every route; afterwards the server is
    well, and took no blame."""
    session, run, sampler = make(server)
    ids = {
        "session_id": session,
        "model_id": run,
        "run_id": run,
        "sampling_session_id": sampler,
        "sampler_id": sampler,
        "base_model": "nano",
    }
    document = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    asked: Counter[int] = Counter()
    for operation in (found.ok() for found in document.get_all_operations()):
        if operation.path.endswith("/finish"):  # of the session that the others need
            continue
        modes = st.one_of(operation.as_strategy(generation_mode=mode) for mode in GenerationMode)

        @given(case=modes, real=st.booleans())
        @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
        def ask(case: schemathesis.Case, real: bool) -> None:
            if real:
                make_real(case, ids)
            response = case.call(timeout=60)
            asked[response.status_code] += 1
            case.validate_response(response, checks=[not_a_server_error])
            assert "Traceback" not in response.text

        ask()
    print(f"{asked.total()} requests: {dict(asked)}")
    assert {200, 404} <= set(asked)
    good_request(server)
    assert server_errors(server.home) == []
    assert server.stderr is not None
    assert "Traceback" not in server.stderr.read_text()

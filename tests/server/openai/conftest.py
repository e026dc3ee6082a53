"""One server for all tests of a file."""

from __future__ import annotations

from collections.abc import Generator

import openai
import pytest
from serving import Serving, serving


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Generator[Serving]:
    with serving(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Serving) -> openai.OpenAI:
    return server.client()

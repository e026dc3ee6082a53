"""Who is answered: a real server through the life of its keys."""

from __future__ import annotations

from collections.abc import Generator

import pytest
from real_server import Server, hosted, process

pytestmark = pytest.mark.xdist_group("access")


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Generator[tuple[Server, str], None, None]:
    """A server in this process that has a key."""
    home = tmp_path_factory.mktemp("locked")
    with hosted(home) as server:
        key, _ = server.keys.create("alice", ["*"])
        yield server, key


def test_the_life_of_a_server_and_its_keys(tmp_path) -> None:
    """Open while it has no key; closed to others from the first key on; a revoked key is refused at its next request, and revoking the
    last one opens nothing. No restart, and no key in the log."""
    with process(tmp_path) as server:
        me = server.ask("GET", "/api/v1/auth/apikey/me", "tml-dummy")
        assert (me.status_code, me.json()["name"]) == (200, "local")
        alice, _ = server.keys.create("alice", ["*"])
        bob, _ = server.keys.create("bob", ["*"])
        assert server.ask("GET", "/api/v1/auth/apikey/me", "tml-dummy").status_code == 401
        for key, name in ((alice, "alice"), (bob, "bob")):
            assert server.ask("GET", "/api/v1/auth/apikey/me", key).json()["name"] == name
        assert [key.used is not None for key in server.keys.all()] == [True, True]
        server.keys.revoke("alice")
        assert server.ask("GET", "/api/v1/auth/apikey/me", alice).status_code == 401
        assert server.ask("GET", "/api/v1/auth/apikey/me", bob).status_code == 200
        server.keys.revoke("bob")
        assert server.ask("GET", "/api/v1/auth/apikey/me", bob).status_code == 401
        assert server.ask("GET", "/api/v1/auth/apikey/me").status_code == 401
    assert server.stderr is not None
    written = server.stderr.read_text()
    assert all(key[13:] not in written for key in (alice, bob))
    assert {line["caller"] for line in server.lines() if line["route"] == "/api/v1/auth/apikey/me"} == {"local", "alice", "bob", None}


def test_both_ways_to_send_a_key(locked: tuple[Server, str]) -> None:
    """Tinker's header and OpenAI's."""
    server, key = locked
    for headers in ({"X-API-Key": key}, {"x-api-key": key}, {"Authorization": f"Bearer {key}"}, {"authorization": f"bearer  {key} "}):
        assert server.ask("GET", "/api/v1/sessions", headers=headers).status_code == 200, headers


@pytest.mark.parametrize(
    "path", ["/api/v1/sessions", "/openapi.json", "/nothing", "/api/v1/healthz/", "/healthzz", "//healthz", "/metrics/x"]
)
def test_without_the_key_nothing_is_told(locked: tuple[Server, str], path: str) -> None:
    """The same 401 for what is there and what is not, whatever was sent in place of the key."""
    server, key = locked
    wrong = ({}, {"X-API-Key": "tml-dummy"}, {"X-API-Key": ""}, {"Authorization": f"Basic {key}"}, {"Authorization": key})
    for headers in (
        *wrong,
        {"X-API-Key": key[:-1] + ("A" if key[-1] != "A" else "B")},
        {"X-API-Key": "x", "Authorization": f"Bearer {key}"},
    ):
        answer = server.ask("GET", path, headers=headers)
        assert answer.status_code == 401, headers
        assert answer.headers["WWW-Authenticate"] == 'Bearer realm="veneer"'
        assert answer.json() == {"detail": "send a valid key, as X-API-Key or as Authorization: Bearer"}
        assert key not in answer.text


def test_what_needs_no_key(locked: tuple[Server, str]) -> None:
    """Probes, the metrics for this machine, and links, which are secret themselves."""
    server, _ = locked
    assert [server.ask("GET", path).status_code for path in ("/healthz", "/api/v1/healthz", "/metrics")] == [200, 200, 200]
    assert server.ask("GET", "/api/v1/files/no-such-token/adapter_model.safetensors").status_code == 410


def test_metrics_are_for_this_machine(locked: tuple[Server, str]) -> None:
    """A proxy on this machine says whom it speaks for, and uvicorn believes it."""
    server, key = locked
    elsewhere = {"X-Forwarded-For": "203.0.113.9"}
    assert server.ask("GET", "/metrics", headers=elsewhere).status_code == 401
    assert server.ask("GET", "/metrics", key, headers=elsewhere).status_code == 200
    assert server.ask("GET", "/healthz", headers=elsewhere).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Origin": "http://localhost:3000"}, 200),
        ({"Origin": "http://127.0.0.1:3000", "Host": "localhost:8321"}, 200),
        ({"Host": "[::1]:8321"}, 200),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://localhost.evil.example"}, 403),
        ({"Host": "evil.example:8321"}, 403),
        ({"Host": "127.0.0.1.nip.io"}, 403),
        ({"Host": "[::1"}, 403),
    ],
)
def test_without_keys_a_browser_is_no_way_in(open_server: Server, headers: dict[str, str], status: int) -> None:
    """A page of another site, and a name of another site that points here."""
    answer = open_server.ask("POST", "/api/v1/create_session", headers=headers, data="{}")
    assert answer.status_code == status
    assert status == 200 or "make a key" in answer.json()["detail"]


def test_with_keys_any_name_and_page_may_ask(locked: tuple[Server, str]) -> None:
    """Behind a proxy the host is whatever it is; who has a key may ask from anywhere."""
    server, key = locked
    headers = {"Host": "models.example", "Origin": "https://console.example"}
    assert server.ask("GET", "/api/v1/sessions", key, headers=headers).status_code == 200


@pytest.fixture(scope="module")
def open_server(tmp_path_factory: pytest.TempPathFactory) -> Generator[Server, None, None]:
    with hosted(tmp_path_factory.mktemp("open")) as server:
        yield server

"""Two keys are two tenants: what one made is not there for the other, by whatever id, on whatever route."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import pytest
from real_server import Server, hosted

from veneer.server.tinker import service, wire

pytestmark = pytest.mark.xdist_group("tenants")
API = "/api/v1"


@dataclass
class Tenant:
    """One key with something of every kind that is made with a key."""

    server: Server
    key: str
    session: str = ""
    run: str = ""
    sampler: str = ""
    snapshot: str = ""
    promise: str = ""
    """Of an operation that waits for ever."""

    def post(self, path: str, body: dict[str, Any]) -> Any:
        return self.server.call(path, body, self.key)

    def done(self, path: str, body: dict[str, Any]) -> Any:
        """The answer of a promise that must be a good one."""
        answer = self.server.result(self.post(path, body)["request_id"], self.key).json()
        assert "error" not in answer, answer
        return answer

    def checkpoint(self, kind: str, name: str) -> str:
        return f"tinker://{self.run}/{kind}/{name}"

    def settle_in(self) -> Tenant:
        self.session = self.post("/create_session", {"tags": ["a"]})["session_id"]
        model = {"session_id": self.session, "model_seq_id": 0, "base_model": "nano", "lora_config": {"rank": 2}}
        self.run = self.done("/create_model", model)["model_id"]
        self.done("/save_weights", {"model_id": self.run, "seq_id": 1, "path": "private"})
        self.done("/save_weights", {"model_id": self.run, "seq_id": 2, "path": "public"})
        self.done("/save_weights_for_sampler", {"model_id": self.run, "seq_id": 3, "path": "private"})
        self.done("/save_weights_external", {"model_id": self.run, "seq_id": 4, "path": "private"})
        unnamed = {"model_id": self.run, "seq_id": 5, "sampling_session_seq_id": 1}
        self.snapshot = self.done("/save_weights_for_sampler", unnamed)["sampling_session_id"]
        self.promise = self.post("/save_weights", {"model_id": self.run, "seq_id": 99, "path": "late"})["request_id"]
        sampling = {"session_id": self.session, "sampling_session_seq_id": 2, "base_model": "nano"}
        self.sampler = self.post("/create_sampling_session", sampling)["sampling_session_id"]
        shared = f"{API}/training_runs/{self.run}/checkpoints/weights/public/publish"
        assert self.server.ask("POST", shared, self.key).status_code == 204
        return self

    def state(self) -> list[Any]:
        """Everything that the tenant is shown of its own."""
        pages = ("/sessions", "/training_runs", "/checkpoints", f"/sessions/{self.session}", f"/training_runs/{self.run}/checkpoints")
        shown = [self.server.ask("GET", API + page, self.key).json() for page in pages]
        poll = self.server.post("/get_info", {"model_id": self.run}, self.key).json()
        heartbeat = self.server.post("/session_heartbeat", {"session_id": self.session}, self.key).status_code
        return [*shown, poll, heartbeat]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Generator[tuple[Tenant, Tenant], None, None]:
    with hosted(tmp_path_factory.mktemp("tenants")) as server:
        yield tuple(Tenant(server, server.keys.create(name, ["*"])[0]).settle_in() for name in ("alice", "bob"))  # type: ignore[misc]


PROMPT = {"prompt": {"chunks": [{"tokens": [1, 2]}]}, "sampling_params": {"max_tokens": 2}}
LORA = {"base_model": "nano", "lora_config": {"rank": 1}}


def posts(a: Tenant, b: Tenant) -> dict[str, list[dict[str, Any]]]:
    """Bodies that b sends with ids of a, by route; each names something of a at another place."""
    private, sampled = a.checkpoint("weights", "private"), a.checkpoint("sampler_weights", "private")
    public, external = a.checkpoint("weights", "public"), a.checkpoint("external_weights", "private")
    operation = {"model_id": a.run, "seq_id": 6}
    return {
        "/session_heartbeat": [{"session_id": a.session}],
        "/create_model": [{"session_id": a.session, "model_seq_id": seq, **LORA} for seq in (0, 7)],
        "/load_weights": [
            {"session_id": a.session, "model_seq_id": 8, "path": public, "optimizer": True},
            {"session_id": b.session, "model_seq_id": 8, "path": private, "optimizer": True},
            {"session_id": b.session, "model_seq_id": 9, "path": sampled, "optimizer": False},
            {**operation, "path": public, "optimizer": True},
        ],
        "/optim_step": [{**operation, "adam_params": {}}],
        "/save_weights": [{**operation, "path": "x"}, {**operation, "path": "private", "overwrite": True}],
        "/save_weights_for_sampler": [{**operation, "path": "x"}, {**operation, "sampling_session_seq_id": 5}],
        "/save_weights_external": [{**operation, "path": "x"}],
        "/create_custom_loss": [{"session_id": a.session, "custom_loss_seq_id": 0}],
        "/copy_weights": [
            {"source_path": private},
            {"source_path": external, "session_id": b.session, "model_seq_id": 5},
            {"source_path": public, "session_id": a.session, "model_seq_id": 5},
        ],
        "/get_info": [{"model_id": a.run}],
        "/create_sampling_session": [{"session_id": a.session, "sampling_session_seq_id": seq, "base_model": "nano"} for seq in (1, 2, 9)]
        + [{"session_id": b.session, "sampling_session_seq_id": 9, "model_path": path} for path in (private, sampled)],
        "/asample": [{**PROMPT, "sampling_session_id": a.sampler, "seq_id": 0}, {**PROMPT, "sampling_session_id": a.snapshot, "seq_id": 0}]
        + [{**PROMPT, "model_path": path} for path in (private, sampled)],
        "/retrieve_future": [{"request_id": a.promise}],
        "/retrieve_futures": [{"target": {"sampling_session_id": a.sampler}, "timeout": 0}],
        "/join_sampling_session": [{"sampling_session_id": a.sampler}, {"sampling_session_id": a.snapshot}],
        "/weights_info": [{"tinker_path": path} for path in (private, sampled, external)],
        f"/sessions/{a.session}/finish": [{}],
    }


def paths(a: Tenant) -> list[tuple[str, str]]:
    """Routes that name something of a in the path."""
    run = f"/training_runs/{a.run}"
    found = [("GET", f"/sessions/{a.session}"), ("GET", f"/samplers/{a.sampler}"), ("GET", f"/samplers/{a.snapshot}"), ("GET", run)]
    found += [("GET", f"{run}/checkpoints"), ("GET", f"{run}/checkpoints/external_weights/private/external_weights_urls")]
    for one in ("weights/private", "weights/public", "sampler_weights/private", "external_weights/private"):
        whole = f"{run}/checkpoints/{one}"
        found += [("DELETE", whole), ("POST", f"{whole}/publish"), ("DELETE", f"{whole}/publish"), ("PUT", f"{whole}/ttl")]
    return found


def pass_of(run: str) -> bytes:
    message = wire.MESSAGES["ForwardBackwardRequest"](model_id=run, seq_id=6, loss_fn="cross_entropy")
    message.data.add()
    return message.SerializeToString()


@pytest.mark.parametrize("turn", [0, 1], ids=["bob asks for alice's", "alice asks for bob's"])
def test_what_is_anothers_is_not_there(two: tuple[Tenant, Tenant], turn: int) -> None:
    """404 on every route with every id, the same as for an id that nobody has; and nothing has changed."""
    owner, other = two[turn], two[1 - turn]
    server, before = owner.server, owner.state()
    for path, bodies in posts(owner, other).items():
        for body in bodies:
            answer = server.post(path, body, other.key)
            assert answer.status_code == 404, f"{path} {body}: {answer.status_code} {answer.text}"
    for method, path in paths(owner):
        answer = server.ask(method, API + path, other.key, json={"ttl_seconds": 3600} if method == "PUT" else None)
        assert answer.status_code == 404, f"{method} {path}: {answer.status_code} {answer.text}"
    sent = {"headers": {"Content-Type": wire.PROTOBUF}, "data": pass_of(owner.run)}
    assert server.ask("POST", f"{API}/forward_backward", other.key, **sent).status_code == 404
    assert server.post("/cancel_future", {"request_id": owner.promise}, other.key).json() == {}
    assert [server.post("/retrieve_future", {"request_id": f"99999-{owner.promise}"}, other.key).status_code] == [404]
    assert owner.state() == before


def test_lists_are_ones_own(two: tuple[Tenant, Tenant]) -> None:
    """Nothing of the other's stands in any list."""
    for owner, other in (two, two[::-1]):
        for page in ("/sessions", "/training_runs", "/checkpoints"):
            shown = owner.server.ask("GET", API + page, other.key).text
            assert owner.session not in shown
            assert other.session in shown


def test_what_is_public_may_be_read_and_not_changed(two: tuple[Tenant, Tenant]) -> None:
    """Loaded, sampled from, copied, looked at: what comes of it is the reader's own."""
    alice, bob = two
    public = alice.checkpoint("weights", "public")
    before = alice.state()
    assert bob.post("/weights_info", {"tinker_path": public})["lora_rank"] == 2
    loaded = bob.done("/load_weights", {"session_id": bob.session, "model_seq_id": 20, "path": public, "optimizer": True})
    assert loaded["model_id"] == f"{bob.session}:train:20"
    sampling = {"session_id": bob.session, "sampling_session_seq_id": 20, "model_path": public}
    assert bob.post("/create_sampling_session", sampling)["sampling_session_id"].startswith(bob.session)
    copy = bob.post("/copy_weights", {"source_path": public})["tinker_path"]
    assert alice.server.post("/weights_info", {"tinker_path": copy}, alice.key).status_code == 404
    assert bob.post("/weights_info", {"tinker_path": copy})["lora_rank"] == 2
    assert alice.state() == before


def test_a_copy_does_not_take_the_place_of_a_run(two: tuple[Tenant, Tenant]) -> None:
    """Not even of one's own: the number that a copy is to have may be taken."""
    alice, _ = two
    model = {"session_id": alice.session, "model_seq_id": 40, "base_model": "nano", "lora_config": {"rank": 2}}
    alice.done("/create_model", model)
    before = alice.state()
    body = {"source_path": alice.checkpoint("weights", "public"), "session_id": alice.session, "model_seq_id": 40}
    answer = alice.server.post("/copy_weights", body, alice.key)
    assert answer.status_code == 400
    assert "give another model_seq_id" in answer.json()["detail"]
    assert alice.state() == before


def test_a_private_checkpoint_in_an_operation_of_ones_own(two: tuple[Tenant, Tenant]) -> None:
    """The address is the asker's, the path is not: told through the promise."""
    alice, bob = two
    model = {"session_id": bob.session, "model_seq_id": 30, "base_model": "nano", "lora_config": {"rank": 2}}
    run = bob.done("/create_model", model)["model_id"]
    body = {"model_id": run, "seq_id": 1, "path": alice.checkpoint("weights", "private"), "optimizer": True}
    answer = bob.server.result(bob.post("/load_weights", body)["request_id"], bob.key).json()
    assert answer["category"] == "user"
    assert answer["error"] == f"there is no checkpoint {alice.checkpoint('weights', 'private')!r}"


def test_one_tenant_cannot_use_up_what_may_be_open(two: tuple[Tenant, Tenant], monkeypatch: pytest.MonkeyPatch) -> None:
    """Operations that wait for a number that never comes count for whoever sent them."""
    monkeypatch.setattr(service, "MOST_OPEN", 10)
    alice, bob = two
    waiting = [
        alice.server.post("/optim_step", {"model_id": alice.run, "seq_id": 1000 + i, "adam_params": {}}, alice.key) for i in range(20)
    ]
    assert {answer.status_code for answer in waiting} == {200, 429}
    assert "operations of yours are open" in waiting[-1].json()["detail"]
    bob.done("/save_weights", {"model_id": bob.run, "seq_id": 6, "path": "after"})


def test_a_link_opens_for_whoever_has_it_and_for_nobody_else(two: tuple[Tenant, Tenant]) -> None:
    """Files of external weights, which are fetched without a key; no way leads from a link to another file."""
    alice, _ = two
    route = f"{API}/training_runs/{alice.run}/checkpoints/external_weights/private/external_weights_urls"
    urls = alice.server.ask("GET", route, alice.key).json()["urls"]
    assert set(urls) == {"adapter_config.json", "adapter_model.safetensors", "README.md", "veneer.json"}
    for url in urls.values():
        path = url[url.index(API) :]
        assert alice.server.ask("GET", path).status_code == 200
        folder, _, name = path.rpartition("/")
        guesses = [
            f"{folder[:-1]}/{name}",
            *(f"{folder}/{way}" for way in ("..", "%2e%2e", "%2e%2e%2fstate.sqlite", "%00", "optimizer.safetensors")),
        ]
        for guess in guesses:
            answer = alice.server.raw(f"GET {guess} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            assert answer[:12] in (b"HTTP/1.1 410", b"HTTP/1.1 404", b"HTTP/1.1 401"), (guess, answer)


def test_the_attack_knows_every_route(two: tuple[Tenant, Tenant]) -> None:
    """A new route of the protocol is to be attacked too."""
    alice, bob = two
    attacked = {*posts(alice, bob), *(path for _, path in paths(alice))}
    names = {
        "session_id": alice.session,
        "sampler_id": alice.sampler,
        "run_id": alice.run,
        "kind": "weights",
        "name": "private",
        "token": "x",
    }
    document = alice.server.ask("GET", "/openapi.json", alice.key).json()["paths"]
    there = {path.removeprefix(API) for path in document if path.startswith(API)}
    assert {path for path in there if path.format(**names) not in attacked} == {
        *(
            "/healthz",
            "/get_server_capabilities",
            "/client/config",
            "/client/dynamic_config",
            "/telemetry",
            "/auth/token",
            "/auth/apikey/me",
        ),
        *("/create_session", "/sessions", "/training_runs", "/checkpoints"),  # name nothing; the lists are looked at above
        *("/forward_backward", "/cancel_future", "/files/{token}/{name}"),  # attacked by other means
    }

"""Behaviours by name, version and label; several at once; changed while requests are under way; and who may see them."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from serving import SORT, SUM, Serving, alone, random_checkpoint, serving

from veneer.server.keys import Keys
from veneer.store.stack import stack_adapters
from veneer.types import SamplingParams

ASKED: dict[str, Any] = {"messages": SUM, "max_tokens": 40, "extra_body": {"return_token_ids": True, "ignore_eos": True}}


def ask(client: openai.OpenAI, model: str, seed: int, lora: list[dict[str, Any]] | None = None) -> Any:
    extra = ASKED["extra_body"] | ({} if lora is None else {"lora": lora})
    return client.chat.completions.create(model=model, seed=seed, **{**ASKED, "extra_body": extra})


def tokens(told: Any) -> list[list[int]]:
    return [choice.model_extra["token_ids"] for choice in told.choices]


def acting(told: Any) -> list[tuple[str, int, float]]:
    return [(adapter["name"], adapter["version"], adapter["scale"]) for adapter in told.model_extra["veneer"]["adapters"]]


def drawn(server: Serving, checkpoint: Any, seed: int, messages: Any = SUM, n: int = 1) -> list[list[int]]:
    params = SamplingParams(max_tokens=40, seed=seed, stop_token_ids=())
    return [sample.tokens.tolist() for sample in alone(server, messages, checkpoint, params, n)]


@pytest.fixture(scope="module", autouse=True)
def adapters(server: Serving) -> None:
    for version in (1, 2, 3):
        assert server.put("maths", seed=version) == version
    for i in range(8):
        server.put(f"eight-{i}", seed=100 + i, rank=1 + i % 3)


def test_names_versions_and_labels(server: Serving, client: openai.OpenAI) -> None:
    """A bare name is the label live, or the newest version; each gives exactly the tokens of those weights alone."""
    server.registry.promote("maths", 1, "beta")
    for model, seed in (("maths", 3), ("maths@1", 1), ("maths@2", 2), ("maths@beta", 1)):
        told = ask(client, model, 9)
        assert tokens(told) == drawn(server, random_checkpoint(server.served, seed), 9)
        assert told.model == model
    for model in ("nano", "other/name"):
        assert tokens(ask(client, model, 9)) == drawn(server, None, 9)


def test_every_answer_says_what_weights_answered(server: Serving, client: openai.OpenAI) -> None:
    """Headers and body, whole and streamed: base digest, adapter digest and version."""
    entry, digest = server.registry.resolve("maths@2"), server.served.engine.base_digest
    wanted = {"x-veneer-base": "nano", "x-veneer-base-digest": digest}
    wanted |= {"x-veneer-adapter": "maths@2", "x-veneer-adapter-digest": entry.digest}
    raw = client.chat.completions.with_raw_response.create(model="maths@2", seed=1, **ASKED)
    assert {key: raw.headers[key] for key in wanted} == wanted
    told: Any = raw.parse()
    mine = {"name": "maths", "version": 2, "digest": entry.digest, "scale": 1.0}
    assert told.model_extra["veneer"] == {"base": "nano", "base_digest": digest, "adapters": [mine], "seed": 1}
    with client.chat.completions.with_streaming_response.create(model="maths@2", seed=1, stream=True, **ASKED) as streamed:
        assert {key: streamed.headers[key] for key in wanted} == wanted
    base = client.completions.with_raw_response.create(model="nano", prompt="a", max_tokens=1)
    assert base.headers["x-veneer-base-digest"] == digest
    assert "x-veneer-adapter" not in base.headers
    assert len({ask(client, model, 1).system_fingerprint for model in ("nano", "maths@1", "maths@2")}) == 3


def test_several_adapters_with_scales(server: Serving, client: openai.OpenAI) -> None:
    """The sum of their updates, each times its scale, as one stack would do it; scale 1 of one is that one, scale 0 is none."""
    lora = [{"name": "maths@1", "scale": 0.7}, {"name": "eight-2", "scale": -0.3}]
    told = ask(client, "nano", 4, lora)
    parts = [(random_checkpoint(server.served, 1), 0.7), (random_checkpoint(server.served, 102, rank=3), -0.3)]
    assert tokens(told) == drawn(server, stack_adapters(parts, "both"), 4)
    assert acting(told) == [("maths", 1, 0.7), ("eight-2", 1, -0.3)]
    assert tokens(ask(client, "nano", 4, [{"name": "maths"}])) == tokens(ask(client, "maths", 4))
    assert tokens(ask(client, "nano", 4, [{"name": "maths", "scale": 0}])) == drawn(server, None, 4)
    raw = client.chat.completions.with_raw_response.create(model="nano", messages=SUM, max_tokens=1, extra_body={"lora": lora})
    assert raw.headers["x-veneer-adapter"] == "maths@1;scale=0.7, eight-2@1;scale=-0.3"


def test_eight_behaviours_in_one_batch(server: Serving) -> None:
    """Each is answered as if it were alone, token for token, streamed or not."""

    async def one(client: openai.AsyncOpenAI, i: int, stream: bool) -> list[list[int]]:
        request: dict[str, Any] = {"model": f"eight-{i}", "seed": i, "n": 2, **ASKED, "messages": SORT}
        if not stream:
            return tokens(await client.chat.completions.create(**request))
        found: dict[int, list[int]] = {0: [], 1: []}
        async for chunk in await client.chat.completions.create(**request, stream=True):
            for choice in chunk.choices:
                found[choice.index] += choice.model_extra.get("token_ids") or []
        return [found[0], found[1]]

    async def all_at_once() -> list[list[list[int]]]:
        async with server.async_client() as client:
            return await asyncio.gather(*(one(client, i, stream=i % 2 == 1) for i in range(8)))

    together = asyncio.run(all_at_once())
    for i, found in enumerate(together):
        assert found == drawn(server, random_checkpoint(server.served, 100 + i, rank=1 + i % 3), i, SORT, 2)
    assert len({str(found) for found in together}) == 8


def test_promoted_and_rolled_back_under_load(server: Serving) -> None:
    """No request is dropped, and each is answered by one version from its first token to its last."""
    for version in (1, 2):
        server.put("moving", seed=200 + version)
    versions = {version: drawn(server, random_checkpoint(server.served, 200 + version), 6)[0] for version in (1, 2)}
    assert versions[1] != versions[2]

    async def one(client: openai.AsyncOpenAI) -> int:
        told = await client.chat.completions.create(model="moving", seed=6, **ASKED)
        ((_, version, _),) = acting(told)
        assert tokens(told) == [versions[version]]
        return version

    async def move(http: httpx2.AsyncClient) -> None:
        for _ in range(5):
            for what, body in (("promote", {"version": 1}), ("promote", {"version": 2}), ("rollback", {})):
                told = await http.post(f"{server.url}/v1/adapters/moving/{what}", json=body)
                assert told.status_code == 200, told.text

    async def load() -> list[int]:
        async with server.async_client() as client, httpx2.AsyncClient() as http:
            asked, moving = [], asyncio.create_task(move(http))
            while not moving.done():
                asked += [asyncio.create_task(one(client)) for _ in range(4)]
                await asyncio.sleep(0.02)
            await moving
            return await asyncio.gather(*asked)

    met = asyncio.run(load())
    assert set(met) == {1, 2}, "both were met"
    assert server.registry.labels("moving") == {"live": 1}


def test_another_process_promotes(server: Serving, client: openai.OpenAI) -> None:
    """The registry is asked at every request: what a verb changes beside the server is seen by the next one."""
    for version in (1, 2):
        server.put("elsewhere", seed=300 + version)
    other = type(server.registry)(server.home)
    for version in (1, 2, 1):
        other.promote("elsewhere", version)
        assert acting(ask(client, "elsewhere", 0)) == [("elsewhere", version, 1.0)]


WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "typo": ({"model": "math"}, "did you mean 'maths'?", "model"),
    "version": ({"model": "maths@9"}, "has no version 9", "model"),
    "label": ({"model": "maths@gamma"}, "no label of that name", "model"),
    "in the list": ({"extra_body": {"lora": [{"name": "maths"}, {"name": "eigth-1"}]}}, "did you mean 'eight-1'?", "lora.1.name"),
    "path": ({"model": "../../etc/passwd"}, "there is no model", "model"),
    "folder": ({"model": "./maths"}, "there is no model", "model"),
    "digest": ({"model": "sha256:0"}, "there is no model", "model"),
    "odd": ({"model": "a b\0"}, "there is no model", "model"),
}


@pytest.mark.parametrize(("asked", "words", "param"), WRONG.values(), ids=WRONG.keys())
def test_unknown_names(client: openai.OpenAI, asked: dict[str, Any], words: str, param: str) -> None:
    """404 with the nearest name, as OpenAI's clients know it; paths from the network name no file."""
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(**{"model": "nano", "messages": SUM, "max_tokens": 1, **asked})
    assert words in caught.value.message
    assert caught.value.code == "model_not_found"
    assert caught.value.param == param


def test_an_adapter_of_another_base(server: Serving, client: openai.OpenAI) -> None:
    """400, and it says which base: never an answer by the wrong weights, and never 409, which clients repeat for minutes."""
    made = random_checkpoint(server.served, 5)
    foreign = dataclasses.replace(made, adapter=dataclasses.replace(made.adapter, base_id="other-8b", base_digest="f" * 64))
    server.registry.put("foreign", foreign, {"stage": "rl"})
    server.put("retold", seed=6, template_digest="0" * 64)
    for asked, words in (
        ({"model": "foreign"}, "made for base 'other-8b' (ffffffffffff)"),
        ({"model": "nano", "extra_body": {"lora": [{"name": "foreign"}]}}, "made for base 'other-8b'"),
        ({"model": "retold"}, "another chat template"),
        ({"model": "maths", "extra_body": {"lora": [{"name": "maths"}]}}, "give the base as the model"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(messages=SUM, max_tokens=1, **asked)  # type: ignore[arg-type]
        assert words in caught.value.message


def test_models(server: Serving, client: openai.OpenAI) -> None:
    """Bases by all their names, adapters with their parent and what the name means now."""
    models = {model.id: model for model in client.models.list()}
    assert {"nano", "other/name", "maths", "eight-0"} <= set(models)
    assert "foreign" not in models
    assert models["nano"].model_extra["parent"] is None  # type: ignore[index]
    extra = models["maths"].model_extra or {}
    assert (extra["parent"], extra["root"]) == ("nano", "maths@3")
    assert extra["veneer"]["digest"] == server.registry.resolve("maths").digest
    assert models["maths"].created > 1_700_000_000
    assert client.models.retrieve("other/name").model_extra["root"] == "nano"  # type: ignore[index]
    assert client.models.retrieve("maths@1").model_extra["root"] == "maths@1"  # type: ignore[index]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nothing")


def test_what_a_caller_does_not_see_is_not_there(tmp_path: Path) -> None:
    """By model, in lists, in the nearest name, to be managed: the same 404 as for what there is not."""
    with serving(tmp_path) as server:
        keys = Keys(server.home / "server")
        key, _ = keys.create("alice", ("alice-*",))
        server.put("alice-one", seed=1)
        server.put("secret", seed=2)
        http = httpx2.Client(base_url=server.url, headers={"authorization": f"Bearer {key}"})
        names = [model["id"] for model in http.get("/v1/models").json()["data"]]
        assert names == ["nano", "other/name", "alice-one"]
        assert [card["name"] for card in http.get("/v1/adapters").json()["data"]] == ["alice-one"]
        for name in ("secret", "secret@1", "secre", "never-was"):
            for body in ({"model": name}, {"model": "nano", "lora": [{"name": name}]}):
                told = http.post("/v1/chat/completions", json={**body, "messages": SUM})
                assert told.status_code == 404
                assert "secret'" not in told.json()["error"]["message"].replace(repr(name), "")
            assert http.get(f"/v1/models/{name}").status_code == 404
        for method, path in (("GET", ""), ("POST", "/promote"), ("POST", "/rollback"), ("DELETE", "")):
            body = {"version": 1} if path == "/promote" else {} if method == "POST" else None
            assert http.request(method, f"/v1/adapters/secret{path}", json=body).status_code == 404
        assert http.post("/v1/unload_lora_adapter", json={"lora_name": "secret"}).status_code == 404
        assert http.post("/v1/load_lora_adapter", json={"lora_name": "secret", "lora_path": "x"}).status_code == 403
        assert server.registry.versions("secret") == [1]
        with pytest.raises(openai.AuthenticationError) as caught:
            server.client().models.list()
        assert caught.value.type == "authentication_error"


def test_a_lineage_names_only_what_the_caller_sees(tmp_path: Path) -> None:
    """Other parents, and folders of the server's disk, are told by their digest."""
    with serving(tmp_path) as server:
        key, _ = Keys(server.home / "server").create("alice", ("alice-*",))
        digest = server.registry.resolve(f"secret@{server.put('secret', seed=1)}").digest
        named = ("secret@1", "/srv/models/secret", "alice-parent@1")
        server.put("alice-child", seed=2, parents=[{"reference": name, "digest": digest} for name in named])
        http = httpx2.Client(base_url=server.url, headers={"authorization": f"Bearer {key}"})
        for answer in (http.get("/v1/adapters/alice-child"), http.get("/v1/adapters")):
            assert "secret" not in answer.text
        parents = http.get("/v1/adapters/alice-child").json()["versions"][0]["parents"]
        assert [parent["reference"] for parent in parents] == [f"sha256:{digest}"] * 2 + ["alice-parent@1"]

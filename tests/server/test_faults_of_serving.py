"""The faults of tests/train/test_faults.py on the way of a Tinker client: each fails the operation at hand, or the first sample behind
it, with its cause; and a run without any goes through."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from real_server import Server, hosted, nano, until

from veneer.engine import LocalEngine
from veneer.engine.full import FullStack
from veneer.server.tinker import wire
from veneer.store import adapters as store
from veneer.store.adapters import read_adapter

PROMPT = [5, 6, 7, 8]


@dataclass
class Client:
    """A model on its way: forward_backward, optim_step, save, sample."""

    server: Server
    session: str = ""
    run: str = ""
    seq: int = 0
    sampler: str = ""
    samplers: int = 0
    samples: int = 0

    def create(self) -> Client:
        self.session = self.server.call("/create_session", {})["session_id"]
        model = {
            "session_id": self.session,
            "model_seq_id": 0,
            "base_model": "nano",
            "lora_config": {"rank": 2, "train_unembed": False, "seed": 1},
        }
        self.run = self._of(self.server.call("/create_model", model))["model_id"]
        return self

    def step(self, learning_rate: float = 1e-2) -> Client:
        self.backward()
        self.do("/optim_step", adam_params={"learning_rate": learning_rate})
        return self

    def backward(self) -> Client:
        self.seq += 1
        request = wire.MESSAGES["ForwardBackwardRequest"](model_id=self.run, seq_id=self.seq, loss_fn="cross_entropy")
        datum = request.data.add()
        datum.model_input.add().encoded_text.tokens = np.arange(20, 60, dtype="<i4").tobytes()
        for name, array in (("target_tokens", np.arange(21, 61, dtype="<i8")), ("weights", np.ones(40, "<f4"))):
            tensor = datum.loss_fn_inputs[name]
            tensor.dense, tensor.dtype = array.tobytes(), wire.INT64 if array.dtype == np.int64 else wire.FLOAT32
            tensor.shape[:] = array.shape
        headers = {"Content-Type": wire.PROTOBUF}
        accepted = self.server.ask("POST", "/api/v1/forward_backward", headers=headers, data=request.SerializeToString()).json()
        assert self.server.result(accepted["request_id"]).headers["content-type"] == wire.PROTOBUF
        return self

    def save(self) -> Client:
        self.samplers += 1
        self.sampler = self.do("/save_weights_for_sampler", sampling_session_seq_id=self.samplers)["sampling_session_id"]
        return self

    def sample(self) -> Client:
        self.samples += 1
        body = {"sampling_session_id": self.sampler, "seq_id": self.samples, "prompt": {"chunks": [{"tokens": PROMPT}]}}
        accepted = self.server.call("/asample", {**body, "sampling_params": {"max_tokens": 4, "seed": 1}})
        answer = self.server.result(accepted["request_id"])
        if answer.headers["content-type"] != wire.PROTOBUF:
            raise Failed(answer.json())
        return self

    def do(self, route: str, **body: Any) -> dict[str, Any]:
        self.seq += 1
        return self._of(self.server.call(route, {"model_id": self.run, "seq_id": self.seq, **body}))

    def _of(self, accepted: dict[str, Any]) -> dict[str, Any]:
        answer = self.server.result(accepted["request_id"]).json()
        if "error" in answer:
            raise Failed(answer)
        return answer


class Failed(Exception):
    def __init__(self, answer: dict[str, Any]) -> None:
        super().__init__(answer["error"])
        assert "\n" not in answer["error"]
        self.category = answer["category"]


@pytest.fixture
def client(tmp_path: Path) -> Generator[Client, None, None]:
    with hosted(tmp_path / "home") as server:
        yield Client(server)


def engine_of(client: Client) -> LocalEngine:
    assert client.server.worker is not None
    (engine,) = client.server.worker.engines
    assert isinstance(engine, LocalEngine)
    return engine


def test_a_true_run_goes_through(client: Client) -> None:
    """Three steps, each sampled from; a step of a schedule that begins at zero; all with records that the files hold."""
    client.create().step(0.0).save().sample()
    for _ in range(3):
        client.step().save().sample()
    path = client.do("/save_weights", path="kept")["path"]
    assert path.endswith("/weights/kept")
    folders = list((client.server.home / "server/tinker").rglob("veneer.json"))
    records = [read_adapter(folder.parent)[0].canary for folder in folders if "/runs/" not in str(folder)]
    assert len(records) == 5
    effects = sorted(np.abs(np.array(r.logprobs) - np.array(r.base_logprobs)).max() for r in records if r is not None)
    assert len(effects) == 5
    assert effects[0] == 0  # nothing was learned at a rate of zero
    assert effects[1] > 0.01


def test_an_adapter_that_is_not_shipped(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """B1. What is saved for sampling are the weights that the run began with."""
    engine = engine_of(client)
    rows, arrays = engine._stack.rows, engine._arrays
    client.create().step()
    monkeypatch.setattr(engine, "_arrays", lambda slot, row, **kept: arrays(slot, rows.published(slot), **kept))
    client.save()
    with pytest.raises(Failed, match=r"has no effect here: it changed the canary's log-probabilities by up to .* where it was saved"):
        client.sample()


def test_a_session_on_another_folder(client: Client) -> None:
    """B1. The folder of a snapshot, which is not in memory any more, holds an older one."""
    assert client.server.served is not None
    shelf = client.server.served.shelf
    shelf.most = 0
    client.create().step().save()
    client.step().save()
    until(lambda: len(shelf) == 0)
    snapshots = sorted((client.server.home / "server/tinker/snapshots").iterdir(), key=lambda path: path.stat().st_mtime)
    old, new = snapshots
    new.rename(new.with_name("aside"))
    old.rename(new)
    with pytest.raises(Failed, match="the session samples from"):
        client.sample()


def test_an_optimizer_that_does_not_hold_the_adapter(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """B2. The step itself fails."""
    client.create()
    monkeypatch.setattr(engine_of(client)._stack.rows, "_update", lambda slots, params, norms: {})
    with pytest.raises(Failed, match="the optimizer does not hold this adapter"):
        client.step()


def test_a_sampler_that_does_not_apply_the_adapter(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """B3. The first sample of the first trained snapshot fails."""
    client.create().step().save()
    monkeypatch.setattr(engine_of(client)._stack.thin, "slots", lambda segments, counts: np.full(sum(counts), -1))
    with pytest.raises(Failed, match="has no effect here") as failed:
        client.sample()
    assert failed.value.category == "server"  # it is not the client's mistake


def test_a_sampler_that_answers_with_an_old_version(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """B3. It says so itself, in a place where nobody looked."""
    engine = engine_of(client)
    client.create().step().save().sample()
    (old,) = [slot.published for name, slot in engine._slots.items() if name != client.run]
    to_sample = engine._to_sample
    client.step().save()
    monkeypatch.setattr(
        engine, "_to_sample", lambda row: dataclasses.replace(to_sample(row), adapter=old) if row.tokens else to_sample(row)
    )
    with pytest.raises(Failed, match="the sampler has other weights than the request says"):
        client.sample()


@pytest.mark.parametrize("loaded", [False, True])
def test_requests_without_the_adapters_name(client: Client, monkeypatch: pytest.MonkeyPatch, loaded: bool) -> None:
    """B4. Lost before the adapter is loaded, and behind that."""
    engine = engine_of(client)
    client.create().step().save()
    if loaded:
        client.sample()
    sample = engine.sample
    monkeypatch.setattr(engine, "sample", lambda prompt, adapter, params, n=1, **more: sample(prompt, None, params, n, **more))
    with pytest.raises(Failed, match=r"from the base alone, asked for was adapter .* lost its adapter on the way"):
        client.sample()


def test_a_load_that_fills_nothing(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """B5. Loaded with 200 OK, matching no module; and the next who asks is not answered from what is left of it."""
    client.create().step()
    fill = engine_of(client)._fill
    monkeypatch.setattr(engine_of(client), "_fill", lambda slot, checkpoint: None)
    client.save()
    for _ in range(2):
        with pytest.raises(Failed, match="the sampler has other weights than the request says"):
            client.sample()
    monkeypatch.setattr(engine_of(client), "_fill", fill)
    client.sample()


def test_a_model_on_an_engine_of_full_copies(client: Client) -> None:
    """B6. A request for LoRA is not full fine-tuning."""
    engine_of(client)._stack = FullStack(nano())
    answer = client.server.call("/create_session", {})
    model = {"session_id": answer["session_id"], "model_seq_id": 0, "base_model": "nano", "lora_config": {"rank": 2}}
    told = client.server.result(client.server.call("/create_model", model)["request_id"]).json()
    assert "trains full copies of the weights and was asked for a low-rank adapter" in told["error"]


def test_an_adapter_that_is_stripped_on_save(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """B6. Half of the tensors never reach the file."""
    client.create().step()
    save = store._save
    kept = "lora_A"
    monkeypatch.setattr(store, "_save", lambda arrays, path: save({k: v for k, v in arrays.items() if kept in k}, path))
    client.save()
    with pytest.raises(Failed, match="weights and scale do not have the digest"):
        client.sample()

"""Bodies of ``forward_backward``: valid ones bent in every way, and hostile ones by hand."""

from __future__ import annotations

import json
import os
import random
import tracemalloc
from collections.abc import Callable, Generator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from real_server import Server, process
from test_malformed import good_request, make, server_errors

from veneer.engine import LOSSES as ENGINE_LOSSES
from veneer.engine.losses import TERMS
from veneer.server.tinker import wire
from veneer.types import DataError, RequestError

pytestmark = pytest.mark.xdist_group("malformed")
ROUNDS = int(os.environ.get("VENEER_FUZZ", "200"))
GROWTH = 64 * 2**20
"""Bytes by which the process may grow: beside what allocators keep, each promise holds its body and its answer until its run's next
state, and one that failed for five minutes."""
LOSSES = ("cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "gspo")


def message(run: str, seq: int, loss: str = "ppo", datums: int = 2) -> Any:
    """A valid request."""
    request = wire.MESSAGES["ForwardBackwardRequest"](model_id=run, seq_id=seq, loss_fn=loss)
    for i in range(datums):
        datum = request.data.add()
        for tokens in ([1, 2], [3]):
            datum.model_input.add().encoded_text.tokens = np.array(tokens, "<i4").tobytes()
        fill(datum, "target_tokens", np.array([2, 3, 4 + i], "<i8"))
        for name in ("weights", "logprobs", "advantages", *(["sequence_ratio_mask"] if loss == "gspo" else [])):
            fill(datum, name, np.full(3, -0.5, "<f4"))
    return request


def fill(datum: Any, name: str, array: np.ndarray[Any, Any]) -> None:
    tensor = datum.loss_fn_inputs[name]
    tensor.dense, tensor.dtype = array.tobytes(), wire.INT64 if array.dtype == np.int64 else wire.FLOAT32
    tensor.shape[:] = array.shape


def sparse(tensor: Any, shape: list[int], crow: list[int], col: list[int], values: int | None = None) -> None:
    tensor.shape[:] = shape
    tensor.sparse_csr.crow_indices = np.array(crow, "<i8").tobytes()
    tensor.sparse_csr.col_indices = np.array(col, "<i8").tobytes()
    tensor.sparse_csr.values = np.zeros(len(col) if values is None else values, "<i8").tobytes()


def targets(request: Any) -> Any:
    return request.data[0].loss_fn_inputs["target_tokens"]


def floods(field: bytes) -> Callable[[Any], bytes]:
    """A million messages of two bytes in a field."""
    return lambda request: request.SerializeToString() + field * 2**20


HOSTILE: dict[str, Callable[[Any], Any]] = {
    "a product of 2**60": lambda r: targets(r).shape.__setitem__(slice(None), [2**30, 2**30]),
    "a product beyond 64 bits": lambda r: targets(r).shape.__setitem__(slice(None), [2**62, 2**62, 2**62]),
    "a negative shape": lambda r: targets(r).shape.__setitem__(slice(None), [-1]),
    "a shape of -1 twice": lambda r: targets(r).shape.__setitem__(slice(None), [-1, -1]),
    "an empty shape in the middle": lambda r: targets(r).shape.__setitem__(slice(None), [3, 0, 2**62]),
    "a thousand axes": lambda r: targets(r).shape.__setitem__(slice(None), [1] * 1000),
    "CSR of 2**60": lambda r: sparse(targets(r), [2**30, 2**30], [0], []),
    "CSR as wide as the memory": lambda r: sparse(targets(r), [3, 2**40], [0, 0, 0, 0], []),
    "CSR with a pointer to nowhere": lambda r: sparse(targets(r), [3, 4], [0, 2**60, 2**60, 2**62], [0]),
    "CSR that goes back": lambda r: sparse(targets(r), [3, 4], [0, 2, 1, 2], [0, 1]),
    "CSR with a column too many": lambda r: sparse(targets(r), [3, 4], [0, 1, 1, 1], [4]),
    "CSR with a negative column": lambda r: sparse(targets(r), [3, 4], [0, 1, 1, 1], [-1]),
    "CSR with a column of 2**63 - 1": lambda r: sparse(targets(r), [3, 4], [0, 1, 1, 1], [2**63 - 1]),
    "CSR with a negative start": lambda r: sparse(targets(r), [3, 4], [-(2**63), 1, 1, 1], [0]),
    "CSR without pointers": lambda r: sparse(targets(r), [3, 4], [], []),
    "CSR with values too few": lambda r: sparse(targets(r), [3, 4], [0, 1, 1, 2], [0, 1], values=1),
    "CSR of one axis": lambda r: sparse(targets(r), [3], [0, 0, 0, 0], []),
    "CSR of no rows": lambda r: sparse(targets(r), [0, 4], [0], []),
    "bytes that are no numbers": lambda r: setattr(targets(r), "dense", b"xyz"),
    "a kind of number that is none": lambda r: setattr(targets(r), "dtype", 2**31 - 1),
    "targets as floats": lambda r: fill(r.data[0], "target_tokens", np.zeros(3, "<f4")),
    "a target beyond the vocabulary": lambda r: fill(r.data[0], "target_tokens", np.array([0, 0, 2**62], "<i8")),
    "a negative target": lambda r: fill(r.data[0], "target_tokens", np.array([0, 0, -(2**63)], "<i8")),
    "tokens beyond the vocabulary": lambda r: setattr(
        r.data[0].model_input[0].encoded_text, "tokens", np.array([2**31 - 1, -1], "<i4").tobytes()
    ),
    "half a token": lambda r: setattr(r.data[0].model_input[0].encoded_text, "tokens", b"\x01"),
    "more tokens than the context": lambda r: setattr(r.data[0].model_input[0].encoded_text, "tokens", bytes(4 * 10**6)),
    "an image": lambda r: r.data[0].model_input.add().image.SetInParent(),
    "no tokens": lambda r: r.data[0].ClearField("model_input"),
    "no inputs": lambda r: r.data[0].ClearField("loss_fn_inputs"),
    "no data": lambda r: r.ClearField("data"),
    "a loss that is none": lambda r: setattr(r, "loss_fn", "../x\x00"),
    "a loss of 100,000 letters": lambda r: setattr(r, "loss_fn", "x" * 100_000),
    "a setting that is a text": lambda r: setattr(r.loss_fn_config_v2["clip_low_threshold"], "text", "x"),
    "a setting that is no number": lambda r: setattr(r.loss_fn_config_v2["clip_low_threshold"], "number", float("nan")),
    "a setting that is unknown": lambda r: setattr(r.loss_fn_config_v2["x" * 1000], "number", 1.0),
    "a setting that only the engine has": lambda r: setattr(r.loss_fn_config_v2["entropy_coef"], "number", 1.0),
    "advantages that are no numbers": lambda r: fill(r.data[0], "advantages", np.array([np.nan, np.inf, 0], "<f4")),
    "weights that are no numbers": lambda r: fill(r.data[0], "weights", np.array([np.nan, np.inf, 0], "<f4")),
    "arrays of different lengths": lambda r: fill(r.data[0], "weights", np.zeros(2, "<f4")),
    "a million data": floods(b"\x1a\x00"),
    "an unknown field of a million": floods(b"\x7a\x00"),
}


def bytes_of(name: str, run: str, seq: int) -> bytes:
    request = message(run, seq)
    raw = HOSTILE[name](request)
    return raw if isinstance(raw, bytes) else request.SerializeToString()


def bent(rng: random.Random, valid: bytes, kept: int) -> bytes:
    """Some bytes of a request changed, cut out, doubled or cut off, behind the first ``kept``, which address it."""
    head, body = valid[:kept], bytearray(valid[kept:])
    for _ in range(rng.randint(1, 4)):
        at, way = rng.randrange(max(len(body), 1)), rng.randrange(5)
        if not body or way == 0:
            body[at:at] = rng.randbytes(rng.randint(1, 8))
        elif way == 1:
            body[at] ^= 1 << rng.randrange(8)
        elif way == 2:
            del body[at : at + rng.randint(1, 20)]
        elif way == 3:
            body[at:at] = body[at : at + rng.randint(1, 60)]
        else:
            body[at : at + 1] = rng.choice((b"\xff\xff\xff\xff\x0f", b"\xff" * 9 + b"\x01", b"\x00", b"\x80" * 11))
    return head + bytes(body)


# ---------------------------------------------------------------- the reading of bodies, alone


@given(seed=st.integers(0, 2**32), loss=st.sampled_from(LOSSES))
@settings(max_examples=ROUNDS, deadline=None)
def test_a_bent_body_is_data_or_a_data_error(seed: int, loss: str) -> None:
    """Nothing else comes of any bytes."""
    valid = message("run", 1, loss).SerializeToString()
    try:
        request = wire.parse_pass(bent(random.Random(seed), valid, 0))
        data = wire.to_data(request.data, request.loss_fn)
    except DataError:
        return
    assert len(data) == len(request.data)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_settings_of_a_loss_are_the_protocols(loss: str) -> None:
    """A client must not come to rely on what Tinker does not have; and all that Tinker has reaches the engine."""
    assert set(wire.SETTINGS[loss]) == set(ENGINE_LOSSES[loss][1])
    given = dict.fromkeys(wire.SETTINGS[loss], 0.5)
    assert wire.loss_settings(loss, given) == given
    for name in TERMS:
        with pytest.raises(RequestError, match=f"loss '{loss}' has no setting '{name}'; it has"):
            wire.loss_settings(loss, {name: 1.0})


@given(body=st.binary(max_size=200))
@settings(max_examples=ROUNDS, deadline=None)
def test_noise_is_data_or_a_data_error(body: bytes) -> None:
    try:
        request = wire.parse_pass(body)
        wire.to_data(request.data, "cross_entropy")
    except DataError:
        pass


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_body_takes_no_more_memory_than_an_honest_one(name: str) -> None:
    """What numpy and Python take while it is read; the largest body here has four megabytes."""
    body = bytes_of(name, "run", 1)
    tracemalloc.start()
    try:
        request = wire.parse_pass(body)
        wire.to_data(request.data, request.loss_fn)
    except DataError:
        pass
    finally:
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert most < 20 * 2**20, f"{most / 2**20:.0f} MiB for {len(body)} bytes"


@pytest.mark.parametrize("path", [(), (3,), (3, 2), (3, 2, 2)], ids=["data", "chunks", "inputs", "shapes"])
def test_a_flood_is_refused_before_it_is_parsed(path: tuple[int, ...]) -> None:
    """A million empty messages, or numbers, at every depth at which the schema has some."""
    flood = {0: b"\x1a\x00", 1: b"\x0a\x00", 2: b"\x12\x00", 3: b"\x20\x01"}[len(path)] * 2**20
    for number in reversed(path):
        flood = bytes([number << 3 | 2]) + _varint(len(flood)) + flood
    with pytest.raises(DataError, match="parts"):
        wire.parse_pass(flood)


def _varint(number: int) -> bytes:
    return (bytes([number & 127 | 128]) + _varint(number >> 7)) if number > 127 else bytes([number])


def test_a_large_honest_body_is_no_flood() -> None:
    """As many datums as the SDK sends at once, each in many chunks."""
    request = message("run", 1, datums=1024)
    for datum in request.data:
        for _ in range(100):
            datum.model_input.add().encoded_text.tokens = bytes(4 * 10)
    body = request.SerializeToString()
    assert len(body) > 2**22
    assert len(wire.parse_pass(body).data) == 1024


def test_many_tensors_share_one_bound() -> None:
    """Each is within it, together they are not: 64 of 2**20 cells."""
    request = wire.MESSAGES["ForwardBackwardRequest"](model_id="run", seq_id=1)
    for _ in range(64):
        datum = request.data.add()
        datum.model_input.add().encoded_text.tokens = np.zeros(1, "<i4").tobytes()
        sparse(datum.loss_fn_inputs["target_tokens"], [1, 2**20], [0, 0], [])
        datum.loss_fn_inputs["target_tokens"].dtype = wire.INT64
    with pytest.raises(DataError, match="send fewer datums at once"):
        wire.to_data(request.data, "cross_entropy")


# ---------------------------------------------------------------- a server that gets them


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Generator[Server, None, None]:
    with process(tmp_path_factory.mktemp("protobuf")) as server:
        yield server


def send(server: Server, body: bytes) -> tuple[int, dict[str, Any]]:
    answer = server.ask("POST", "/api/v1/forward_backward", headers={"Content-Type": wire.PROTOBUF}, data=body)
    return answer.status_code, answer.json()


def test_a_server_that_gets_hostile_bodies(server: Server) -> None:
    """Each is refused with 4xx or fails its future as the client's mistake; the run itself goes on."""
    _, run, _ = make(server)
    seq = 1
    for name in HOSTILE:
        status, answer = send(server, bytes_of(name, run, seq))
        assert status == 200 or 400 <= status < 500, (name, status, answer)
        if status == 200:
            failed = server.result(answer["request_id"]).json()
            assert failed["category"] == "user", (name, failed)
            assert 0 < len(failed["error"]) < 500, (name, failed)
            assert str(server.home) not in failed["error"]
            seq += 1
    _, answer = send(server, message(run, seq).SerializeToString())
    good = server.result(answer["request_id"])
    assert good.headers["content-type"] == wire.PROTOBUF, good.text


def test_a_server_that_gets_bent_bodies(server: Server) -> None:
    """As many as VENEER_FUZZ says: 4xx, a failed future of category user, or an answer; then it is well, and no larger."""
    rng, (_, run, _) = random.Random(0), make(server)
    seq, kept, before = 1, 0, 0
    for i in range(ROUNDS + 50):
        if i == 50:
            before = server.resident()
        request = message(run, seq, rng.choice(LOSSES))
        kept = len(wire.MESSAGES["ForwardBackwardRequest"](model_id=run, seq_id=seq).SerializeToString())
        body = bent(rng, request.SerializeToString(), kept)
        try:
            address = wire.parse_pass(body)
        except DataError:
            address = None
        if address is not None and (address.model_id, address.seq_id) != (run, seq):
            continue  # it would wait for its turn for ever
        status, answer = send(server, body)
        assert status == (400 if address is None else 200), (status, answer)
        seq += status == 200
        if seq % 100 == 0:  # so that the run's state moves on, and bodies before it go
            step = {"model_id": run, "seq_id": seq, "adam_params": {"learning_rate": 0.0}}
            server.result(server.call("/optim_step", step)["request_id"])
            seq += 1
    server.result(answer["request_id"]) if status == 200 else None
    grown = server.resident() - before
    print(f"{ROUNDS} bent bodies: {grown / 2**20:.1f} MiB more of {before / 2**20:.0f}")
    assert grown < GROWTH, f"{grown / 2**20:.1f} MiB more after {ROUNDS} bodies"
    good_request(server)
    assert [json.loads(text) for text in server_errors(server.home)] == []

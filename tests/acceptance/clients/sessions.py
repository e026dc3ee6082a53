"""SDK and plain HTTP: sessions, names of bases, and a wire that repeats, reorders and garbles."""

from __future__ import annotations

import threading
import time
import uuid
from typing import Any

import tinker
from checks import (
    BASE,
    CONTEXT,
    OTHER_NAME,
    Figures,
    close,
    datum,
    http,
    logprobs_of,
    new_model,
    refused,
    rows,
    run_checks,
    tokens_of,
    train,
)
from tinker import types
from tinker.proto import tinker_public_pb2 as wire
from tinker.proto.request_conv import forward_backward_request_to_proto
from tinker.types import ForwardBackwardInput, ForwardBackwardRequest

rest = tinker.RestClient()


# ---------------------------------------------------------------- bases and sessions


def unknown_bases_are_refused():
    session = tinker.ServiceClient()
    for name in ("Qwen/Qwen3-8C", "gpt-17", ""):
        refused(lambda name=name: session.create_lora_training_client(name).result(), within=10)
        if name:
            refused(lambda name=name: session.create_sampling_client(base_model=name).result(), within=10)
    message = refused(lambda: session.create_lora_training_client("Qwen/Qwen3-8C").result())
    assert BASE in message, f"the nearest name is not in the message: {message}"
    refused(lambda: session.create_lora_training_client(BASE, rank=0).result())
    refused(lambda: session.create_lora_training_client(BASE, rank=100_000).result())
    refused(lambda: session.create_lora_training_client(BASE, optimizer=types.DimuonOptimizerConfig()).result(), "dimuon")
    train(new_model(session), rows(2), 1)


def several_names_of_bases():
    """Each is listed, trains, samples, finds its tokenizer and comes back as it was asked for."""
    models = {m.model_name: m for m in rest.get_server_capabilities().result().supported_models}
    assert {BASE, OTHER_NAME} <= models.keys(), list(models)
    assert models[BASE].max_context_length == CONTEXT, models[BASE]
    session = tinker.ServiceClient()
    data = rows(2)
    for name in (BASE, OTHER_NAME, f"{BASE}:peft:131072"):
        client = new_model(session, base=name)
        assert client.get_info().model_data.model_name == name
        sampler = session.create_sampling_client(base_model=name).result()
        assert sampler.get_base_model() == name
        for tokenizer in (client.get_tokenizer(), sampler.get_tokenizer()):
            assert tokenizer.decode(tokenizer.encode("27+94+38=?")) == "27+94+38=?"
        train(client, data, 1)
        path = client.save_weights_for_sampler("kept").result().path
        assert session.create_sampling_client(model_path=path).result().get_base_model() == name


def sessions_are_listed_and_end():
    session = tinker.ServiceClient(user_metadata={"purpose": "listing"}, display_name="a name")
    model = new_model(session)
    sampler = session.create_sampling_client(base_model=BASE).result()
    identity = model.model_id.split(":")[0]
    assert model.model_id == f"{identity}:train:0", model.model_id
    assert identity in rest.list_sessions(limit=20).result().sessions
    found = rest.get_session(identity).result()
    assert model.model_id in found.training_run_ids
    assert any(s == sampler._sampling_session_id for s in found.sampler_ids), found.sampler_ids
    assert (found.user_metadata or {}).get("purpose") == "listing"
    assert found.display_name in (None, "a name")
    runs = rest.list_training_runs(limit=5).result()
    assert model.model_id in [r.training_run_id for r in runs.training_runs], "the newest run is not among the first five"
    assert http("POST", "/api/v1/session_heartbeat", {"session_id": identity, "type": "session_heartbeat"})[0] == 200
    session.close("success", detail="all is well").result()
    assert http("POST", "/api/v1/session_heartbeat", {"session_id": identity, "type": "session_heartbeat"})[0] == 410
    body = {"model_id": model.model_id, "seq_id": 1, "adam_params": dict(types.AdamParams()), "type": "optim_step"}
    status, answer = http("POST", "/api/v1/optim_step", body)
    if status == 200:
        answer = retrieve(answer["request_id"])
        assert "error" in answer, f"a finished session still trains: {answer}"
    else:
        assert 400 <= status < 500, (status, answer)
        assert status not in (409, 429)


def many_sessions_at_once():
    """Sixteen models train side by side, each as if alone."""
    data = [rows(2, seed=seed) for seed in range(16)]
    alone = train(new_model(tinker.ServiceClient(), seed=3), data[3], 4, 1e-2)
    found: dict[int, list[float]] = {}

    def one(i: int) -> None:
        found[i] = train(new_model(tinker.ServiceClient(), seed=i), data[i], 4, 1e-2)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 16, f"only {len(found)} of 16 finished"
    assert found[3] == alone, "a run's numbers depend on its company"


# ---------------------------------------------------------------- the wire


class Raw:
    """A model driven by plain HTTP, as a client whose network repeats and reorders."""

    def __init__(self) -> None:
        self.session = post("create_session", tags=[], user_metadata={}, sdk_version="0.38.0", type="create_session")["session_id"]
        config = {"rank": 4, "seed": 5, "train_attn": True, "train_mlp": True, "train_unembed": True}
        self.create = {"session_id": self.session, "model_seq_id": 0, "base_model": BASE, "lora_config": config}
        self.create |= {"optimizer_config": {"type": "adamw"}, "type": "create_model"}
        self.model = retrieve(post("create_model", **self.create)["request_id"])["model_id"]

    def pass_(self, seq: int, data: list[types.Datum]) -> str:
        request = ForwardBackwardRequest(
            forward_backward_input=ForwardBackwardInput(data=data, loss_fn="cross_entropy"), model_id=self.model, seq_id=seq
        )
        body = forward_backward_request_to_proto(request).SerializeToString()
        status, answer = http("POST", "/api/v1/forward_backward", body, "application/x-protobuf")
        assert status == 200, answer
        return answer["request_id"]

    def step(self, seq: int) -> str:
        params = {**dict(types.AdamParams(learning_rate=1e-2))}
        return post("optim_step", model_id=self.model, seq_id=seq, adam_params=params, type="optim_step")["request_id"]


def post(route: str, **body: Any) -> dict[str, Any]:
    status, answer = http("POST", f"/api/v1/{route}", body)
    assert status == 200, f"{route}: {status} {answer}"
    return answer


def retrieve(request: str) -> Any:
    for _ in range(20):
        status, answer = http("POST", "/api/v1/retrieve_future", {"request_id": request, "allow_metadata_only": False})
        if status != 408 and not (isinstance(answer, dict) and answer.get("type") == "try_again"):
            assert status == 200, f"{status} {answer}"
            return answer
    raise AssertionError(f"{request} was never done")


def loss_in(answer: bytes) -> float:
    return wire.ForwardBackwardOutput.FromString(answer).metrics["loss:sum"]


def repeated_requests_run_once():
    """Every request sent twice, as a client does whose answer got lost: the same id, and one step each."""
    plain, stuttering, data = Raw(), Raw(), rows(2, seed=60)
    assert retrieve(post("create_model", **stuttering.create)["request_id"])["model_id"] == stuttering.model
    losses: dict[str, list[float]] = {"plain": [], "stuttering": []}
    for step in range(3):
        losses["plain"].append(loss_in(retrieve(plain.pass_(2 * step + 1, data))))
        retrieve(plain.step(2 * step + 2))
        first, again = stuttering.pass_(2 * step + 1, data), stuttering.pass_(2 * step + 1, data)
        assert first == again, "the same request got another id"
        losses["stuttering"].append(loss_in(retrieve(first)))
        assert stuttering.step(2 * step + 2) == stuttering.step(2 * step + 2)
        assert retrieve(first) == retrieve(first), "a result can be fetched only once"
    assert losses["plain"] == losses["stuttering"], losses


def requests_may_arrive_in_any_order():
    """seq 4, 3, 2, then 1: run as 1, 2, 3, 4."""
    plain, shuffled, data = Raw(), Raw(), rows(2, seed=61)
    wanted = [plain.pass_(1, data), plain.step(2), plain.pass_(3, data), plain.step(4)]
    calls = [lambda: shuffled.pass_(1, data), lambda: shuffled.step(2), lambda: shuffled.pass_(3, data), lambda: shuffled.step(4)]
    requests = {i: calls[i]() for i in (3, 2, 1, 0)}
    assert [loss_in(retrieve(requests[i])) for i in (0, 2)] == [loss_in(retrieve(wanted[i])) for i in (0, 2)]


def garbage_is_answered():
    """No 5xx, which a client would repeat for five minutes, and no silence."""
    raw = Raw()
    tries = [
        ("POST", "/api/v1/forward_backward", b"\xff\xff\xff\xff garbage", "application/x-protobuf"),
        ("POST", "/api/v1/forward_backward", b"", "application/x-protobuf"),
        ("POST", "/api/v1/optim_step", b"{not json", "application/json"),
        ("POST", "/api/v1/optim_step", b"[]", "application/json"),
        ("POST", "/api/v1/optim_step", b"{}", "application/json"),
        ("POST", "/api/v1/create_model", b'{"session_id": "nobody", "model_seq_id": 0, "base_model": "nano"}', "application/json"),
        ("POST", "/api/v1/asample", b'{"sampling_session_id": "nobody", "seq_id": 0, "num_samples": 1}', "application/json"),
        ("POST", "/api/v1/get_info", b'{"model_id": "nobody:train:0"}', "application/json"),
        ("POST", "/api/v1/session_heartbeat", b'{"session_id": "nobody"}', "application/json"),
        ("POST", "/api/v1/load_weights", b'{"path": "tinker://../../etc/weights/passwd", "optimizer": true}', "application/json"),
        ("GET", "/api/v1/sessions/nobody", None, "application/json"),
        ("GET", "/api/v1/samplers/nobody:sample:0", None, "application/json"),
        ("GET", "/api/v1/training_runs?limit=minus&offset=-3", None, "application/json"),
    ]
    for method, path, body, content_type in tries:
        status, answer = http(method, path, body, content_type)
        assert 400 <= status < 500, f"{method} {path} {body!r}: {status} {answer}"
        assert status not in (408, 409, 429), f"{path}: a client repeats {status}"
        assert isinstance(answer, dict), f"{method} {path}: no JSON body: {answer!r}"
    status, answer = http("POST", "/api/v1/retrieve_future", {"request_id": str(uuid.uuid4()), "allow_metadata_only": False})
    assert status in (400, 404, 410), (status, answer)
    tensor = wire.Tensor(dense=b"\x01\x02\x03", dtype=wire.DTYPE_INT64, shape=[4])
    broken = wire.ForwardBackwardRequest(model_id=raw.model, seq_id=1, loss_fn="cross_entropy")
    one = broken.data.add()
    one.model_input.add().encoded_text.tokens = b"\x01\x02\x03\x04\x05"
    one.loss_fn_inputs["target_tokens"].CopyFrom(tensor)
    status, answer = http("POST", "/api/v1/forward_backward", broken.SerializeToString(), "application/x-protobuf")
    if status == 200:
        answer = retrieve(answer["request_id"])
        assert answer["category"] == "user", answer
    else:
        assert 400 <= status < 500, (status, answer)
    retrieve(raw.pass_(2, rows(1)))  # number 1 counts as used


def crooked_sparse_tensors_are_refused():
    """CSR whose pointers lead outside."""
    raw = Raw()
    good = datum([5, 6, 7], [[1, 2], [3, 4], [5, 6]])
    request = ForwardBackwardRequest(
        forward_backward_input=ForwardBackwardInput(data=[good], loss_fn="cross_entropy"), model_id=raw.model, seq_id=1
    )
    spoil = {
        "columns outside": ([0, 1, 2, 2], [0, 7]),
        "negative columns": ([0, 1, 2, 2], [0, -1]),
        "pointers that fall": ([0, 2, 1, 2], [0, 1]),
        "pointers beyond": ([0, 1, 2, 9], [0, 1]),
        "too few pointers": ([0, 2], [0, 1]),
    }
    for seq, (what, (crow, columns)) in enumerate(spoil.items(), 1):
        message = forward_backward_request_to_proto(request)
        message.seq_id = seq
        tensor = message.data[0].loss_fn_inputs["target_tokens"]
        tensor.CopyFrom(wire.Tensor(dtype=wire.DTYPE_INT64, shape=[3, 2]))
        tensor.sparse_csr.values = int64(3, 4)
        tensor.sparse_csr.crow_indices, tensor.sparse_csr.col_indices = int64(*crow), int64(*columns)
        status, answer = http("POST", "/api/v1/forward_backward", message.SerializeToString(), "application/x-protobuf")
        answer = retrieve(answer["request_id"]) if status == 200 else answer
        assert isinstance(answer, dict), f"{what}: accepted"
        assert answer.get("category") == "user" or 400 <= status < 500, f"{what}: {status} {answer}"


def int64(*values: int) -> bytes:
    return b"".join(value.to_bytes(8, "little", signed=True) for value in values)


def waiting_is_cheap() -> Figures:
    """A future that is not done is held for a while, and then answered with 408 before the client's 45 seconds."""
    raw = Raw()
    request = raw.step(2)  # waits for number 1
    clock = time.monotonic()
    status, answer = http("POST", "/api/v1/retrieve_future", {"request_id": request, "allow_metadata_only": False})
    held = time.monotonic() - clock
    assert status == 408 or (isinstance(answer, dict) and answer.get("type") == "try_again"), (status, answer)
    assert 0.9 < held < 45, f"held for {held:.1f} s"
    retrieve(raw.pass_(1, rows(1)))
    retrieve(request)
    return {"seconds_held": round(held, 1)}


def logprobs_do_not_depend_on_the_client():
    """A prompt by the SDK and the same in many pieces."""
    session = tinker.ServiceClient()
    sampler = session.create_sampling_client(base_model=BASE).result()
    ids = tokens_of("count 3 in 7313390")
    pieces = types.ModelInput(chunks=[types.EncodedTextChunk(tokens=[i]) for i in ids])
    whole = sampler.compute_logprobs(types.ModelInput.from_ints(ids)).result()
    assert sampler.compute_logprobs(pieces).result() == whole
    close(logprobs_of(new_model(session), [datum(ids[:-1], ids[1:])])[0], whole[1:], 1e-3, "trainer and sampler")


if __name__ == "__main__":
    checks = [
        *(unknown_bases_are_refused, several_names_of_bases, sessions_are_listed_and_end, many_sessions_at_once),
        *(repeated_requests_run_once, requests_may_arrive_in_any_order, garbage_is_answered, crooked_sparse_tensors_are_refused),
        *(waiting_is_cheap, logprobs_do_not_depend_on_the_client),
    ]
    run_checks(checks, __doc__)

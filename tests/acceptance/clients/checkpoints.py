"""SDK: what is saved, for how long, who may load it, and that it goes on bit for bit."""

from __future__ import annotations

import json
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import tinker
import torch
from checks import BASE, close, http, logprobs_of, new_model, prompt_of, refused, rows, run_checks, train
from reference import fetch, open_peft, target_logprobs, weights_of
from tinker import types

session, rest = tinker.ServiceClient(), tinker.RestClient()
YEAR = 365 * 24 * 3600


def listed(path: str) -> types.Checkpoint | None:
    run = types.ParsedCheckpointTinkerPath.from_tinker_path(path).training_run_id
    found = [c for c in rest.list_checkpoints(run).result().checkpoints if c.tinker_path == path]
    assert len(found) < 2, found
    return found[0] if found else None


def there(path: str) -> types.Checkpoint:
    found = listed(path)
    assert found is not None, f"{path} is not listed"
    return found


def same(ours: list[np.ndarray], theirs: list[np.ndarray], what: str) -> None:
    for a, b in zip(ours, theirs, strict=True):
        close(a, b, 0.0, what)


# ---------------------------------------------------------------- bit for bit


def with_optimizer_it_goes_on_bit_for_bit():
    """Three steps, save, three steps; and from the checkpoint, in another session, three steps: the same numbers."""
    data, model = rows(3, seed=40), new_model(session, seed=40)
    train(model, data, 3, 1e-2)
    path = model.save_state("middle").result().path
    wanted, weights = train(model, data, 3, 1e-2), weights_of(model)
    other = tinker.ServiceClient()
    resumed = other.create_training_client_from_state_with_optimizer(path).result()
    assert train(resumed, data, 3, 1e-2) == wanted, "a resumed run's losses differ from the uninterrupted run's"
    found = weights_of(resumed)
    assert all(torch.equal(found[name], weights[name]) for name in weights), "a resumed run's weights differ"
    assert resumed.model_id.endswith(":train:0"), resumed.model_id
    other.close("success").result()
    again = tinker.ServiceClient().create_training_client_from_state_with_optimizer(path).result()
    assert train(again, data, 3, 1e-2) == wanted, "loading a second time differs"


def without_optimizer_adam_starts_anew():
    """The same weights; then a first step, which with bias correction is not the step of an old optimizer."""
    data, model = rows(3, seed=41), new_model(session, seed=41)
    train(model, data, 4, 1e-2)
    path = model.save_state("weights").result().path
    fresh, twin, resumed = (
        session.create_training_client_from_state(path).result(),
        session.create_training_client_from_state(path).result(),
        session.create_training_client_from_state_with_optimizer(path).result(),
    )
    same(logprobs_of(fresh, data), logprobs_of(model, data), "loaded weights")
    assert train(fresh, data, 3, 1e-2) == train(twin, data, 3, 1e-2)
    first, with_moments = weights_of(fresh), train(resumed, data, 3, 1e-2)
    train(model, data, 3, 1e-2)
    same(logprobs_of(resumed, data), logprobs_of(model, data), "with the optimizer")
    assert not all(torch.equal(tensor, weights_of(resumed)[name]) for name, tensor in first.items()), (
        "the optimizer was loaded though not asked for"
    )
    assert with_moments


def older_clients_load_into_a_new_model():
    """load_state as a model's first request."""
    data, model = rows(2, seed=42), new_model(session, seed=42)
    train(model, data, 2, 1e-2)
    path = model.save_state("old").result().path
    loaded = new_model(session, seed=43)
    loaded.load_state_with_optimizer(path).result()
    assert train(loaded, data, 2, 1e-2) == train(model, data, 2, 1e-2)


def a_training_run_survives_its_session():
    """The session is closed; its checkpoints sample and train in others, and user metadata is there."""
    first = tinker.ServiceClient()
    model = first.create_lora_training_client(BASE, rank=4, seed=44, user_metadata={"renderer_name": "qwen3", "who": "me"}).result()
    data = rows(2, seed=44)
    train(model, data, 2, 1e-2)
    state = model.save_state("final", user_metadata={"step": "2"}).result().path
    sampler = model.save_weights_for_sampler("final", user_metadata={"score": "0.5"}).result().path
    request = prompt_of("sort 739562")
    wanted = model.save_weights_and_get_sampling_client().result().compute_logprobs(request).result()
    first.close("success", detail="done").result()
    for path in (sampler, state):
        other = tinker.ServiceClient().create_sampling_client(model_path=path).result()
        assert other.compute_logprobs(request).result() == wanted, f"{path} samples otherwise"
        assert other.get_base_model() == BASE, other.get_base_model()
    run = rest.get_training_run_by_tinker_path(state).result()
    assert run.user_metadata is not None
    assert {"renderer_name": "qwen3", "who": "me"}.items() <= run.user_metadata.items(), run.user_metadata
    assert (run.base_model, run.is_lora, run.lora_rank, run.training_run_id) == (BASE, True, 4, model.model_id), run
    assert run.last_checkpoint is None or run.last_checkpoint.tinker_path == state
    assert there(state).user_metadata == {"step": "2"}
    assert there(sampler).user_metadata == {"score": "0.5"}
    info = rest.get_weights_info_by_tinker_path(state).result()
    assert (info.base_model, info.is_lora, info.lora_rank) == (BASE, True, 4), info
    assert (info.train_attn, info.train_mlp, info.train_unembed) == (True, True, True), info


# ---------------------------------------------------------------- names, times, rights


def names_and_kinds():
    model = new_model(session, seed=45)
    train(model, rows(2), 1)
    state, sampler = model.save_state("one").result().path, model.save_weights_for_sampler("one").result().path
    external = model.save_weights_external("one").result().path
    assert state == f"tinker://{model.model_id}/weights/one", state
    assert sampler == f"tinker://{model.model_id}/sampler_weights/one", sampler
    assert external == f"tinker://{model.model_id}/external_weights/one", external
    kinds = {
        "training": (state, "weights/one"),
        "sampler": (sampler, "sampler_weights/one"),
        "external": (external, "external_weights/one"),
    }
    for kind, (path, identity) in kinds.items():
        found = there(path)
        assert (found.checkpoint_type, found.checkpoint_id, found.public) == (kind, identity, False), found
        assert found.size_bytes is None or found.size_bytes > 1000, found
        assert found.expires_at is None
        assert abs(found.time - datetime.now(UTC)) < timedelta(minutes=5), found.time
    newest = rest.list_user_checkpoints(limit=3).result()
    assert newest.cursor is not None
    assert newest.cursor.total_count >= 3
    assert {c.tinker_path for c in newest.checkpoints} == {state, sampler, external}, "the newest are not listed first"
    second = rest.list_user_checkpoints(limit=1, offset=1).result()
    assert [c.tinker_path for c in second.checkpoints] == [newest.checkpoints[1].tinker_path]
    for name in ("a/b", "../up", ""):
        refused(lambda name=name: model.save_state(name).result())


def overwriting_is_asked_for():
    data, model = rows(2, seed=46), new_model(session, seed=46)
    train(model, data, 2, 1e-2)
    path = model.save_state("same", user_metadata={"a": "1"}).result().path
    first = logprobs_of(model, data)
    train(model, data, 2, 1e-2)
    refused(lambda: model.save_state("same").result(), "same")
    same(logprobs_of(session.create_training_client_from_state(path).result(), data), first, "a refused save")
    assert model.save_state("same", overwrite=True, user_metadata={"b": "2"}).result().path == path
    same(logprobs_of(session.create_training_client_from_state(path).result(), data), logprobs_of(model, data), "an overwritten save")
    assert there(path).user_metadata == {"b": "2"}


def times_to_live():
    model = new_model(session, seed=47)
    path = model.save_state("hour", ttl_seconds=3600).result().path
    expires = there(path).expires_at
    assert expires is not None
    assert abs(expires - datetime.now(UTC) - timedelta(hours=1)) < timedelta(minutes=5), expires
    rest.set_checkpoint_ttl_from_tinker_path(path, None).result()
    assert there(path).expires_at is None
    rest.set_checkpoint_ttl_from_tinker_path(path, 7200).result()
    later = there(path).expires_at
    assert later is not None
    assert later > expires
    for seconds in (3599, 0, -1, 10 * YEAR + 86400 * 4):
        refused(lambda seconds=seconds: rest.set_checkpoint_ttl_from_tinker_path(path, seconds).result())
        refused(lambda seconds=seconds: model.save_state(f"ttl-{seconds}", ttl_seconds=seconds).result())
    assert there(model.save_weights_for_sampler("sampler", ttl_seconds=3600).result().path).expires_at is not None


def publishing_and_deleting():
    data, model = rows(2, seed=48), new_model(session, seed=48)
    path = model.save_state("public").result().path
    rest.publish_checkpoint_from_tinker_path(path).result()
    assert there(path).public
    rest.unpublish_checkpoint_from_tinker_path(path).result()
    assert not there(path).public
    sampler = model.save_weights_for_sampler("gone").result().path
    for gone in (path, sampler):
        rest.delete_checkpoint_from_tinker_path(gone).result()
        assert listed(gone) is None
        refused(lambda gone=gone: rest.delete_checkpoint_from_tinker_path(gone).result())
    refused(lambda: session.create_training_client_from_state(path).result())
    refused(lambda: session.create_sampling_client(model_path=sampler).result())
    refused(lambda: rest.get_weights_info_by_tinker_path(path).result())
    train(model, data, 1)
    assert listed(model.save_state("public").result().path) is not None, "a deleted name cannot be used again"


def what_is_not_there_is_refused():
    run = new_model(session).model_id
    for path in (f"tinker://{run}/weights/none", "tinker://nobody:train:0/weights/none"):
        refused(lambda path=path: session.create_training_client_from_state(path).result())
        refused(lambda path=path: session.create_sampling_client(model_path=path).result())
        refused(lambda path=path: rest.get_weights_info_by_tinker_path(path).result())
    refused(lambda: rest.get_training_run("nobody:train:0").result())
    for route in ("weights/..", "sampler_weights/%2e%2e%2f%2e%2e%2fetc", "weights/..%2f..%2f..%2fetc%2fpasswd"):
        status, _ = http("DELETE", f"/api/v1/training_runs/{run}/checkpoints/{route}")
        assert status in (400, 404, 405), f"{route}: {status}"


# ---------------------------------------------------------------- external weights


def peft_opens_external_weights():
    """Fetched without a key; stock PEFT on stock transformers gives the log-probabilities of the trainer."""
    data, model = rows(3, seed=49), new_model(session, rank=5, seed=49)
    train(model, data, 4, 1e-2)
    path = model.save_weights_external("peft", ttl_seconds=3600).result().path
    answer = rest.get_external_weights_urls(path).result()
    assert answer.expires > datetime.now(UTC) + timedelta(minutes=9), answer.expires
    assert {"adapter_config.json", "adapter_model.safetensors"} <= answer.urls.keys(), list(answer.urls)
    folder = fetch(path, Path(tempfile.mkdtemp(prefix="files-", dir=".")))
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (5, 32, "LORA"), config
    opened = open_peft(folder)
    apart = [
        close(lp, target_logprobs(opened, d).detach(), 1e-3, "PEFT and the trainer")
        for d, lp in zip(data, logprobs_of(model, data), strict=True)
    ]
    return {"peft_vs_trainer": max(apart)}


def external_weights_may_be_encrypted():
    import pyrage

    model, identity = new_model(session, seed=50), pyrage.x25519.Identity.generate()
    path = model.save_weights_external("secret", age_encryption_recipients=[str(identity.to_public())]).result().path
    folder = fetch(path, Path(tempfile.mkdtemp(prefix="files-", dir=".")))
    files = sorted(p.name for p in folder.iterdir())
    assert files
    assert all(name.endswith(".age") for name in files), files
    for name in files:
        (folder / name.removesuffix(".age")).write_bytes(pyrage.decrypt((folder / name).read_bytes(), [identity]))
    assert open_peft(folder).peft_config["default"].r == 8
    refused(lambda: model.save_weights_external("nonsense", age_encryption_recipients=["age1nonsense"]).result())


def the_cookbook_downloads_weights():
    from tinker_cookbook import weights

    data, model = rows(2, seed=51), new_model(session, seed=51)
    train(model, data, 3, 1e-2)
    wanted = logprobs_of(model, data)
    for path in (model.save_weights_external("book").result().path, model.save_state("book").result().path):
        folder = Path(weights.download(tinker_path=path, output_dir=tempfile.mkdtemp(prefix="files-", dir=".")))
        opened = open_peft(folder)
        for d, lp in zip(data, wanted, strict=True):
            close(lp, target_logprobs(opened, d).detach(), 1e-3, f"{path} by weights.download")


if __name__ == "__main__":
    checks = [
        *(with_optimizer_it_goes_on_bit_for_bit, without_optimizer_adam_starts_anew, older_clients_load_into_a_new_model),
        *(a_training_run_survives_its_session, names_and_kinds, overwriting_is_asked_for, times_to_live, publishing_and_deleting),
        *(what_is_not_there_is_refused, peft_opens_external_weights, external_weights_may_be_encrypted, the_cookbook_downloads_weights),
    ]
    run_checks(checks, __doc__)

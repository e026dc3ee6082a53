"""Faults that were reported of LoRA training systems, injected the way they happened: each stops the run within one step, or at the
load, and says what it is.

B1 to B6 are the reports: verl#7495, trl#6700, modelscope/ms-swift#9855, radixark/miles#2075, vllm#34186, verl#7285 with
SkyRL#1077.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_helpers import config_of, engine_of, open_session, run_session

from veneer.engine import FullEngine, load_base
from veneer.measure.canary import with_canary
from veneer.train import learn
from veneer.train.session import Session
from veneer.types import Adapter, AdapterError, AttestationError, Checkpoint, LoraConfig


def start(tmp_path: Path, **rl_settings: Any) -> Session:
    return open_session(config_of(tmp_path, rl={"steps": 4, **rl_settings}), tmp_path / "run")


def stops(session: Session, words: str, *, after_step: int = 0, error: type[Exception] = AttestationError) -> None:
    """The run ends with these words, and ``after_step`` is the last one that it recorded."""
    with pytest.raises(error, match=words) as caught:
        run_session(session)
    assert "\n" not in str(caught.value)
    assert [m["step"] for m in session.run.metrics()] == list(range(after_step + 1))


# ---------------------------------------------------------------- B1: the adapter never reaches the sampler


def test_an_adapter_that_is_never_published_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """B1. Publishing does nothing: the sampler goes on with the first weights."""
    session = start(tmp_path)
    publish = type(engine_of(session)._stack.rows).publish
    calls = []

    def only_once(rows: Any, slot: int) -> None:
        calls.append(slot)
        if len(calls) <= 2:  # its creation, and the first call of the loop
            publish(rows, slot)

    monkeypatch.setattr(type(engine_of(session)._stack.rows), "publish", only_once)
    stops(session, "changed nothing that is sampled")


def test_weights_stale_behind_a_true_digest_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """B1. The published digest is right, yet the sampler's copy is put back to the old weights."""
    session = start(tmp_path)
    engine = engine_of(session)
    true_publish = engine._publish

    def publish_and_put_back(name: str) -> Adapter:
        row = engine._stack.rows.published(engine._slot(name).slot)
        old = row.clone()
        adapter = true_publish(name)
        if old.any():
            row.copy_(old)
        return adapter

    monkeypatch.setattr(engine, "_publish", publish_and_put_back)
    stops(session, r"has no effect here.*loaded and not applied")


# ---------------------------------------------------------------- B2: nothing is trained


def test_learning_rate_zero_is_caught(tmp_path: Path) -> None:
    """B2. A run that trains nothing fails at once."""
    stops(start(tmp_path, learning_rate=0.0), "learning rate is 0")


def test_an_optimizer_that_does_not_hold_the_adapter_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """B2. Gradients, norms and losses look healthy, and the optimizer updates nothing."""
    session = start(tmp_path)
    monkeypatch.setattr(engine_of(session)._stack.rows, "_update", lambda slots, params, norms: {})
    stops(session, "the optimizer does not hold this adapter")


def test_no_gradient_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """B2. The adapter was loaded as not trainable: no map gets a gradient."""
    session = start(tmp_path)
    monkeypatch.setattr(engine_of(session), "_add_gradient", lambda slot, gradient: None)
    stops(session, "no gradient arrived")


def test_nothing_to_train_is_refused(tmp_path: Path) -> None:
    """B2. A configuration that adapts no module is no run."""
    config = config_of(tmp_path, lora={"train_attn": False, "train_mlp": False})
    with pytest.raises(AdapterError, match="nothing would be trained"):
        run_session(open_session(config, tmp_path / "run"))


# ---------------------------------------------------------------- B3: the sampler ignores the updates


def test_a_sampler_that_does_not_apply_the_adapter_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """B3. The adapter is loaded, named and never applied."""
    session = start(tmp_path)
    monkeypatch.setattr(engine_of(session)._stack.thin, "slots", lambda segments, counts: np.full(sum(counts), -1))
    stops(session, r"has no effect here.*loaded and not applied")


def test_a_sampler_that_answers_with_an_old_version_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """B3. Rollouts of an asynchronous server go on with the version that it started with, which was true once."""
    session = start(tmp_path)
    engine = engine_of(session)
    to_sample, first = engine._to_sample, []

    def stale(row: Any) -> Any:
        sample = to_sample(row)
        first.append(sample.adapter)
        return dataclasses.replace(sample, adapter=first[0]) if len(sample.tokens) else sample

    monkeypatch.setattr(engine, "_to_sample", stale)
    stops(session, r"version 0 .*asked for was adapter .*other weights", after_step=1)


def test_an_adapter_changed_behind_the_loop_is_caught(tmp_path: Path) -> None:
    """B3. Training weights that move without an optimizer step are not those that were sampled."""
    session = start(tmp_path)

    def disturb(metrics: dict[str, Any]) -> None:
        if metrics["step"] == 1:
            (state,) = engine_of(session)._stack.rows.trained.values()
            state.weights.mul_(1.5)

    session.on_step = disturb
    stops(session, "do not run the same weights", after_step=1)


# ---------------------------------------------------------------- B4: requests lose the adapter's name


def test_requests_without_the_adapters_name_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """B4. Something between the loop and the sampler forgets the name: every trajectory is the base's."""
    session = start(tmp_path)
    engine = engine_of(session)
    sample = engine.sample
    monkeypatch.setattr(engine, "sample", lambda prompt, adapter, params, n=1, **more: sample(prompt, None, params, n, **more))
    with pytest.raises(AttestationError, match=r"from the base alone.*lost its adapter on the way"):
        run_session(session)
    assert session.run.metrics() == []


def test_samples_of_another_adapter_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """B4. Rollouts of another adapter must not be trained on, whatever their log-probabilities."""
    session = start(tmp_path)
    to_data = learn.groups_to_data

    def forged(*args: Any, **settings: Any) -> list[Any]:
        data_ED = to_data(*args, **settings)
        for datum in (datum for data in data_ED for datum in data):
            object.__setattr__(datum.adapter, "digest", "0" * 64)
        return data_ED

    monkeypatch.setattr(learn, "groups_to_data", forged)
    with pytest.raises(AttestationError, match="these samples come from"):
        run_session(session)


# ---------------------------------------------------------------- B5: loaded, and matching nothing


def trained(tmp_path: Path) -> tuple[Session, Checkpoint]:
    """A session that begins from an adapter which does something, with its record."""
    session = start(tmp_path)
    engine = engine_of(session)
    engine.create_adapter("before", LoraConfig(rank=1))
    fresh = engine.save_state("before", "sampler").result()
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(0, 0.1, array.shape).astype(np.float32) for name, array in fresh.weights.items()}
    engine.load_state("before", dataclasses.replace(fresh, weights=weights)).result()
    saved = with_canary(engine, "before", engine.save_state("before", "sampler").result(), session.canary)
    engine.remove_adapter("before")
    session.init = saved
    return session, saved


def test_a_true_start_goes_through(tmp_path: Path) -> None:
    """The checks of this part do not cry wolf."""
    session, _ = trained(tmp_path)
    run_session(session)
    assert len(session.run.metrics()) == 5


def test_weights_that_match_no_module_are_refused(tmp_path: Path) -> None:
    """B5. Names from another framework, or of another layout: 200 OK, and the base answers."""
    session, saved = trained(tmp_path)
    weights = {name.replace("model.layers", "model.language_model.layers"): array for name, array in saved.weights.items()}
    session.init = dataclasses.replace(saved, weights=weights)
    with pytest.raises(AdapterError, match=r"model.layers.0.self_attn.q_proj.lora_A.weight is missing"):
        run_session(session)


@pytest.mark.parametrize("recorded", [True, False])
def test_a_load_that_fills_nothing_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded: bool) -> None:
    """B5. The load succeeds, its loop over matching modules never ran. With and without a record."""
    session, saved = trained(tmp_path)
    session.init = saved if recorded else dataclasses.replace(saved, canary=None)
    monkeypatch.setattr(engine_of(session), "_fill", lambda slot, checkpoint: None)
    with pytest.raises(AttestationError, match="other weights than the request says"):
        run_session(session)
    assert session.run.metrics() == []


@pytest.mark.parametrize("recorded", [True, False])
def test_a_load_that_is_not_applied_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded: bool) -> None:
    """B5. The weights are in memory, digest and all, and no module adds them."""
    session, saved = trained(tmp_path)
    session.init = saved if recorded else dataclasses.replace(saved, canary=None)
    monkeypatch.setattr(engine_of(session)._stack.thin, "slots", lambda segments, counts: np.full(sum(counts), -1))
    with pytest.raises(AttestationError, match="has no effect here"):
        run_session(session)
    assert session.run.metrics() == []


# ---------------------------------------------------------------- B6: the base is trained, or the adapter is not what is kept


def test_a_lora_run_on_an_engine_of_full_copies_is_refused(tmp_path: Path) -> None:
    """B6. A request for LoRA must not become full fine-tuning in silence."""
    session = start(tmp_path)
    session.engine = FullEngine(load_base("nano"))
    with pytest.raises(AdapterError, match="trains full copies of the weights and was asked for a low-rank adapter"):
        run_session(session)


def test_a_base_that_is_trained_along_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """B6. The optimizer holds the base too."""
    session = start(tmp_path)
    rows, model = engine_of(session)._stack.rows, engine_of(session).base.model
    adam = rows.adam

    def adam_and_more(slots: Any, params: Any) -> list[float]:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=1e-3)
        return adam(slots, params)

    monkeypatch.setattr(rows, "adam", adam_and_more)
    stops(session, "the base is not what it was")


def test_a_base_changed_in_one_number_is_caught_before_anything_is_kept(tmp_path: Path) -> None:
    """B6. The base is bit for bit the same after a run, or the run has failed."""
    session = open_session(config_of(tmp_path), tmp_path / "run")

    def disturb(metrics: dict[str, Any]) -> None:
        if metrics["step"] == 1:
            with torch.no_grad():
                next(engine_of(session).base.model.parameters())[0, 0] += 1e-3

    session.on_step = disturb
    with pytest.raises(AttestationError, match="the base changed"):
        run_session(session)
    assert [folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000000"]

"""What the engine refuses, in one line, and how it stays as it was."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import transformers as hf
from engine_tools import (
    FREE,
    VOCAB,
    add_random_adapter,
    datum,
    full_engine,
    lora_engine,
    no_gradients,
    prompt,
    row_bytes,
    sampled_datum,
    scrambled,
    wide_engine,
)

from tiny_models import random_model
from veneer.assets import NANO_FOLDER
from veneer.engine import Base, LocalEngine, LoraEngine, load_base
from veneer.types import AdamParams, AdapterError, AttestationError, BaseError, Checkpoint, Datum, LoraConfig

STEP = AdamParams(learning_rate=1e-2, weight_decay=0.1)
SMALL = LoraConfig(rank=2, alpha=4)


@contextmanager
def expect_refused(error: type[Exception], *words: str) -> Iterator[None]:
    """Exactly this error, on one line, naming what is wrong and where."""
    with pytest.raises(error) as caught:
        yield
    message = str(caught.value)
    assert type(caught.value) is error
    assert "\n" not in message
    for word in words:
        assert word in message, message


# ---------------------------------------------------------------- configurations


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (LoraConfig(rank=0), ("rank 0", "from 1 to 16", "k_proj")),
        (LoraConfig(rank=-3), ("rank -3",)),
        (LoraConfig(rank=17), ("rank 17", "from 1 to 16", "k_proj")),
        (LoraConfig(rank=33, target_modules=("up_proj",)), ("rank 33", "32", "up_proj")),
        (LoraConfig(target_modules=("q_porj",)), ("'q_porj'", "q_proj")),
        (LoraConfig(target_modules=("q_proj", "layers.7.mlp.up_proj")), ("'layers.7.mlp.up_proj'",)),
        (LoraConfig(target_modules=("proj",)), ("'proj'",)),
        (LoraConfig(train_attn=False, train_mlp=False), ("train_attn", "train_mlp", "train_unembed")),
        (LoraConfig(alpha=0.0), ("alpha 0",)),
        (LoraConfig(alpha=float("nan")), ("alpha nan",)),
    ],
    ids=lambda value: "" if isinstance(value, tuple) else f"r{value.rank}a{value.alpha}{'-'.join(value.target_modules)}",
)
def test_wrong_configs_are_refused_with_what_and_where(config: LoraConfig, words: tuple[str, ...]) -> None:
    """A run that trains nothing, or something else than was meant, must fail at once and say which key to change."""
    engine = lora_engine()
    engine.create_adapter("other", SMALL)
    before = row_bytes(engine, "other")
    with expect_refused(AdapterError, *words):
        engine.create_adapter("x", config)
    assert row_bytes(engine, "other") == before
    with expect_refused(AdapterError, "'x'", "other"):
        engine.sample(prompt(3), "x", FREE)
    engine.create_adapter("x", SMALL)


def test_widest_rank_fits() -> None:
    """The bound in the message is the bound."""
    engine = lora_engine()
    assert engine.create_adapter("x", LoraConfig(rank=16)) > 0
    engine.forward_backward("x", [datum(9)], "cross_entropy").result()


def test_switches_choose_what_they_say() -> None:
    """train_attn, train_mlp, train_unembed: parameters counted by hand, per layer and rank."""
    attention = (32 + 32) + 2 * (32 + 16) + (32 + 32)  # q, k and v, o
    mlp = 2 * (32 + 48) + (48 + 32)
    for attn, up, head in ((1, 1, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)):
        config = LoraConfig(rank=3, train_attn=bool(attn), train_mlp=bool(up), train_unembed=bool(head))
        wanted = 3 * (2 * (attn * attention + up * mlp) + head * (32 + VOCAB))
        assert lora_engine().create_adapter("x", config) == wanted


def test_creating_twice_is_refused() -> None:
    """The second of two loops with one name would silently train the first's adapter."""
    engine = lora_engine()
    add_random_adapter(engine, "x", SMALL, seed=1)
    before = row_bytes(engine, "x")
    with expect_refused(AdapterError, "'x'"):
        engine.create_adapter("x", LoraConfig(rank=4))
    assert row_bytes(engine, "x") == before


@pytest.mark.parametrize("verb", ["sample", "forward", "forward_backward", "optim_step", "publish", "save_state", "remove_adapter"])
def test_unknown_adapters_are_named(verb: str) -> None:
    """Every verb says which adapters there are."""
    engine = lora_engine()
    engine.create_adapter("there", SMALL)
    calls = {
        "sample": lambda: engine.sample(prompt(3), "nobody", FREE),
        "forward": lambda: engine.forward("nobody", [datum(5)], "cross_entropy"),
        "forward_backward": lambda: engine.forward_backward("nobody", [datum(5)], "cross_entropy"),
        "optim_step": lambda: engine.optim_step("nobody", STEP).result(),
        "publish": lambda: engine.publish("nobody").result(),
        "save_state": lambda: engine.save_state("nobody").result(),
        "remove_adapter": lambda: engine.remove_adapter("nobody"),
    }
    with expect_refused(AdapterError, "'nobody'", "there"):
        calls[verb]()


def moe_engine() -> LocalEngine:
    config = hf.Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    return LoraEngine(Base("moe", hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32), None))


def test_experts_are_refused_and_attention_works() -> None:
    """Adapting a mixture of experts in part, silently, would be a different experiment than the one that was asked for."""
    engine = moe_engine()
    with expect_refused(AdapterError, "experts", "train_mlp"):
        engine.create_adapter("x", LoraConfig(rank=4))
    assert engine.create_adapter("x", LoraConfig(rank=4, train_mlp=False)) == 4 * 2 * (2 * 64 + 2 * 48)
    assert all("self_attn" in name for name in engine.save_state("x").result().weights)
    before = engine.forward("x", [datum(9)], "cross_entropy").result().metrics["loss:sum"]
    for _ in range(3):
        engine.forward_backward("x", [datum(9)], "cross_entropy")
        engine.optim_step("x", AdamParams(1e-2)).result()
    assert engine.forward("x", [datum(9)], "cross_entropy").result().metrics["loss:sum"] < before


def test_models_without_linear_maps_are_refused() -> None:
    """GPT-2's maps are Conv1D: an adapter there would have no parameters and learn nothing."""
    config = hf.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    engine = LoraEngine(Base("gpt2", hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32), None))
    with expect_refused(AdapterError, "train_attn", "GPT2LMHeadModel"):
        engine.create_adapter("x", LoraConfig(rank=2))
    with expect_refused(AdapterError, "'c_attn'"):
        engine.create_adapter("x", LoraConfig(rank=2, target_modules=("c_attn",)))
    assert len(engine.sample(prompt(5), None, FREE).result()[0].tokens) == 8


def test_full_fine_tuning_is_no_adapter_of_a_lora_engine() -> None:
    """A config of None, or a checkpoint of a whole model, on the wrong kind of engine is a request error, not an assertion."""
    engine, whole = lora_engine(), full_engine()
    with expect_refused(AdapterError):
        engine.create_adapter("x", None)
    whole.create_adapter("x", None)
    with expect_refused(AdapterError):
        engine.load_state("x", whole.save_state("x").result()).result()


def test_lora_is_no_adapter_of_a_full_engine() -> None:
    """A thin checkpoint does not fit a whole model, and says so."""
    engine, thin = full_engine(), lora_engine()
    thin.create_adapter("x", SMALL)
    with expect_refused(AdapterError):
        engine.load_state("x", thin.save_state("x").result()).result()


def test_a_full_engine_does_not_ignore_a_lora_config() -> None:
    """A LoraConfig that is silently ignored trains all weights where a thin adapter was asked for."""
    with expect_refused(AdapterError):
        full_engine().create_adapter("x", SMALL)


def dead_end_engine() -> LocalEngine:
    """A model with an attention map that nothing ever calls."""
    model = random_model("qwen3")
    model.model.layers[1].self_attn.dead_end = torch.nn.Linear(32, 32)
    return LoraEngine(Base("dead end", model, None))


def test_targets_without_a_gradient_are_named() -> None:
    """An adapter that is half connected trains a little and looks healthy; the first step must say so and change nothing."""
    engine = dead_end_engine()
    engine.create_adapter("x", SMALL)
    before = row_bytes(engine, "x", ("weights", "published", "m", "v"))
    engine.forward_backward("x", [datum(40)], "cross_entropy").result()
    with expect_refused(AttestationError, "model.layers.1.self_attn.dead_end"):
        engine.optim_step("x", STEP).result()
    assert row_bytes(engine, "x", ("weights", "published", "m", "v")) == before
    engine.create_adapter("y", LoraConfig(rank=2, target_modules=("q_proj", "up_proj")))
    engine.forward_backward("y", [datum(40)], "cross_entropy").result()
    assert engine.optim_step("y", STEP).result()["version"] == 1


def test_a_row_of_one_token_may_be_trained() -> None:
    """Queries and keys of a single token have no gradient; that is no mistake of anyone's."""
    engine = lora_engine()
    engine.create_adapter("x", SMALL)
    engine.forward_backward("x", [datum(1)], "cross_entropy").result()
    assert engine.optim_step("x", STEP).result()["version"] == 1


@pytest.mark.parametrize("seed", [-1, 2**63, 2**70])
def test_any_integer_is_a_seed(seed: int) -> None:
    """Seeds come from hashes and counters; each must work and none be the default."""
    engine = lora_engine()
    engine.create_adapter("x", dataclasses.replace(SMALL, seed=seed))
    engine.create_adapter("other", dataclasses.replace(SMALL, seed=1))
    assert engine.publish("x").result().digest != engine.publish("other").result().digest


# ---------------------------------------------------------------- attestation


def sampled(engine: LocalEngine, name: str) -> Datum:
    (sample,) = engine.sample(prompt(4), name, FREE).result()
    return sampled_datum(prompt(4), sample.tokens, sample.logprobs, sample.adapter)


def test_own_samples_of_any_published_version_are_welcome() -> None:
    """Off-policy by a few versions is a choice that the loss handles; the evidence still has to fit."""
    engine = lora_engine()
    engine.create_adapter("x", SMALL)
    row = sampled(engine, "x")
    for version in (1, 2):
        engine.forward_backward("x", [row, sampled(engine, "x")], "importance_sampling")
        engine.optim_step("x", STEP)
        assert engine.publish("x").result().version == version
    engine.forward_backward("x", [row, sampled(engine, "x"), datum(5)], "importance_sampling").result()


@pytest.mark.parametrize(
    "forged",
    [{"digest": "0" * 64}, {"version": 7}, {"name": "y"}, {"base_digest": "0" * 64}],
    ids=lambda fields: next(iter(fields)),
)
def test_forged_evidence_is_refused(forged: dict) -> None:
    """What was sampled is what is trained: same adapter, same version, same weights, same base."""
    engine = lora_engine()
    for name in "xy":
        engine.create_adapter(name, SMALL)
    row = sampled(engine, "x")
    assert row.adapter is not None
    with expect_refused(AttestationError, "'x'"):
        engine.forward_backward("x", [row, dataclasses.replace(row, adapter=dataclasses.replace(row.adapter, **forged))], "ppo")
    assert engine.step() == 0
    assert no_gradients(engine)


def test_samples_of_another_adapter_are_refused() -> None:
    """Two loops that mix up their batches."""
    engine = lora_engine()
    for name in "xy":
        engine.create_adapter(name, SMALL)
    with expect_refused(AttestationError, "'x'", "'y'"):
        engine.forward_backward("y", [sampled(engine, "x")], "ppo")


def test_samples_of_an_unpublished_version_are_refused() -> None:
    """Version 1 exists in training; it was never published, so nothing can have been sampled from it."""
    engine = lora_engine()
    engine.create_adapter("x", SMALL)
    row = sampled(engine, "x")
    engine.forward_backward("x", [row], "ppo")
    engine.optim_step("x", STEP).result()
    in_training = engine.save_state("x").result().adapter
    assert in_training.version == 1
    with expect_refused(AttestationError, "version 1"):
        engine.forward_backward("x", [dataclasses.replace(row, adapter=in_training)], "ppo")
    engine.publish("x").result()
    engine.forward_backward("x", [dataclasses.replace(row, adapter=in_training)], "ppo").result()


def test_samples_of_another_base_are_refused() -> None:
    """The same adapter on a base with other weights is another policy."""
    engine, other = lora_engine(seed=0), lora_engine(seed=1)
    for e in (engine, other):
        e.create_adapter("x", SMALL)
    with expect_refused(AttestationError, other.base_digest[:12], engine.base_digest[:12]):
        engine.forward_backward("x", [sampled(other, "x")], "ppo")


def test_weights_of_a_stranger_with_the_same_name_are_refused() -> None:
    """After a name is made anew, samples from its former holder are foreign."""
    engine = lora_engine()
    engine.create_adapter("x", SMALL)
    row = sampled(engine, "x")
    engine.remove_adapter("x")
    engine.create_adapter("x", dataclasses.replace(SMALL, seed=1))
    with expect_refused(AttestationError, "'x'"):
        engine.forward_backward("x", [row], "ppo")


@pytest.mark.parametrize("wait", [True, False], ids=["awaited", "queued"])
def test_samples_from_before_a_roll_back_are_refused(wait: bool) -> None:
    """After a load the name holds other weights; whether the load was awaited before the batch was queued must not matter."""
    engine = lora_engine()
    engine.create_adapter("x", SMALL)
    other = scrambled(engine.save_state("x").result(), seed=3)
    row = sampled(engine, "x")
    load = engine.load_state("x", other)
    if wait:
        load.result()
    with expect_refused(AttestationError, "'x'"):
        engine.forward_backward("x", [row], "ppo").result()
    load.result()
    assert no_gradients(engine)


# ---------------------------------------------------------------- checkpoints


def trained(engine: LocalEngine, name: str, steps: int, first: int = 0) -> None:
    for i in range(first, first + steps):
        engine.forward_backward(name, [datum(9, i), datum(5, i)], "cross_entropy")
        engine.optim_step(name, dataclasses.replace(STEP, learning_rate=1e-2 / (i + 1))).result()


def without(checkpoint: Checkpoint, field: str, key: str) -> Checkpoint:
    return dataclasses.replace(checkpoint, **{field: {k: v for k, v in getattr(checkpoint, field).items() if k != key}})


def with_array(checkpoint: Checkpoint, field: str, key: str, array: np.ndarray) -> Checkpoint:
    return dataclasses.replace(checkpoint, **{field: {**getattr(checkpoint, field), key: array}})


A = "model.layers.1.mlp.up_proj.lora_A.weight"
B = "model.layers.1.mlp.up_proj.lora_B.weight"
DAMAGES = {
    "another base": (
        lambda c: dataclasses.replace(c, adapter=dataclasses.replace(c.adapter, base_digest="f" * 64)),
        ("base", "ffffffffffff"),
    ),
    "missing weight": (lambda c: without(c, "weights", A), (A, "missing")),
    "missing moment": (lambda c: without(c, "optimizer", f"v.{B}"), (f"v.{B}", "missing")),
    "missing step": (lambda c: without(c, "optimizer", "step"), ("step",)),
    "wrong shape": (lambda c: with_array(c, "weights", A, np.zeros((3, 32), np.float32)), (A, "(3, 32)", "(2, 32)")),
    "transposed": (lambda c: with_array(c, "weights", B, np.zeros((2, 48), np.float32)), (B, "(2, 48)", "(48, 2)")),
    "moment of wrong shape": (lambda c: with_array(c, "optimizer", f"m.{A}", np.zeros((2, 31), np.float32)), (f"m.{A}", "(2, 31)")),
    "extra weight": (lambda c: with_array(c, "weights", "lm_head.lora_A.weight", np.zeros((2, 32), np.float32)), ("lm_head",)),
    "rank too high": (lambda c: dataclasses.replace(c, config=LoraConfig(rank=99)), ("rank 99",)),
    "unknown target": (lambda c: dataclasses.replace(c, config=LoraConfig(rank=2, target_modules=("c_attn",))), ("c_attn",)),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["x", "new"], ids=["over-old", "fresh-name"])
def test_damaged_checkpoints_change_nothing(damage: str, name: str) -> None:
    """A failed roll-back must leave what is being served exactly as it was."""
    engine = lora_engine()
    for adapter in ("x", "y"):
        add_random_adapter(engine, adapter, SMALL, seed=1)
        trained(engine, adapter, 2)
    checkpoint = engine.save_state("y").result()
    before = {adapter: (row_bytes(engine, adapter), engine.save_state(adapter).result().adapter) for adapter in ("x", "y")}
    free = len(engine._stack.rows)
    spoil, words = DAMAGES[damage]
    with expect_refused(AdapterError, *words):
        engine.load_state(name, spoil(checkpoint)).result()
    for adapter, (content, described) in before.items():
        assert row_bytes(engine, adapter) == content
        assert engine.save_state(adapter).result().adapter == described
    assert len(engine._stack.rows) == free, "the slot that was tried is lost"
    with expect_refused(AdapterError, "'new'"):
        engine.sample(prompt(3), "new", FREE)
    engine.load_state(name, checkpoint).result()
    assert engine.publish(name).result().digest == checkpoint.adapter.digest


def test_a_loaded_adapter_is_the_saved_one() -> None:
    """Weights, digest, version, and the samples drawn from it."""
    engine, other = wide_engine(), wide_engine()
    add_random_adapter(engine, "x", LoraConfig(rank=4), seed=1)
    trained(engine, "x", 3)
    published = engine.publish("x").result()
    checkpoint = engine.save_state("x", "sampler").result()
    assert not checkpoint.optimizer
    other.load_state("copy", checkpoint).result()
    samples = [e.sample(prompt(5), name, FREE).result()[0] for e, name in ((engine, "x"), (other, "copy"))]
    assert samples[0].tokens.tolist() == samples[1].tokens.tolist()
    assert np.array_equal(samples[0].logprobs, samples[1].logprobs)
    assert samples[1].adapter == dataclasses.replace(published, name="copy")
    assert published.version == 3


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_training_continues_bit_for_bit(kind: str) -> None:
    """An interrupted run that resumes must be the run that was not interrupted: weights, moments, bias correction."""
    straight, first, second = (lora_engine() if kind == "lora" else full_engine() for _ in range(3))
    for engine in (straight, first):
        engine.create_adapter("x", LoraConfig(rank=4) if kind == "lora" else None)
    trained(straight, "x", 5)
    trained(first, "x", 2)
    checkpoint = first.save_state("x").result()
    trained(first, "x", 1, first=9)  # a copy: what happens later must not reach the checkpoint
    second.load_state("x", checkpoint).result()
    trained(second, "x", 3, first=2)
    wanted, found = straight.save_state("x").result(), second.save_state("x").result()
    assert found.adapter == wanted.adapter
    assert wanted.adapter.version == 5
    for field in ("weights", "optimizer"):
        assert set(getattr(found, field)) == set(getattr(wanted, field))
        for key, array in getattr(wanted, field).items():
            assert np.array_equal(getattr(found, field)[key], array), key


def test_a_sampler_checkpoint_starts_with_fresh_moments() -> None:
    """Without moments training goes on from the weights, at their version, as Adam does at its beginning."""
    engine = lora_engine()
    engine.create_adapter("x", SMALL)
    trained(engine, "x", 2)
    engine.load_state("x", engine.save_state("x", "sampler").result()).result()
    state = engine.save_state("x").result()
    assert state.adapter.version == 2
    assert all(not array.any() for key, array in state.optimizer.items() if key[:2] in ("m.", "v."))


def test_loading_over_an_adapter_drops_its_waiting_gradient() -> None:
    """A roll-back in the middle of an accumulation must not leave half a batch behind."""
    engine = lora_engine()
    engine.create_adapter("x", SMALL)
    checkpoint = engine.save_state("x").result()
    engine.forward_backward("x", [datum(9)], "cross_entropy").result()
    engine.load_state("x", checkpoint).result()
    assert not any(row_bytes(engine, "x", ("grad",))["grad"])


# ---------------------------------------------------------------- bases


def test_missing_folder_is_one_line(tmp_path) -> None:
    """A mistyped path."""
    with expect_refused(BaseError, "no such folder", "nowhere"):
        load_base(str(tmp_path / "nowhere"))


def broken_base(tmp_path, how: str) -> str:
    folder = tmp_path / "base"
    shutil.copytree(NANO_FOLDER, folder)
    weights = folder / "model.safetensors"
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif how == "no weights":
        weights.unlink()
    elif how == "no config":
        (folder / "config.json").unlink()
    elif how == "broken config":
        (folder / "config.json").write_text('{"model_type": "qwen3",')
    elif how == "unknown architecture":
        (folder / "config.json").write_text('{"model_type": "perceptron"}')
    elif how == "no tokenizer":
        for path in folder.glob("tokenizer*"):
            path.unlink()
    elif how == "missing tensor":
        import safetensors.torch as st

        tensors = st.load_file(weights)
        del tensors["model.layers.1.mlp.up_proj.weight"]
        st.save_file(tensors, weights, metadata={"format": "pt"})
    return str(folder)


@pytest.mark.parametrize(
    "how", ["truncated", "no weights", "no config", "broken config", "unknown architecture", "no tokenizer", "missing tensor"]
)
def test_broken_folders_are_one_line(how: str, tmp_path) -> None:
    """A download that broke off: one line that names the folder, not a page of traceback, and never a base with random weights."""
    assert (NANO_FOLDER / "model.safetensors").is_file(), "the bundled base has no weights: run recipes/pretrain_nano.py"
    folder = broken_base(tmp_path, how)
    with expect_refused(BaseError, folder):
        load_base(folder)


def test_a_name_that_is_not_cached_is_one_line() -> None:
    """Offline, as in CI."""
    with expect_refused(BaseError, "nobody/no-such-model"):
        load_base("nobody/no-such-model")


def test_saved_models_load_as_they_are(tmp_path) -> None:
    """The digest of a base depends on its tensors, not on where it came from."""
    shutil.copytree(NANO_FOLDER, tmp_path / "copy")
    here, there = load_base("nano", device="cpu"), load_base(str(tmp_path / "copy"), device="cpu")
    assert here.digest == there.digest
    assert (here.base_id, there.base_id) == ("nano", "copy")
    assert not any(p.requires_grad for p in here.parameters())
    assert Base("x", random_model("llama"), None).digest != Base("x", random_model("llama", seed=1), None).digest

"""KL to a reference and entropy as terms of a loss: by hand, against autograd on a full softmax, and against PEFT in float64."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from engine_tools import add_random_adapter, datum, full_engine, gradients, lora_engine
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from test_fast_paths import family
from test_targets import bits, engine_with, in_float64, near, plain_loss, soft

from tiny_models import random_model
from veneer.engine import logprobs as logprobs_module
from veneer.engine.logprobs import target_logprobs, target_logprobs_and_entropies
from veneer.engine.losses import LOSSES, LossInputs, Terms, add_terms, kl_estimate, resolve_terms
from veneer.types import AdamParams, DataError, Datum, LoraConfig, RequestError

POLICY = tuple(name for name in LOSSES if name != "cross_entropy")
BOTH = {"kl_coef": 0.3, "kl_estimator": 3, "entropy_coef": 0.2}


# ---------------------------------------------------------------- by hand


@pytest.mark.parametrize(
    ("estimator", "value", "slope"),
    [(1, math.log(2), 1.0), (2, math.log(2) ** 2 / 2, math.log(2)), (3, 0.5 - 1 + math.log(2), 0.5)],
)
def test_kl_estimates_by_hand(estimator: int, value: float, slope: float) -> None:
    """A token of probability 1/2 that the reference gives 1/4: r = 1/2, log r = -ln 2. Slopes: 1, ln 2 and 1 - r."""
    lp = torch.tensor([math.log(0.5)], dtype=torch.float64, requires_grad=True)
    found = kl_estimate(lp, torch.tensor([math.log(0.25)], dtype=torch.float64), estimator)
    found.sum().backward()
    assert float(found.detach()) == pytest.approx(value)
    assert float(lp.grad) == pytest.approx(slope)


def test_terms_by_hand() -> None:
    """Two tokens, weights 1 and 1/2, k2 with d = 1 and -2, entropies 0.7 and 0.1:
    10 (1 * 1/2 + 1/2 * 2) - 3 (1 * 0.7 + 1/2 * 0.1) = 15 - 2.25; the sums told are 1/2 + 2 and 0.7 + 0.1, without weights."""
    lp = torch.tensor([-1.0, -4.0])
    x = LossInputs(
        lp, lp, lp, torch.tensor([1.0, 0.5]), torch.tensor([0, 0]), None, lp - torch.tensor([1.0, -2.0]), torch.tensor([0.7, 0.1])
    )
    value, sums = add_terms(x, Terms(10.0, 2, 3.0))
    assert value is not None
    assert float(value) == pytest.approx(12.75)
    assert {name: float(total) for name, total in sums.items()} == pytest.approx({"kl_base": 2.5, "entropy": 0.8})
    assert add_terms(dataclasses.replace(x, reference=None, entropy=None), Terms()) == (None, {})


@settings(deadline=None)
@given(seed=st.integers(0, 10**6))
def test_the_mean_of_k1_and_k3_over_the_policy_is_the_kl(seed: int) -> None:
    """Summed over the whole vocabulary under p, 1 and 3 are KL(p || r) itself, and the gradient of 2, with the tokens held fixed, is
    the gradient of it: which a penalty must follow."""
    rng = np.random.default_rng(seed)
    logits = torch.tensor(rng.normal(0, 1, 7), requires_grad=True)
    reference = torch.tensor(rng.normal(0, 1, 7)).log_softmax(0)
    lp = logits.log_softmax(0)
    kl = (lp.exp() * (lp - reference)).sum()
    (wanted,) = torch.autograd.grad(kl, logits, retain_graph=True)
    p = lp.exp().detach()
    for estimator in (1, 3):
        assert float((p * kl_estimate(lp, reference, estimator)).sum().detach()) == pytest.approx(float(kl.detach()))
    found = {k: torch.autograd.grad((p * kl_estimate(lp, reference, k)).sum(), logits, retain_graph=True)[0] for k in (1, 2, 3)}
    torch.testing.assert_close(found[2], wanted)
    torch.testing.assert_close(found[1], torch.zeros_like(wanted))
    forward = (reference.exp() * (reference - lp)).sum()
    torch.testing.assert_close(found[3], torch.autograd.grad(forward, logits)[0])


# ---------------------------------------------------------------- the entropy's gradient


class Head:
    """Hidden states times W, frozen or not."""

    def __init__(self, weight: torch.Tensor, frozen: bool) -> None:
        self.weight, self.frozen_weight, self.vocab_size = weight, weight if frozen else None, len(weight)

    def __call__(self, hidden: torch.Tensor, start: int) -> torch.Tensor:
        return (hidden @ self.weight.T).float()


@settings(deadline=None, max_examples=40)
@given(n=st.integers(1, 40), vocab=st.integers(2, 30), width=st.integers(0, 3), frozen=st.booleans(), seed=st.integers(0, 10**6))
def test_entropy_and_gradient_are_those_of_a_full_softmax(n: int, vocab: int, width: int, frozen: bool, seed: int) -> None:
    """In chunks or at once, with a frozen head or one that is trained, with one target at a place or several."""
    torch.manual_seed(seed)
    hidden, weight = torch.randn(n, 5, requires_grad=True), torch.randn(vocab, 5, requires_grad=not frozen)
    targets = torch.randint(0, vocab, (n, width) if width else (n,))
    a, b = torch.randn(targets.shape), torch.randn(n)
    log_p = (hidden @ weight.T).log_softmax(-1)
    picked = log_p.gather(1, targets if width else targets[:, None]).reshape(targets.shape)
    h = -(log_p.exp() * log_p).sum(-1)
    leaves = [hidden] if frozen else [hidden, weight]
    wanted = torch.autograd.grad((a * picked).sum() + (b * h).sum(), leaves)
    before = logprobs_module.LOGITS_AT_ONCE["cpu"]
    logprobs_module.LOGITS_AT_ONCE["cpu"] = 16 * vocab
    try:
        lp, entropy = target_logprobs_and_entropies(hidden, targets, Head(weight, frozen))
        plain = target_logprobs(hidden, targets, Head(weight, frozen))
        with torch.no_grad():
            inferred = target_logprobs_and_entropies(hidden, targets, Head(weight, frozen))
    finally:
        logprobs_module.LOGITS_AT_ONCE["cpu"] = before
    found = torch.autograd.grad((a * lp).sum() + (b * entropy).sum(), leaves)
    torch.testing.assert_close(entropy, h, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)
    assert torch.equal(lp, plain), "entropies must not change a bit of the rest"
    assert torch.equal(inferred[0], lp)
    torch.testing.assert_close(inferred[1], entropy)


def test_entropy_gradient_equals_finite_differences() -> None:
    """Independently of autograd: H by its definition at hidden +- 1e-3."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(11, 4)
    _, entropy = target_logprobs_and_entropies(hidden, torch.zeros(3, dtype=torch.long), Head(weight, True))
    (found,) = torch.autograd.grad(entropy.sum(), hidden)

    def entropy_at(row: int, state: torch.Tensor) -> float:
        p = (state.double() @ weight.double().T).softmax(-1)[row]
        return -sum(float(x) * math.log(float(x)) for x in p)

    for row in range(3):
        for column in range(4):
            step = torch.zeros_like(hidden)
            step[row, column] = 1e-3
            slope = (entropy_at(row, hidden.detach() + step) - entropy_at(row, hidden.detach() - step)) / 2e-3
            assert float(found[row, column]) == pytest.approx(slope, abs=1e-4)


def test_a_uniform_distribution_has_the_most_entropy_and_no_slope() -> None:
    """ln V, by hand."""
    hidden = torch.zeros(2, 4, requires_grad=True)
    _, entropy = target_logprobs_and_entropies(hidden, torch.tensor([0, 1]), Head(torch.randn(9, 4), True))
    (slope,) = torch.autograd.grad(entropy.sum(), hidden)
    assert entropy.tolist() == pytest.approx([math.log(9)] * 2)
    assert slope.abs().max() < 1e-6


# ---------------------------------------------------------------- through the engine


def with_reference(data: Sequence[Datum], seed: int = 0) -> list[Datum]:
    """The data with a reference's log-probabilities a little off the sampler's."""
    rng = np.random.default_rng([13, seed])
    return [
        dataclasses.replace(
            row,
            per_token=dict(row.per_token)
            | {"reference_logprobs": (row.logprobs + rng.normal(0, 0.5, row.logprobs.shape)).astype(np.float32)},
        )
        for row in data
    ]


def plain_terms(log_p: torch.Tensor, lp: torch.Tensor, row: Datum, config: Mapping[str, float]) -> torch.Tensor:
    """coef (r - 1 - log r) - coef H, per target under its weight, in plain torch."""
    w = torch.from_numpy(row.mask).double()
    gap = torch.from_numpy(row.per_token["reference_logprobs"]).double() - lp
    kl = {1: -gap, 2: gap**2 / 2, 3: gap.exp() - 1 - gap}[int(config["kl_estimator"])]
    h = -(log_p.exp() * log_p).sum(-1).reshape(-1, *[1] * (w.ndim - 1))
    return (w * (config["kl_coef"] * kl - config["entropy_coef"] * h)).sum()


def check_terms(engine, model: PeftModel, data: Sequence[Datum], name: str, config: Mapping[str, float]) -> None:
    """Loss and gradient of adapter x are those of plain torch in float64."""
    own = {**LOSSES[name][1], **config}
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for row in data:
        log_p = model(input_ids=torch.from_numpy(row.tokens)[None]).logits[0].log_softmax(-1)
        lp = log_p.gather(1, torch.from_numpy(row.targets).reshape(len(row.tokens), -1)).reshape(row.targets.shape)
        total = total + plain_loss(name, lp, row, own) + plain_terms(log_p, lp, row, own)
    total.backward()
    metrics = engine.forward_backward("x", data, name, config).result().metrics
    assert metrics["loss:sum"] == pytest.approx(float(total.detach()), rel=2e-5, abs=2e-5)
    named = {n.removeprefix("base_model.model.").replace(".default.", "."): p for n, p in model.named_parameters() if p.requires_grad}
    found, whole = gradients(engine, "x"), torch.sqrt(sum(p.grad.square().sum() for p in named.values()))
    for key, parameter in named.items():
        gap = torch.linalg.vector_norm(found[key] - parameter.grad)
        assert gap <= 2e-5 * max(torch.linalg.vector_norm(parameter.grad), 1e-3 * whole), key


@pytest.mark.parametrize("kind", ["qwen3", "gemma2"])
@pytest.mark.parametrize("name", POLICY)
def test_every_policy_loss_with_both_terms_is_plain_torchs(name: str, kind: str, tmp_path) -> None:
    """Frozen heads (qwen3), and logits that are capped and go through autograd (gemma2); rows that share a prompt."""
    engine = engine_with(kind)
    model = in_float64(kind, engine, tmp_path)
    data = with_reference(near(model, [datum(20), *family(14, (3, 9)), datum(31, 2)]))
    check_terms(engine, model, data, name, BOTH)


@pytest.mark.parametrize("estimator", [1, 2, 3])
def test_many_targets_at_a_place_and_settings_of_their_own(estimator: int, tmp_path) -> None:
    """Soft targets count each with its weight, and thresholds per token do not disturb the terms."""
    engine = engine_with()
    model = in_float64("qwen3", engine, tmp_path)
    low = {"clip_low_threshold": np.full((14, 3), 0.7, np.float32), "clip_high_threshold": np.full((14, 3), 1.3, np.float32)}
    first, second = near(model, [soft(14, 3), datum(12)])
    data = with_reference([dataclasses.replace(first, per_token=low), second])
    check_terms(engine, model, data, "ppo", BOTH | {"kl_estimator": estimator})


def test_adapted_unembeddings_learn_from_the_entropy_too(tmp_path) -> None:
    """Where the head itself is trained no shortcut may drop its gradient."""
    engine = engine_with("llama", LoraConfig(rank=4, alpha=8, train_unembed=True))
    model = in_float64("llama", engine, tmp_path)
    check_terms(engine, model, with_reference(near(model, [datum(20), datum(9, 1)])), "importance_sampling", BOTH)


def test_full_fine_tuning_has_the_terms(tmp_path) -> None:
    """The comparison of LoRA with all weights must be of one objective."""
    engine, model = full_engine(), random_model("qwen3").double()
    engine.create_adapter("x", None)
    data = with_reference([datum(20), datum(9, 1)])
    total = torch.zeros((), dtype=torch.float64)
    for row in data:
        log_p = model(input_ids=torch.from_numpy(row.tokens)[None]).logits[0].log_softmax(-1)
        lp = log_p[torch.arange(len(row.targets)), torch.from_numpy(row.targets)]
        total = total + plain_loss("importance_sampling", lp, row, BOTH) + plain_terms(log_p, lp, row, BOTH)
    total.backward()
    metrics = engine.forward_backward("x", data, "importance_sampling", BOTH).result().metrics
    assert metrics["loss:sum"] == pytest.approx(float(total.detach()), rel=2e-5)
    found = gradients(engine, "x")
    for key, parameter in model.named_parameters():
        assert torch.linalg.vector_norm(found[key] - parameter.grad) <= 2e-5 * torch.linalg.vector_norm(parameter.grad), key


def test_metrics_are_means_over_tokens(tmp_path) -> None:
    """Not over weights, which carry the normalisation; and there are none that nobody asked for."""
    engine = engine_with()
    model = in_float64("qwen3", engine, tmp_path)
    (row,) = with_reference([datum(12)])
    metrics = engine.forward("x", [row], "importance_sampling", BOTH).result().metrics
    with torch.no_grad():
        log_p = model(input_ids=torch.from_numpy(row.tokens)[None]).logits[0].log_softmax(-1).numpy()
    read = row.mask != 0
    gap = row.per_token["reference_logprobs"][read] - log_p[np.arange(12), row.targets][read]
    assert metrics["kl_base:mean"] == pytest.approx(float((np.exp(gap) - 1 - gap).mean()), rel=1e-4)
    assert metrics["entropy:mean"] == pytest.approx(float(-(np.exp(log_p) * log_p).sum(-1)[read].mean()), rel=1e-4)
    plain = engine.forward("x", [datum(12)], "importance_sampling").result().metrics
    assert not {"kl_base:mean", "entropy:mean"} & set(plain)


@pytest.mark.parametrize("name", POLICY)
def test_settings_of_zero_change_no_bit(name: str) -> None:
    """What is switched off must be off."""
    data = [*family(30, (12, 3, 25)), datum(20, 4)]
    plain, off = engine_with(), engine_with()
    wanted = plain.forward_backward("x", data, name).result()
    found = off.forward_backward("x", data, name, {"kl_coef": 0.0, "kl_estimator": 2, "entropy_coef": 0.0}).result()
    assert found.metrics == wanted.metrics
    assert bits(off, "x") == bits(plain, "x")


def test_a_request_keeps_its_bits_beside_one_that_asks_for_entropies(monkeypatch) -> None:
    """Another experiment's bonus must neither change nor slow what is beside it: they do not share a pass."""
    alone, together = engine_with(), engine_with()
    data = family(20, (4, 9))
    wanted = alone.forward_backward("y", data, "ppo").result()
    sizes: list[int] = []
    inner = logprobs_module._entropy
    monkeypatch.setattr(logprobs_module, "_entropy", lambda log_p: sizes.append(len(log_p)) or inner(log_p))
    first = together.forward_backward("x", [datum(12)], "ppo", {"entropy_coef": 0.1})
    second = together.forward_backward("y", data, "ppo")
    assert second.result().metrics == wanted.metrics
    assert bits(together, "y") == bits(alone, "y")
    assert first.result().metrics["entropy:mean"] > 0
    assert sum(sizes) == 8, "an entropy for each trained position of the one request, and no other"


def test_the_bonus_raises_entropy_and_the_penalty_brings_the_base_back() -> None:
    """The signs, end to end: a few steps with no advantage at all."""
    for config, key in (({"entropy_coef": 1.0}, "entropy:mean"), ({"kl_coef": 1.0, "kl_estimator": 2}, "kl_base:mean")):
        engine = lora_engine()
        add_random_adapter(engine, "x", LoraConfig(rank=4, alpha=8), seed=1)
        row = dataclasses.replace(datum(24), advantages=np.zeros(24, np.float32), mask=np.ones(24, np.float32))
        if "kl_coef" in config:
            base = engine.forward(None, [row], "importance_sampling").result().logprobs_D[0]
            row = dataclasses.replace(row, per_token={"reference_logprobs": base})
        told = []
        for _ in range(6):
            told.append(engine.forward_backward("x", [row], "importance_sampling", config).result().metrics[key])
            engine.optim_step("x", AdamParams(learning_rate=1e-2)).result()
        assert told[-1] > told[0] + 0.05 if key == "entropy:mean" else told[-1] < 0.5 * told[0], told


def test_rows_without_weight_need_no_reference() -> None:
    """A group that cancelled may be scored beside the others."""
    engine = engine_with()
    idle = dataclasses.replace(datum(9, 1), mask=np.zeros(9, np.float32))
    row = with_reference([datum(12)])
    alone = engine.forward("x", row, "ppo", BOTH).result().metrics
    assert engine.forward("x", [idle, *row], "ppo", BOTH, everywhere=True).result().metrics == pytest.approx(alone, rel=1e-6)
    assert engine.forward_backward("x", [idle], "ppo", BOTH).result().metrics["loss:sum"] == 0


@pytest.mark.parametrize(
    ("loss", "config", "kind", "words"),
    [
        ("ppo", {"kl_coef": 0.1}, DataError, "datum 0 has no 'reference_logprobs'"),
        ("ppo", {"kl_coef": -0.1}, RequestError, "kl_coef must be a finite number from 0"),
        ("ppo", {"kl_coef": math.inf}, RequestError, "kl_coef must be a finite number from 0"),
        ("gspo", {"entropy_coef": math.inf}, RequestError, "entropy_coef a finite number"),
        ("gspo", {"entropy_coef": math.nan}, RequestError, "entropy_coef"),
        ("cispo", {"kl_estimator": 4}, RequestError, "kl_estimator must be 1, 2 or 3, and is 4"),
        ("cross_entropy", {"entropy_coef": 0.1}, RequestError, "has no setting 'entropy_coef'; it has none"),
        ("ppo", {"entropy_cof": 0.1}, RequestError, "'entropy_cof'; it has clip_low_threshold, clip_high_threshold, kl_coef"),
    ],
)
def test_wrong_terms_are_refused_at_once(loss, config, kind, words: str) -> None:
    """One line, before anything is queued."""
    engine = engine_with()
    for call in (engine.forward, engine.forward_backward):
        with pytest.raises(kind, match=words):
            call("x", [datum(6)], loss, config)
    assert engine.step() == 0


def test_a_reference_that_is_not_read_is_refused() -> None:
    """Whoever sends one means it; and one with holes would make NaN of the weights."""
    engine = engine_with()
    (row,) = with_reference([datum(12)])
    with pytest.raises(RequestError, match="reads no 'reference_logprobs'"):
        engine.forward("x", [row], "ppo")
    row.per_token["reference_logprobs"][6] = np.nan
    with pytest.raises(DataError, match="datum 0: reference_logprobs must be finite where the mask is not 0"):
        engine.forward("x", [row], "ppo", BOTH)
    assert resolve_terms("ppo", None) == Terms()

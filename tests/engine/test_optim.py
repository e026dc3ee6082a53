"""Adam on rows, accumulation, and full fine-tuning, against torch."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from engine_tools import (
    FREE,
    POISON,
    add_random_adapter,
    break_passes,
    clean,
    count_passes,
    datum,
    full_engine,
    gradients,
    logits_of,
    lora_engine,
    poisoned,
    prompt,
    relative_error,
    row_bytes,
    rows_of_adapter,
    scrambled,
    slot_of,
    target_logprobs,
)
from test_guards import dead_end_engine, sampled

from tiny_models import random_model
from veneer.engine.rows import AT_ONCE, Rows
from veneer.types import AdamParams, AttestationError, Datum, LoraConfig, RequestError, RunError

X = LoraConfig(rank=4, alpha=8)


def rows_with(weights: torch.Tensor) -> tuple[Rows, int]:
    rows = Rows(torch.device("cpu"))
    rows.claim(weights.numel())  # so that the slot is not the first
    slot = rows.claim(weights.numel())
    rows.open(slot).weights.copy_(weights)
    return rows, slot


@pytest.mark.parametrize(
    ("betas", "eps", "decay", "clip"),
    [((0.9, 0.95), 1e-12, 0.0, 0.0), ((0.9, 0.999), 1e-8, 0.1, 0.0), ((0.5, 0.8), 1e-3, 0.01, 0.7), ((0.0, 0.9), 1e-8, 0.3, 100.0)],
)
def test_adam_equals_torch_adamw(betas: tuple[float, float], eps: float, decay: float, clip: float) -> None:
    """Learning rates from papers only carry over if the optimizer is the one they used."""
    torch.manual_seed(0)
    start = torch.randn(50)
    rows, slot = rows_with(start)
    reference = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([reference], lr=1.0, betas=betas, eps=eps, weight_decay=decay)
    for step in range(10):
        rate, gradient = 0.05 * (1 - step / 10), torch.randn(50) * 10 ** (step % 3 - 1)
        rows.open(slot).grad.copy_(gradient)
        norm = rows.adam([slot], [AdamParams(rate, *betas, eps, decay, clip)])[0]
        assert norm == pytest.approx(float(gradient.norm()), rel=1e-6), "the norm is reported before clipping"
        reference.grad = gradient.clone()
        if clip:
            torch.nn.utils.clip_grad_norm_([reference], clip)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        torch.testing.assert_close(rows.training(slot), reference.detach(), rtol=1e-6, atol=1e-6)
        assert not rows.open(slot).grad.any()
    assert rows.open(slot).steps == 10
    assert (rows.training(slot) - start).abs().max() > 0.1
    assert not rows.training(0).any()


def test_clipping_scales_the_gradient_to_the_norm() -> None:
    """One wild batch must not throw a run away; a gradient inside the norm is left alone."""
    for clip, wanted in ((1.0, torch.tensor([0.6, 0.8])), (10.0, torch.tensor([3.0, 4.0])), (0.0, torch.tensor([3.0, 4.0]))):
        rows, slot = rows_with(torch.zeros(2))
        rows.open(slot).grad.copy_(torch.tensor([3.0, 4.0]))
        assert rows.adam([slot], [AdamParams(beta1=0.0, grad_clip_norm=clip)]) == [5.0]
        torch.testing.assert_close(rows.open(slot).m, wanted, rtol=1e-6, atol=0)


def test_first_step_by_hand() -> None:
    """With bias correction the first step is the learning rate against the sign, whatever the gradient's size."""
    rows, slot = rows_with(torch.tensor([1.0, 1.0]))
    rows.open(slot).grad.copy_(torch.tensor([100.0, -1e-3]))
    rows.adam([slot], [AdamParams(learning_rate=0.1, weight_decay=0.5)])
    torch.testing.assert_close(rows.training(slot), torch.tensor([0.95 - 0.1, 0.95 + 0.1]))


@pytest.mark.parametrize("huge", [3e38, -3e38])
def test_gradient_that_is_not_finite_is_refused(huge: float) -> None:
    """A NaN in the weights ends a run for good; the last good weights must survive, and training can go on."""
    engine = lora_engine()
    add_random_adapter(engine, "x", X, seed=1)
    engine.forward_backward("x", [datum(9)], "cross_entropy")
    engine.optim_step("x", AdamParams(1e-2)).result()
    before = row_bytes(engine, "x")
    bad = dataclasses.replace(datum(9), advantages=np.full(9, huge, np.float32))
    engine.forward_backward("x", [bad], "importance_sampling").result()
    with pytest.raises(RequestError, match="finite"):
        engine.optim_step("x", AdamParams(1e-2)).result()
    assert row_bytes(engine, "x") == before
    engine.forward_backward("x", [datum(9)], "cross_entropy")
    assert engine.optim_step("x", AdamParams(1e-2)).result()["version"] == 2
    assert np.isfinite(rows_of_adapter(engine, "x")["weights"]).all()


@pytest.mark.parametrize("size", [1e20, 1e25])
def test_moments_that_overflow_are_refused(size: float) -> None:
    """Squares overflow long before gradients do; a second moment of infinity would stop the adapter for good without a word."""
    rows, slot = rows_with(torch.ones(3))
    rows.open(slot).grad[1] = size
    (refused,) = rows.adam([slot], [AdamParams(beta2=0.5)])
    assert isinstance(refused, RequestError)
    assert torch.equal(rows.training(slot), torch.ones(3))
    assert not any(getattr(rows.open(slot), field).any() for field in ("m", "v", "grad"))
    assert rows.open(slot).steps == 0


def test_weights_up_to_the_limit_are_welcome() -> None:
    """The limit is the one in the message."""
    rows, slot = rows_with(torch.ones(2))
    for rate, fine in ((9.9e5, True), (1.1e6, False)):
        rows.open(slot).weights[:] = 1
        rows.open(slot).grad[0] = 1
        (found,) = rows.adam([slot], [AdamParams(beta1=0.0, learning_rate=rate)])
        assert (found == 1.0) if fine else "1e+06" in str(found)


# ---------------------------------------------------------------- steps without a gradient


def test_a_step_without_a_gradient_is_torch_adamw_on_zeros() -> None:
    """Momentum carries on, moments decay, weights decay: as torch does it, also on an adapter that never trained."""
    engine = lora_engine()
    add_random_adapter(engine, "x", X, seed=1)
    settings = AdamParams(1e-2, 0.9, 0.95, 1e-8, 0.1)
    weights = {key: torch.from_numpy(array.copy()) for key, array in engine.save_state("x").result().weights.items()}
    optimizer = torch.optim.AdamW(list(weights.values()), lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for turn in range(5):
        for tensor in weights.values():
            tensor.grad = torch.zeros_like(tensor)
        if turn == 2:
            engine.forward_backward("x", [datum(30)], "cross_entropy").result()
            for key, gradient in gradients(engine, "x").items():
                weights[key].grad = gradient
        norm = engine.optim_step("x", settings, need_gradient=False).result()
        assert (norm["grad_norm"] > 0) == (turn == 2)
        assert norm["version"] == turn + 1
        optimizer.step()
        state = engine.save_state("x").result()
        for key, wanted in weights.items():
            np.testing.assert_allclose(state.weights[key], wanted.numpy(), rtol=1e-6, atol=1e-7, err_msg=key)
        assert state.optimizer["step"] == turn + 1


def test_a_failed_gradient_is_not_stepped_over() -> None:
    """Whoever asks for a pass and a step in one go, and whose pass fails, must not get a step of momentum alone."""
    engine = lora_engine()
    add_random_adapter(engine, "x", X, seed=1)
    break_passes(engine, poisoned)
    row = clean(20)
    row.tokens[3] = POISON
    passed, stepped = (
        engine.forward_backward("x", [row], "cross_entropy"),
        engine.optim_step("x", AdamParams(), need_gradient=False),
    )
    with pytest.raises(RunError, match="forward_backward failed"):
        stepped.result()
    with pytest.raises(ValueError, match="choked"):
        passed.result()
    assert engine.optim_step("x", AdamParams(), need_gradient=False).result()["version"] == 1
    engine.forward_backward("x", [row], "cross_entropy")
    engine.forward_backward("x", [clean(20)], "cross_entropy")
    engine.step()
    with pytest.raises(RunError, match="forward_backward failed"):
        engine.optim_step("x", AdamParams(), need_gradient=False).result()


def test_a_gradient_that_a_roll_back_forbade_is_not_stepped_over() -> None:
    """The weights that were just loaded must not move because a batch of the old ones came too late."""
    engine = lora_engine()
    add_random_adapter(engine, "x", X, seed=1)
    row, state = sampled(engine, "x"), scrambled(engine.save_state("x").result(), seed=3)
    futures = [
        engine.load_state("x", state),
        engine.forward_backward("x", [row], "ppo"),
        engine.optim_step("x", AdamParams(weight_decay=1.0), need_gradient=False),
    ]
    futures[0].result()
    for future, error in zip(futures[1:], (AttestationError, RunError), strict=True):
        with pytest.raises(error):
            future.result()
    assert engine.save_state("x").result().adapter.version == 0
    for name, wanted in state.weights.items():
        assert np.array_equal(engine.save_state("x").result().weights[name], wanted)


def test_advantages_that_are_all_zero_are_no_half_trained_adapter() -> None:
    """A first batch without bits is bad luck; the check waits for the first one that has some."""
    engine = dead_end_engine()
    engine.create_adapter("whole", dataclasses.replace(X, target_modules=("q_proj", "up_proj")))
    engine.create_adapter("half", X)
    flat = dataclasses.replace(datum(40), advantages=np.zeros(40, np.float32))
    for name in ("whole", "half"):
        engine.forward_backward(name, [flat], "importance_sampling").result()
        assert engine.optim_step(name, AdamParams()).result() == {"grad_norm": 0.0, "version": 1.0}
        engine.forward_backward(name, [datum(40)], "importance_sampling").result()
    assert engine.optim_step("whole", AdamParams()).result()["version"] == 2
    with pytest.raises(AttestationError, match="dead_end"):
        engine.optim_step("half", AdamParams()).result()


def test_step_without_a_gradient_is_an_error() -> None:
    """A run that trains nothing must fail at once, not report success."""
    engine = lora_engine()
    engine.create_adapter("x", X)
    before = row_bytes(engine, "x")
    with pytest.raises(RunError, match="without a gradient"):
        engine.optim_step("x", AdamParams()).result()
    engine.forward("x", [datum(9)], "cross_entropy").result()
    with pytest.raises(RunError, match="without a gradient"):
        engine.optim_step("x", AdamParams()).result()
    masked = dataclasses.replace(datum(9), mask=np.zeros(9, np.float32))
    engine.forward_backward("x", [masked], "cross_entropy").result()
    with pytest.raises(RunError, match="without a gradient"):
        engine.optim_step("x", AdamParams()).result()
    engine.forward_backward("x", [datum(9)], "cross_entropy").result()
    engine.optim_step("x", AdamParams()).result()
    with pytest.raises(RunError, match="without a gradient"):
        engine.optim_step("x", AdamParams()).result()
    assert row_bytes(engine, "x") != before


@pytest.mark.parametrize(
    "wrong",
    [{"learning_rate": -1e-3}, {"learning_rate": math.nan}, {"learning_rate": math.inf}, {"beta1": 1.0}, {"beta2": 1.0}],
    ids=lambda wrong: "-".join(f"{k}={v}" for k, v in wrong.items()),
)
def test_settings_that_ruin_the_weights_are_refused(wrong: dict[str, float]) -> None:
    """One NaN from a schedule's division by zero must not replace the weights with NaN and count a version."""
    engine = lora_engine()
    engine.create_adapter("x", X)
    engine.forward_backward("x", [datum(9)], "cross_entropy").result()
    before = row_bytes(engine, "x", ("weights", "m", "v"))
    with pytest.raises(RequestError):
        engine.optim_step("x", AdamParams(**wrong)).result()
    assert row_bytes(engine, "x", ("weights", "m", "v")) == before


def test_one_batch_of_eight_is_eight_batches_of_one() -> None:
    """Memory decides the batch; it must not decide the result."""
    data = [datum(n, seed=n) for n in (3, 20, 8, 8, 14, 5, 27, 11)]
    together, apart = lora_engine(), lora_engine()
    for engine in (together, apart):
        add_random_adapter(engine, "x", X, seed=1)
    total = together.forward_backward("x", data, "importance_sampling").result()
    losses = [apart.forward_backward("x", [row], "importance_sampling").result().metrics["loss:sum"] for row in data]
    assert total.metrics["loss:sum"] == pytest.approx(sum(losses), rel=1e-6, abs=1e-5)
    for key, gradient in gradients(apart, "x").items():
        assert relative_error(gradients(together, "x")[key], gradient) < 2e-6, key


@pytest.mark.parametrize("size", [40, 30_000, 100_000])
def test_rows_are_stepped_together_or_one_by_one_to_the_same_bits(size: int) -> None:
    """How many share a product of numbers is a matter of time alone."""
    settings = [AdamParams(learning_rate=10.0**-i, weight_decay=0.1 * i, grad_clip_norm=i % 2) for i in range(5)]

    def stepped(at_once: int) -> list[torch.Tensor]:
        rows, draw = Rows(torch.device("cpu")), torch.Generator().manual_seed(0)
        slots = [rows.claim(size) for _ in settings]
        for _ in range(3):
            for slot in slots:
                rows.open(slot).grad.normal_(generator=draw)
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(AT_ONCE, "cpu", at_once)
                rows.adam(slots, settings)
        return [part for slot in slots for part in (rows.open(slot).weights, rows.open(slot).m, rows.open(slot).v)]

    ours, one_by_one, together = stepped(AT_ONCE["cpu"]), stepped(1), stepped(2**30)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(ours, one_by_one, together, strict=True))


def test_micro_batches_are_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cutting a large request to fit the machine changes sums by rounding only, and keeps answers in request order."""
    data = [datum(n, seed=n) for n in (3, 20, 8, 14, 5, 27)]
    outputs, found = [], []
    for budget in (1024, 30):
        engine = lora_engine()
        add_random_adapter(engine, "x", X, seed=1)
        calls = count_passes(engine)
        monkeypatch.setattr("veneer.engine.trainer.TOKENS_PER_PASS", {"cpu": budget})
        outputs.append(engine.forward_backward("x", data, "gspo").result())
        found.append(gradients(engine, "x"))
        assert (len(calls) == 1) == (budget == 1024)
    assert outputs[1].metrics == pytest.approx(outputs[0].metrics, rel=1e-5, abs=1e-6)
    for one, many in zip(outputs[0].logprobs_D, outputs[1].logprobs_D, strict=True):
        np.testing.assert_allclose(many, one, atol=1e-5, rtol=0)
    for key, gradient in found[0].items():
        assert relative_error(found[1][key], gradient) < 2e-6, key


# ---------------------------------------------------------------- full fine-tuning


def reference_loss(model, data: list[Datum]) -> torch.Tensor:
    losses = []
    for row in data:
        ratio = (target_logprobs(model, row) - torch.from_numpy(row.logprobs)).exp()
        losses.append(-(torch.from_numpy(row.mask) * ratio * torch.from_numpy(row.advantages)).sum())
    return torch.stack(losses).sum()


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "gemma2"])
def test_full_fine_tuning_equals_plain_torch(architecture: str) -> None:
    """The comparison arm must be what anyone would write by hand, or every LoRA-versus-full table is wrong."""
    engine, model = full_engine(architecture), random_model(architecture).requires_grad_(True)
    assert engine.create_adapter("x", None) == sum(p.numel() for p in model.parameters())
    data = [datum(n, seed=n) for n in (12, 5, 19)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    reference_loss(model, data).backward()
    engine.forward_backward("x", data, "importance_sampling").result()
    found = gradients(engine, "x")
    assert set(found) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert relative_error(found[name], parameter.grad) < 1e-5, name
    # torch's step with the engine's gradient: where a gradient is about 0, Adam's first step is its sign and rounding would decide it
    for name, parameter in model.named_parameters():
        parameter.grad = found[name]
    optimizer.step()
    engine.optim_step("x", AdamParams(1e-3, 0.9, 0.95, 1e-8, 0.1)).result()
    weights = engine.save_state("x").result().weights
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(weights[name], parameter.detach().numpy(), rtol=1e-6, atol=1e-7, err_msg=name)
    ids = torch.from_numpy(prompt(10))[None]
    with torch.no_grad():
        trained = logits_of(engine, slot_of(engine, "x"), ids, published=False)
        torch.testing.assert_close(trained[0], model(input_ids=ids).logits[0], rtol=0, atol=1e-5)


def test_full_fine_tuning_leaves_the_base_alone() -> None:
    """Slot None is the control of every comparison."""
    engine, untouched = full_engine(), random_model("qwen3")
    engine.create_adapter("x", None)
    ids = torch.from_numpy(prompt(10))[None]
    for _ in range(3):
        engine.forward_backward("x", [datum(12)], "cross_entropy")
        engine.optim_step("x", AdamParams(1e-2)).result()
    engine.publish("x").result()
    assert engine.measure_base_digest() == engine.base_digest
    with torch.no_grad():
        wanted = untouched(input_ids=ids).logits[0]
        base, tuned = (logits_of(engine, slot, ids)[0] for slot in (None, slot_of(engine, "x")))
    assert (base - wanted).abs().max() < 1e-5
    assert (tuned - wanted).abs().max() > 0.1


def test_full_copies_keep_apart() -> None:
    """Two copies and the base in one step: each as if alone."""
    mixed = full_engine()
    for name in "ab":
        mixed.create_adapter(name, None)
    futures = {name: mixed.forward_backward(name, [datum(9, i), datum(4, i)], "cross_entropy") for i, name in enumerate("ab")}
    base = mixed.forward(None, [datum(6)], "cross_entropy")
    mixed.step()
    for i, name in enumerate("ab"):
        alone = full_engine()
        alone.create_adapter(name, None)
        wanted = alone.forward_backward(name, [datum(9, i), datum(4, i)], "cross_entropy").result()
        assert futures[name].result().metrics == pytest.approx(wanted.metrics, rel=1e-6)
        reference = gradients(alone, name)
        for key, gradient in gradients(mixed, name).items():
            if reference[key].any():
                assert relative_error(gradient, reference[key]) < 1e-6, key
            else:
                assert not gradient.any()
    assert base.done()
    before = row_bytes(mixed, "b")
    mixed.optim_step("a", AdamParams(1e-2)).result()
    mixed.publish("a").result()
    assert row_bytes(mixed, "b") == before
    ours, theirs, plain = (mixed.sample(prompt(6), name, FREE).result()[0] for name in ("a", "b", None))
    assert theirs.tokens.tolist() == plain.tokens.tolist()
    assert not np.array_equal(ours.logprobs, plain.logprobs)


def test_full_sampler_scores_as_its_trainer() -> None:
    """The comparison arm samples from the weights it trains."""
    engine = full_engine()
    engine.create_adapter("x", None)
    engine.forward_backward("x", [datum(12)], "cross_entropy")
    engine.optim_step("x", AdamParams(1e-2))
    published = engine.publish("x").result()
    ids = prompt(7)
    (sample,) = engine.sample(ids, "x", FREE).result()
    assert sample.adapter == published
    row = np.concatenate([ids, sample.tokens])
    zeros, ones = np.zeros(len(row) - 1, np.float32), np.ones(len(row) - 1, np.float32)
    scored = engine.forward("x", [Datum(row[:-1], row[1:], zeros, zeros, ones)], "cross_entropy").result().logprobs_D[0]
    np.testing.assert_allclose(scored[len(ids) - 1 :], sample.logprobs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_training_lowers_the_loss(kind: str) -> None:
    """The whole loop learns: a fixed row is memorised."""
    engine = lora_engine() if kind == "lora" else full_engine()
    engine.create_adapter("x", LoraConfig(rank=8) if kind == "lora" else None)
    row = datum(12)
    first = engine.forward("x", [row], "cross_entropy").result().metrics["loss:sum"]
    for _ in range(12):
        engine.forward_backward("x", [row], "cross_entropy")
        engine.optim_step("x", AdamParams(1e-2)).result()
    assert engine.forward("x", [row], "cross_entropy").result().metrics["loss:sum"] < 0.5 * first

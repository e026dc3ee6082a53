"""Which targets are scored and trained: everywhere, many at a position, and settings of their own, against plain torch in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
import transformers as hf
from engine_tools import (
    VOCAB,
    add_random_adapter,
    count_passes,
    datum,
    full_engine,
    gradients,
    lora_engine,
    prompt,
    relative_error,
)
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from test_fast_paths import CountingHead, family

from tiny_models import random_model
from veneer.engine import LocalEngine
from veneer.engine import logprobs as logprobs_module
from veneer.engine.losses import LOSSES
from veneer.store.adapters import write_adapter
from veneer.types import AdamParams, DataError, Datum, Floats, LoraConfig, RunError

NAMES = tuple(LOSSES)
KINDS = ("qwen3", "mistral", "gemma2")
X = LoraConfig(rank=4, alpha=8)
STEP = AdamParams(learning_rate=1e-2)


def engine_with(kind: str = "qwen3", config: LoraConfig = X) -> LocalEngine:
    engine = lora_engine(kind)
    for i, name in enumerate("xy"):
        add_random_adapter(engine, name, config, seed=i)
    return engine


def in_float64(kind: str, engine: LocalEngine, folder) -> PeftModel:
    """Stock PEFT on transformers, with adapter x."""
    write_adapter(folder / "x", engine.save_state("x", "sampler").result(), {})
    return PeftModel.from_pretrained(random_model(kind), folder / "x", is_trainable=True).eval().double()


def scored(model: hf.PreTrainedModel | PeftModel, row: Datum) -> torch.Tensor:
    """log p of every target, in the targets' shape."""
    logits = model(input_ids=torch.from_numpy(row.tokens)[None]).logits[0]
    targets = torch.from_numpy(row.targets).reshape(len(row.tokens), -1)
    return logits.log_softmax(-1).gather(1, targets).reshape(row.targets.shape)


def plain_loss(name: str, lp: torch.Tensor, row: Datum, config: Mapping[str, float]) -> torch.Tensor:
    """The losses' formulas over one whole row, masked by multiplication."""
    q, a, w = (torch.from_numpy(getattr(row, field)).double() for field in ("logprobs", "advantages", "mask"))
    own = {key: torch.from_numpy(array).double() for key, array in row.per_token.items()}
    bounds = (f"clip_{side}_threshold" for side in ("low", "high"))
    low, high = (own.get(key, torch.full_like(lp, config.get(key, 0))) for key in bounds)
    ratio = (lp - q).exp()
    if name == "gspo":
        counted = own.get("sequence_ratio_mask", (w != 0).double())
        ratio = ((lp - q) * counted).sum().div(counted.sum() + (counted.sum() == 0)).exp().detach() * (lp - lp.detach()).exp()
    bounded = torch.minimum(torch.maximum(ratio, low), high)
    terms = {
        "cross_entropy": lambda: lp,
        "importance_sampling": lambda: ratio * a,
        "ppo": lambda: torch.minimum(ratio * a, bounded * a),
        "gspo": lambda: torch.minimum(ratio * a, bounded * a),
        "cispo": lambda: bounded.detach() * a * lp,
        "dro": lambda: a * lp - 0.5 * config["beta"] * (lp - q) ** 2,
    }
    return -(w * terms[name]()).sum()


def check(
    engine: LocalEngine, model: PeftModel, data: Sequence[Datum], name: str, config: Mapping[str, float] | None = None, **how
) -> None:
    """Log-probabilities, loss and gradient of adapter x are those of plain torch in float64."""
    full = {**LOSSES[name][1], **(config or {})}
    model.zero_grad()
    lps = [scored(model, row) for row in data]
    wanted = torch.stack([plain_loss(name, lp, row, full) for lp, row in zip(lps, data, strict=True)]).sum()
    wanted.backward()
    output = engine.forward_backward("x", data, name, config, **how).result()
    for row, found, lp in zip(data, output.logprobs_D, lps, strict=True):
        assert found.shape == row.targets.shape
        read = np.ones_like(row.mask, dtype=bool) if how.get("everywhere") else row.mask != 0
        np.testing.assert_allclose(found[read], lp.detach().numpy()[read], atol=2e-5, rtol=0)
    assert output.metrics["loss:sum"] == pytest.approx(float(wanted.detach()), rel=2e-5, abs=2e-5)
    assert output.metrics["tokens:sum"] == sum(np.count_nonzero(row.mask) for row in data)
    assert all(key.count(":") == 1 for key in output.metrics)
    named = {n.removeprefix("base_model.model.").replace(".default.", "."): p for n, p in model.named_parameters() if p.requires_grad}
    found, whole = gradients(engine, "x"), torch.sqrt(sum(p.grad.square().sum() for p in named.values()))
    assert set(found) == set(named)
    for key, parameter in named.items():
        gap = torch.linalg.vector_norm(found[key] - parameter.grad)
        assert gap <= 2e-5 * max(torch.linalg.vector_norm(parameter.grad), 1e-3 * whole), key


def soft(length: int, width: int, seed: int = 0) -> Datum:
    """A row of ``width`` random targets a position, a third of them without weight, and the first positions without any."""
    rng = np.random.default_rng([11, seed, length, width])
    shape = (length, width)
    mask = np.where(rng.uniform(size=shape) < 0.33, 0, rng.normal(0.5, 0.7, shape))
    mask[: length // 3] = 0
    mask[-1, 0] = 1
    q, advantages = rng.normal(-4, 0.3, shape), rng.normal(0, 1, shape)
    arrays = (array.astype(np.float32) for array in (q, advantages, mask))
    return Datum(rng.integers(3, VOCAB, length), rng.integers(0, VOCAB, shape), *arrays)


def near(model: PeftModel, data: Sequence[Datum], seed: int = 0) -> list[Datum]:
    """The data with a sampler's log-probabilities a little off the model's, so that some ratios are clipped and some are not."""
    rng, rows = np.random.default_rng(seed), []
    for row in data:
        with torch.no_grad():
            lp = scored(model, row).numpy()
        rows.append(dataclasses.replace(row, logprobs=(lp + rng.normal(rng.normal(0, 0.4), 0.3, lp.shape)).astype(np.float32)))
    return rows


def bits(engine: LocalEngine, name: str) -> dict[str, bytes]:
    return {key: gradient.numpy().tobytes() for key, gradient in gradients(engine, name).items()}


# ---------------------------------------------------------------- log-probabilities everywhere


@pytest.mark.parametrize("name", NAMES)
def test_a_groups_loss_and_gradient_keep_their_bits_when_all_is_scored(name: str) -> None:
    """Asking for more numbers must not train something else."""
    data = family(30, (12, 3, 25, 1)) + family(7, (5, 1, 30), seed=9)
    plain, everywhere = engine_with(), engine_with()
    wanted = plain.forward_backward("x", data, name).result()
    found = everywhere.forward_backward("x", data, name, everywhere=True).result()
    assert found.metrics == wanted.metrics
    assert bits(everywhere, "x") == bits(plain, "x")
    for row, ours, theirs in zip(data, found.logprobs_D, wanted.logprobs_D, strict=True):
        assert np.isfinite(ours).all()
        assert np.array_equal(np.isnan(theirs), row.mask == 0)
        assert np.array_equal(ours[row.mask != 0], theirs[row.mask != 0])


def patterned(length: int, pattern: Sequence[float], seed: int) -> Datum:
    row = datum(length, seed)
    return dataclasses.replace(row, mask=np.resize(np.array(pattern, np.float32), length))


MASKS = {
    "groups": family(30, (12, 3)) + family(7, (5, 1, 30), seed=9) + family(30, (4,)),
    "holes": [patterned(20, (0, 1, 0, 0, 1), 1), patterned(33, (1, 0), 2), patterned(9, (0, 0, -1), 3)],
    "turns-and-tails": [patterned(60, [0] * 10 + [1] * 8 + [0] * 12 + [1] * 5 + [0] * 25, i) for i in range(3)],
    "weightless-beside": [patterned(20, [0], 1), *family(9, (4, 6)), patterned(1, [0], 2), patterned(25, [1], 3), patterned(20, [0], 1)],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("everywhere", [False, True], ids=["asked", "everywhere"])
def test_all_targets_are_scored_as_transformers_scores_them(masks: str, kind: str, everywhere: bool, tmp_path) -> None:
    """Whoever plots log-probabilities of prompts, or makes losses of their own from them, must get the model's."""
    engine = engine_with(kind)
    check(engine, in_float64(kind, engine, tmp_path), MASKS[masks], "importance_sampling", everywhere=everywhere)


def test_forward_scores_everywhere_without_an_adapter() -> None:
    """A reference model for a KL penalty is the base, and its data carry no weights yet."""
    engine, model = engine_with(), random_model("qwen3")
    data = [dataclasses.replace(row, mask=np.zeros_like(row.mask)) for row in family(20, (4, 9))]
    output = engine.forward(None, data, "cross_entropy", everywhere=True).result()
    for row, found in zip(data, output.logprobs_D, strict=True):
        np.testing.assert_allclose(found, scored(model, row).detach().numpy(), atol=1e-5, rtol=0)
    assert output.metrics == {"loss:sum": 0, "tokens:sum": 0}


def test_a_prompt_that_a_group_shares_is_read_and_scored_once() -> None:
    """All scores of a group of eight must not cost eight prompts."""
    data, sizes = family(30, (12, 3, 25, 8)), list[int]()
    engine = engine_with()
    calls, inner = count_passes(engine), engine._stack._head
    engine._stack._head = lambda *args: CountingHead(inner(*args), sizes)
    found = engine.forward_backward("x", data, "cross_entropy", everywhere=True).result().logprobs_D
    assert sum(calls) == sum(sizes) // VOCAB == 30 + (12 + 3 + 25 + 8)
    assert len({lp[:30].tobytes() for lp in found}) == 1
    calls.clear()
    fifth = [np.where(np.arange(len(row.targets)) == 4, 50 + i % 2, row.targets) for i, row in enumerate(data)]
    odd = [dataclasses.replace(row, targets=targets) for row, targets in zip(data, fifth, strict=True)]
    engine.forward_backward("x", odd, "cross_entropy").result()
    assert sum(calls) == 30 + (12 + 3 + 25 + 8), "what is not asked for does not matter"
    calls.clear()
    other = engine.forward_backward("x", odd, "cross_entropy", everywhere=True).result().logprobs_D
    assert sum(calls) == 2 * 30 + (12 + 3 + 25 + 8)
    for i, (ours, before) in enumerate(zip(other, found, strict=True)):
        assert np.abs(ours - before)[np.arange(len(ours)) != 4].max() < 1e-5
        assert ours[4] == other[i % 2][4] != other[1 - i % 2][4]


def test_groups_without_weights_share_what_they_begin_with() -> None:
    """A loss of one's own begins with scores of data that carry no weights: their prompts must not be read once a member."""
    groups = [family(30, (12, 3, 25, 8)), family(40, (9, 9), seed=7), family(3, (20, 20), seed=8), family(30, (6,), seed=9) * 2]
    data = [dataclasses.replace(row, mask=np.zeros_like(row.mask)) for group in groups for row in group]
    engine, single = engine_with(), engine_with()
    calls = count_passes(engine)
    found = engine.forward("x", data, "cross_entropy", everywhere=True).result().logprobs_D
    assert sum(calls) == (30 + 12 + 3 + 25 + 8) + (40 + 9 + 9) + 2 * (3 + 20) + (35 + 1 + 1)
    for row, lp in zip(data, found, strict=True):
        wanted = single.forward("x", [row], "cross_entropy", everywhere=True).result().logprobs_D[0]
        np.testing.assert_allclose(lp, wanted, atol=1e-5, rtol=0)


def test_only_datums_with_weights_run_backward() -> None:
    """Groups whose advantages cancelled are scored like the others, at the price of reading, and change no bit of the gradient."""
    weighted, plain = family(30, (12, 3)), engine_with()
    idle = [dataclasses.replace(row, mask=np.zeros_like(row.mask)) for row in family(20, (9, 5), seed=5)]
    plain.forward_backward("x", weighted, "ppo").result()
    engine, lengths = engine_with(), list[int]()
    train = engine._stack.train
    engine._stack.train = lambda flat, finish: lengths.append(len(flat.tokens)) or train(flat, finish)
    output = engine.forward_backward("x", [idle[0], *weighted, idle[1]], "ppo", everywhere=True).result()
    assert lengths == [30 + 12 + 3]
    assert all(np.isfinite(lp).all() for lp in output.logprobs_D)
    assert bits(engine, "x") == bits(plain, "x")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("everywhere", [False, True])
def test_a_request_without_weights_adds_no_gradient(name: str, everywhere: bool) -> None:
    """A group whose advantages cancelled must not end a run, nor touch what is gathered."""
    engine = engine_with()
    engine.forward_backward("x", [datum(20)], "cross_entropy").result()
    before = bits(engine, "x")
    row = dataclasses.replace(datum(12), mask=np.zeros(12, np.float32))
    trained = engine._stack.train
    engine._stack.train = None  # there is nothing to find a gradient of
    output = engine.forward_backward("x", [row, row], name, everywhere=everywhere).result()
    engine._stack.train = trained
    assert output.metrics == {"loss:sum": 0, "tokens:sum": 0}
    assert [np.isfinite(lp).all() if everywhere else np.isnan(lp).all() for lp in output.logprobs_D] == [True, True]
    assert bits(engine, "x") == before


@pytest.mark.parametrize("name", NAMES)
def test_targets_without_weight_stay_out_of_the_loss_whatever_they_hold(name: str) -> None:
    """0 times infinity is not 0: a hole in the data of one array must not spoil the gradient."""
    row, wild = datum(20), datum(20)
    hole = row.mask == 0
    for array, poison in ((wild.logprobs, -np.inf), (wild.advantages, np.nan)):
        array[hole] = poison
    engine, other = engine_with(), engine_with()
    outputs = [e.forward_backward("x", [r], name, everywhere=True).result() for e, r in ((engine, row), (other, wild))]
    assert np.isfinite(outputs[1].metrics["loss:sum"])
    assert outputs[0].metrics == outputs[1].metrics
    assert bits(engine, "x") == bits(other, "x")


# ---------------------------------------------------------------- many targets at a position


@pytest.mark.parametrize("everywhere", [False, True], ids=["asked", "everywhere"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_soft_targets_are_those_of_plain_torch(name: str, kind: str, everywhere: bool, tmp_path) -> None:
    """K weighted targets at each position, under every loss, with rows of one target beside them."""
    engine = engine_with(kind)
    model = in_float64(kind, engine, tmp_path)
    data = near(model, [soft(24, 5, 1), datum(17, 2), soft(9, 5, 3), soft(31, 2, 4), soft(1, 5, 5)])
    check(engine, model, data, name, everywhere=everywhere)
    if name in ("ppo", "gspo"):
        assert 0 < engine.forward("x", data, name).result().metrics["clip_fraction:mean"] < 1


@pytest.mark.parametrize("adapted", [False, True], ids=["plain-head", "adapted-head"])
@pytest.mark.parametrize("kind", ["qwen3", "gemma2"])
def test_soft_targets_take_one_row_of_logits_a_position_in_pieces(kind: str, adapted: bool, tmp_path, monkeypatch) -> None:
    """With 150,000 words and 20 targets, neither the logits of a pass nor twenty times as many may be there."""
    monkeypatch.setitem(logprobs_module.LOGITS_AT_ONCE, "cpu", 20 * VOCAB)
    engine, sizes = engine_with(kind, dataclasses.replace(X, train_unembed=adapted)), list[int]()
    model, data = in_float64(kind, engine, tmp_path), [soft(60, 7, 1), soft(33, 7, 2)]
    inner = engine._stack._head
    engine._stack._head = lambda *args: CountingHead(inner(*args), sizes)
    check(engine, model, data, "cross_entropy")
    trained = sum(int(row.mask.any(1).sum()) for row in data)
    assert max(sizes) <= 20 * VOCAB
    assert sum(sizes) <= trained * VOCAB * (2 if adapted or kind == "gemma2" else 1), "once, and again where autograd recomputes"


def test_soft_targets_under_full_fine_tuning() -> None:
    """The comparison arm distils too."""
    engine, model = full_engine(), random_model("qwen3").requires_grad_(True)
    engine.create_adapter("x", None)
    data = [soft(12, 3, 1), soft(20, 3, 2)]
    torch.stack([plain_loss("cross_entropy", scored(model, row), row, {}) for row in data]).sum().backward()
    engine.forward_backward("x", data, "cross_entropy", everywhere=True).result()
    found = gradients(engine, "x")
    for name, parameter in model.named_parameters():
        assert relative_error(found[name], parameter.grad) < 1e-5, name


def test_one_target_a_position_is_the_same_in_either_shape() -> None:
    """[N, 1] is [N]; and two halves of a weight on one token are the weight."""
    row = datum(20)

    def shaped(array: np.ndarray, copies: int) -> np.ndarray:
        return np.repeat(array[:, None], copies, 1)

    arrays = {name: getattr(row, name) for name in ("targets", "logprobs", "advantages", "mask")}
    column = Datum(row.tokens, **{name: shaped(array, 1) for name, array in arrays.items()})
    halves = Datum(row.tokens, **{name: shaped(array * np.float32(0.5) if name == "mask" else array, 2) for name, array in arrays.items()})
    found = []
    for one in (row, column, halves):
        engine = engine_with()
        output = engine.forward_backward("x", [one], "ppo").result()
        assert output.logprobs_D[0].shape == one.targets.shape
        values = np.unique(output.logprobs_D[0][np.isfinite(output.logprobs_D[0])])
        found.append((output.metrics["loss:sum"], values, gradients(engine, "x")))
    for loss, values, gradient in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-6)
        np.testing.assert_array_equal(values, found[0][1])
        for key, wanted in found[0][2].items():
            assert relative_error(gradient[key], wanted) < 2e-6, key


def test_company_of_other_widths_changes_no_bit() -> None:
    """One tenant distils with 20 targets, one with 3, one trains by reward: each as if alone."""
    asked = {"x": [soft(20, 20, 1), soft(11, 20, 2)], "y": [soft(33, 3, 3)], "z": [datum(25, 4), datum(9, 5)], None: [soft(8, 3, 6)]}

    def fresh() -> LocalEngine:
        engine = engine_with()
        add_random_adapter(engine, "z", X, seed=2)
        return engine

    def ask(engine: LocalEngine, name: str | None):
        pass_through = engine.forward if name is None else engine.forward_backward
        return pass_through(name, asked[name], "importance_sampling", everywhere=name == "y")

    together = fresh()
    futures = {name: ask(together, name) for name in asked}
    together.step()
    for name, future in futures.items():
        alone = fresh()
        wanted, found = ask(alone, name).result(), future.result()
        assert found.metrics == wanted.metrics
        assert [lp.tobytes() for lp in found.logprobs_D] == [lp.tobytes() for lp in wanted.logprobs_D]
        assert name is None or bits(together, name) == bits(alone, name)


@pytest.mark.parametrize(("shape", "bad"), [((5, 3), VOCAB), ((5, 3), -1)])
def test_soft_targets_outside_the_vocabulary_are_refused(shape: tuple[int, int], bad: int) -> None:
    """Also those without weight: they are looked up all the same."""
    row = soft(*shape)
    row.targets[2, 1], row.mask[2, 1] = bad, 0
    with pytest.raises(DataError, match="datum 0: targets"):
        engine_with().forward_backward("x", [row], "cross_entropy")


# ---------------------------------------------------------------- any request


@st.composite
def requests(draw: st.DrawFn) -> list[Datum]:
    """Groups with one prompt and single rows, of any widths, with masks of any kind and targets that may differ under one prompt."""
    data: list[Datum] = []
    for group in range(draw(st.integers(1, 3))):
        head, width = prompt(draw(st.integers(1, 20)), group), draw(st.sampled_from([0, 0, 1, 3]))
        for member in range(draw(st.integers(1, 3))):
            rng = np.random.default_rng([group, member, draw(st.integers(0, 99))])
            tokens = np.concatenate([head, rng.integers(3, VOCAB, draw(st.integers(0, 12)))])
            shape = (len(tokens), width) if width else (len(tokens),)
            targets = rng.integers(0, VOCAB, shape) if draw(st.booleans()) else np.resize(np.arange(5, 90), shape)
            mask = rng.normal(0, 1, shape) * (rng.uniform(size=shape) < draw(st.sampled_from([0.0, 0.3, 1.0])))
            mask[: draw(st.sampled_from([0, len(head)]))] = 0
            arrays = (a.astype(np.float32) for a in (rng.normal(-4, 0.3, shape), rng.normal(0, 1, shape), mask))
            counted = rng.uniform(0, 1, shape) * (rng.uniform(size=shape) < 0.5)
            own = {"sequence_ratio_mask": counted.astype(np.float32)} if draw(st.booleans()) else {}
            data.append(Datum(tokens, targets, *arrays, per_token=own))
    return data


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> PeftModel:
    return in_float64("qwen3", engine_with(), tmp_path_factory.mktemp("adapter"))


@settings(max_examples=40, deadline=None, derandomize=True, phases=[Phase.generate])
@given(data=requests(), name=st.sampled_from(["gspo", *NAMES]), everywhere=st.booleans())
def test_any_request_is_plain_torch_row_by_row(reference: PeftModel, data: list[Datum], name: str, everywhere: bool) -> None:
    """Shapes, masks and shared prompts that nobody thought of."""
    data = data if name == "gspo" else [dataclasses.replace(row, per_token={}) for row in data]
    if any(row.mask.any() for row in data):
        check(engine_with(), reference, data, name, everywhere=everywhere)
        return
    lps = engine_with().forward_backward("x", data, name, everywhere=everywhere).result().logprobs_D
    for row, found in zip(data, lps, strict=True):
        wanted: Floats = scored(reference, row).detach().numpy()
        assert np.isnan(found).all() if not everywhere else np.abs(found - wanted).max() < 2e-5


def test_scores_without_a_gradient_do_not_let_a_step_through() -> None:
    """A run that trains nothing must fail at once, however many log-probabilities it reads."""
    engine = engine_with()
    row = dataclasses.replace(datum(20), mask=np.zeros(20, np.float32))
    engine.forward_backward("x", [row], "cross_entropy", everywhere=True).result()
    with pytest.raises(RunError, match="without a gradient"):
        engine.optim_step("x", STEP).result()

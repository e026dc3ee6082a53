"""Sampling: the distribution, the draws, and when a completion ends."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from engine_tools import FREE, GREEDY, VOCAB, add_random_adapter, datum, full_engine, lora_engine, prompt
from transformers import TopKLogitsWarper, TopPLogitsWarper

from tiny_models import ARCHITECTURES, random_model
from veneer.assets import NANO_FOLDER
from veneer.engine import LoraEngine, load_base
from veneer.engine.draws import Chooser, sequence_key, truncate
from veneer.engine.draws import uniforms as device_uniforms
from veneer.types import AdamParams, LoraConfig, RequestError, Sample, SamplingParams


def uniforms(seed: int, sequence: int, count: int) -> np.ndarray:
    """[count] draws of a sequence from its first position on."""
    return device_uniforms(torch.full((count,), sequence_key(seed, sequence)), torch.arange(count)).numpy()


def reference_uniforms(seed: int, sequence: int, count: int) -> np.ndarray:
    """The same in numpy's unsigned arithmetic."""

    def mix(x: np.ndarray) -> np.ndarray:
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

    with np.errstate(over="ignore"):
        golden = np.uint64(0x9E3779B97F4A7C15)
        key = mix(mix(np.array([seed % 2**64], np.uint64)) + golden * np.uint64(sequence + 1))
        bits = mix(key + golden * np.arange(1, count + 1, dtype=np.uint64))
    return (bits >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)


def texts(samples: list[Sample]) -> list[tuple[int, ...]]:
    return [tuple(s.tokens.tolist()) for s in samples]


# ---------------------------------------------------------------- draws


def test_seeds_reproduce_and_differ() -> None:
    """A seed is a promise; a different seed or sequence must give something else."""
    engine = lora_engine()
    once, again = (texts(engine.sample(prompt(6), None, FREE, n=6).result()) for _ in range(2))
    other = texts(engine.sample(prompt(6), None, SamplingParams(max_tokens=8, stop_token_ids=(), seed=1), n=6).result())
    assert once == again
    assert len(set(once)) == 6
    assert not set(once) & set(other)


def test_more_completions_keep_the_first_ones() -> None:
    """Completion i is the same whether 2 or 6 are asked for, so that a group can be extended."""
    engine = lora_engine()
    assert texts(engine.sample(prompt(6), None, FREE, n=6).result())[:2] == texts(engine.sample(prompt(6), None, FREE, n=2).result())


def test_a_longer_budget_extends_the_same_completion() -> None:
    """Draws depend on the position alone, so max_tokens only cuts."""
    engine = lora_engine()
    short, long = (
        engine.sample(prompt(6), None, SamplingParams(max_tokens=n, stop_token_ids=())).result()[0].tokens.tolist() for n in (5, 15)
    )
    assert long[:5] == short


def test_uniforms_are_a_prefix_and_in_range() -> None:
    """Counter-based: the count changes nothing."""
    long = uniforms(3, 1, 1000)
    for count in (0, 1, 7, 999):
        assert np.array_equal(uniforms(3, 1, count), long[:count])
    assert long.dtype == np.float32
    assert long.min() >= 0
    assert long.max() < 1
    for seed in (-1, 2**63, 2**64 + 5):
        assert np.isfinite(uniforms(seed, 0, 3)).all()


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


def chi_square_bound(freedom: int, z: float = 4.0) -> float:
    """Wilson and Hilferty's approximation of the quantile at z standard deviations (4: 1 in 30,000)."""
    return freedom * (1 - 2 / (9 * freedom) + z * math.sqrt(2 / (9 * freedom))) ** 3


@pytest.mark.parametrize("seed", [0, 7, -1, 2**63, 2**64 - 3])
def test_uniforms_are_splitmix64(seed: int) -> None:
    """Drawn on the device in signed arithmetic, whose bits must be those of the published generator."""
    for sequence in (0, 1, 999):
        assert np.array_equal(uniforms(seed, sequence, 100), reference_uniforms(seed, sequence, 100))


@pytest.mark.parametrize("axis", ["position", "sequence", "seed"])
def test_uniforms_look_uniform_and_independent(axis: str) -> None:
    """Neighbouring seeds, sequences and positions must not be related: a group of rollouts is made of them."""
    n = 4096
    if axis == "position":
        u = uniforms(0, 0, n)
    elif axis == "sequence":
        u = np.array([uniforms(0, i, 1)[0] for i in range(n)])
    else:
        u = np.array([uniforms(i, 0, 1)[0] for i in range(n)])
    assert chi_square(np.bincount((u * 64).astype(int), minlength=64), np.full(64, n / 64)) < chi_square_bound(63)
    assert u.mean() == pytest.approx(0.5, abs=4 / math.sqrt(12 * n))
    pairs = (u[:-1] * 8).astype(int) * 8 + (u[1:] * 8).astype(int)
    assert chi_square(np.bincount(pairs, minlength=64), np.full(64, (n - 1) / 64)) < chi_square_bound(63)
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 4 / math.sqrt(n)


# ---------------------------------------------------------------- the distribution


def next_token_logits() -> torch.Tensor:
    with torch.no_grad():
        return random_model("qwen3")(input_ids=torch.from_numpy(prompt(6))[None]).logits[0, -1]


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0},
        {"temperature": 0.7},
        {"temperature": 1.5},
        {"top_k": 5},
        {"top_p": 0.8},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.6},
    ],
    ids=lambda p: "-".join(f"{k}={v}" for k, v in p.items()),
)
def test_frequencies_are_the_probabilities(params: dict) -> None:
    """4000 draws against the distribution that transformers' warpers define; logprobs are those of that very distribution."""
    logits = next_token_logits()[None] / params.get("temperature", 1.0)
    if "top_k" in params:
        logits = TopKLogitsWarper(params["top_k"])(None, logits)
    if "top_p" in params:
        logits = TopPLogitsWarper(params["top_p"])(None, logits)
    wanted = logits[0].double().log_softmax(-1).numpy()
    engine, n = lora_engine(), 4000
    samples = engine.sample(prompt(6), None, SamplingParams(max_tokens=1, stop_token_ids=(), seed=5, **params), n=n).result()
    tokens = np.array([s.tokens[0] for s in samples])
    allowed = np.flatnonzero(np.isfinite(wanted))
    assert set(tokens) <= set(allowed)
    np.testing.assert_allclose([s.logprobs[0] for s in samples], wanted[tokens], atol=1e-5, rtol=0)
    expected = n * np.exp(wanted[allowed])
    counts = np.bincount(tokens, minlength=VOCAB)[allowed]
    rare = expected < 5
    if rare.any():  # pooled, as the chi-square approximation needs
        expected, counts = np.append(expected[~rare], expected[rare].sum()), np.append(counts[~rare], counts[rare].sum())
    assert len(expected) > 3
    assert chi_square(counts, expected) < chi_square_bound(len(expected) - 1)


@pytest.mark.parametrize(("k", "p"), [(0, 1.0), (1, 1.0), (5, 1.0), (0, 0.9), (0, 0.01), (10, 0.5), (97, 0.999), (500, 0.3)])
def test_truncation_equals_transformers(k: int, p: float) -> None:
    """top_k and top_p must mean what they mean everywhere else."""
    torch.manual_seed(k)
    logits = torch.randn(32, VOCAB) * 3
    wanted = TopKLogitsWarper(min(k, VOCAB))(None, logits) if k else logits
    wanted = TopPLogitsWarper(p)(None, wanted) if p < 1 else wanted
    assert torch.equal(truncate(logits, torch.full((32,), k), torch.full((32,), p)), wanted)


def test_rows_with_other_settings_do_not_mix() -> None:
    """Each row of a batch has its own k and p."""
    torch.manual_seed(0)
    logits = torch.randn(4, VOCAB) * 2
    kept = truncate(logits, torch.tensor([0, 3, 0, 7]), torch.tensor([1.0, 1.0, 0.5, 0.9])).isfinite().sum(1).tolist()
    assert kept[0] == VOCAB
    assert kept[1] == 3
    assert 1 <= kept[2] < VOCAB
    assert 1 <= kept[3] <= 7


def test_top_p_one_keeps_every_token_of_a_sure_distribution() -> None:
    """A row that asks for no truncation must be left alone when a neighbour asks for some: who else is in the batch does not matter."""
    logits = torch.zeros(2, VOCAB)
    logits[:, 50] = 30.0  # its probability rounds to 1 in float32
    kept = truncate(logits, torch.tensor([0, 5]), torch.tensor([1.0, 1.0]))
    assert torch.equal(kept[0], logits[0])
    assert int(kept[1].isfinite().sum()) == 5


def test_draws_invert_the_cumulative_distribution() -> None:
    """Probabilities 0.2, 0, 0.3, 0.5: the token is the first whose cumulative probability exceeds the draw; never one with none."""
    logits = torch.tensor([0.2, 0.0, 0.3, 0.5]).log().expand(7, 4)
    draws = torch.tensor([0.0, 0.19, 0.21, 0.49, 0.51, 0.99, 1 - 2**-24])
    tokens, logprobs = Chooser([FREE] * 7, torch.device("cpu"))(logits, draws)
    assert tokens.tolist() == [0, 0, 2, 2, 3, 3, 3]
    torch.testing.assert_close(logprobs.exp(), torch.tensor([0.2, 0.2, 0.3, 0.3, 0.5, 0.5, 0.5]))


def test_greedy_rows_beside_tempered_and_truncated_ones() -> None:
    """Evaluation at temperature 0 in one batch with training rollouts."""
    engine = lora_engine()
    alone = engine.sample(prompt(6), None, GREEDY).result()[0]
    futures = [engine.sample(prompt(6), None, SamplingParams(max_tokens=8, temperature=2.0, top_k=3, stop_token_ids=()), n=3)]
    beside = engine.sample(prompt(6), None, GREEDY)
    futures.append(engine.sample(prompt(6), None, SamplingParams(max_tokens=8, top_p=0.3, stop_token_ids=()), n=3))
    assert texts(beside.result()) == texts([alone])
    np.testing.assert_allclose(beside.result()[0].logprobs, alone.logprobs, atol=1e-5, rtol=0)
    assert len({text for future in futures for text in texts(future.result())}) > 3


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_p": math.nan},
        {"max_tokens": -1},
    ],
    ids=lambda p: "-".join(f"{k}={v}" for k, v in p.items()),
)
def test_nonsense_settings_are_refused(wrong: dict) -> None:
    """Refused when asked, not with an index error from a kernel later."""
    engine = lora_engine()
    with pytest.raises(RequestError):
        engine.sample(prompt(4), None, SamplingParams(**wrong))
    with pytest.raises(RequestError):
        engine.sample(prompt(4), None, FREE, n=0)
    assert engine.step() == 0


# ---------------------------------------------------------------- the end of a completion


def test_stop_tokens_end_the_row_and_stay_in_it() -> None:
    """What was sampled is what is trained: the stop token too."""
    engine = lora_engine()
    free = engine.sample(prompt(6), None, SamplingParams(max_tokens=20, stop_token_ids=())).result()[0]
    assert free.stop_reason == "length"
    stop = int(free.tokens[9])
    first = free.tokens.tolist().index(stop)
    params = SamplingParams(max_tokens=20, stop_token_ids=(stop, VOCAB - 1 if stop != VOCAB - 1 else 5))
    stopped = engine.sample(prompt(6), None, params).result()[0]
    expected = min(first, *(free.tokens.tolist().index(t) for t in params.stop_token_ids if t in free.tokens))
    assert stopped.stop_reason == "stop"
    assert stopped.tokens.tolist() == free.tokens[: expected + 1].tolist()
    assert stopped.logprobs.shape == stopped.tokens.shape


def test_none_means_the_models_own_end_and_empty_means_never() -> None:
    """stop_token_ids None is the end-of-sequence token (2), () runs on through it."""
    engine, n = lora_engine(), 200
    own, never = (engine.sample(prompt(6), None, SamplingParams(max_tokens=12, stop_token_ids=ids), n=n).result() for ids in (None, ()))
    ended = [s for s in own if s.stop_reason == "stop"]
    assert 0 < len(ended) < n
    for sample in own:
        assert 2 not in sample.tokens[:-1]
        assert (sample.stop_reason == "stop") == (sample.tokens[-1] == 2)
    assert all(len(s.tokens) == 12 and s.stop_reason == "length" for s in never)
    assert any(2 in s.tokens[:-1] for s in never)
    for one, other in zip(own, never, strict=True):
        assert other.tokens[: len(one.tokens)].tolist() == one.tokens.tolist()


@pytest.fixture(scope="module")
def nano() -> LoraEngine:
    if not (NANO_FOLDER / "model.safetensors").is_file():
        pytest.fail("the bundled base has no weights: run recipes/pretrain_nano.py")
    return LoraEngine(load_base("nano", device="cpu"))


def test_stop_text_ends_the_completion_and_stays_in_it(nano) -> None:
    """Tool calls end with a text that is rarely one token."""
    tokenizer = nano.base.tokenizer
    ids = np.array(tokenizer.encode("What is 12 + 7?", add_special_tokens=False))
    params = {"max_tokens": 40, "temperature": 1.5, "stop_token_ids": ()}
    free = nano.sample(ids, None, SamplingParams(**params), n=8).result()
    cut_somewhere = 0
    for i, sample in enumerate(free):
        text = tokenizer.decode(sample.tokens, skip_special_tokens=False)
        stop = tokenizer.decode(sample.tokens[10:13], skip_special_tokens=False)
        if "�" in stop:
            continue
        cut_somewhere += 1
        found = nano.sample(ids, None, SamplingParams(**params, stop=("never this text", stop)), n=8).result()[i]
        wanted = next(n for n in range(1, 41) if stop in tokenizer.decode(sample.tokens[:n], skip_special_tokens=False))
        assert found.stop_reason == "stop"
        assert found.tokens.tolist() == sample.tokens[:wanted].tolist()
        assert stop in tokenizer.decode(found.tokens, skip_special_tokens=False)
        assert len(tokenizer.decode(found.tokens, skip_special_tokens=False)) <= len(text)
    assert cut_somewhere >= 2


def test_bundled_base_ends_its_turns(nano) -> None:
    """None takes the end-of-sequence tokens from the generation config that ships with the model."""
    assert nano.base.eos_token_ids == (330,)


@pytest.mark.parametrize("room", [1, 3])
def test_context_length_ends_a_completion(room: int) -> None:
    """A prompt near the end of the context is cut there and says so; positions beyond it were never trained."""
    engine = lora_engine()
    ids = prompt(128 - room)
    near = engine.sample(ids, None, SamplingParams(max_tokens=50, stop_token_ids=()))
    short = engine.sample(prompt(4), None, SamplingParams(max_tokens=50, stop_token_ids=()))
    (sample,) = near.result()
    assert len(sample.tokens) == room
    assert sample.stop_reason == "length"
    assert len(short.result()[0].tokens) == 50, "a neighbour keeps its own budget"


def test_no_tokens_asked_for() -> None:
    """max_tokens 0 scores a prompt without sampling."""
    engine = lora_engine()
    empty = engine.sample(prompt(5), None, SamplingParams(max_tokens=0), n=2, prompt_logprobs=True)
    full = engine.sample(prompt(5), None, FREE)
    for sample in empty.result():
        assert sample.tokens.shape == sample.logprobs.shape == (0,)
        assert sample.tokens.dtype == np.int64
        assert sample.stop_reason == "length"
        assert sample.prompt_logprobs is not None
        assert np.isfinite(sample.prompt_logprobs[1:]).all()
    assert len(full.result()[0].tokens) == 8


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_ragged_batches_give_the_tokens_of_one_by_one(architecture: str) -> None:
    """Rows that finish early leave the batch; the cache of the rest must be moved with them."""
    engine = lora_engine(architecture)
    for name, rank in (("a", 2), ("b", 4)):
        add_random_adapter(engine, name, LoraConfig(rank=rank, alpha=8), seed=rank)
    asked = []
    for i, budget in enumerate((1, 24, 2, 3, 17, 1, 9, 30, 5, 2, 12, 4)):
        params = SamplingParams(max_tokens=budget, seed=i, temperature=(1.0, 0.7, 0.0)[i % 3], top_k=(0, 8)[i % 2], stop_token_ids=None)
        asked.append((prompt(2 + 3 * i, i), ("a", None, "b")[i % 3 - 1], params))
    alone = [engine.sample(ids, name, params).result()[0] for ids, name, params in asked]
    futures = [engine.sample(ids, name, params) for ids, name, params in asked]
    for one, future in zip(alone, futures, strict=True):
        (other,) = future.result()
        assert one.tokens.tolist() == other.tokens.tolist()
        assert one.stop_reason == other.stop_reason
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5, rtol=0)


def test_more_completions_than_one_batch_holds() -> None:
    """300 completions are cut into batches; each is still itself."""
    engine = lora_engine()
    many = texts(engine.sample(prompt(4), None, SamplingParams(max_tokens=2, stop_token_ids=()), n=300).result())
    few = texts(engine.sample(prompt(4), None, SamplingParams(max_tokens=2, stop_token_ids=()), n=3).result())
    assert len(many) == 300
    assert many[:3] == few
    assert len(set(many)) > 100


def test_samples_carry_their_evidence() -> None:
    """Digest and version say which weights were sampled: those that were published, not those in training."""
    engine = lora_engine()
    engine.create_adapter("x", LoraConfig(rank=2))
    first = engine.publish("x").result()
    sample = engine.sample(prompt(4), "x", FREE).result()[0]
    assert sample.adapter == first
    assert (first.version, first.base_digest, sample.base_id) == (0, engine.base_digest, "qwen3")
    assert engine.sample(prompt(4), None, FREE).result()[0].adapter is None


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_sampling_uses_the_published_weights_until_the_next_publish(kind: str) -> None:
    """A version number on a sample is a lie if a training step already leaks into what is served."""
    engine = lora_engine() if kind == "lora" else full_engine()
    engine.create_adapter("x", LoraConfig(rank=4) if kind == "lora" else None)

    def ask() -> Sample:
        return engine.sample(prompt(6), "x", FREE, prompt_logprobs=True).result()[0]

    before = ask()
    engine.forward_backward("x", [datum(20)], "cross_entropy")
    engine.optim_step("x", AdamParams(1e-2)).result()
    unpublished = ask()
    assert unpublished.adapter == before.adapter
    assert unpublished.tokens.tolist() == before.tokens.tolist()
    assert np.array_equal(unpublished.logprobs, before.logprobs)
    assert np.array_equal(unpublished.prompt_logprobs, before.prompt_logprobs, equal_nan=True)
    published = engine.publish("x").result()
    after = ask()
    assert after.adapter == published
    assert published.version == 1
    assert not np.array_equal(after.prompt_logprobs, before.prompt_logprobs, equal_nan=True)


def test_rows_that_ended_at_the_end_of_the_context_read_nothing_beyond_it() -> None:
    """They stay in the batch while others go on, and tables of positions end where the context does."""
    engine = lora_engine()
    context = engine.context_length
    ended = engine.sample(prompt(context - 4), None, SamplingParams(max_tokens=50, stop_token_ids=(), seed=1), n=2)
    running = engine.sample(prompt(10), None, SamplingParams(max_tokens=40, stop_token_ids=(), seed=2), n=20)
    furthest = []
    while not running.done():
        engine.step()
        batch = engine._sampler.crews[0].batch
        furthest += [int(batch.positions.max())] if batch.rows else []
    assert [len(s.tokens) for s in ended.result()] == [4, 4]
    assert max(furthest) == context - 1

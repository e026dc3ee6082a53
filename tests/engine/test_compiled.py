"""The compiled loops against torch and float64, and engines on top of them: no row sees another, nor a second thread."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import transformers as hf
from engine_tools import POISON, add_random_adapter, at_rest, break_passes, finish, prompt, sampled_datum
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tiny_models import SMALL
from veneer.engine import Base, LocalEngine, LoraEngine, compiled, pointwise
from veneer.engine.attention import Score, scores_to_output
from veneer.engine.cache import StepLayout
from veneer.engine.flat import Segment
from veneer.engine.queue import EngineFuture
from veneer.engine.thin import RowWise, ThinAdapters
from veneer.engine.update import Active
from veneer.types import LoraConfig, SamplingParams

SCORE = Score(0, 0.3, window=33)
PROPERTY = settings(max_examples=150, deadline=None, derandomize=True, phases=[Phase.generate])
CACHE = "keys values slots slots positions"
LOOPS = {"norm": "x weight eps", "renorm": "x rms weight", "norm_backward": "x rms weight dy"}
LOOPS |= {"turn": "qkv head_weight eps cos sin turned", "turn_backward": "qkv qk_rms head_weight cos sin dq dk dv"}
LOOPS |= {"swiglu": "gate_up", "swiglu_backward": "gate_up dy", "choose": "logits uniform"}
LOOPS |= {"attend_cached": f"dq dk dv {CACHE} score attended", "add_thin": "x dy", "norm_stage": "x dy weight eps out"}
LOOPS |= {"swiglu_stage": "x gate_up out"} | {"attention_stage": f"x qkv head_array eps cos_t sin_t {CACHE} scale window attended_2d"}
BOTH, THIN = list(LOOPS)[:7], list(LOOPS)[-4:]
"""Every loop with its arguments; what ``pointwise`` has too; what adds thin adapters, which are its further arguments."""
SHARED = {"weight", "head_weight", "head_array", "eps", "turned", "score", "scale", "window", "cos_t", "sin_t", *THIN}
"""Arguments without a row for each token."""


def normal(rng: np.random.Generator, *shape: int, size: float = 1.0) -> Tensor:
    return torch.from_numpy((rng.normal(0, 1, shape) * size).astype(np.float32))


def thin_table(widths: Sequence[int], d_in: int, ranks: Sequence[int], missing: float, rng: np.random.Generator) -> tuple:
    """An index of one product, the line of adapters, and each slot's update as a matrix. What nothing should read is NaN."""
    names, ends = [f"out{o}" for o in range(len(widths))], np.cumsum([0, *widths])
    index, dense = ThinAdapters([names], dict(zip(names, widths, strict=True))), torch.zeros(len(ranks), d_in, ends[-1]).double()
    table = np.full((len(ranks), 5 + 17 * (len(widths) * d_in + ends[-1])), np.nan, np.float32)
    for slot, rank in enumerate(ranks):
        at, layout = 3, dict[str, tuple[int, int]]()
        for o, name in enumerate(names):
            if rng.random() >= missing:
                a, bt = (normal(rng, rank, n) for n in (d_in, widths[o]))
                layout[name], stop = (at, at + a.numel()), at + a.numel() + bt.numel()
                table[slot, at:stop], at = torch.cat([a.view(-1), bt.view(-1)]), stop
                dense[slot, :, ends[o] : ends[o + 1]] = 8 / rank * a.T.double() @ bt.double()
        begin = slot * table.shape[1]
        index.put(slot, LoraConfig(rank=4, alpha=1), dict.fromkeys(names, (0, 0)), begin)  # one that was removed
        index.put(slot, LoraConfig(rank=rank, alpha=8), layout, begin)
    return index, table.reshape(-1), dense


def inputs(rows: int = 21, width: int = 37, dim: int = 6, heads=4, kv_heads=2, normed=True, sizes=(1.0, 1.0), seed=0) -> dict:
    """Random arguments of every loop. ``sizes``: of activations and gradients."""
    rng, kv, both = np.random.default_rng(seed), (kv_heads, dim), heads + kv_heads
    forward = {"x": (width,), "gate_up": (2 * width,), "qkv": ((both + kv_heads) * dim,)}
    backward = {"dy": (width,), "dq": (heads, dim), "dk": kv, "dv": kv}
    rest = {"logits": (333,), "keys": (kv_heads, 50, dim), "values": (kv_heads, 50, dim)}
    kinds = zip((forward, backward, rest), (*sizes, 1.0), strict=True)
    i = {name: normal(rng, rows, *shape, size=size) for shapes, size in kinds for name, shape in shapes.items()}
    i |= {"weight": normal(rng, width), "head_weight": normal(rng, both, dim) if normed else None, "turned": both}
    angles, head_array = normal(rng, rows, 1, dim // 2, size=9), i["head_weight"] if normed else torch.empty(0, 0)
    i |= {"cos": torch.cat([angles.cos()] * 2, -1), "sin": torch.cat([-angles.sin(), angles.sin()], -1), "head_array": head_array}
    i |= {"positions": torch.from_numpy(rng.integers(0, 50, rows)), "shared": torch.from_numpy(rng.integers(0, 50, rows))}
    i["shared"] = torch.minimum(i["shared"], i["positions"])
    i |= {"whose": torch.from_numpy(rng.integers(-1, 4, rows))}
    i |= {"uniform": torch.from_numpy(rng.random(rows)).float(), "cos_t": normal(rng, 50, dim), "sin_t": normal(rng, 50, dim)}
    i |= {"eps": np.float32(1e-6), "score": SCORE, "scale": np.float32(SCORE.scale), "window": SCORE.window}
    for name, widths in zip(THIN, [(width,)] * 2 + [(width,) * 2, (heads * dim, kv_heads * dim, kv_heads * dim)], strict=True):
        i[name] = thin_table(widths, width, (1, 5, 16, 8), 0.2, rng)
    return i


def outputs(ops, name: str, i: dict, rows: Sequence[int] | None = None) -> list[Tensor]:
    """Of one loop, for some rows of the line: what it returns, or its arguments after it wrote to them. The inputs stay as they are."""
    rows = list(range(len(i["x"])) if rows is None else rows)
    i = {key: value if key in SHARED else value[rows] for key, value in i.items()} | {"qk_rms": None, "slots": torch.arange(len(rows))}
    i |= {"rms": pointwise.norm(i["x"], i["weight"], 1e-6)[1], "out": torch.zeros_like(i["x"]), "attended": torch.zeros_like(i["dq"])}
    i["attended_2d"] = i["attended"].flatten(1)
    if i["head_weight"] is not None:
        heads = i["qkv"].view(len(rows), -1, i["cos"].shape[-1])[:, : i["turned"]]
        i["qk_rms"] = pointwise.norm(heads, i["head_weight"], 1e-6)[1]
    args = [i[key] for key in LOOPS[name].split()]
    more = RowWise(*i[name][:2], i["whose"].numpy(), Active([], [])).of("out0") if name in THIN else ()
    if name == "attend_cached":
        found = attend(*args, shared=i["shared"].tolist())
    elif "stage" in name:
        arrays = [a.numpy() if isinstance(a, Tensor) else a for a in args]
        found = attend_in_a_stage(arrays, i, more) if name == "attention_stage" else getattr(ops, name)(*arrays, *more, room(16))
    else:
        found = getattr(ops, name)(*args, *more)
    if found is None:
        found = [i[key] for key in LOOPS[name].split() if key not in SHARED | {"slots"}]
    return [t for t in (found if isinstance(found, (tuple, list)) else (found,)) if t is not None]


def room(*shape: int) -> np.ndarray:
    return np.full(shape, np.nan, np.float32)


def torn(cache: Tensor, slots: Tensor, shared: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """What rows have for themselves and what they share, of a cache in which each row's keys lie in one piece."""
    own, theirs = cache.numpy().copy(), np.full_like(cache.numpy(), np.nan)
    for slot, length in zip(slots.tolist(), shared, strict=True):
        theirs[slot, :, :length] = own[slot, :, :length]
        own[slot] = np.roll(own[slot], -length, 1)
    return own, theirs


def mended(cache: Tensor, own: np.ndarray, slots: Tensor, shared: Sequence[int]) -> None:
    for slot, length in zip(slots.tolist(), shared, strict=True):
        cache[slot] = torch.from_numpy(np.roll(own[slot], length, 1))


def attend(q, k, v, keys, values, rows, slots, positions, score, out, shared: Sequence[int]) -> None:
    """attend_cached over a cache in which the first ``shared`` keys of each row lie elsewhere, the first row's being the first slot's."""
    (own_keys, their_keys), (own_values, their_values) = (torn(cache, slots, shared) for cache in (keys, values))
    where = rows.numpy(), slots.numpy(), positions.numpy(), slots.numpy(), np.array(shared)
    compiled.attend_cached(q, k, v, own_keys, own_values, their_keys, their_values, *where, *compiled.scoring(score), out=out)
    for cache, own in ((keys, own_keys), (values, own_values)):
        mended(cache, own, slots, shared)


def attend_in_a_stage(args: list, i: dict, thin: tuple) -> None:
    *before, keys, _, rows, slots, positions, scale, window, out = args
    shared = i["shared"].tolist()
    (own_keys, their_keys), (own_values, their_values) = (torn(i[name], i["slots"], shared) for name in ("keys", "values"))
    cached = own_keys, own_values, their_keys, their_values, rows, slots, positions, slots, np.array(shared), scale, window, np.float32(0)
    rooms = compiled.room_to_attend(own_keys, their_keys), room(i["turned"] - keys.shape[1] + 1, keys.shape[3])
    compiled.attention_stage(*before, *cached, out, *rooms, *thin, room(16))
    for cache, own in ((i["keys"], own_keys), (i["values"], own_values)):
        mended(cache, own, i["slots"], shared)


def bits(tensors: Sequence[Tensor]) -> list[bytes]:
    return [t.contiguous().numpy().tobytes() for t in tensors]


SIZES, FEW, WIDTH, SEED = st.sampled_from([0.0, 1e-20, 1e-3, 1.0, 1e3, 1e15]), st.integers(1, 3), st.integers(1, 70), st.integers(0, 999)
SHAPES = {"rows": st.sampled_from([1, 2, 5, 17]), "width": st.integers(2, 70), "dim": st.integers(1, 35).map(lambda half: 2 * half)}
SHAPES |= {"heads": st.integers(1, 5), "kv_heads": FEW, "normed": st.booleans(), "sizes": st.tuples(SIZES, SIZES), "seed": SEED}
WINDOW, SOFTCAP = st.none() | st.integers(1, 80), st.sampled_from([None, 5.0])


def terms(name: str, i: dict, dim: int) -> Tensor:
    """The largest that gradients of these sizes make of a row or a head, wherever they point: what rounding is measured by."""
    rng, down = torch.Generator().manual_seed(0), ("dy", "dq", "dk", "dv")
    others = [i | {n: torch.randn(i[n].shape, generator=rng) * i[n].abs().amax() for n in down} for _ in range(12)]
    largest = torch.stack([outputs(pointwise, name, other)[0].abs() for other in others]).amax(0)
    return largest.view(-1, dim).amax(-1, keepdim=True).expand(-1, dim).reshape(largest.shape)


@pytest.mark.parametrize("name", BOTH)
@PROPERTY
@given(st.fixed_dictionaries(SHAPES), st.sampled_from([None, None, np.nan, np.inf, -np.inf]), st.data())
def test_a_compiled_function_is_its_definition(name: str, shape: dict, bad: float | None, data) -> None:
    """What a CPU computes must be what a GPU computes, at odd widths and at the ends of the range; a NaN must not be swallowed."""
    i = inputs(**shape)
    sizes = (terms(name, i, shape["dim" if "turn" in name else "width"]), torch.zeros(()))
    if bad is not None:
        broken = i[data.draw(st.sampled_from([key for key in LOOPS[name].split() if isinstance(i.get(key), Tensor)]))].view(-1)
        broken[data.draw(st.integers(0, len(broken) - 1))] = bad
    found, wanted = outputs(compiled, name, i), outputs(pointwise, name, i)
    assert [t.shape for t in found] == [t.shape for t in wanted]
    sound = torch.stack([t.isfinite().flatten(1).all(1) for t in wanted]).all(0)
    assert bad is not None or bool(sound.all())
    for ours, theirs, size in zip(found, wanted, sizes, strict=False):
        assert not bool((ours.isfinite() & ~theirs.isfinite()).any())
        assert bool(((ours.double() - theirs).abs() <= 2e-6 * theirs.abs() + 1e-6 * size + 1e-36)[sound].all())


@PROPERTY
@given(st.tuples(FEW, st.integers(1, 4), WIDTH, WIDTH, st.integers(1, 6)), WINDOW, SOFTCAP, st.sampled_from([-1, -1, 0, 1]), SEED)
def test_a_row_attends_to_exactly_the_keys_that_it_sees(shape, window: int | None, softcap: float | None, broken: int, seed: int) -> None:
    """What lies behind a row's position, before its window or in another slot is an older completion's; a NaN that is seen shows."""
    (kv_heads, group, dim, capacity, count), rng = shape, np.random.default_rng(seed)
    q, k, v = (normal(rng, 9, h, dim, size=1.5) for h in (kv_heads * group, kv_heads, kv_heads))
    rows, slots = (torch.from_numpy(rng.permutation(n)[:count]) for n in (9, 8))
    positions, score = torch.from_numpy(rng.integers(0, capacity, count)), Score(0, 0.3, window, softcap)
    caches = [torch.full((8, kv_heads, capacity, dim), torch.nan) for _ in range(2)]
    right = list(torch.full_like(q, -7).double())
    for row, slot, position in zip(rows.tolist(), slots.tolist(), positions.tolist(), strict=True):
        begin = max(0, position + 1 - (window or capacity))
        for cache in caches:
            cache[slot, :, begin:position] = normal(rng, kv_heads, position - begin, dim, size=1.5)
        if broken >= 0 and position > begin:
            caches[broken][slot, -1, begin, 0] = torch.nan
        seen = [torch.cat([cache[slot, :, begin:position], new[row, :, None]], 1) for cache, new in zip(caches, (k, v), strict=True)]
        right[row] = scores_to_output(*(t.double()[None] for t in (q[row, :, None], *seen)), score, None, False)[0, :, 0]
    out, kept = torch.full_like(q, -7), [cache.clone() for cache in caches]
    attend(q, k, v, *caches, rows, slots, positions, score, out, shared=[int(rng.integers(0, p + 1)) for p in positions])
    np.testing.assert_allclose(out, torch.stack(right), rtol=0, atol=1e-5)
    for old, new in zip(kept, (k, v), strict=True):
        old[slots, :, positions] = new[rows]
    assert bits(caches) == bits(kept), "written elsewhere"


@PROPERTY
@given(st.lists(WIDTH, min_size=1, max_size=3), WIDTH, st.lists(st.integers(1, 17), min_size=1, max_size=5), SEED)
def test_every_row_gets_its_own_adapters_update(widths: list[int], d_in: int, ranks: list[int], seed: int) -> None:
    """Any mix of ranks, the base among them, and adapters of only some outputs; thick ones are left to other products."""
    index, line, dense = thin_table(widths, d_in, ranks, seed % 3 / 4, rng := np.random.default_rng(seed))
    x, y = (normal(rng, 9, 2 * n)[:, ::2] if seed % 2 else normal(rng, 9, n) for n in (d_in, sum(widths)))
    whose = rng.integers(-1, len(ranks), 7).tolist()  # the line is longer: filling
    wanted, size = y.double(), y.double().abs()
    for i, slot in enumerate(whose):
        if slot >= 0 and ranks[slot] <= compiled.THIN:
            wanted[i] += x[i].double() @ dense[slot]
            size[i] += x[i].double().abs() @ dense[slot].abs()
    thin = index.slots([Segment(None if slot < 0 else slot, 1, 1) for slot in whose], [1] * 7)
    RowWise(index, line, thin, Active([], [])).add(x, y, "out0")
    assert bool(((y.double() - wanted).abs() <= 1e-5 * size).all())


@pytest.mark.parametrize("vocab", [1, 2, 63, 64, 65, 1000, 150_000])
@pytest.mark.parametrize("kind", ["flat", "peaked", "holes", "broken"])
def test_a_draw_inverts_the_cumulative_distribution(kind: str, vocab: int) -> None:
    """At both ends of the unit interval and of the vocabulary; never a token that was ruled out, and no confidence in a NaN."""
    rng = np.random.default_rng(vocab)
    uniform = torch.from_numpy(np.concatenate([[0, 2**-24, 0.5, 1 - 2**-24, -1], rng.integers(0, 2**24, 7) * 2.0**-24])).float()
    logits = normal(rng, 12, vocab, size={"flat": 1e-3, "peaked": 30.0}.get(kind, 2.0))
    if kind == "holes":
        logits[torch.from_numpy(rng.random(logits.shape) < 0.5)] = -torch.inf
        logits[:, : vocab // 3] = logits[:, vocab - vocab // 3 :] = -torch.inf
        logits[:, vocab // 2] = 0.0
    if kind == "broken":
        logits[:2, -1] = torch.tensor([torch.nan, torch.inf])
    tokens, logprobs = compiled.choose(logits, uniform)
    at, wanted, drawn = tokens[:, None], logits.double().log_softmax(-1), uniform >= 0
    upper, wanted = wanted.exp().cumsum(-1).gather(1, at)[:, 0], wanted.gather(1, at)[:, 0]
    assert not bool((uniform > upper + 1e-6)[drawn].any())
    assert not bool((uniform < upper - wanted.exp() - 1e-6)[drawn].any())
    assert not bool((logits.gather(1, at) == -torch.inf).any())
    np.testing.assert_allclose(logprobs, wanted, rtol=0, atol=1e-5)
    assert torch.equal(tokens[~drawn], logits.argmax(-1)[~drawn])


@pytest.mark.parametrize("vocab", [3, 65, 200])
def test_tokens_come_as_often_as_they_should(vocab: int) -> None:
    """Chi-square over 40,000 draws: six standard deviations. A number on a boundary belongs to the next token."""
    rng, count = np.random.default_rng(vocab), 40_000
    logits, uniform = normal(rng, vocab), torch.from_numpy(rng.integers(0, 2**24, count) * 2.0**-24).float()
    expected = count * logits.double().softmax(-1)
    found = torch.bincount(compiled.choose(logits.expand(count, -1), uniform)[0], minlength=vocab)
    assert abs(float(((found - expected).square() / expected).sum()) - (vocab - 1)) < 6 * (2 * (vocab - 1)) ** 0.5
    some = normal(rng, 2000, 64).index_fill_(1, torch.arange(40, 64), -torch.inf)
    assert int(compiled.choose(some, torch.full((2000,), 1 - 2**-24))[0].max()) < 40, "rounding drew what was ruled out"
    assert torch.equal(compiled.choose(torch.full((512, 128), 3.0), torch.arange(512) / 512)[0], torch.arange(512) // 4)


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("name", LOOPS)
def test_a_row_has_the_bits_that_it_has_alone(name: str, normed: bool) -> None:
    """Neither how many others there are, nor in which order, nor a second thread may show; the loops let go of the interpreter."""
    i = [inputs(dim=dim, normed=normed, seed=dim) for dim in (6, 32)]
    together, some = [outputs(compiled, name, one) for one in i], np.random.default_rng(0).permutation(21)[:13].tolist()
    assert all(bool(t.any()) for every in together for t in every)
    jobs = [(at, rows) for rows in ([5], [20], [7, 3], list(range(21))[::-1], some) * 8 for at in (0, 1)]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda job: bits(outputs(compiled, name, i[job[0]], job[1])), jobs))
    assert found == [bits([t[rows] for t in together[at]]) for at, rows in jobs]


def test_loops_are_compiled_where_nothing_may_be_written() -> None:
    """A read-only installation without a home: numba has nowhere to keep machine code, and says so with an error."""
    script = """
from numba.core import caching
caching.CacheImpl._locator_classes = []
import torch
from veneer.engine import compiled
print(f"{compiled.norm(torch.full((2, 3), 2.0), torch.ones(3), 0.0)[0].sum():.4f}")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "6.0000", done.stderr


WIDE = SMALL | {"hidden_size": 48, "intermediate_size": 52, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 10}
KINDS = {"qwen3": hf.Qwen3Config, "llama": hf.LlamaConfig, "qwen2": hf.Qwen2Config}
NAMES = (None, "r1", "r8", "r16", "r17", "r40")
MIXED = [(name, 3 + 9 * at, 1 + 11 * at % 30, 23) for at, name in enumerate(NAMES)]
"""Requests: adapter, prompt length, budget, n."""


def mixed_engine(kind: str) -> LocalEngine:
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(KINDS[kind](**WIDE), dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, float("norm" in name), 0.2)
    engine = LoraEngine(Base(kind, model, None))
    for rank in (1, 8, 16, 17, 40):
        add_random_adapter(engine, f"r{rank}", LoraConfig(rank=rank, alpha=8, train_unembed=rank in (8, 40)), seed=rank)
    return engine


def ask(engine: LocalEngine, requests: Sequence[tuple], threads: int = 1, **kwargs) -> list[EngineFuture]:
    torch.set_num_threads(threads)
    return [engine.sample(prompt(length), name, SamplingParams(most, stop_token_ids=()), n, **kwargs) for name, length, most, n in requests]


def told(futures: Sequence[EngineFuture]) -> list[list[tuple]]:
    """What was answered; from here on torch has one thread again."""
    found = [[(s.tokens.tolist(), s.logprobs.tobytes(), s.stop_reason) for s in future.result()] for future in futures]
    torch.set_num_threads(1)
    return found


@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_mixed_batch_is_scored_as_forward_scores_it(kind: str, scored: bool) -> None:
    """Thin adapters, thick ones and the base side by side: what a decoding step says is what the trainer will read."""
    engine, requests = mixed_engine(kind), [(name, length, 20, 2) for length in (3, 30) for name in NAMES]
    for (name, length, *_), future in zip(requests, ask(engine, requests, prompt_logprobs=scored), strict=True):
        data = [sampled_datum(prompt(length), s.tokens, s.logprobs, s.adapter) for s in future.result()]
        for row in data:
            row.mask[:] = 1
        for s, found in zip(future.result(), engine.forward(name, data, "cross_entropy").result().logprobs_D, strict=True):
            ours = np.concatenate([s.prompt_logprobs[1:], s.logprobs]) if scored else s.logprobs
            assert len(ours) == 20 + scored * (length - 1)
            assert np.abs(found[-len(ours) :] - ours).max() < 1e-5, name


@pytest.mark.parametrize("requests", [MIXED, [("r8", 9, 40, 140)], [*MIXED, ("r17", 5, 12, 70)]], ids=["mixed", "one-prompt", "both"])
def test_two_crews_say_what_one_says(requests: list[tuple]) -> None:
    """On a machine with other cores a run is the same run; completions come in their order, wherever they were drawn."""
    wanted, engine = told(ask(mixed_engine("qwen3"), requests)), mixed_engine("qwen3")
    futures = ask(engine, requests, threads=2)
    engine.step()
    running = [len(crew.rows) for crew in engine._sampler.crews]
    assert told(futures) == wanted
    assert [rows > 25 for rows in running] == [True, True]
    assert [rows[:7] for rows in wanted] == told(ask(mixed_engine("qwen3"), [(*request[:3], 7) for request in requests]))


def test_a_thick_adapter_has_the_same_bits_in_company_on_two_threads() -> None:
    """Up to 63 rows are one crew, whose products use every thread: how many rows there are must not show in them either."""
    alone, company = [("r40", 8, 6, 3)], [("r40", 8, 6, 3), ("r40", 9, 6, 60)]
    assert told(ask(mixed_engine("llama"), company, threads=2)[:1]) == told(ask(mixed_engine("llama"), alone, threads=2))


def test_two_engines_at_once_say_what_each_says_alone() -> None:
    """Scratch memory that two engines shared would mix their rows."""
    wanted, engines = [told(ask(mixed_engine(kind), MIXED)) for kind in KINDS], [mixed_engine(kind) for kind in KINDS]
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda engine: told(ask(engine, MIXED)), engines)) == wanted


@pytest.mark.parametrize("where", ["prompt", "step"])
def test_a_crew_that_fails_leaves_the_other_ones_answers(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever was answered is not asked again, whoever was not starts anew, and only the request at fault hears of it."""
    requests = [(NAMES[at % 4], 3 + at, 1 + at % 20, 2) for at in range(40)] + [("r1", 5, 9, 70)]
    wanted, engine, lanes, once = told(ask(mixed_engine("llama"), requests)), mixed_engine("llama"), set[int](), iter(["a step"])
    poison, answers = np.array([5, POISON, 7]), list[int]()

    def breaks(flat) -> Exception | None:
        lanes.add(threading.get_ident())
        if where == "step":
            return ValueError("once") if isinstance(flat.layout, StepLayout) and next(once, None) else None
        return ValueError("choked") if poison.tobytes() in flat.tokens.numpy().tobytes() else None

    break_passes(engine, breaks)
    futures = ask(engine, requests, threads=2)
    bad = [engine.sample(poison, "r8", SamplingParams(4), 3)] if where == "prompt" else []
    for verb in ("set_result", "set_error"):
        inner = getattr(EngineFuture, verb)
        monkeypatch.setattr(EngineFuture, verb, lambda self, x, inner=inner: (answers.append(id(self)), inner(self, x)))
    engine.step()
    early, crews = sum(future.done() for future in futures), len(lanes)
    finish(engine, futures + bad)
    assert told(futures) == wanted
    assert crews == 2
    assert 0 < early < len(futures)
    assert [answers.count(id(future)) for future in futures + bad] == [1] * len(futures + bad)
    assert all(isinstance(future._error, ValueError) for future in bad)
    assert at_rest(engine)

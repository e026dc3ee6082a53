"""On a CPU in float32 a run's numbers do not depend on its company, to the last bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
import transformers as hf
from engine_tools import FREE, Loop, add_random_adapter, datum, differences, lora_engine, prompt, together
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tiny_models import SMALL
from veneer.engine import Base, FullEngine, LocalEngine, LoraEngine, load_base
from veneer.engine import sampler as sampler_module
from veneer.engine import trainer as trainer_module
from veneer.types import AdamParams, LoraConfig, SamplingParams

EQUAL = (
    Loop("a"),
    Loop("b", lengths=(30, 3), budgets=(12, 30), stops=True),
    Loop("c", lengths=(17,), budgets=(20,), n=3, loss="ppo"),
    Loop("d", lengths=(9, 9, 40), budgets=(1, 16, 9), n=1, stops=True, loss="cross_entropy", rounds=3),
)
MIXED = tuple(dataclasses.replace(loop, rank=rank) for loop, rank in zip(EQUAL, (1, 8, 2, 1), strict=True))
LONG = (
    Loop("a", lengths=(30, 250), budgets=(40, 50), n=1),
    Loop("b", lengths=(120, 7), budgets=(20, 30), rank=1, stops=True),
    Loop("c", lengths=(270, 300), budgets=(6, 20), rank=4, n=1),
    Loop("d", lengths=(60, 31), budgets=(30, 3), rank=8),
)


SIZES = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ROUND = {
    "gemma2": lambda: hf.Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=16, sliding_window=16, final_logit_softcapping=5.0),
    "one-kv-head": lambda: hf.Gemma2Config(**SIZES, num_key_value_heads=1, head_dim=16, sliding_window=16, final_logit_softcapping=5.0),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**SIZES),
    "phi": lambda: hf.PhiConfig(**SIZES, num_key_value_heads=4),
}
"""Models that run through transformers' modules have the bits they have alone where the widths of MLP and vocabulary are
multiples of 64 and heads at least 16 wide, as those of real models are: elsewhere a kernel's tail rounds in another way."""


def engine_of(architecture: str) -> LocalEngine:
    if architecture not in ROUND:
        return lora_engine(architecture)
    torch.manual_seed(0)
    return randomised(architecture, hf.AutoModelForCausalLM.from_config(ROUND[architecture](), dtype=torch.float32).eval())


def odd_widths() -> LocalEngine:
    """Sizes that no vector unit likes."""
    torch.manual_seed(0)
    small = SMALL | {"hidden_size": 36, "intermediate_size": 45, "num_attention_heads": 3, "num_key_value_heads": 1}
    return randomised("odd", hf.AutoModelForCausalLM.from_config(hf.LlamaConfig(**small, head_dim=14), dtype=torch.float32).eval())


def randomised(name: str, model: hf.PreTrainedModel) -> LocalEngine:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    return LoraEngine(Base(name, model, None))


def nano() -> LocalEngine:
    return LoraEngine(load_base("nano", "cpu"))


def expect_the_same_alone(make: Callable[[], LocalEngine], loops: tuple[Loop, ...]) -> None:
    """Every loop beside the others gives what it gives on an engine of its own."""
    found = together(make(), loops)
    for loop, told in zip(loops, found, strict=True):
        (alone,) = together(make(), [loop])
        assert isinstance(alone, dict), alone
        assert len({value for name, value in alone.items() if "digest" in name}) == loop.rounds, "it was meant to learn"
        assert differences(told, alone) == [], loop.name


@pytest.mark.parametrize("ranks", ["equal", "mixed"])
@pytest.mark.parametrize("architecture", ["qwen3", "llama", "mistral", "gemma2", "gpt_neox", "phi"])
def test_loops_in_company_have_the_bits_they_have_alone(architecture: str, ranks: str) -> None:
    """A result that somebody else's run can change is a result that nobody can reproduce."""
    expect_the_same_alone(lambda: engine_of(architecture), EQUAL if ranks == "equal" else MIXED)


@pytest.mark.parametrize("kind", ["odd", "one-kv-head"])
def test_loops_on_odd_models_have_the_bits_they_have_alone(kind: str) -> None:
    """Widths that are no multiple of eight, and one product where others have a batch, take other kernels."""
    expect_the_same_alone(odd_widths if kind == "odd" else lambda: engine_of(kind), MIXED)


def test_long_loops_on_the_bundled_base_have_the_bits_they_have_alone() -> None:
    """Rows past 256 positions, and rows that move from one bank to the next, at the real widths."""
    expect_the_same_alone(nano, LONG)


def test_ten_equal_loops_on_the_bundled_base_have_the_bits_they_have_alone() -> None:
    """Many adapters of one rank with as many rows each run as one stack, which must not show."""
    loops = tuple(Loop(f"x{i}", rank=8, lengths=(10 + i,), budgets=(6 + 2 * (i % 3),), n=16, rounds=2) for i in range(10))
    found = together(nano(), loops)
    for i in (0, 4, 9):
        (alone,) = together(nano(), [loops[i]])
        assert differences(found[i], alone) == []


LOOPS = st.builds(
    Loop,
    name=st.just("x"),
    rank=st.integers(1, 12),
    lengths=st.tuples(st.integers(1, 90), st.integers(1, 40)),
    budgets=st.tuples(st.integers(1, 34), st.integers(1, 34)),
    n=st.integers(1, 5),
    rounds=st.just(2),
    stops=st.booleans(),
    scored=st.booleans(),
    temperature=st.sampled_from([0.0, 0.7, 1.0]),
    clip=st.sampled_from([0.0, 0.1]),
)


@settings(max_examples=6, deadline=None, derandomize=True, phases=[Phase.generate])
@given(loops=st.lists(LOOPS, min_size=2, max_size=5))
@pytest.mark.parametrize("architecture", ["qwen3", "gemma2"])
def test_any_loops_have_the_bits_they_have_alone(architecture: str, loops: list[Loop]) -> None:
    """Shapes that nobody thought of."""
    named = tuple(dataclasses.replace(loop, name=f"x{i}") for i, loop in enumerate(loops))
    found = together(engine_of(architecture), named)
    for told, loop in zip(found, named, strict=True):
        (alone,) = together(engine_of(architecture), [loop])
        assert differences(told, alone) == []


# ---------------------------------------------------------------- one kind of company at a time


def asked(engine: LocalEngine, length: int, budget: int, name: str | None = "x", **kwargs):
    return engine.sample(prompt(length), name, SamplingParams(budget, stop_token_ids=()), 3, prompt_logprobs=True, **kwargs)


def bits(future) -> list[tuple]:
    return [(s.tokens.tolist(), s.logprobs.tobytes(), s.prompt_logprobs.tobytes(), s.stop_reason, s.adapter) for s in future.result()]


def engine_x(architecture: str = "qwen3") -> LocalEngine:
    engine = engine_of(architecture)
    add_random_adapter(engine, "x", LoraConfig(rank=4, alpha=8), seed=1)
    return engine


NEIGHBOURS = {
    "longer": lambda e: e.sample(prompt(90, 1), None, SamplingParams(37, stop_token_ids=()), 2),
    "ends-early": lambda e: e.sample(prompt(6, 1), None, SamplingParams(1, stop_token_ids=()), 2),
    "same-adapter": lambda e: e.sample(prompt(4, 1), "x", SamplingParams(30, stop_token_ids=()), 4),
    "greedy": lambda e: e.sample(prompt(4, 1), None, SamplingParams(9, temperature=0.0, stop_token_ids=())),
    "truncated": lambda e: e.sample(prompt(4, 1), None, SamplingParams(9, 0.5, top_k=3, top_p=0.4, stop_token_ids=()), 20),
    "many": lambda e: [asked(e, 1 + i, 2 + i % 30, "x" if i % 2 else None) for i in range(30)],
    "score-only": lambda e: e.sample(prompt(90, 1), "x", SamplingParams(0), prompt_logprobs=True),
    "training": lambda e: e.forward(None, [datum(50, i) for i in range(30)], "cross_entropy"),
}


@pytest.mark.parametrize("architecture", ["qwen3", "phi", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("neighbour", NEIGHBOURS)
def test_no_kind_of_neighbour_changes_a_bit(neighbour: str, architecture: str) -> None:
    """Each way in which company could reach a row: longer, shorter, greedy, truncated, many, scored, trained."""
    alone = bits(asked(engine_x(architecture), 10, 40))
    for late in (False, True):
        engine = engine_x(architecture)
        future = asked(engine, 10, 40)
        if late:
            engine.step()
        NEIGHBOURS[neighbour](engine)
        assert bits(future) == alone, f"late: {late}"


def test_scoring_the_same_prompt_for_a_neighbour_does_not_show() -> None:
    """One who did not ask for prompt log-probabilities must get none, whoever else asks about the same prompt."""
    engine = engine_x()
    ids = prompt(8)
    plain, scored = engine.sample(ids, "x", FREE), engine.sample(ids, "x", FREE, prompt_logprobs=True)
    assert plain.result()[0].prompt_logprobs is None
    assert scored.result()[0].prompt_logprobs is not None
    assert plain.result()[0].logprobs.tobytes() == scored.result()[0].logprobs.tobytes()


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_adding_and_removing_an_adapter_midway_does_not_change_a_bit(rank: int) -> None:
    """Users come and go while others' completions run, and the stack of weights is laid out anew."""
    alone = bits(asked(engine_x(), 20, 30))
    engine = engine_x()
    add_random_adapter(engine, "y", LoraConfig(rank=2, alpha=8), seed=2)
    future, lost = asked(engine, 20, 30), asked(engine, 20, 30, "y")
    for _ in range(5):
        engine.step()
    for i in range(3):
        add_random_adapter(engine, f"new{i}", LoraConfig(rank=rank, alpha=8), seed=3 + i)
    asked(engine, 3, 30, "new1")
    engine.step()
    engine.remove_adapter("y")
    engine.create_adapter("z", LoraConfig(rank=rank))
    engine.step()
    engine.remove_adapter("new1")
    assert bits(future) == alone
    assert lost.done()


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_the_number_of_rows_at_once_does_not_change_a_bit(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A smaller machine takes longer, and says the same."""
    requests = [(5, 9), (30, 34), (7, 1), (60, 12)]
    alone = [bits(asked(engine_x(), *request)) for request in requests]
    monkeypatch.setitem(sampler_module.ROWS, "cpu", rows)
    engine = engine_x()
    futures = [asked(engine, *request) for request in requests]
    assert [bits(future) for future in futures] == alone


def test_the_seed_of_one_loop_does_not_reach_another() -> None:
    """The bits are the same because nothing leaks, not because nothing differs."""
    found = together(lora_engine(), EQUAL)
    assert len({told["1 digest"] for told in found}) == len(EQUAL)


# ---------------------------------------------------------------- training


def trained(engine: LocalEngine, lengths: tuple[int, ...], rounds: int = 2, clip: float = 0.1, full: bool = False) -> dict[str, object]:
    """What a run on given data leaves."""
    if "x" not in engine._slots:
        engine.create_adapter("x", None if full else LoraConfig(rank=8, alpha=16))
    told: dict[str, object] = {}
    for turn in range(rounds):
        data = [datum(length, i + turn) for i, length in enumerate(lengths)]
        told[f"{turn} loss"] = engine.forward_backward("x", data, "importance_sampling").result().metrics["loss:sum"]
        told[f"{turn} grad norm"] = engine.optim_step("x", AdamParams(1e-2, grad_clip_norm=clip)).result()["grad_norm"]
    state = engine.save_state("x").result()
    return told | {name: array.tobytes() for part in (state.weights, state.optimizer) for name, array in part.items()}


@pytest.mark.parametrize("architecture", ["qwen3", "gemma2", "nano", "full gemma2", "full nano"])
def test_training_has_the_same_bits_on_one_thread_and_on_two(architecture: str) -> None:
    """Moving a run to a machine with other cores must not make it another run; full copies of the weights, which take the places of the
    base's own while a pass runs, must not see each other's."""
    lengths = (100, 7, 64, 90, 90, 33, 120, 5, 111, 128) * 2
    found = {}
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            kind, _, name = architecture.rpartition(" ")
            engine = nano() if name == "nano" else engine_of(name)
            found[threads] = trained(FullEngine(engine.base) if kind else engine, lengths, full=bool(kind))
    finally:
        torch.set_num_threads(1)
    assert differences(found[2], found[1]) == []


def test_threads_do_not_matter_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lanes share the memory; that must not decide how a request is cut, or a 0.6B base on a laptop has other bits on other cores."""
    monkeypatch.setattr(trainer_module, "free_memory", lambda device: 12 * 2**20)
    found = {}
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found[threads] = trained(lora_engine(), (100, 7, 64, 90, 90, 33, 120, 5, 111, 128))
    finally:
        torch.set_num_threads(1)
    assert differences(found[2], found[1]) == []


@pytest.mark.parametrize("rank", [1, 3, 9, 16])
def test_a_neighbours_rank_does_not_change_a_gradient_norm(rank: int) -> None:
    """A wider neighbour makes every row of the stack longer; clipping follows the norm, so one bit of it is a bit of every weight."""
    engine, alone = lora_engine(), lora_engine()
    engine.create_adapter("y", LoraConfig(rank=rank))
    assert differences(trained(engine, (9, 40, 17), rounds=3), trained(alone, (9, 40, 17), rounds=3)) == []

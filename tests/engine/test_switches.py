"""Adapters that act on spans of one context: held against the same model run by hand, transformers, and PEFT's activated LoRA."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from engine_tools import FREE, VOCAB, add_random_adapter, at_rest, finish, full_engine, prompt, scrambled, slot_of
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel

from tiny_models import random_model
from veneer.assets import NANO_FOLDER
from veneer.engine import Base, LocalEngine, LoraEngine, load_base
from veneer.engine.attention import Layout, Ragged, Row, Score
from veneer.engine.cache import Bank, SharingRows, StepLayout
from veneer.engine.draws import Chooser, sequence_key, uniforms
from veneer.engine.flat import Flat, Segment, filled
from veneer.store.adapters import write_adapter
from veneer.types import AdapterError, LoraConfig, RequestError, RunError, Sample, SamplingParams, Switch

Acts = Callable[[int, list[int]], str | None]
"""Position, and what was drawn so far -> the adapter that acts on the token there."""


def engine_xyz(architecture: str = "qwen3", dtype: torch.dtype = torch.float32) -> LocalEngine:
    engine = LoraEngine(Base(architecture, random_model(architecture), None, dtype))
    for i, (name, rank) in enumerate((("x", 4), ("y", 1), ("z", 16))):
        add_random_adapter(engine, name, LoraConfig(rank=rank, alpha=8), seed=i)
    return engine


def rule(adapter: str | None, switches: Sequence[Switch], length: int) -> Acts:
    """What ``Switch`` says, written out by looking back from scratch each time."""

    def acts(position: int, drawn: list[int]) -> str | None:
        now, behind = adapter, 0
        for switch in switches:
            if switch.at is not None:
                if position < switch.at:
                    return now
            else:
                size, seen = len(switch.after), drawn[: max(0, position - length + 1)]
                ends = [end for end in range(behind + size, len(seen) + 1) if tuple(seen[end - size : end]) == switch.after]
                if not ends:
                    return now
                behind = ends[0]
            now = switch.adapter
        return now

    return acts


# ---------------------------------------------------------------- the same kernels by hand


@dataclasses.dataclass
class Recorded:
    """A prompt's layout under which each position's keys and values are those of the adapter that acts there."""

    inner: Ragged
    mine: np.ndarray
    """Positions at which the adapter of this pass acts."""
    kept: dict[int, tuple[torch.Tensor, torch.Tensor]]

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, score: Score) -> torch.Tensor:
        length, here = self.inner.tokens, torch.from_numpy(self.mine)
        if score.layer not in self.kept:
            self.kept[score.layer] = (k[:length].clone(), v[:length].clone())
        for whole, part in zip(self.kept[score.layer], (k, v), strict=True):
            whole[here] = part[here]
        k, v = k.clone(), v.clone()
        k[:length], v[:length] = self.kept[score.layer]
        return self.inner.attend(q, k, v, score)


def read_by_hand(engine: LocalEngine, ids: np.ndarray, acts: Acts, kept: dict) -> torch.Tensor:
    """Run a whole prompt once for each adapter, in the order in which they act, each time with the others' keys where they act: the
    logits behind its last token, and its keys and values in ``kept``."""
    names = [acts(i, []) for i in range(len(ids))]
    logits = torch.empty(0)
    for end in [i for i in range(len(ids)) if i + 1 == len(ids) or names[i + 1] != names[i]]:
        begin = max([i + 1 for i in range(end) if names[i] != names[end]], default=0)
        layout: Layout = Recorded(Ragged([Row(0, len(ids))], torch.device("cpu"), engine.base.window), np.arange(begin, end + 1), kept)
        slot = None if names[end] is None else slot_of(engine, names[end])
        line = filled(ids.tolist(), torch.device("cpu")), filled(list(range(len(ids))), torch.device("cpu"))
        flat = Flat(*line, layout, [Segment(slot, len(ids), 1)], torch.tensor([len(ids) - 1]))
        logits = engine._stack.infer(flat, lambda hidden, head: head(hidden, 0), published=True)
    return logits


def draw_by_hand(engine: LocalEngine, ids: np.ndarray, acts: Acts, params: SamplingParams, sequence: int = 0) -> tuple[list[int], bytes]:
    """One completion, token by token, alone, with the adapter looked up for every position."""
    kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    logits = read_by_hand(engine, ids, acts, kept)
    theirs, own = (Bank(capacity, torch.device("cpu")) for capacity in (len(ids), params.max_tokens))
    (slot,), (place,) = theirs.claim(1), own.claim(1)
    for layer, (k, v) in kept.items():
        for stored, new in zip(theirs.stored(layer, k), (k, v), strict=True):
            stored[slot, :, : len(ids)] = new.transpose(0, 1)
    choose, key = Chooser([params], torch.device("cpu")), torch.tensor([sequence_key(params.seed, sequence)])
    tokens, logprobs = list[int](), list[float]()
    while True:
        drawn = choose.draw(logits, uniforms(key, torch.tensor([len(tokens)])))
        tokens.append(int(drawn.tokens[0]))
        logprobs.append(float(drawn.logprobs[0]))
        if len(tokens) == params.max_tokens:
            return tokens, np.array(logprobs, np.float32).tobytes()
        position = len(ids) + len(tokens) - 1
        name = acts(position, tokens)
        where = (np.array([n], np.int64) for n in (0, place, slot, len(ids)))
        rows = SharingRows(own, theirs, *where)
        line = filled([tokens[-1]], torch.device("cpu")), filled([position], torch.device("cpu"))
        rows.begin(line[1], 0)
        segments = [Segment(None if name is None else slot_of(engine, name), 1, 1)]
        flat = Flat(*line, StepLayout([rows]), segments, torch.tensor([0]))
        logits = engine._stack.infer(flat, lambda hidden, head: head(hidden, 0), published=True)


def seen(samples: Sequence[Sample]) -> list[tuple[list[int], bytes]]:
    return [(s.tokens.tolist(), s.logprobs.tobytes()) for s in samples]


def expect_switches(sample: Sample, acts: Acts, length: int, published: dict) -> None:
    """``Sample.switches`` is what happened, as far as tokens were read."""
    drawn = sample.tokens.tolist()
    now, changes = acts(0, []), list[tuple[int, str | None]]()
    for position in range(length + len(drawn) - 1):
        name = acts(position, drawn)
        if name != now:
            changes.append((position, name))
            now = name
    assert sample.adapter == published.get(acts(0, []))
    assert [(at, adapter) for at, adapter in sample.switches] == [(at, published.get(name)) for at, name in changes]


NAMES = [None, "x", "y", "z"]


def _changes(names: list[str | None]) -> bool:
    return all(a != b for a, b in itertools.pairwise(names))


@st.composite
def requests(draw: st.DrawFn) -> tuple:
    """A prompt length, who acts first, switches, a budget and a temperature; neighbours differ, so that every switch shows."""
    length, budget = draw(st.integers(1, 70)), draw(st.integers(1, 30))
    places = sorted(draw(st.sets(st.integers(1, length - 1), max_size=3))) if length > 1 else []
    names = draw(st.lists(st.sampled_from(NAMES), min_size=6, max_size=6).filter(_changes))
    ranks = draw(st.lists(st.integers(0, 6), max_size=2))
    return length, names[0], names[1:], places, ranks, budget, draw(st.sampled_from([0.0, 1.0]))


def build(engine: LocalEngine, request: tuple) -> tuple:
    """Switches of a request: the sequences to wait for are taken from what the row draws without them, so that they are met."""
    length, first, rest, places, ranks, budget, temperature = request
    ids = prompt(length, budget)
    params = SamplingParams(budget, temperature, stop_token_ids=(), seed=length)
    switches = [Switch(name, at=place) for name, place in zip(rest, places, strict=False)]
    for i, rank in enumerate(ranks):
        acts = rule(first, switches, length)
        tokens, _ = draw_by_hand(engine, ids, acts, params)
        after = tuple(tokens[rank : rank + 1 + i]) or (5,)
        switches.append(Switch(rest[len(places) + i], after=after))
    return ids, first, params, switches


@settings(max_examples=25, deadline=None, derandomize=True)
@given(company=st.lists(requests(), min_size=1, max_size=5))
def test_spans_have_the_bits_of_a_run_by_hand(company: list[tuple]) -> None:
    """Prompt spans in one pass and rows that change their adapter midway, in any company: each is what it is token by token, alone."""
    engine, by_hand = engine_xyz(), engine_xyz()
    published = {name: engine.publish(name).result() for name in "xyz"}
    built = [build(by_hand, request) for request in company]
    futures = [engine.sample(ids, first, params, 2, switches=switches) for ids, first, params, switches in built]
    for (ids, first, params, switches), future in zip(built, futures, strict=True):
        acts = rule(first, switches, len(ids))
        samples = future.result()
        assert seen(samples) == [draw_by_hand(by_hand, ids, acts, params, i) for i in range(2)]
        for sample in samples:
            expect_switches(sample, acts, len(ids), published)
    assert at_rest(engine)


# ---------------------------------------------------------------- transformers, one adapter a position


def patched_logprobs(model: hf.PreTrainedModel, engine: LocalEngine, row: np.ndarray, names: Sequence[str | None]) -> np.ndarray:
    """transformers' log-probabilities [len(row) - 1] of row[1:], with the adapter ``names[i]`` on the token i."""
    handles = []
    for name in {n for n in names if n is not None}:
        config, mask = engine._slots[name].config, torch.tensor([n == name for n in names])
        weights = engine.save_state(name, "sampler").result().weights
        for key in weights:
            if not key.endswith("lora_A.weight"):
                continue
            module = key.removesuffix(".lora_A.weight")
            a, b = (torch.from_numpy(weights[f"{module}.lora_{m}.weight"]) for m in "AB")

            def hook(_, args, output, a=a, b=b, mask=mask, scale=config.alpha / config.rank):
                return output + mask[: output.shape[1], None] * (args[0] @ a.T @ b.T) * scale

            handles.append(model.get_submodule(module).register_forward_hook(hook))
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(row)[None]).logits[0].float()
    for handle in handles:
        handle.remove()
    return logits.log_softmax(-1)[:-1].gather(1, torch.from_numpy(row)[1:, None])[:, 0].numpy()


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "gemma2", "phi"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_spans_are_scored_as_transformers_scores_them(architecture: str, dtype: torch.dtype) -> None:
    """The reference shares no line with us: whole rows through transformers' modules, each token through its own adapter."""
    engine = engine_xyz(architecture, dtype)
    ids = prompt(20)
    params = SamplingParams(16, stop_token_ids=(), seed=3)
    free = engine.sample(ids, "x", params, switches=[Switch("y", at=7), Switch(None, at=12)]).result()[0].tokens
    after = tuple(free[3:5].tolist())
    switches = [Switch("y", at=7), Switch(None, at=12), Switch("z", after=after), Switch("x", after=(int(free[6]),))]
    sample = engine.sample(ids, "x", params, switches=switches, prompt_logprobs=True).result()[0]
    acts, row = rule("x", switches, len(ids)), np.concatenate([ids, sample.tokens])
    names = [acts(i, sample.tokens.tolist()) for i in range(len(row))]
    assert set(names) >= {"x", "y", None, "z"}
    reference = random_model(architecture)
    wanted = patched_logprobs(reference, engine, row, names)
    found = np.concatenate([sample.prompt_logprobs[1:], sample.logprobs])
    limit = 2e-5 if dtype == torch.float32 else 0.15
    assert np.abs(found - wanted).max() < limit
    for wrong in (names[1:] + names[-1:], names[:1] + names[:-1]):
        assert np.abs(patched_logprobs(reference, engine, row, wrong) - found).max() > 2 * limit, "one place off was meant to show"


# ---------------------------------------------------------------- PEFT's activated LoRA


def activated(tmp_path: Path, engine: LocalEngine, invocation: Sequence[int]) -> PeftModel:
    """Adapter x in stock PEFT, acting from the last place on at which ``invocation`` begins in a prompt."""
    write_adapter(tmp_path / "x", engine.save_state("x", "sampler").result(), {})
    config = tmp_path / "x" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"alora_invocation_tokens": list(invocation)}))
    model = hf.AutoModelForCausalLM.from_pretrained(NANO_FOLDER, dtype=torch.float32)
    return PeftModel.from_pretrained(model, tmp_path / "x").eval()


def nano_x() -> LocalEngine:
    engine = LoraEngine(load_base("nano", "cpu"))
    add_random_adapter(engine, "x", LoraConfig(rank=8, alpha=4), seed=1)
    return engine


def test_activated_lora_in_the_prompt_is_pefts(tmp_path: Path) -> None:
    """A turn that begins with its invocation: the adapter acts on the invocation's own tokens too."""
    engine = nano_x()
    rng = np.random.default_rng(0)
    invocation = [40, 41, 42]
    ids = np.concatenate([rng.integers(43, 300, 21), invocation, rng.integers(43, 300, 9)])
    model = activated(tmp_path, engine, invocation)
    params = SamplingParams(12, temperature=0.0, stop_token_ids=())
    (sample,) = engine.sample(ids, None, params, prompt_logprobs=True, switches=[Switch("x", at=21)]).result()
    with torch.no_grad():
        whole = torch.from_numpy(np.concatenate([ids, sample.tokens]))[None]
        logprobs = model(input_ids=whole).logits[0].log_softmax(-1)[:-1].gather(1, whole[0, 1:, None])[:, 0].numpy()
        drawn = model.generate(input_ids=torch.from_numpy(ids)[None], max_new_tokens=12, do_sample=False, eos_token_id=None)
    np.testing.assert_allclose(np.concatenate([sample.prompt_logprobs[1:], sample.logprobs]), logprobs, atol=2e-5, rtol=0)
    assert drawn[0, len(ids) :].tolist() == sample.tokens.tolist()
    late = engine.sample(ids, None, params, prompt_logprobs=True, switches=[Switch("x", at=22)]).result()[0]
    assert np.abs(late.prompt_logprobs[1:] - sample.prompt_logprobs[1:]).max() > 1e-3


def test_activated_lora_behind_a_drawn_token_is_pefts(tmp_path: Path) -> None:
    """Where the model itself draws the invocation, its last token is read by the adapter, and every later token is the adapter's."""
    engine = nano_x()
    ids = prompt(18)
    params = SamplingParams(24, temperature=1.5, stop_token_ids=(), seed=2)
    free = engine.sample(ids, None, params, 4).result()
    token, index = next(
        (t, i) for i, s in enumerate(free) for t in s.tokens[4:12].tolist() if t not in ids and s.tokens.tolist().count(t) == 1
    )
    sample = engine.sample(ids, None, params, 4, switches=[Switch("x", after=(token,))]).result()[index]
    model = activated(tmp_path, engine, [token])
    place = sample.tokens.tolist().index(token)
    upto = next((i for i in range(place + 1, 24) if sample.tokens[i] == token), 24)  # PEFT would begin again at a second one
    assert upto > place + 3
    assert sample.switches == ((18 + place, engine.publish("x").result()),)
    row = torch.from_numpy(np.concatenate([ids, sample.tokens[:upto]]))[None]
    with torch.no_grad():
        logits = model(input_ids=row).logits[0, 17:-1] / 1.5
    wanted = logits.log_softmax(-1).gather(1, row[0, 18:, None])[:, 0].numpy()
    np.testing.assert_allclose(sample.logprobs[:upto], wanted, atol=2e-5, rtol=0)
    plain = free[index].logprobs
    assert np.array_equal(plain[: place + 1], sample.logprobs[: place + 1]), "the token itself is drawn by who acted before"
    assert not np.array_equal(plain[place + 1 :], sample.logprobs[place + 1 :])


# ---------------------------------------------------------------- requests, barriers, errors


def test_switching_rows_take_every_way_that_other_rows_take() -> None:
    """Long rows that move between banks, stops, likeliest tokens, pieces, a batch too small for all: nothing of it is lost midway."""
    engine, by_hand = engine_xyz(), engine_xyz()
    params = SamplingParams(90, stop_token_ids=(), seed=1)
    ids = prompt(30)
    first = draw_by_hand(by_hand, ids, lambda *_: "x", params)[0][5]
    switches = [Switch("y", at=11), Switch("z", after=(first,)), *[Switch(name, after=(token,)) for name, token in (("x", 7), (None, 9))]]
    acts, pieces = rule("x", switches, 30), []
    future = engine.sample(ids, "x", params, 3, switches=switches, top_logprobs=2, on_piece=pieces.append)
    others = [engine.sample(prompt(5 + i), name, SamplingParams(40, seed=i), 2) for i, name in enumerate(NAMES)]
    assert seen(future.result()) == [draw_by_hand(by_hand, ids, acts, params, i) for i in range(3)]
    assert sum(len(p.tokens) for p in pieces) == 270
    for i, (name, other) in enumerate(zip(NAMES, others, strict=True)):
        assert seen(other.result()) == seen(by_hand.sample(prompt(5 + i), name, SamplingParams(40, seed=i), 2).result())


def test_spans_are_not_shared_with_who_has_other_spans() -> None:
    """The same tokens read by other adapters are other keys: prompts that start in one step must not be taken for one."""
    engine, ids = engine_xyz(), prompt(24)
    asked = [[Switch("x", at=at)] for at in (0, 5, 6, 23)] + [[], [Switch("y", at=5)], [Switch("x", at=5), Switch("y", at=6)]]
    futures = [engine.sample(ids, None, FREE, switches=switches) for switches in asked]
    found = [future.result()[0] for future in futures]
    assert len({s.logprobs.tobytes() for s in found}) == len(asked)
    for switches, sample in zip(asked, found, strict=True):
        assert seen(engine_xyz().sample(ids, None, FREE, switches=switches).result()) == seen([sample])
    assert found[0].switches == ((0, engine.publish("x").result()),)
    assert seen(engine.sample(ids, "x", FREE).result()) == seen(found[:1]), "from the first position on it is the whole request's"


@pytest.mark.parametrize("place", ["prompt", "completion"])
@pytest.mark.parametrize("verb", ["publish", "load"])
def test_what_changes_an_adapter_waits_for_rows_that_will_switch_to_it(verb: str, place: str) -> None:
    """A completion that begins with one version of y and would go on with another has no name for what drew it."""
    engine = engine_xyz()
    state = engine.save_state("y", "sampler").result()
    switch = Switch("y", at=2) if place == "prompt" else Switch("y", after=(VOCAB - 1,))
    running = engine.sample(prompt(5), "x", SamplingParams(60, stop_token_ids=()), switches=[switch])
    engine.step()
    assert not running.done()
    change = engine.publish("y") if verb == "publish" else engine.load_state("y", scrambled(state, 9))
    behind = engine.sample(prompt(5), "y", FREE)
    other = engine.sample(prompt(5), "z", FREE)
    while not other.done():
        engine.step()
    assert not running.done()
    assert not change.done()
    assert not behind.done()
    before = engine_xyz().sample(prompt(5), "x", SamplingParams(60, stop_token_ids=()), switches=[switch]).result()
    assert seen(running.result()) == seen(before)
    behind.result()
    assert change.done()


def test_a_request_that_waits_for_one_adapter_keeps_the_others_as_they_are() -> None:
    """Requests of one adapter run in the order they were made, also where another adapter holds them up."""
    engine = engine_xyz()
    state = {name: scrambled(engine.save_state(name, "sampler").result(), 9) for name in "xy"}
    holds = engine.sample(prompt(5), "x", SamplingParams(60, stop_token_ids=()))
    engine.step()
    first = engine.load_state("x", state["x"])
    held = engine.sample(prompt(6), "x", FREE, switches=[Switch("y", at=3)])
    second = engine.load_state("y", state["y"])
    free = [engine.sample(prompt(6), name, FREE) for name in (None, "z")]
    step = engine.save_state("y")
    while not all(f.done() for f in free):
        engine.step()
    assert [f.done() for f in (holds, first, held, second, step)] == [False] * 5
    sample = held.result()[0]
    second.result()
    wanted = engine_xyz()
    wanted.load_state("x", state["x"]).result()
    assert seen([sample]) == seen(wanted.sample(prompt(6), "x", FREE, switches=[Switch("y", at=3)]).result())
    step.result()


@pytest.mark.parametrize("stage", ["queued", "running"])
@pytest.mark.parametrize("place", ["prompt", "completion"])
def test_removing_an_adapter_fails_the_rows_that_will_switch_to_it(stage: str, place: str) -> None:
    """Its slot may be somebody else's by the time they get there."""
    engine = engine_xyz()
    switch = Switch("y", at=2) if place == "prompt" else Switch("y", after=(VOCAB - 1,))
    lost = engine.sample(prompt(5), "x", SamplingParams(60, stop_token_ids=()), switches=[switch])
    kept = engine.sample(prompt(5), "x", SamplingParams(60, stop_token_ids=()))
    if stage == "running":
        engine.step()
    engine.remove_adapter("y")
    engine.create_adapter("w", LoraConfig(rank=4))
    with pytest.raises(AdapterError, match="'y' was removed"):
        lost.result()
    assert seen(kept.result()) == seen(engine_xyz().sample(prompt(5), "x", SamplingParams(60, stop_token_ids=())).result())
    assert at_rest(engine)


def test_an_adapter_that_a_queued_load_will_bring_can_be_switched_to() -> None:
    """Load, then ask, without waiting; and if the load fails, so does the question."""
    engine = engine_xyz()
    state = engine.save_state("y", "sampler").result()
    engine.load_state("copy", state)
    copied = engine.sample(prompt(9), None, FREE, switches=[Switch("copy", at=4)])
    assert seen(copied.result()) == seen(engine.sample(prompt(9), None, FREE, switches=[Switch("y", at=4)]).result())
    engine.load_state("never", dataclasses.replace(state, adapter=dataclasses.replace(state.adapter, base_digest="0" * 64)))
    bad = engine.sample(prompt(9), None, FREE, switches=[Switch("never", at=4)])
    finish(engine, [bad])
    with pytest.raises(AdapterError, match="no adapter 'never'"):
        bad.result()


@pytest.mark.parametrize(
    ("switches", "words"),
    [
        ([Switch("q", at=1)], "no adapter 'q'"),
        ([Switch("x")], "switch 0 needs one of two"),
        ([Switch("x", at=1, after=(3,))], "switch 0 needs one of two"),
        ([Switch("x", at=-1)], "switch 0 is at position -1; it must be from 0 to 8"),
        ([Switch("x", at=9)], "switch 0 is at position 9; it must be from 0 to 8"),
        ([Switch("x", at=4), Switch("y", at=4)], "switch 1 is at position 4; it must be from 5 to 8"),
        ([Switch("x", at=4), Switch("y", at=2)], "switch 1 is at position 2"),
        ([Switch("x", after=(4,)), Switch("y", at=2)], "switch 1 is in the prompt, but one before it waits"),
        ([Switch("x", at=4), Switch("x", after=(97,))], "switch 1 comes after .97,.; tokens must be from 0 to 96"),
        ([Switch("x", after=(-1,))], "switch 0 comes after"),
    ],
)
def test_switches_that_make_no_sense_are_refused_on_arrival(switches: list[Switch], words: str) -> None:
    """In one line that says which and why, to the one who asked."""
    engine = engine_xyz()
    with pytest.raises(RequestError, match=words) as caught:
        engine.sample(prompt(9), "x", FREE, switches=switches)
    assert "\n" not in str(caught.value)
    assert engine.step() == 0


def test_full_copies_cannot_be_switched_between() -> None:
    """They take turns with the whole model."""
    engine = full_engine()
    engine.create_adapter("x", None)
    with pytest.raises(RequestError, match="cannot switch between them"):
        engine.sample(prompt(9), None, FREE, switches=[Switch("x", at=4)])


def test_a_switch_to_poisoned_weights_names_those_who_acted() -> None:
    """Whoever reads the log must find the adapter, and the rows that have not come to it go on."""
    engine = engine_xyz()
    state = engine.save_state("y", "sampler").result()
    weights = {name: np.full_like(array, 1e30) for name, array in state.weights.items()}
    engine.load_state("bad", dataclasses.replace(state, weights=weights)).result()
    params = SamplingParams(20, stop_token_ids=(), seed=4)
    tokens = engine.sample(prompt(9), "x", params).result()[0].tokens
    token = next(t for i, t in enumerate(tokens) if i > 5 and t not in tokens[:i])
    bad = engine.sample(prompt(9), "x", params, switches=[Switch("bad", after=(int(token),))])
    never = engine.sample(prompt(9), "x", params, switches=[Switch("bad", after=(int(token), 3, 3, 3))])
    span = engine.sample(prompt(9), "x", params, switches=[Switch("bad", at=3), Switch(None, at=6)])
    finish(engine, [bad, never, span])
    for future in (bad, span):
        with pytest.raises(RunError, match=r"adapter 'x' or .*adapter 'bad' gives log-probabilities that are not finite"):
            future.result()
    assert never.result()[0].tokens.tolist() == tokens.tolist()
    assert never.result()[0].switches == ()

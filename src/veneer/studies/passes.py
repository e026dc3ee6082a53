"""A training pass and a step of reinforcement learning, with an adapter and with full fine-tuning: counted, clocked and weighed for
``cost.py``, on a bench."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from veneer.envs import load_env
from veneer.measure.flops import (
    FULL,
    StepWork,
    Trained,
    break_even_rank,
    formula_ratio,
    forward_flops,
    step_flops,
    train_flops,
)
from veneer.render import load_renderer
from veneer.shapes import LinearMap, ModelShape
from veneer.studies.bench import Bench, Opened, Source
from veneer.studies.lab import Lab
from veneer.train.datums import trajectory_to_data
from veneer.train.rollouts import closing, derive_seed
from veneer.types import AdamParams, Datum, Engine, LoraConfig, Sample, SamplingParams, Tokens, Trajectory, Transition

TINY = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2}
DEEP = {**TINY, "model_type": "llama", "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 24, "vocab_size": 97}
WIDE = {**TINY, "model_type": "qwen3", "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 2, "vocab_size": 576}
RANKS = (1, 8, 32)
BEYOND = 1.5
"""Times the rank at which an adapter saves nothing: a rank that is tried too."""
LLAMA, SMALL = "meta-llama/Llama-3.1-8B", "Qwen/Qwen3-0.6B"
PUBLISHED: Sequence[tuple[str, int, str]] = (
    (LLAMA, 1, "0.667"),
    (LLAMA, 32, "0.679"),
    (LLAMA, 256, "0.763"),
    (SMALL, 32, "0.713"),
    (SMALL, 256, "1.03"),
)
"""What the formula comes to, over the maps of the layers."""
ROWS, LENGTH = 8, 64
"""Of a training pass: few enough tokens for both engines to run it in one piece."""
ENV, GROUPS, SIZE, MAX_TOKENS = "arithmetic", 8, 8, 72
"""Of a step whose answers end where the model ends them."""
EVEN = 32
"""Tokens of every answer of the other step."""
REPEATS = 20
"""Rounds of the clocks, a seed."""
NAME = "measured"


@dataclass(frozen=True)
class Subject:
    """A model that is measured."""

    name: str
    source: Source
    as_modules: bool = False

    def open(self, bench: Bench, weights: Literal["lora", "full"]) -> Opened:
        return bench.open(self.source, weights, as_modules=self.as_modules)


# ---------------------------------------------------------------- training passes


@dataclass(frozen=True)
class Counted:
    """FLOPs of a training pass with an adapter of one rank, and of full fine-tuning's; of products with weights."""

    subject: str
    layers: int
    written_out: bool
    rank: int
    lora: float
    full: float
    planned_lora: float
    """By ``measure/flops.py``."""
    planned_full: float
    formula: float
    """(2 W + 3 r P1) / 3 W over all maps."""
    break_even: float
    """The rank at which the formula is 1."""

    @property
    def ratio(self) -> float:
        return self.lora / self.full


def rows_of(shape: ModelShape, seed: int) -> list[Datum]:
    """Random rows in which every token is trained."""
    rng, ones = np.random.default_rng(derive_seed("cost", seed)), np.ones(LENGTH, np.float32)
    rows = rng.integers(3, shape.vocab, (ROWS, LENGTH + 1))
    return [Datum(row[:-1], row[1:], np.zeros(LENGTH, np.float32), ones, ones) for row in rows]


def adapted(shape: ModelShape) -> list[LinearMap]:
    return shape.adapted(LoraConfig(1))


def ranks_of(shape: ModelShape) -> list[int]:
    """RANKS and one that costs more than it saves, as far as they fit."""
    maps = adapted(shape)
    widest = min(m.width for m in maps)
    beyond = math.ceil(BEYOND * break_even_rank(shape.maps, maps))
    return [rank for rank in sorted({*RANKS, beyond}) if rank <= widest]


def formula_of(shape: ModelShape, rank: int) -> float:
    """Over the maps of the layers, as it was published."""
    maps = adapted(shape)
    return formula_ratio(maps, maps, rank)


def count_passes(bench: Bench, subject: Subject) -> list[Counted]:
    """Of every rank."""
    lora, full = subject.open(bench, "lora"), subject.open(bench, "full")
    shape, data = lora.shape, rows_of(lora.shape, 0)
    maps, tokens = adapted(shape), ROWS * LENGTH

    def counted(opened: Opened, config: LoraConfig | None) -> float:
        opened.engine.create_adapter(NAME, config)
        flops = bench.count_flops(lambda: _train(opened.engine, NAME, data))
        opened.engine.remove_adapter(NAME)
        return flops.linear

    of_full = counted(full, None)
    return [
        Counted(
            subject.name,
            shape.layers,
            lora.written_out,
            rank,
            counted(lora, LoraConfig(rank)),
            of_full,
            train_flops(shape, tokens, None, Trained(maps, rank)),
            train_flops(shape, tokens),
            formula_ratio(shape.maps, maps, rank),
            break_even_rank(shape.maps, maps),
        )
        for rank in ranks_of(shape)
    ]


def _train(engine: Engine, name: str, data: Sequence[Datum]) -> None:
    engine.forward_backward(name, data, "cross_entropy").result()


# ---------------------------------------------------------------- whole steps


@dataclass(frozen=True)
class Side:
    """FLOPs of a step in its parts, of products with weights."""

    drawn: int
    """Tokens."""
    sampling: float
    unseen: float
    """Of the adapter while sampling, by ``measure/flops.py``, where the counter does not see it."""
    old: float
    """A forward pass over the episodes."""
    training: float

    def total(self, old: bool) -> float:
        return self.sampling + self.unseen + self.old * old + self.training


@dataclass(frozen=True)
class Step:
    """A step of reinforcement learning with an adapter of rank 1 and with full fine-tuning."""

    even: bool
    """Answers of one length."""
    lora: Side
    full: Side
    stages: Mapping[bool, Mapping[str, float]]
    """With and without the log-probabilities read once more: LoRA over full by ``measure/flops.py``, from the formula on to what Veneer
    does, one difference after the other."""

    def ratio(self, old: bool) -> float:
        return self.lora.total(old) / self.full.total(old)

    def planned(self, old: bool) -> float:
        return [*self.stages[old].values()][-1]


async def problem_prompts(base: str) -> list[Tokens]:
    """Of GROUPS problems."""
    renderer, prompts = load_renderer(base), list[Tokens]()
    async with closing(load_env(ENV, {})) as dataset:
        for index in range(GROUPS):
            shown = await dataset.env("train", index).initial_observation()
            prompts.append(renderer.build_generation_prompt(shown.messages, shown.tools))
    return prompts


def count_step(bench: Bench, base: str, prompts: Sequence[Tokens], *, even: bool) -> Step:
    lora, full = bench.open(base, "lora"), bench.open(base, "full")
    params = SamplingParams(EVEN, stop_token_ids=()) if even else SamplingParams(MAX_TOKENS)
    mine, theirs = (_count_side(bench, *side, prompts, params) for side in ((lora, LoraConfig(1)), (full, None)))
    work = StepWork(len(prompts), SIZE, statistics.fmean(map(len, prompts)), mine.drawn / (len(prompts) * SIZE), params.max_tokens)
    return Step(even, mine, theirs, {old: stages_of(lora.shape, work, old) for old in (False, True)})


def _count_side(bench: Bench, opened: Opened, config: LoraConfig | None, prompts: Sequence[Tokens], how: SamplingParams) -> Side:
    engine, drawn = opened.engine, list[list[Sample]]()
    engine.create_adapter(NAME, config)

    def draw() -> None:
        params = [replace(how, seed=derive_seed("cost", i)) for i in range(len(prompts))]
        futures = [engine.sample(prompt, NAME, each, SIZE) for prompt, each in zip(prompts, params, strict=True)]
        drawn.extend(future.result() for future in futures)

    sampling = bench.count_flops(draw).linear
    data = _episodes(prompts, drawn)
    tokens = sum(len(sample.tokens) for samples in drawn for sample in samples)
    unseen = 0.0
    if config is not None and config.rank <= opened.unseen_rank:
        read = tokens + sum(map(len, prompts))
        trained = Trained(adapted(opened.shape), config.rank)
        unseen = forward_flops(opened.shape, read, None, trained) - forward_flops(opened.shape, read)
    old = bench.count_flops(lambda: engine.forward(NAME, data, "cross_entropy").result()).linear

    def train() -> None:
        engine.forward_backward(NAME, data, "importance_sampling")
        engine.optim_step(NAME, AdamParams()).result()

    return Side(tokens, sampling, unseen, old, bench.count_flops(train).linear)


def _episodes(prompts: Sequence[Tokens], drawn: Sequence[Sequence[Sample]]) -> list[Datum]:
    """All of them, with advantages of both signs."""
    data = list[Datum]()
    for prompt, samples in zip(prompts, drawn, strict=True):
        for i, sample in enumerate(samples):
            turn = Transition(prompt, sample, {"role": "assistant", "content": ""}, 0.0)
            data += trajectory_to_data(Trajectory([turn], 0.0), [(-1.0) ** i / (len(prompts) * len(samples))])
    return data


def stages_of(shape: ModelShape, work: StepWork, old: bool) -> dict[str, float]:
    """LoRA of rank 1 over full fine-tuning in a step, from the formula to ``step_flops``, one difference after the other."""
    maps, again = adapted(shape), 1 + old
    trained, drawn = Trained(maps, 1), work.drawn
    adapter, frozen = sum(trained.adds(m) for m in maps), shape.products

    def over(tokens: float, logits: float | None) -> float:
        """``logits`` of so many tokens; drawn ones always have them."""

        def one(what: Trained) -> float:
            read = tokens - drawn
            sampled = forward_flops(shape, drawn, None, what) + forward_flops(shape, read, None if logits is None else 0.0, what)
            once_more = forward_flops(shape, tokens, logits, what) if old else 0.0
            return sampled + once_more + train_flops(shape, tokens, logits, what)

        return one(trained) / one(FULL)

    return {
        "the formula for an adapter that costs nothing": (again + 2) / (again + 3),
        "with the adapter's own products": (frozen * (again + 2) + adapter * (again + 3)) / (frozen * (again + 3)),
        "without the gradient of the first layer's input": over(drawn, None),
        "with prompts, read once a group for sampling and for training": over(drawn + work.prompts, None),
        "with logits of drawn tokens alone": over(drawn + work.prompts, drawn),
    }


@dataclass(frozen=True)
class Formulas:
    """What is computed from configurations alone."""

    published: Sequence[tuple[str, int, str, float]]
    """Model, rank, what was published, and what the formula comes to."""
    steps: Mapping[bool, float]
    """LoRA of rank 1 over full fine-tuning in a step of a wide model without prompts; with the log-probabilities read once more."""


def wide_step(shape: ModelShape) -> Mapping[bool, float]:
    """As ``Formulas.steps``, by ``measure/flops.py``."""
    trained = Trained(adapted(shape), 1)

    def ratio(old: bool) -> float:
        work = StepWork(GROUPS, SIZE, 0.0, 1000.0, 1000.0, old)
        return step_flops(shape, work, trained).linear / step_flops(shape, work).linear

    return {old: ratio(old) for old in (False, True)}


# ---------------------------------------------------------------- time and memory


@dataclass(frozen=True)
class Clocked:
    """One rank beside full fine-tuning, both in turns: seconds [seed][round]."""

    subject: str
    written_out: bool
    rank: int
    passes: Sequence[Sequence[float]]
    """Forward and backward."""
    full_passes: Sequence[Sequence[float]]
    steps: Sequence[Sequence[float]]
    """The same, an optimizer step and publishing."""
    full_steps: Sequence[Sequence[float]]

    @property
    def pass_ratios(self) -> list[float]:
        """Of each seed, the median over rounds of neighbours."""
        return _ratios(self.passes, self.full_passes)

    @property
    def full_seconds(self) -> float:
        """Of a pass of full fine-tuning, the median of all."""
        return statistics.median(seconds for many in self.full_passes for seconds in many)

    @property
    def step_ratios(self) -> list[float]:
        return _ratios(self.steps, self.full_steps)


def _ratios(mine: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.median(a / b for a, b in zip(one, other, strict=True)) for one, other in zip(mine, theirs, strict=True)]


def clock(lab: Lab, bench: Bench, subject: Subject, seeds: int) -> list[Clocked]:
    """RANKS that save something, in turns with full fine-tuning."""
    lora, full = subject.open(bench, "lora"), subject.open(bench, "full")
    ranks = [rank for rank in ranks_of(lora.shape) if rank in RANKS]
    sides: dict[int, Opened] = {0: full, **dict.fromkeys(ranks, lora)}
    passes: dict[int, list[list[float]]] = {rank: [] for rank in sides}
    steps: dict[int, list[list[float]]] = {rank: [] for rank in sides}
    for seed in range(seeds):
        data = rows_of(lora.shape, seed)
        for rank, opened in sides.items():
            opened.engine.create_adapter(f"{rank}", LoraConfig(rank, seed=seed) if rank else None)
            passes[rank].append([])
            steps[rank].append([])
        for turn in range(1 + REPEATS):
            lab.go_on()
            order = [*sides][turn % len(sides) :] + [*sides][: turn % len(sides)]
            for rank in order:
                one, whole = _timed(bench, sides[rank].engine, f"{rank}", data)
                if turn:  # the first finds caches cold
                    passes[rank][-1].append(one)
                    steps[rank][-1].append(whole)
        for rank, opened in sides.items():
            opened.engine.remove_adapter(f"{rank}")
    return [Clocked(subject.name, lora.written_out, rank, passes[rank], passes[0], steps[rank], steps[0]) for rank in ranks]


def _timed(bench: Bench, engine: Engine, name: str, data: Sequence[Datum]) -> tuple[float, float]:
    """Of a pass, and of that with what follows it."""
    one = bench.seconds(lambda: _train(engine, name, data))
    return one, one + bench.seconds(lambda: _finish(engine, name))


def _finish(engine: Engine, name: str) -> None:
    engine.optim_step(name, AdamParams()).result()
    engine.publish(name).result()


@dataclass(frozen=True)
class Peak:
    """Bytes of tensors when they were most, the base's among them."""

    one_pass: int
    """While a pass runs beside what training keeps."""
    step: int
    """Over a pass, an optimizer step and publishing."""


@dataclass(frozen=True)
class Weighed:
    """What training takes with an adapter of one rank, and with full fine-tuning."""

    subject: str
    written_out: bool
    rank: int
    lora: Peak
    full: Peak
    base: int
    """Bytes of the base alone."""


def weigh(bench: Bench, subject: Subject) -> list[Weighed]:
    """Of RANKS, each on a base on which nothing was trained before."""

    def most(weights: Literal["lora", "full"], config: LoraConfig | None, *, step: bool) -> tuple[Opened, int]:
        opened = subject.open(bench, weights)
        data = rows_of(opened.shape, 0)

        def work() -> None:
            opened.engine.create_adapter(NAME, config)
            _train(opened.engine, NAME, data)
            if step:
                _finish(opened.engine, NAME)

        return opened, opened.base_bytes + bench.peak_bytes(work)

    def peak(weights: Literal["lora", "full"], config: LoraConfig | None) -> tuple[Opened, Peak]:
        (_, one_pass), (opened, step) = most(weights, config, step=False), most(weights, config, step=True)
        return opened, Peak(one_pass, step)

    opened, of_full = peak("full", None)
    found = []
    for rank in [rank for rank in ranks_of(opened.shape) if rank in RANKS]:
        lora, of_lora = peak("lora", LoraConfig(rank))
        found.append(Weighed(subject.name, lora.written_out, rank, of_lora, of_full, opened.base_bytes))
    return found

"""All figures of a planned run, and the settings that follow from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from veneer.measure.flops import FULL, StepFlops, StepWork, Trained, break_even_rank, formula_ratio, step_flops
from veneer.measure.plan import cost, memory, rate, signal, size
from veneer.measure.plan.cost import Device, StepBytes
from veneer.measure.plan.figure import TML, Figure
from veneer.measure.plan.memory import Passes
from veneer.measure.plan.rate import Rule
from veneer.measure.plan.signal import PassRates
from veneer.measure.plan.size import TaskKind
from veneer.shapes import LinearMap, ModelShape, adapter_parameters
from veneer.types import ConfigError, LoraConfig

GROUPS, GROUP_SIZE, STEPS = 8, 8, 80
"""What a run has when nothing is given: the defaults of its configuration."""
SMALL_BATCH, MANY_ROWS, WIDE = 32, 64, 64
"""Sequences that are few enough for supervised training, and too many; a rank that is too large for many episodes a step."""


@dataclass(frozen=True)
class Text:
    """What supervised training reads."""

    tokens: float
    """On which it trains, all in all and each once."""
    batch_size: int
    row_tokens: float
    """Trained tokens of a row."""
    prompt_tokens: float = 0.0
    """Of a row, read and not trained on."""
    first_epoch_nats: float | None = None
    """A token; None: not known."""

    @property
    def steps(self) -> int:
        """Of one epoch."""
        return max(1, math.ceil(self.tokens / (self.row_tokens * self.batch_size)))


@dataclass(frozen=True)
class Budget:
    """What may be used up: one of the two."""

    seconds: float | None = None
    episodes: int | None = None


@dataclass(frozen=True)
class Wish:
    """What is asked for. None: to be planned, or not known."""

    lora: LoraConfig
    """Its switches; rank and alpha are planned unless they are given below."""
    passes: Passes
    kind: TaskKind = "rl"
    rank: int | None = None
    alpha: float | None = None
    rates: PassRates | None = None
    useful: float = 0.6
    """The wanted share of useful groups."""
    groups: int | None = None
    group_size: int | None = None
    steps: int | None = None
    prompt_tokens: float = 0.0
    drawn_tokens: float = 0.0
    longest: float = 0.0
    """Tokens drawn of the longest episode."""
    old_logprobs: bool = False
    text: Text | None = None
    full_rate: float | None = None
    rate: Figure | None = None
    """A learning rate that was found otherwise: given, converted, or measured."""
    rows: int = 512
    """Completions that decode together."""
    row_places: int = 0
    prompt_places: int = 0
    device: Device | None = None
    price: float | None = None
    budget: Budget = Budget()


@dataclass(frozen=True)
class Plan:
    shape: ModelShape
    wish: Wish
    config: LoraConfig
    """Of the adapter."""
    maps: Sequence[LinearMap]
    work: StepWork
    steps: int
    learning_rate: float | None
    sections: Mapping[str, Sequence[Figure]]
    warnings: Sequence[str] = field(default_factory=list[str])

    def figure(self, name: str) -> Figure:
        return next(figure for figures in self.sections.values() for figure in figures if figure.name == name)

    def settings(self) -> dict[str, Any]:
        """As a run's configuration has them: tables ``lora`` and ``rl`` or ``sft``.

        Raises:
            ConfigError: there is no learning rate.
        """
        if self.learning_rate is None:
            raise ConfigError("no learning rate is known: give --full-lr or --lr")
        lora = {"rank": self.config.rank, "alpha": self.config.alpha}
        lora |= {"train_attn": self.config.train_attn, "train_mlp": self.config.train_mlp, "train_unembed": self.config.train_unembed}
        if self.config.target_modules:
            lora["target_modules"] = list(self.config.target_modules)
        loop: dict[str, Any] = {"steps": self.steps, "learning_rate": float(f"{self.learning_rate:.3g}")}
        if self.wish.kind == "rl":
            loop |= {"groups_per_batch": self.work.groups, "group_size": self.work.group_size}
        else:
            loop |= {"batch_size": self.work.episodes}
        return {"kind": self.wish.kind, "lora": lora, self.wish.kind: loop}


def make_plan(shape: ModelShape, wish: Wish) -> Plan:
    """Every figure that can be told from what is known.

    Raises:
        AdapterError: the rank does not fit, or the targets match nothing.
        ConfigError: a budget in time without a device, or one that is too small for a step.
    """
    trial = wish.rank or min(size.LEAST_RANK, min(m.width for m in shape.adapted(replace(wish.lora, rank=1))))
    maps = shape.adapted(replace(wish.lora, rank=trial))
    signals, work = _signal(wish)
    steps = _steps(shape, wish, work, Trained(maps, trial))
    demand = _demand(wish, work, steps)
    chosen = size.plan_rank(maps, wish.kind, demand)
    if wish.rank is not None:
        chosen = replace(chosen, value=wish.rank, low=None, high=None, note=f"given; {chosen.value:g} would be planned", formula="given")
    assert chosen.value is not None
    rank, alpha = int(chosen.value), wish.alpha or size.ALPHA
    config = replace(wish.lora, rank=rank, alpha=alpha)
    learning = wish.rate or _rate(shape, wish, steps, Rule(rank, alpha), maps)
    trained = Trained(maps, rank)
    parameters = adapter_parameters(maps, rank)
    sections = {
        "adapter": _adapter(maps, chosen, parameters, demand, wish),
        "learning": [learning, *signals, _batch(wish, work, rank, steps)],
        "memory": _memory(shape, wish, work, maps, rank, parameters),
        "compute": _compute(shape, wish, work, trained),
        "time": _time(shape, wish, work, trained, steps),
    }
    warnings = [*shape.doubts, *_warnings(wish, work, rank, steps, sections, trained)]
    return Plan(shape, wish, config, maps, work, steps, learning.value, sections, warnings)


# ---------------------------------------------------------------- what a step is


def _signal(wish: Wish) -> tuple[list[Figure], StepWork]:
    """Figures of the task's signal, and a step's work."""
    if wish.kind == "sft":
        text = wish.text or Text(0.0, 16, 1.0)
        return [], StepWork(text.batch_size, 1, text.prompt_tokens, text.row_tokens, text.row_tokens, samples=False)
    figures = list[Figure]()
    group_size = wish.group_size or GROUP_SIZE
    if wish.rates is not None:
        planned = signal.plan_group_size(wish.rates, wish.useful)
        if wish.group_size is None and planned.value is not None:
            group_size = max(2, int(planned.value))
        figures = [
            signal.plan_pass_rate(wish.rates),
            planned,
            signal.plan_useful(wish.rates, group_size),
            signal.plan_bits(wish.rates, group_size),
        ]
    groups = wish.groups or GROUPS
    return figures, StepWork(
        groups, group_size, wish.prompt_tokens, wish.drawn_tokens, max(wish.longest, wish.drawn_tokens), wish.old_logprobs
    )


def _steps(shape: ModelShape, wish: Wish, work: StepWork, trained: Trained) -> int:
    if wish.steps is not None:
        return wish.steps
    if wish.budget.episodes is not None:
        return max(1, wish.budget.episodes // work.episodes)
    if wish.budget.seconds is not None:
        if wish.device is None:
            raise ConfigError("--budget in time or money: give --device, whose speed says how far it reaches")
        step = _step_time(shape, wish, wish.device, work, trained)
        steps = cost.steps_within(step, wish.budget.seconds)
        if steps < 1:
            raise ConfigError(f"--budget: a step takes {step.range} on {wish.device.name}, which is more; lower --groups or --group-size")
        return steps
    return wish.text.steps if wish.text is not None and wish.kind == "sft" else STEPS


def _demand(wish: Wish, work: StepWork, steps: int) -> Figure | None:
    if wish.kind == "rl":
        return None if wish.rates is None else signal.plan_demand(wish.rates, work.group_size, work.episodes * steps)
    if wish.text is None or wish.text.first_epoch_nats is None:
        return None
    return signal.plan_demand_of_text(min(wish.text.tokens, steps * work.drawn), wish.text.first_epoch_nats)


# ---------------------------------------------------------------- sections


def _adapter(maps: Sequence[LinearMap], rank: Figure, parameters: int, demand: Figure | None, wish: Wish) -> list[Figure]:
    alpha = size.plan_alpha()
    if wish.alpha is not None:
        alpha = replace(alpha, value=wish.alpha, formula="given")
    assert rank.value is not None
    figures = [rank, alpha, size.plan_parameters(maps, int(rank.value)), size.plan_bytes(parameters), size.plan_capacity(parameters)]
    return figures if demand is None else [*figures, demand, size.plan_saturation(demand, figures[-1])]


def _rate(shape: ModelShape, wish: Wish, steps: int, rule: Rule, maps: Sequence[LinearMap]) -> Figure:
    found = (
        rate.rate_from_nothing(shape.name, shape.architecture, shape.hidden, wish.kind, rule.rank)
        if wish.full_rate is None
        else rate.rate_from_full(wish.full_rate, wish.kind, steps, rule.rank, maps)
    )
    if rule.alpha == size.ALPHA or found.value is None:
        return found
    converted = rate.convert_rate(found.value, Rule(rule.rank, size.ALPHA), rule)
    assert converted.low is not None
    assert converted.high is not None
    low, high = (converted.low * (found.low or found.value) / found.value, converted.high * (found.high or found.value) / found.value)
    return replace(
        converted, formula=f"{found.formula}; then {converted.formula}", source=f"{found.source}; {converted.source}", low=low, high=high
    )


def _batch(wish: Wish, work: StepWork, rank: int, steps: int) -> Figure:
    """The guard-rail, with its evidence."""
    if wish.kind == "sft":
        source = (
            f"{TML}, section on batch size: on 10,000 examples the gap to full fine-tuning grows with the batch, at every rank; "
            "on the 512 of docs/studies/batch.md ranks 8 and 64 equal it in batches of 128"
        )
        note = f"up to {SMALL_BATCH} is safe; here {steps:,} steps"
        return Figure("batch", work.episodes, "sequences", "given", source, min(8, work.episodes), max(SMALL_BATCH, work.episodes), note)
    source = (
        "Structure over Scale, https://openreview.net/forum?id=XGZHI14m8P (rank 64: 73.1% at 64, 8.7% at 128; rank 8 and all else well); "
        "Mind Lab (rank 32 best at 128, https://alpha.macaron.im/mindlab/research/"
        "lora-in-reasoning-rl-the-sweet-spot-between-performance-stability-and-cost)"
    )
    note = "the two studies disagree; neither says what its learning rate did with the rank"
    return Figure("batch", work.episodes, "episodes", f"{work.groups} groups x {work.group_size}", source, note=note)


def _memory(shape: ModelShape, wish: Wish, work: StepWork, maps: Sequence[LinearMap], rank: int, parameters: int) -> list[Figure]:
    passes, reading = wish.passes, memory.Reading(work.prompts, work.drawn, work.prompt_tokens, work.drawn_tokens)
    if wish.device is not None:
        fits = memory.tokens_that_fit(shape, passes, wish.device.memory - memory.BYTES[passes.dtype] * shape.parameters)
        passes = replace(passes, tokens=min(passes.tokens, fits))
    base, adapter = memory.plan_base(shape, passes.dtype), memory.plan_adapter(parameters, max(m.d_in for m in maps))
    activations = memory.plan_activations(shape, passes, reading, maps, rank)
    held, full = [base, adapter, activations], [base, memory.plan_full(shape), activations]
    figures = [base, adapter, activations]
    if work.samples:
        rows = min(wish.rows, work.episodes)
        places = wish.row_places or math.ceil(wish.prompt_tokens + wish.drawn_tokens)
        prompts = min(work.groups, math.ceil(rows / work.group_size)) if wish.prompt_places else 0
        cache = memory.plan_cache(shape, passes.dtype, rows, places, prompts, wish.prompt_places)
        figures += [memory.plan_cache_token(shape, passes.dtype), cache]
        held.append(cache)
        full.append(cache)
    return [
        *figures,
        memory.plan_total(held, "memory"),
        memory.plan_total(full, "memory of full fine-tuning"),
        *memory.plan_usual(shape, parameters),
    ]


ENDS = "for answers of one length; where they end by themselves 4% more was counted (docs/studies/cost.md)"


def _compute(shape: ModelShape, wish: Wish, work: StepWork, trained: Trained) -> list[Figure]:
    source = f"{TML}, section on compute; checked by tests/measure/test_flops.py against torch's counter"
    ratio = formula_ratio(shape.maps, trained.maps, trained.rank)
    edge = break_even_rank(shape.maps, trained.maps)
    figures = [
        Figure("a token forward", 2 * shape.products, "FLOPs", "2 x products of its linear maps", source, note="attention's own apart"),
        Figure(
            "training pass to full",
            ratio,
            "x",
            "(2 W + 3 r P1) / 3 W",
            source,
            note="linear maps alone; measured speeds differ",
        ),
        Figure("break-even rank", edge, "", "W / (3 P1)", source, note="from there on an adapter's training pass costs more"),
    ]
    if not work.drawn:
        return figures
    mine, full = (step_flops(shape, work, what, checkpointing=wish.passes.checkpointing) for what in (trained, FULL))
    return [
        *figures,
        Figure("a step", mine.total, "FLOPs", _parts(mine), source, note="norms, activations and the optimizer apart"),
        Figure("a step to full", mine.linear / full.linear, "x", "linear maps: prompts, sampling, training", source, note=ENDS),
        Figure("a step to full, with attention", mine.total / full.total, "x", "the same and attention's own products", source, note=ENDS),
    ]


def _parts(step: StepFlops) -> str:
    parts = {"prompts": step.prompts, "sampling": step.sampling, "old log-probabilities": step.old_logprobs}
    parts |= {"training": step.training, "attention": step.attention}
    return " + ".join(f"{name} {value / step.total:.0%}" for name, value in parts.items() if value)


def _step_time(shape: ModelShape, wish: Wish, device: Device, work: StepWork, trained: Trained) -> Figure:
    each = memory.BYTES[wish.passes.dtype]
    together = min(wish.rows, work.episodes)
    met = sum(min(m.copies, m.active * together) * m.d_in * m.d_out for m in shape.maps)
    reads = StepBytes(each * met, each * shape.cache_numbers, wish.rows)
    return cost.plan_step_time(device, step_flops(shape, work, trained, checkpointing=wish.passes.checkpointing), work, reads)


def _time(shape: ModelShape, wish: Wish, work: StepWork, trained: Trained, steps: int) -> list[Figure]:
    if wish.device is None or not work.drawn:
        return []
    step = _step_time(shape, wish, wish.device, work, trained)
    run = cost.plan_run_time(step, steps)
    return [step, run] if wish.price is None else [step, run, cost.plan_money(run, wish.price)]


def _warnings(wish: Wish, work: StepWork, rank: int, steps: int, sections: Mapping[str, Sequence[Figure]], trained: Trained) -> list[str]:
    found = list[str]()
    if any(m.kind == "expert" for m in trained.maps):
        found.append("the maps of experts are planned for; Veneer's own engine does not adapt them yet (train_mlp = false does without)")
    if wish.kind == "sft" and (work.episodes > MANY_ROWS or steps < rate.LONG):
        found.append(f"{work.episodes} sequences a step and {steps} steps: adapters want small batches and {rate.LONG} steps or more")
    if wish.kind == "rl" and rank >= WIDE and work.episodes > MANY_ROWS:
        found.append(f"rank {rank} with {work.episodes} episodes a step: such runs have collapsed; take rank 32 or less")
    if wish.kind == "rl" and wish.rates is None:
        found.append("no pass rates: group size and bits cannot be planned; give --pass-rates, or --env with a base that can be loaded")
    if wish.rates is not None and (hardness := signal.hardness(wish.rates)):
        found.append(hardness)
    if wish.rate is not None and wish.rate.note:
        found.append(f"learning rate: {wish.rate.note}")
    planned = next((figure for figure in sections["learning"] if figure.name == "group size"), None)
    if planned is not None and planned.value is None:
        found.append(planned.note)
    memory_needed = next(figure for figure in sections["memory"] if figure.name == "memory")
    if wish.device is not None and memory_needed.value is not None and memory_needed.value > wish.device.memory:
        found.append(f"{memory_needed.text} are more than {wish.device.name} has; smaller passes, or gradient checkpointing")
    return found

"""Learning rates of adapters: from that of full fine-tuning, from another rule for alpha and rank, or from none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from veneer.measure.plan.figure import TML, Figure
from veneer.measure.plan.size import ALPHA, TaskKind
from veneer.shapes import LinearMap

RATIO, SHORT_RATIO = 10.0, 15.0
SHORT, LONG = 100, 300
"""Steps up to which a run is short, and from which on it is not."""
RATIO_RANGE = 2.0
"""A factor to either side."""
FAMILIES = {"llama": 0.781, "qwen": 0.0775}
"""Powers of 2000 / hidden size, in the cookbook's fit."""
NARROW = (0.96, 0.66)
"""Factor and power of ``first_step_ratio`` that the ratios of supervised training follow: 2.5, 3.9 and 6.3 where it is 4.3, 8.7 and 17.3,
64, 128 and 256 wide (docs/studies/width.md). They come to ten in a model 520 wide."""
MEASURED = {"nano": 1.5e-3}
"""Rates at rank 4 to 32 that were swept here (docs/studies/rank.md)."""


def first_step_ratio(maps: Sequence[LinearMap]) -> float:
    """How many times the learning rate of full fine-tuning an adapter with alpha 32 needs so that its first step of Adam lowers the loss
    as much, if gradients are independent and of one size everywhere.

    A step of Adam is a sign for every number. With a gradient G [d_out, d_in] of entries of size s, all weights come to
    <G, sign(G)> = s d_out d_in times the rate; B alone, beside an A of entries uniform in +-1/sqrt(d_in), to (alpha / r) |G A^T|_1, so
    alpha s d_out / sqrt(3), whatever the rank. That makes sqrt(3) / alpha times the mean input width of the maps' outputs.
    """
    return math.sqrt(3) / ALPHA * sum(m.weights for m in maps) / sum(m.copies * m.d_out for m in maps)


def ratio_to_full(kind: TaskKind, steps: int | None, rank: int, maps: Sequence[LinearMap]) -> tuple[float, str]:
    """How many times the learning rate of full fine-tuning, and why: what was found in models at least 1024 wide, and in narrow ones less.
    By reward no more than what makes the first steps equal, and half at rank 1; of supervised training no more than was found in three
    widths, at rank 1 too."""
    ratio, why = RATIO, "10 x (9.8 in a fit over 14 models; alpha 32, Adam)"
    if kind == "sft" and steps is not None and steps < LONG:
        place = min(1.0, max(0.0, (LONG - steps) / (LONG - SHORT)))
        ratio = RATIO * (SHORT_RATIO / RATIO) ** place
        why = f"{ratio:.3g} x: 15 up to {SHORT} steps, 10 from {LONG} on, as B starts at zero"
    equal = first_step_ratio(maps)
    if kind == "sft":
        factor, power = NARROW
        narrow, rule = factor * equal**power, f"{factor:g} (sqrt(3) x mean input width / alpha)^{power:g}, as found in three narrow widths"
    else:
        narrow, rule = equal, "sqrt(3) x mean input width / alpha, with which first steps are equal"
    if narrow < ratio:
        ratio, why = narrow, f"{narrow:.3g} x: {rule}; {ratio:.3g} in wide models"
    if kind == "rl" and rank == 1:
        return ratio / 2, f"{why}, half of it at rank 1"
    return ratio, why


def rate_from_full(full_rate: float, kind: TaskKind, steps: int | None, rank: int, maps: Sequence[LinearMap]) -> Figure:
    """The learning rate of an adapter with alpha 32 on ``maps``, from a tuned one of full fine-tuning, for any architecture."""
    ratio, why = ratio_to_full(kind, steps, rank, maps)
    value = full_rate * ratio
    rewarded = "docs/studies/rank.md: 10 [5, 20] at ranks 4 and 32, 5 [2.5, 10] at rank 1 after 40 steps by reward"
    supervised = "docs/studies/width.md: 2.5, 3.9 and 6.3 at 64, 128 and 256; learning_rate.md: 3.1 [1.5, 6.7], rank 1 like the others"
    source = f"{TML}, section on learning rates; {rewarded if kind == 'rl' else supervised}; docs/plan.md: two widths"
    found = "derived and checked at two widths" if kind == "rl" else "fitted to three widths and checked on another base"
    note = f"10 was found, not derived, and the bound for narrow models {found}. Try a third and three times as much"
    return Figure("learning rate", value, "", f"full rate {full_rate:g} x {why}", source, value / RATIO_RANGE, value * RATIO_RANGE, note)


def rate_from_nothing(name: str, architecture: str, hidden: int, kind: TaskKind, rank: int) -> Figure:
    """Where no rate of full fine-tuning is known: a guess with a wide range, and what it rests on."""
    half = 2.0 if rank == 1 and kind == "rl" else 1.0
    swept = "sweep it, or give --full-lr"
    if kind == "rl" and name in MEASURED:
        value = MEASURED[name] / half
        source = "docs/studies/rank.md: the best of a grid a factor of two apart, forty steps of sums"
        return Figure(
            "learning rate", value, "", "swept on this base" + (", half of it at rank 1" if rank == 1 else ""), source, value / 2, value * 2
        )
    if kind == "rl":
        low, high = 1e-5 / half, 4e-5 / half
        source = "rates in public recipes: cookbook 1e-5, 2e-5 (MATH), 8e-5 (GSM8K), verl 3e-5"
        note = f"published recipes from 0.5B on; small bases and toy tasks want up to 100 times as much: {swept}"
        return Figure("learning rate", math.sqrt(low * high), "", "1e-5 to 4e-5, their geometric mean", source, low, 1e-4 / half, note)
    power = next((p for family, p in FAMILIES.items() if family in architecture.lower()), None)
    if power is None:
        note = f"no fit covers {architecture}: {swept}"
        return Figure("learning rate", None, "", "5e-4 (2000 / hidden)^p", "Llama and Qwen alone were fitted", note=note)
    value = 5e-4 * (2000 / hidden) ** power
    source = f"tinker-cookbook, hyperparam_utils.py, as of {TML}; Tulu 3, 780 steps of 128"
    note = f"checked there from width 1024 to 8192: {swept}"
    return Figure("learning rate", value, "", f"5e-4 (2000 / {hidden})^{power:g}", source, value / 3, value * 3, note)


# ---------------------------------------------------------------- from one rule for alpha and rank to another


@dataclass(frozen=True)
class Rule:
    """How an adapter's update is scaled."""

    rank: int
    alpha: float
    root: bool = False
    """Scaled by alpha / sqrt(rank) (rsLoRA, https://arxiv.org/abs/2312.03732) instead of alpha / rank."""

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.root else self.rank)


def convert_rate(rate: float, there: Rule, here: Rule) -> Figure:
    """The learning rate that does under one rule what ``rate`` did under another, with Adam and PEFT's start of A.

    With s the scale and r the rank, what an adapter does at first grows as s r x rate, for B starts at zero and each of the r terms of B A
    moves alike; later A has moved too, and it grows as s r x rate^2. The first keeps s r x rate (TML's invariances, section on learning
    rates), the second sqrt(s r) x rate, which the best rates follow in muA (https://arxiv.org/abs/2602.06204): with alpha / r they do not
    depend on the rank, with alpha = c r they fall as its root, with rsLoRA as its fourth root.
    """
    change = (there.scale * there.rank) / (here.scale * here.rank)
    first, sustained = rate * change, rate * math.sqrt(change)
    low, high = min(first, sustained), max(first, sustained)
    formula = f"scale x rank x rate is kept at first (x {change:.3g}), sqrt(scale x rank) x rate later (x {math.sqrt(change):.3g})"
    source = f"{TML}, section on invariances; muA, https://arxiv.org/abs/2602.06204"
    note = "the value is that of the root, which longer runs follow; a short one may want the other end"
    return Figure("learning rate", sustained, "", formula, source, low, high, note)

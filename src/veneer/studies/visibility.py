"""Does reinforcement learning change few weights because of what it is, or because its learning rate is small?

All weights are trained by reward and by demonstrations, at the same learning rates and for as many steps, one to forty. Of published
checkpoints in bfloat16 5 to 30% of the weights differ after reinforcement learning, and most after supervised training
(https://arxiv.org/abs/2505.11711): a small subnetwork, and much the same one for every seed. But a step of Adam is about the learning
rate for every weight, and bfloat16 shows no change below 1/512 of the weight it is added to: what becomes visible may be a matter of
sizes alone. The null model deals the same updates out anew among the weights of each matrix, and the overlap of two seeds is compared
with that of two that choose by magnitude alone.

Weights are rounded to bfloat16 before updates are added, as those of published models are numbers of bfloat16 to begin with. One that lies
between two such numbers and near their middle is shown to change by the smallest update, and is the same one in every seed; how much is
visible of the base's float32 weights as they are is told beside it. Whether an update exceeds 1e-5 does not depend on the weight: dealt out
anew, as many do, so that share has no null model; and float32 shows nearly every update, whoever gets it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from veneer.measure.anatomy import Overlap, Update, Visible, in_bfloat16, overlap_of, share_visible, updates_of, visible
from veneer.measure.verdict import compare_seeds, pseudo_values, t_interval
from veneer.store.adapters import read_adapter
from veneer.studies.contest import Arm, Terms, config_of, overridden, terms_for
from veneer.studies.demonstrations import write_demonstrations
from veneer.studies.drawing import picture
from veneer.studies.lab import ADAPTER, COUNTED, Lab, Outcome
from veneer.studies.result import Finding, Result
from veneer.train.config import RunConfig

QUESTION = "Does reinforcement learning change few weights because of what it is, or because its learning rate is small?"
CLAIMS = (16, 17)
REWARDED, SHOWN = "by reward", "by demonstrations"
RATES: Sequence[float] = (1e-6, 1e-5, 1e-4)
ROWS = 500
"""Demonstrations, of which a fifth is held out."""
LENGTHS: Sequence[int] = (1, 10, 40)
"""Steps. Of the longest all is asked, of the shorter how much is visible."""
SHARED: Mapping[str, Mapping[str, Any]] = {
    REWARDED: {
        "weights": "full",
        "env": {"name": "arithmetic"},
        "rl": {"steps": LENGTHS[-1], "groups_per_batch": 8, "group_size": 8},
        "eval": {"problems": 256, "every": LENGTHS[-1]},
    },
    SHOWN: {
        "kind": "sft",
        "weights": "full",
        "sft": {"steps": LENGTHS[-1], "batch_size": 16, "held_out": 0.2},
        "eval": {"every": LENGTHS[-1]},
    },
}
MARGIN = 0.05
"""Of a share of weights."""

Weights = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Shown:
    """Of the runs of one way, of one learning rate and length."""

    way: str
    rate: float
    steps: int
    visible: Sequence[Visible]
    """In bfloat16, for each seed."""
    unrounded: Sequence[Visible]
    """The same of weights that were not rounded before."""
    moved: Sequence[float]
    """Shares that changed in float32."""
    beyond: Sequence[float]
    """Shares that changed by more than 1e-5 in bfloat16."""
    overlaps: Mapping[tuple[int, int], Overlap]
    """Of all pairs of seeds with a visible change."""
    gained: Sequence[float]
    """Score at the end less that of the start."""

    @property
    def name(self) -> str:
        return f"{self.way}, {self.rate:g}"

    def common(self, what: str) -> list[float]:
        """What pairs of seeds have in common, as a value for each seed: measured, by_magnitude or by chance. Empty of two seeds."""
        pairs = {pair: float(getattr(overlap, what)) for pair, overlap in self.overlaps.items()}
        return pseudo_values(pairs) if len(pairs) > 1 else []


async def conduct(lab: Lab, terms: Terms) -> Result:
    """Raises:
    ConfigError: an override that cannot be applied.
    Interrupted, VeneerError: as ``Lab.run``.
    """
    data = write_demonstrations(lab.folder.parent / "data", ROWS, seed=0)
    configs = {way: _configs(way, str(data), terms) for way in SHARED}
    outcomes = iter(await lab.run([config for wanted in configs.values() for config in wanted]))
    runs = {way: [next(outcomes) for _ in wanted] for way, wanted in configs.items()}
    base = await _base(lab, configs[REWARDED][0])
    shown = [
        _look(base, way, rate, steps, [outcome for outcome in found if _what(outcome.config) == (rate, steps)])
        for way, found in runs.items()
        for rate in RATES
        for steps in LENGTHS
    ]
    return Result(_findings(shown), _tables(shown), {"shown": [_one(one) for one in shown]}, lambda path: _draw(shown, path))


def _configs(way: str, data: str, terms: Terms) -> list[RunConfig]:
    kind = SHARED[way].get("kind", "rl")
    shared = {**SHARED[way], "sft": {**SHARED[way].get("sft", {}), "data": data}}
    lengths = [Arm(f"{steps} steps", {kind: {"steps": steps}}, RATES) for steps in LENGTHS]
    tree = overridden(shared, lengths, terms_for(terms, kind))
    return [config_of(tree, arm, rate, seed) for arm in lengths for rate in RATES for seed in range(terms.seeds)]


def _what(config: RunConfig) -> tuple[float, int]:
    work = getattr(config, config.kind)
    return work.learning_rate, work.steps


async def _base(lab: Lab, config: RunConfig) -> Weights:
    """The base's weights, by the names that a full copy has."""
    engine = lab.place(config).engine
    engine.create_adapter(COUNTED, None)
    saved = await engine.save_state(COUNTED, "sampler")
    engine.remove_adapter(COUNTED)
    return saved.weights


def _look(base: Weights, way: str, rate: float, steps: int, outcomes: Sequence[Outcome]) -> Shown:
    updates = [updates_of(base, read_adapter(outcome.folder / ADAPTER)[0].weights, None) for outcome in outcomes]
    rounded = {name: in_bfloat16(base[name]) for name in updates[0]}
    masks = [[visible(rounded[name], update.rows(), "bfloat16") for name, update in found.items()] for found in updates]
    some = [mask for mask in masks if any(part.any() for part in mask)]
    return Shown(
        way,
        rate,
        steps,
        [share_visible(rounded, found, "bfloat16") for found in updates],
        [share_visible(base, found, "bfloat16") for found in updates],
        [_share(base, found, "float32", 0.0) for found in updates],
        [_share(rounded, found, "bfloat16", 1e-5) for found in updates],
        {pair: overlap_of(list(rounded.values()), *(some[seed] for seed in pair)) for pair in itertools.combinations(range(len(some)), 2)},
        [outcome.score - outcome.score_before for outcome in outcomes],
    )


def _share(base: Weights, updates: Mapping[str, Update], dtype: str, tolerance: float) -> float:
    changed = sum(int(visible(base[name], update.rows(), dtype, tolerance).sum()) for name, update in updates.items())
    return changed / sum(update.size for update in updates.values())


# ---------------------------------------------------------------- what it says


def _findings(every: Sequence[Shown]) -> list[Finding]:
    found, shown = [], _longest(every)
    for one in shown:
        null = compare_seeds([v.measured for v in one.visible], [v.null for v in one.visible], MARGIN)
        found.append(Finding(f"{one.name}: visible in bfloat16 beside what sizes alone make visible", null.verdict, str(null)))
    for rate in RATES:
        rewarded, supervised = (next(o for o in shown if (o.way, o.rate) == (way, rate)) for way in (REWARDED, SHOWN))
        ways = compare_seeds([v.measured for v in rewarded.visible], [v.measured for v in supervised.visible], MARGIN)
        found.append(Finding(f"visible at {rate:g}: {REWARDED} beside {SHOWN}", ways.said("more", "fewer"), ways.numbers))
    found += [_of_steps([one for one in every if (one.way, one.rate) == (way, min(RATES))]) for way in SHARED]
    for one in shown:
        if len(one.overlaps) > 1:
            apart = compare_seeds(one.common("measured"), one.common("by_magnitude"), MARGIN)
            asked = f"{one.name}: overlap of two seeds beside that of choosing by magnitude alone"
            found.append(Finding(asked, apart.said("more", "less"), apart.numbers))
    return found


def _longest(every: Sequence[Shown]) -> list[Shown]:
    return [one for one in every if one.steps == max(LENGTHS)]


def _of_steps(shown: Sequence[Shown]) -> Finding:
    """``shown``: of one way and learning rate, by length."""
    shares = [[v.measured for v in one.visible] for one in shown]
    numbers = "; ".join(f"{_percent(share)} after {one.steps}" for one, share in zip(shown, shares, strict=True))
    first = shown[0]
    return Finding(f"{first.name}: visible in bfloat16 after so many steps: {first.steps}", f"{t_interval(shares[0]).value:.1%}", numbers)


def _tables(shown: Sequence[Shown]) -> str:
    heads = (
        "way, learning rate",
        "steps",
        "gained",
        "changed in float32",
        "in bfloat16",
        "by sizes alone",
        "unrounded before",
        "by more than 1e-5",
    )
    heads += ("overlap of seeds", "by magnitude", "by chance")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for one in shown:
        overlaps = [one.common(what) for what in ("measured", "by_magnitude", "chance")]
        cells = [f"{one.steps}", f"{t_interval(one.gained).value:+.3f}", _percent(one.moved), _percent([v.measured for v in one.visible])]
        cells += [
            _percent([v.null for v in one.visible]),
            _percent([v.measured for v in one.unrounded]),
            _percent(one.beyond),
            *(_percent(values) for values in overlaps),
        ]
        lines.append(f"| {one.name} | {' | '.join(cells)} |")
    return (
        "\n".join(
            [
                *lines,
                "",
                "Means over seeds with 95% intervals; overlaps: all pairs of seeds, by the jackknife. Gained: in each way's score.",
            ]
        )
        + "\n"
    )


def _percent(values: Sequence[float]) -> str:
    if len(values) < 2:
        return "-"
    mean = t_interval(values)
    return f"{mean.value:.1%} [{max(0.0, mean.low):.1%}, {min(1.0, mean.high):.1%}]"


def _one(one: Shown) -> dict[str, Any]:
    return {
        "way": one.way,
        "learning_rate": one.rate,
        "steps": one.steps,
        "bfloat16": [v.measured for v in one.visible],
        "bfloat16_by_sizes_alone": [v.null for v in one.visible],
        "bfloat16_unrounded_before": [v.measured for v in one.unrounded],
        "float32": one.moved,
        "beyond_1e-5": one.beyond,
        "overlaps": [[*pair, o.measured, o.by_magnitude, o.chance] for pair, o in one.overlaps.items()],
        "gained": one.gained,
    }


def _draw(every: Sequence[Shown], path: Path) -> None:
    """Left: what is visible, by learning rate. Middle: by steps. Right: what two seeds share."""
    with picture(path, 11.4, 4.0) as figure:
        left, middle, right = figure.subplots(1, 3)
        for way, colour in ((REWARDED, "#0066cc"), (SHOWN, "#cc5500")):
            mine = [one for one in _longest(every) if one.way == way]
            rates = [one.rate for one in mine]
            for key, style, more in (("measured", "-", ""), ("null", ":", ", by sizes alone")):
                _line(left, rates, [[getattr(v, key) for v in one.visible] for one in mine], colour, style, way + more)
            for place, rate in enumerate(RATES):
                there = [one for one in every if (one.way, one.rate) == (way, rate)]
                shares = [[v.measured for v in one.visible] for one in there]
                _line(middle, [one.steps for one in there], shares, colour, "-", f"{way}, {rate:g}", 0.4 + 0.6 * place / len(RATES))
            two = [one for one in mine if len(one.overlaps) > 1]
            for key, style, more in (("measured", "-", ""), ("by_magnitude", ":", ", by magnitude"), ("chance", "--", ", by chance")):
                _line(right, [one.rate for one in two], [one.common(key) for one in two], colour, style, way + more)
        visibly = "share of weights visible in bfloat16"
        for axes, across, up in (
            (left, "learning rate", visibly),
            (middle, "steps", visibly),
            (right, "learning rate", "overlap of two seeds"),
        ):
            axes.set_xscale("log")
            axes.set(xlabel=across, ylabel=up, ylim=(-0.02, 1.02))
            axes.legend(frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, handlelength=3)


def _line(
    axes: Any, across: Sequence[float], values: Sequence[Sequence[float]], colour: str, style: str, label: str, alpha: float = 1.0
) -> None:
    means = [t_interval(some) for some in values]
    bars = [[m.value - m.low for m in means], [m.high - m.value for m in means]]
    heights = [m.value for m in means]
    axes.errorbar(across, heights, yerr=bars, color=colour, linestyle=style, alpha=alpha, marker="o", markersize=3, label=label)

"""Does the ratio of the best learning rates, of an adapter and of all weights, grow with the width of the model?

"LoRA Without Regret" finds ten in models 2,048 to 8,192 wide, at all of them alike, and says that a theory of equal steps would have it
grow as the width over twice alpha, which it did not find (https://thinkingmachines.ai/blog/lora/). Steps of Adam that lower the loss as
much at first would want sqrt(3) / alpha times the mean input width (``measure/plan/rate.py``). So one that does not grow is told from one
that grows as the width.

Bases of three widths are made here, alike but for it: random weights, all of them trained on digits that are to be sorted, turned round or
counted, at a rate that falls as the width. Then each learns what none has seen, digits in falling order, with an adapter of rank 8 and
alpha 32 and with all weights, at seven learning rates or more, on the same seeds.
"""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from veneer.assets import NANO
from veneer.envs.digits import generate_count, generate_reverse, generate_sort
from veneer.measure.plan.rate import first_step_ratio
from veneer.measure.verdict import compare_seeds, t_interval
from veneer.store.adapters import read_adapter
from veneer.store.files import new_folder
from veneer.studies.contest import Arm, Sweep, Terms, overridden, sweep_all, thinned
from veneer.studies.contest_page import COLOURS, tell_edges
from veneer.studies.demonstrations import write_demonstrations, write_rows
from veneer.studies.drawing import across_learning_rates, picture
from veneer.studies.lab import ADAPTER, Lab, Outcome, origin
from veneer.studies.learning_rate import FULL_RATES, LORA_RATES, best_rates
from veneer.studies.result import Finding, Result, ratio_of
from veneer.train.config import RunConfig, make_config
from veneer.types import ConfigError, LoraConfig, RunError

QUESTION = "Does the ratio of the best learning rates of an adapter and of all weights grow with the width of the model?"
CLAIMS = (9,)
WIDTHS: Sequence[int] = (64, 128, 256)
LAYERS = 2
PRETRAINED = "pretrained"
"""On skills of digits, a third of the rows each."""
SKILLS = (generate_sort, generate_reverse, generate_count)
PRETRAINING: Mapping[str, Any] = {"steps": 600, "batch_size": 32, "held_out": 0.1}
PRETRAINING_ROWS = 6000
PRETRAINING_RATE = 0.064
"""Over the width."""
DEMONSTRATIONS = 500
"""Of which a fifth is held out."""
SHARED: Mapping[str, Any] = {"kind": "sft", "sft": {"steps": 60, "batch_size": 16, "held_out": 0.2}, "eval": {"every": 60}}
LORA: Mapping[str, Any] = {"rank": 8, "alpha": 32.0}
POWER_MARGIN = 0.5
"""Of a power of the width: halfway between a ratio that stays and one that grows as the width."""
RATIO_MARGIN = 1.0
"""Of a ratio's logarithm to base 2."""
CLAIMED = 10.0


@dataclass(frozen=True)
class Wide:
    """A base of one width, and both ways at every rate."""

    width: int
    learned: float
    """Its held-out loss when it had been pretrained, in nats a token."""
    equal_steps: float
    """The ratio with which first steps are equal."""
    adapter: Sweep
    full: Sweep

    @property
    def logs(self) -> list[float]:
        """Of each seed, the logarithm to base 2 of the ratio of best rates."""
        return list(np.log2(best_rates(self.adapter)) - np.log2(best_rates(self.full)))


def arms_on(bases: Mapping[int, str]) -> Sequence[Arm]:
    """Two for each width, by the folder of its base."""
    return [
        arm
        for width, base in bases.items()
        for arm in (
            Arm(f"{width} wide, rank {LORA['rank']}", {"base": base, "lora": LORA}, LORA_RATES),
            Arm(f"{width} wide, full", {"base": base, "weights": "full"}, FULL_RATES),
        )
    ]


async def conduct(lab: Lab, terms: Terms) -> Result:
    """Raises:
    ConfigError: an override that cannot be applied, or is of what the study itself decides; a lab that makes no bases.
    Interrupted, VeneerError: as ``Lab.run``.
    """
    folder = lab.folder.parent / "data"
    shared = {**SHARED, "sft": {**SHARED["sft"], "data": str(write_demonstrations(folder, DEMONSTRATIONS, seed=0))}}
    shared = overridden(shared, arms_on(dict.fromkeys(WIDTHS, "")), terms)
    if lab.random_base is None or lab.bench is None:
        raise ConfigError("width: this lab makes no bases")
    pretrained = await _pretrained(lab, folder)
    bases = {width: str(_base_of(outcome, folder)) for width, outcome in pretrained.items()}
    arms = thinned(arms_on(bases), terms)
    sweeps = iter(await sweep_all(lab, shared, arms, terms.seeds))
    found = list[Wide]()
    for width, base in bases.items():
        maps = lab.bench.shape_of(base).adapted(LoraConfig(**LORA))
        found.append(Wide(width, -pretrained[width].score, first_step_ratio(maps), next(sweeps), next(sweeps)))
    return width_result(found)


# ---------------------------------------------------------------- bases


async def _pretrained(lab: Lab, folder: Path) -> dict[int, Outcome]:
    """What trained each width, from random weights on."""
    assert lab.random_base is not None
    rng, rows = random.Random("width"), list[Mapping[str, Any]]()
    for _ in range(PRETRAINING_ROWS):
        problem = rng.choice(SKILLS)(rng)
        rows.append({"prompt": problem.prompt, "completion": problem.answer})
    data = str(write_rows(folder, rows))
    configs = list[RunConfig]()
    for width in WIDTHS:
        random_base = folder / f"random-{width}-{origin()[:16]}"
        if not random_base.is_dir():
            with new_folder(random_base) as aside:
                lab.random_base(NANO, aside, width, LAYERS, width)
        sft = {**PRETRAINING, "data": data, "learning_rate": PRETRAINING_RATE / width}
        configs.append(make_config({"kind": "sft", "base": str(random_base), "weights": "full", "sft": sft, "eval": {"every": 10**6}}))
    return dict(zip(WIDTHS, await lab.run(configs), strict=True))


def _base_of(outcome: Outcome, folder: Path) -> Path:
    """A base with the weights that a run came to.

    Raises:
        RunError: they diverged.
    """
    if outcome.diverged:
        raise RunError(f"width: a base could not be pretrained ({outcome.diverged})")
    checkpoint = read_adapter(outcome.folder / ADAPTER)[0]
    base = folder / f"{PRETRAINED}-{checkpoint.adapter.digest[:16]}"
    if not base.is_dir():
        with new_folder(base) as aside:
            for path in Path(outcome.config.base).iterdir():
                if path.suffix != ".safetensors":
                    shutil.copy(path, aside / path.name)
            save_file(dict(checkpoint.weights), aside / "model.safetensors", metadata={"format": "pt"})
    return base


# ---------------------------------------------------------------- what it says


def width_result(found: Sequence[Wide]) -> Result:
    return Result(_findings(found), _tables(found), {"widths": [_one(wide) for wide in found]}, lambda path: _draw(found, path))


def powers(found: Sequence[Wide]) -> list[float]:
    """For each seed the power of the width that the ratio follows: least squares in logarithms."""
    return [float(power) for power in np.polyfit([math.log2(wide.width) for wide in found], np.array([wide.logs for wide in found]), 1)[0]]


def _findings(found: Sequence[Wide]) -> list[Finding]:
    told, arm = t_interval(powers(found)), f"the best rate of rank {LORA['rank']} over that of all weights"
    findings = []
    for asked, claimed in (("does not depend on the width (power 0)", 0.0), ("grows as the width (power 1)", 1.0)):
        beside = compare_seeds(powers(found), [claimed] * len(powers(found)), POWER_MARGIN)
        numbers = f"{told.value:+.2f} [{told.low:+.2f}, {told.high:+.2f}], margin {POWER_MARGIN:g}{beside.wanted}"
        findings.append(Finding(f"{arm} {asked}", beside.said("more", "less"), f"{numbers}{''.join(map(_edges, found))}"))
    for wide in found:
        beside = compare_seeds(wide.logs, [math.log2(CLAIMED)] * len(wide.logs), RATIO_MARGIN)
        numbers = f"{ratio_of(wide.logs)}, margin a factor of 2{beside.wanted}{_edges(wide)}"
        findings.append(Finding(f"{wide.width} wide: it is 10 times that of all weights", beside.said("higher", "lower"), numbers))
    return findings


def _edges(wide: Wide) -> str:
    return tell_edges({f"the adapter, {wide.width} wide,": wide.adapter, f"all weights, {wide.width} wide,": wide.full})


def _tables(found: Sequence[Wide]) -> str:
    lines = [
        "| width | loss when pretrained | best rate, adapter | best rate, full | ratio | for equal first steps | width over twice alpha |",
        "|---" * 7 + "|",
    ]
    for wide in found:
        rates = [list(np.log2(best_rates(sweep))) for sweep in (wide.adapter, wide.full)]
        cells = [ratio_of(logs, ".3g") for logs in (*rates, wide.logs)]
        theories = f"{wide.equal_steps:.1f} | {wide.width / 2 / LORA['alpha']:.1f}"
        lines.append(f"| {wide.width} | {wide.learned:.3f} | {' | '.join(cells)} | {theories} |")
    lines += [
        "",
        "Geometric means over seeds with 95% intervals; the best rate of a seed is the vertex of the parabola through its best three.",
        "",
    ]
    lines += ["| arm | held-out loss by learning rate, the mean over seeds |", "|---|---|"]
    for wide in found:
        for name, sweep in ((f"rank {LORA['rank']}", wide.adapter), ("full", wide.full)):
            losses = ", ".join(f"{rate:.3g} {-mean:.3f}{'*' if rate == sweep.best else ''}" for rate, mean in sweep.means.items())
            lines.append(f"| {wide.width} wide, {name} | {losses} |")
    return "\n".join(lines) + "\n"


def _one(wide: Wide) -> dict[str, Any]:
    return {
        "width": wide.width,
        "learned": wide.learned,
        "equal_steps": wide.equal_steps,
        "log2_ratios": wide.logs,
        **{
            name: {
                "edge": sweep.edge,
                "best_rates": best_rates(sweep),
                "losses": [{"learning_rate": rate, "losses": [-o.score for o in outcomes]} for rate, outcomes in sweep.tried.items()],
            }
            for name, sweep in (("adapter", wide.adapter), ("full", wide.full))
        },
    }


def _draw(found: Sequence[Wide], path: Path) -> None:
    with picture(path, 9.6, 3.2) as figure:
        losses, ratios = figure.subplots(1, 2)
        for wide, colour in zip(found, COLOURS, strict=False):
            for sweep, style in ((wide.adapter, "-"), (wide.full, "--")):
                label = f"{wide.width}" if style == "-" else None
                losses.plot(list(sweep.means), [-m for m in sweep.means.values()], color=colour, linestyle=style, label=label, linewidth=1)
        across_learning_rates(losses)
        losses.set(yscale="log", ylabel="held-out loss", title=f"rank {LORA['rank']}, and all weights (dashed)")
        losses.legend(title="width", frameon=False, fontsize=7)
        widths, around = [wide.width for wide in found], [t_interval(wide.logs) for wide in found]
        bars = [[2**one.value - 2**one.low for one in around], [2**one.high - 2**one.value for one in around]]
        ratios.errorbar(widths, [2**one.value for one in around], yerr=bars, color="#0066cc", marker="o", markersize=3, label="best rates")
        ratios.plot(widths, [wide.equal_steps for wide in found], color="#cc5500", linestyle="--", linewidth=1, label="equal first steps")
        ratios.plot(widths, [w / 2 / LORA["alpha"] for w in widths], color="#228833", linestyle=":", linewidth=1, label="width / (2 alpha)")
        ratios.axhline(CLAIMED, color="#999999", linewidth=0.8, label="10")
        ratios.set(xscale="log", yscale="log", xlabel="width", ylabel="ratio of best rates")
        ratios.set_xticks(widths, [str(w) for w in widths])
        ratios.minorticks_off()
        ratios.legend(frameon=False, fontsize=7)

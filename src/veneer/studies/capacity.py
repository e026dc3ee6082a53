"""Where does a thin adapter fall behind, when there is much to remember? Random facts, of fewer and of more bits than it has parameters.

"LoRA Without Regret" holds that supervised training on more bits than an adapter can store is where it falls behind full fine-tuning, and
counts about one bit a parameter (https://thinkingmachines.ai/blog/lora/, section on capacity); networks that are trained for long store up
to two (https://arxiv.org/abs/2404.05405). A model of billions is never told so much by reward. The bundled base is small enough that a few
dozen facts are more than its thinnest adapters have parameters, so here the argument can fail.

A fact is a key of three digits and an answer of sixteen random ones, 53.15 bits that nothing but memory can tell; every seed has facts of
its own, all of which are read many times. What is stored is the bits of the facts less the bits that the trained model still needs for the
whole answers, so never more than the facts have, and a lower bound. The score is that as a share of the facts' bits.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np

from veneer.measure.verdict import t_interval
from veneer.store.adapters import read_adapter
from veneer.studies.contest import Arm, Contest, Entrant, Terms, hold_contest, overridden
from veneer.studies.contest_page import COLOURS, contest_result
from veneer.studies.demand import Demanded, demand_findings
from veneer.studies.demonstrations import write_rows
from veneer.studies.drawing import picture
from veneer.studies.lab import ADAPTER, Lab, Outcome
from veneer.studies.result import Finding, Result, joined
from veneer.train.config import RunConfig

QUESTION = "Where does a thin adapter fall behind, when there is much to remember?"
CLAIMS = ()
DIGITS = 16
FACT_BITS = DIGITS * math.log2(10)
STEPS: Mapping[int, int] = {16: 150, 64: 450}
"""By number of facts. Batches are of sixteen."""
MARGIN = 0.05
"""Of the facts' bits."""
LORA_RATES = tuple(1e-3 * 2**k for k in range(5))
FULL_RATES = tuple(2.5e-4 * 2**k for k in range(5))
SHARED: Mapping[str, Any] = {
    "kind": "sft",
    "sft": {"batch_size": 16, "held_out": 0.0},
    "eval": {"every": 10**6},
    "checkpoint_every": 10**6,
}
REMEMBERED = "(remembered)"
"""The adapter that is examined; no run can have this name."""


def arms(facts: int | None = None) -> Sequence[Arm]:
    """On nano: 2,560, 11,264 and 180,224 parameters, and all. ``facts``: None: as for the fewest."""
    work = {"sft": {"steps": STEPS[min(STEPS) if facts is None else facts], "held_out": 0.0}}
    thin = {"rank 1 of down_proj": {"rank": 1, "target_modules": ["down_proj"]}, "rank 1": {"rank": 1}, "rank 16": {"rank": 16}}
    return [
        Arm("full", {"weights": "full", **work}, FULL_RATES),
        *(Arm(name, {"lora": lora, **work}, LORA_RATES) for name, lora in thin.items()),
    ]


def write_facts(folder: Path, facts: int, seed: int) -> Path:
    """Keys with their answers, a line each, in a file named by its content.

    Raises:
        StorageError: it cannot be written.
    """
    rng = random.Random(f"facts {facts} {seed}")
    rows = [{"prompt": f"{key:03d}", "completion": "".join(rng.choices("0123456789", k=DIGITS))} for key in rng.sample(range(1000), facts)]
    return write_rows(folder, rows)


# ---------------------------------------------------------------- what is stored


@dataclass(frozen=True)
class Memory:
    """What a run has stored of its facts."""

    config: RunConfig
    facts: int
    needed: float
    """Bits that the answers still cost."""
    needed_before: float
    """That they cost the base."""
    ended: float
    """Bits a fact that were learned in the last quarter of the steps: near 0, more steps would store no more."""
    diverged: str | None

    @property
    def bits(self) -> float:
        """Of the facts."""
        return self.facts * FACT_BITS

    @property
    def stored(self) -> float:
        return self.bits - self.needed

    @property
    def score(self) -> float:
        return 0.0 if self.diverged else self.stored / self.bits

    @property
    def score_before(self) -> float:
        return 1 - self.needed_before / self.bits


@dataclass(frozen=True)
class Memories:
    """Makes runs on so many facts in a lab, those of its seed for each, and examines them."""

    lab: Lab
    facts: int

    async def run(self, configs: Sequence[RunConfig]) -> list[Memory]:
        """Raises:
        Interrupted, VeneerError: as ``Lab.run``.
        """
        outcomes = await self.lab.run([self._with_facts(config) for config in configs])
        found = list[Memory]()
        for outcome in outcomes:
            told = await self.lab.measured("bits of the rows", outcome.config, partial(self._examine, outcome))
            ended = _last_quarter([float(m["train_mean_nll"]) for m in outcome.metrics if "train_mean_nll" in m])
            tokens = told["tokens"] / self.facts
            found.append(Memory(outcome.config, self.facts, told["after"], told["before"], ended * tokens, outcome.diverged))
        return found

    def _with_facts(self, config: RunConfig) -> RunConfig:
        data = write_facts(self.lab.folder.parent / "data", self.facts, config.seed)
        return config.model_copy(update={"sft": config.sft.model_copy(update={"data": str(data)})})

    async def _examine(self, outcome: Outcome, config: RunConfig) -> dict[str, float]:
        """Bits that all answers cost the base and what was trained, and their tokens."""
        place = self.lab.place(config)
        rows, _ = place.rows(config)
        data = [datum for row in rows for datum in row]
        checkpoint, _ = read_adapter(outcome.folder / ADAPTER)
        await place.engine.load_state(REMEMBERED, checkpoint)
        try:
            before, after = place.engine.forward(None, data, "cross_entropy"), place.engine.forward(REMEMBERED, data, "cross_entropy")
            costs = [(await one).metrics for one in (before, after)]
        finally:
            place.engine.remove_adapter(REMEMBERED)
        first, last = (cost["loss:sum"] / math.log(2) for cost in costs)
        return {"before": first, "after": last, "tokens": costs[0]["tokens:sum"]}


def _last_quarter(losses: Sequence[float]) -> float:
    """Bits a token by which the loss fell from the third quarter's end to the last one's, each a mean over an eighth of the steps."""
    eighth = max(1, len(losses) // 8)
    third = losses[len(losses) * 3 // 4 - eighth : len(losses) * 3 // 4]
    return (statistics.fmean(third) - statistics.fmean(losses[-eighth:])) / math.log(2) if len(losses) >= 4 else math.nan


# ---------------------------------------------------------------- what it says


async def conduct(lab: Lab, terms: Terms) -> Result:
    """Raises:
    ConfigError: an override that cannot be applied.
    Interrupted, VeneerError: as ``Lab.run``.
    """
    shared = overridden(SHARED, arms(), terms)
    contests, parameters = dict[int, Contest](), dict[str, int]()
    for facts in STEPS:
        contests[facts] = await hold_contest(Memories(lab, facts), shared, arms(facts), MARGIN, terms)
        for entrant in contests[facts].entrants:
            parameters.setdefault(entrant.arm.name, lab.trainable(entrant.outcomes[0].config))
    question = "{arm} beside {reference}, each at its best learning rate"
    results = {f"{facts} facts": contest_result(contest, question) for facts, contest in contests.items()}
    result = joined(results, _table(contests, parameters), lambda path: _draw(contests, parameters, path))
    document = {**result.document, "parameters": parameters, "stored": _document(contests)}
    return Result([*capacity_findings(contests, parameters), *result.findings], result.tables, document, result.draw)


def memories(entrant: Entrant) -> list[Memory]:
    return [cast(Memory, outcome) for outcome in entrant.outcomes]


def capacity_findings(contests: Mapping[int, Contest], parameters: Mapping[str, int]) -> list[Finding]:
    """Whether adapters fall behind that have room for the facts, or have none, and what a parameter stored at most."""
    told = [
        Demanded(f"{entrant.arm.name}, {facts} facts", facts * FACT_BITS / parameters[entrant.arm.name], entrant.comparison)
        for facts, contest in contests.items()
        for entrant in contest.entrants
        if entrant.comparison is not None
    ]
    most = max(
        (
            (t_interval([m.stored / parameters[e.arm.name] for m in memories(e)]), e.arm.name, n)
            for n, c in contests.items()
            for e in c.entrants
        ),
        key=lambda found: found[0].value,
    )
    mean, arm, facts = most
    return [
        *demand_findings("full fine-tuning", told),
        Finding(
            "most bits that an arm stored for each parameter",
            f"{mean.value:.2f}",
            f"{mean.value:.2f} [{mean.low:.2f}, {mean.high:.2f}]: {arm}, {facts} facts",
        ),
    ]


def _table(contests: Mapping[int, Contest], parameters: Mapping[str, int]) -> str:
    lines = [
        "| facts | arm | parameters | bits asked, a parameter | stored, a parameter | share stored | in the last quarter, bits a fact |"
    ]
    lines.append("|---" * 7 + "|")
    for facts, contest in contests.items():
        for entrant in contest.entrants:
            count, found = parameters[entrant.arm.name], memories(entrant)
            stored, share, ended = (
                t_interval(values) for values in ([m.stored / count for m in found], [m.score for m in found], [m.ended for m in found])
            )
            cells = (facts, entrant.arm.name, f"{count:,}", f"{facts * FACT_BITS / count:.3g}", f"{stored.value:.3g}")
            lines.append(f"| {' | '.join(map(str, cells))} | {share.value:.3f} [{share.low:.3f}, {share.high:.3f}] | {ended.value:+.2f} |")
    return (
        "\n".join([*lines, "", f"Means over seeds. A fact has {FACT_BITS:.2f} bits; less than 0 is a model that is surer of wrong digits."])
        + "\n"
    )


def _document(contests: Mapping[int, Contest]) -> list[dict[str, Any]]:
    return [
        {"facts": facts, "arm": e.arm.name, "bits": [m.stored for m in memories(e)], "last_quarter": [m.ended for m in memories(e)]}
        for facts, contest in contests.items()
        for e in contest.entrants
    ]


def _draw(contests: Mapping[int, Contest], parameters: Mapping[str, int], path: Path) -> None:
    with picture(path, 7.2, 3.4) as figure:
        axes = figure.subplots()
        for (facts, contest), colour in zip(contests.items(), COLOURS[1:], strict=False):
            around = [t_interval([m.stored for m in memories(e)]) for e in contest.entrants]
            counts = [parameters[e.arm.name] for e in contest.entrants]
            bars = [[m.value - m.low for m in around], [m.high - m.value for m in around]]
            axes.errorbar(
                counts, [m.value for m in around], yerr=bars, color=colour, fmt="o", markersize=4, capsize=3, label=f"{facts} facts"
            )
            axes.axhline(facts * FACT_BITS, color=colour, linewidth=0.6, linestyle=":")
        room = np.geomspace(min(parameters.values()) / 4, max(parameters.values()), 200)
        top = 1.1 * max(contests) * FACT_BITS
        bottom = 1.1 * min([0.0, *(m.stored for contest in contests.values() for e in contest.entrants for m in memories(e))])
        for rate, style in ((1, "-"), (2, "--")):
            label = f"{rate} bit{'s' if rate > 1 else ''} a parameter"
            axes.plot(room, rate * room, color="#999999", linewidth=0.8, linestyle=style, label=label)
        axes.set(xscale="log", xlabel="parameters", ylabel="bits stored", ylim=(bottom, top))
        axes.legend(frameon=False, fontsize=7)

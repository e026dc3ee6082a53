"""Is an adapter that was merged into the base's weights what it is beside them? In three dtypes, at full strength and at less.

An adapter beside the base is a sum of products, and costs nothing but those. Merged, W + (alpha / r) B A is stored once, in the dtype of
the base, and what is smaller than half of a weight's last bit is gone: with bfloat16's eight significant bits a small update can lose
most (https://arxiv.org/abs/2505.11711 counts what is left). Nor can a merged adapter be switched off.

Adapters are trained by reinforcement learning, one a seed. In every dtype the base is rounded first, as models are published, and then
asked twice: with the adapter beside it, and with the adapter merged into the rounded weights. Both compute in float32, so what is found
is what storing the sum cost. A weaker adapter is the same times a factor: a step of learning changes wide models less beside their
weights than this base. Log-probabilities are those of the adapter's own answers to held-out problems.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from veneer.envs import load_env
from veneer.measure.verdict import compare_seeds, t_interval
from veneer.store.adapters import read_adapter
from veneer.store.stack import stack_adapters
from veneer.studies import toggle
from veneer.studies.bench import Bench, Merge
from veneer.studies.contest import Terms, overridden
from veneer.studies.drawing import picture
from veneer.studies.lab import ADAPTER, Lab, Outcome, Place
from veneer.studies.result import Finding, Result, interval_of
from veneer.studies.toggle import LOW_RANK, ask, problem_prompts
from veneer.train.config import RunConfig, make_config
from veneer.train.evaluate import evaluate
from veneer.train.rollouts import Policy, closing
from veneer.types import Checkpoint, ConfigError, Datum, Engine, RunError, SamplingParams, Tokens

QUESTION = "Is an adapter that was merged into the base's weights what it is beside them?"
CLAIMS = (22,)
SHARED: Mapping[str, Any] = {
    "env": {"name": "arithmetic"},
    "rl": {"steps": 20, "groups_per_batch": 8, "group_size": 8},
    "eval": {"problems": 64, "every": 20},
    "lora": {"rank": 1},
}
DTYPES = ("float32", "float16", "bfloat16")
STRENGTHS: Sequence[float] = (1.0, 2**-2, 2**-4, 2**-6)
PROBLEMS = 256
SOLVED_MARGIN = 0.02
GAP = 1e-3
"""Nats: further off is another answer in float32 (docs/proof.md)."""
BESIDE = "(beside)"
"""The adapter that is examined; no run can have this name."""


@dataclass(frozen=True)
class Beside:
    """An adapter beside a base, at one strength."""

    rows: Sequence[tuple[int, Tokens]]
    """How long each prompt is, and the prompt with an answer of the adapter's."""
    adapted: NDArray[np.float64]
    """Log-probabilities of all answers' tokens."""
    effect: float
    """Root mean square of their difference from those of the base alone, in nats."""
    solved: float


@dataclass(frozen=True)
class Merged:
    """The same in the base's weights."""

    seed: int
    strength: float
    dtype: str
    lost: float
    changed: float
    gap: float
    """Largest, of its log-probabilities to those of base and adapter, in nats."""
    gap_share: float
    """Root mean square of the gaps over the adapter's effect."""
    solved: float
    solved_beside: float


async def conduct(lab: Lab, terms: Terms) -> Result:
    """Raises:
    ConfigError: an override that cannot be applied, or is of what the study itself decides; a lab that cannot merge.
    RunError: a run has left the base as it was.
    Interrupted, VeneerError: as ``Lab.run``.
    """
    shared = {**overridden(SHARED, [LOW_RANK], terms), **LOW_RANK.settings}
    configs = [make_config({**shared, "seed": seed}) for seed in range(terms.seeds)]
    if lab.merge is None or lab.bench is None:
        raise ConfigError("merging: this lab has nothing to merge with")
    merger = Merger(lab.merge, lab.bench)
    outcomes = await lab.run(configs)
    asked = f"{toggle.PROMPTS} x {toggle.ANSWERS} answers of {toggle.LENGTH} tokens"
    what = f"merged in {', '.join(DTYPES)} at {STRENGTHS}, {PROBLEMS} problems, {asked}"
    records = [await lab.measured(what, outcome.config, partial(_merge, lab, merger, outcome)) for outcome in outcomes]
    return merging_result([Merged(**one) for record in records for one in record], outcomes)


async def _merge(lab: Lab, merger: Merger, outcome: Outcome, config: RunConfig) -> list[dict[str, Any]]:
    """An adapter in every dtype, at every strength."""
    place, (adapter, _) = lab.place(config), read_adapter(outcome.folder / ADAPTER)
    renderer, prompts = place.renderer, await problem_prompts(place, config)
    found = list[Merged]()
    with tempfile.TemporaryDirectory(prefix="veneer-merging-") as scratch:
        for dtype in DTYPES:
            folder = Path(scratch) / dtype
            merger.merge(config.base, stack_adapters([(adapter, 0.0)], BESIDE), folder, dtype)
            rounded = Place(merger.open(folder), renderer)
            for strength in STRENGTHS:
                lab.go_on()
                checkpoint = stack_adapters([(_moved(adapter, rounded.engine), strength)], BESIDE)
                beside = await _beside(rounded, prompts, checkpoint, config)
                found.append(await merger.examine(folder, rounded, outcome, checkpoint, strength, dtype, beside))
    return [asdict(one) for one in found]


def _moved(checkpoint: Checkpoint, engine: Engine) -> Checkpoint:
    """To the engine's base, which is the adapter's own but for rounding."""
    return replace(checkpoint, adapter=replace(checkpoint.adapter, base_digest=engine.base_digest))


async def _beside(place: Place, prompts: Sequence[Tokens], checkpoint: Checkpoint, config: RunConfig) -> Beside:
    await place.engine.load_state(BESIDE, checkpoint)
    try:
        answers = (await ask(place, prompts, [BESIDE]))[BESIDE]
        rows = [
            (len(prompt), np.concatenate([prompt, sample.tokens]))
            for prompt, samples in zip(prompts, answers, strict=True)
            for sample in samples
        ]
        base, adapted = await answers_logprobs(place.engine, None, rows), await answers_logprobs(place.engine, BESIDE, rows)
        effect = _rms(adapted - base)
        if not effect:
            raise RunError(
                f"merging: the adapter of seed {config.seed} changes no log-probability; train it on what the base can be rewarded"
            )
        return Beside(rows, adapted, effect, await _solved(place, BESIDE, config))
    finally:
        place.engine.remove_adapter(BESIDE)


@dataclass(frozen=True)
class Merger:
    """What merges, and opens what was merged."""

    merge: Merge
    bench: Bench

    def open(self, folder: Path) -> Engine:
        return self.bench.open(str(folder), "lora", exact=True).engine

    async def examine(
        self, base: Path, place: Place, outcome: Outcome, checkpoint: Checkpoint, strength: float, dtype: str, beside: Beside
    ) -> Merged:
        """``base``: the folder of what ``place`` runs."""
        with tempfile.TemporaryDirectory(dir=base.parent) as name:
            stored = self.merge(str(base), checkpoint, Path(name), dtype)
            merged = Place(self.open(Path(name)), place.renderer)
        gaps = await answers_logprobs(merged.engine, None, beside.rows) - beside.adapted
        return Merged(
            seed=outcome.config.seed,
            strength=strength,
            dtype=dtype,
            lost=stored.lost,
            changed=stored.changed,
            gap=float(np.abs(gaps).max()),
            gap_share=_rms(gaps) / beside.effect,
            solved=await _solved(merged, None, outcome.config),
            solved_beside=beside.solved,
        )


async def answers_logprobs(engine: Engine, name: str | None, rows: Sequence[tuple[int, Tokens]]) -> NDArray[np.float64]:
    """Of all answers' tokens, one behind the other."""
    data = []
    for _, row in rows:
        zeros = np.zeros(len(row) - 1, np.float32)
        data.append(Datum(row[:-1], row[1:], zeros, zeros, zeros + 1))
    read = (await engine.forward(name, data, "cross_entropy")).logprobs_D
    return np.concatenate([one[start - 1 :] for (start, _), one in zip(rows, read, strict=True)]).astype(np.float64)


async def _solved(place: Place, name: str | None, config: RunConfig) -> float:
    policy = Policy(place.engine, place.renderer, name, SamplingParams(max_tokens=config.rl.max_tokens), config.env.seconds)
    async with closing(load_env(config.env.name, config.env.args)) as dataset:
        return (await evaluate(policy, dataset, PROBLEMS, 0)).solved.value


def _rms(values: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.square(values).mean()))


# ---------------------------------------------------------------- what it says


def merging_result(found: Sequence[Merged], outcomes: Sequence[Outcome]) -> Result:
    findings = [_of_precision(found)]
    for dtype in DTYPES:
        mine = _of(found, dtype, STRENGTHS[0])
        told = compare_seeds([m.solved for m in mine], [m.solved_beside for m in mine], SOLVED_MARGIN)
        findings.append(Finding(f"held-out problems solved: merged in {dtype} beside not merged", told.verdict, told.numbers))
    for strength in STRENGTHS:
        shares = [m.gap_share for m in _of(found, DTYPES[-1], strength)]
        how = "at full strength" if strength == 1 else f"at 1/{1 / strength:g} of its strength"
        asked = f"what merging in {DTYPES[-1]} takes or adds, over the adapter's effect on log-probabilities, {how}"
        findings.append(Finding(asked, f"{t_interval(shares).value:.2g}", interval_of(shares)))
    document = {
        "merged": [asdict(one) for one in found],
        "trained": [{"seed": o.config.seed, "before": o.score_before, "after": o.score, "diverged": o.diverged} for o in outcomes],
    }
    return Result(findings, _tables(found, outcomes), document, lambda path: _draw(found, path))


def _of_precision(found: Sequence[Merged]) -> Finding:
    gaps = [one.gap for one in found if one.dtype == "float32"]
    return Finding(
        "merged in float32, every log-probability is what it is beside the base, to a thousandth of a nat",
        "equal" if max(gaps) <= GAP else "differs",
        f"{max(gaps):.2g} nats at the most, over {len(gaps)} merged models",
    )


def _of(found: Sequence[Merged], dtype: str, strength: float) -> list[Merged]:
    return [one for one in found if (one.dtype, one.strength) == (dtype, strength)]


def _tables(found: Sequence[Merged], outcomes: Sequence[Outcome]) -> str:
    lines = ["| stored in | strength | lost of the update | weights that moved | largest gap, nats | gap over effect | solved | beside |"]
    lines.append("|---" * 8 + "|")
    for dtype in DTYPES:
        for strength in STRENGTHS:
            mine = _of(found, dtype, strength)
            columns = ("lost", "changed", "gap", "gap_share", "solved", "solved_beside")
            cells = [interval_of([getattr(one, column) for one in mine]) for column in columns]
            lines.append(f"| {dtype} | {strength:.3g} | {' | '.join(cells)} |")
    trained = ", ".join(f"{o.score_before:.3f} -> {o.score:.3f}" + (" (diverged)" if o.diverged else "") for o in outcomes)
    lines += [
        "",
        "Means over seeds with 95% intervals; lost and gap over effect are ratios of root mean squares: 0 is the whole adapter, 1 is an",
    ]
    lines += [f"error as large as the adapter. Their rewards on held-out problems, before and after training: {trained}."]
    return "\n".join(lines) + "\n"


def _draw(found: Sequence[Merged], path: Path) -> None:
    """Left: what storing loses, by strength. Right: what is solved, merged and beside."""
    with picture(path, 8.4, 3.2) as figure:
        left, right = figure.subplots(1, 2)
        for dtype, colour in zip(DTYPES, ("#555555", "#0066cc", "#cc5500"), strict=False):
            for axes, column in ((left, "gap_share"), (right, "solved")):
                around = [t_interval([getattr(one, column) for one in _of(found, dtype, strength)]) for strength in STRENGTHS]
                bars = [[m.value - m.low for m in around], [m.high - m.value for m in around]]
                axes.errorbar(
                    STRENGTHS, [m.value for m in around], yerr=bars, color=colour, marker="o", markersize=3, capsize=3, label=f"in {dtype}"
                )
        beside = [t_interval([one.solved_beside for one in _of(found, DTYPES[0], strength)]).value for strength in STRENGTHS]
        right.plot(STRENGTHS, beside, color="black", linestyle=":", label="not merged")
        left.set(xscale="log", yscale="log", xlabel="strength of the adapter", ylabel="error over effect on log-probabilities")
        right.set(xscale="log", xlabel="strength of the adapter", ylabel="share of held-out problems solved", ylim=(0, 1))
        left.legend(frameon=False, fontsize=7)
        right.legend(frameon=False, fontsize=7)

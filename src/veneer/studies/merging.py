"""Is an adapter that was merged into the base's weights what it is beside them? In three dtypes, at full strength and at less.

An adapter beside the base is a sum of products, and costs nothing but those. Merged, W + (alpha / r) B A is stored once, in the dtype of
the base, and what is smaller than half of a weight's last bit is gone: with bfloat16's eight significant bits a small update can lose
most (https://arxiv.org/abs/2505.11711 counts what is left). Nor can a merged adapter be switched off.

Adapters are trained by reinforcement learning, one a seed, and merged at full strength and at less, as updates of longer training on wider
models are smaller beside their weights than these. Merged weights are read back and run in float32, so what is found is what storing
cost. Log-probabilities are those of the adapter's own answers to held-out problems.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from veneer.envs import load_env
from veneer.measure.verdict import compare_seeds, t_interval
from veneer.store.adapters import read_adapter
from veneer.store.stack import stack_adapters
from veneer.studies.bench import Bench, Merge
from veneer.studies.contest import Arm, Terms, overridden
from veneer.studies.drawing import picture
from veneer.studies.lab import ADAPTER, Lab, Outcome, Place
from veneer.studies.result import Finding, Result
from veneer.studies.toggle import ask, problem_prompts
from veneer.train.config import RunConfig, make_config
from veneer.train.evaluate import evaluate
from veneer.train.rollouts import Policy, closing
from veneer.types import Checkpoint, ConfigError, Datum, Engine, SamplingParams, Tokens

QUESTION = "Is an adapter that was merged into the base's weights what it is beside them?"
CLAIMS = (22,)
SHARED: Mapping[str, Any] = {
    "env": {"name": "arithmetic"},
    "rl": {"steps": 20, "groups_per_batch": 8, "group_size": 8},
    "eval": {"problems": 64, "every": 20},
    "lora": {"rank": 1},
}
LOW_RANK = Arm("adapter", {"weights": "lora"}, ())
"""What the study is about: it stays."""
DTYPES = ("float32", "float16", "bfloat16")
STRENGTHS: Sequence[float] = (1.0, 0.25, 0.0625)
PROBLEMS = 256
SOLVED_MARGIN = 0.02
GAP = 1e-3
"""Nats: further off is another answer in float32 (docs/proof.md)."""
BESIDE = "(beside)"
"""The adapter that is examined; no run can have this name."""


@dataclass(frozen=True)
class Beside:
    """An adapter beside the base, at one strength."""

    rows: Sequence[tuple[int, Tokens]]
    """Prompts with its answers, and how long the prompt is."""
    base: NDArray[np.float64]
    """Log-probabilities of all answers' tokens without it,"""
    adapted: NDArray[np.float64]
    """and with it."""
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
    """Root mean square of the gaps over that of the adapter's effect."""
    solved: float
    solved_beside: float


async def conduct(lab: Lab, terms: Terms) -> Result:
    """Raises:
    ConfigError: an override that cannot be applied, or is of what the study itself decides; a lab that cannot merge.
    Interrupted, VeneerError: as ``Lab.run``.
    """
    shared = {**overridden(SHARED, [LOW_RANK], terms), **LOW_RANK.settings}
    configs = [make_config({**shared, "seed": seed}) for seed in range(terms.seeds)]
    if lab.merge is None or lab.bench is None:
        raise ConfigError("merging: this lab has nothing to merge with")
    outcomes = await lab.run(configs)
    place = lab.place(configs[0])
    prompts = await problem_prompts(place, configs[0])
    found = list[Merged]()
    for outcome in outcomes:
        whole = read_adapter(outcome.folder / ADAPTER)[0]
        for strength in STRENGTHS:
            checkpoint = stack_adapters([(whole, strength)], BESIDE)
            beside = await _beside(place, prompts, checkpoint, outcome.config)
            for dtype in DTYPES:
                lab.go_on()
                found.append(await _merged(lab.merge, lab.bench, place, outcome, checkpoint, strength, dtype, beside))
    return merging_result(found, outcomes)


async def _beside(place: Place, prompts: Sequence[Tokens], checkpoint: Checkpoint, config: RunConfig) -> Beside:
    await place.engine.load_state(BESIDE, checkpoint)
    try:
        answers = (await ask(place, prompts, [BESIDE]))[BESIDE]
        rows = [
            (len(prompt), np.concatenate([prompt, sample.tokens]))
            for prompt, samples in zip(prompts, answers, strict=True)
            for sample in samples
        ]
        base, adapted = await _logprobs(place.engine, None, rows), await _logprobs(place.engine, BESIDE, rows)
        return Beside(rows, base, adapted, await _solved(place, BESIDE, config))
    finally:
        place.engine.remove_adapter(BESIDE)


async def _merged(
    merge: Merge, bench: Bench, place: Place, outcome: Outcome, checkpoint: Checkpoint, strength: float, dtype: str, beside: Beside
) -> Merged:
    with tempfile.TemporaryDirectory(prefix="merged-", dir=outcome.folder) as name:
        stored = merge(outcome.config.base, checkpoint, Path(name), dtype)
        merged = Place(bench.open(name, "lora").engine, place.renderer)
    gaps, effect = await _logprobs(merged.engine, None, beside.rows) - beside.adapted, _rms(beside.adapted - beside.base)
    return Merged(
        seed=outcome.config.seed,
        strength=strength,
        dtype=dtype,
        lost=stored.lost,
        changed=stored.changed,
        gap=float(np.abs(gaps).max()),
        gap_share=_rms(gaps) / effect if effect else 0.0,
        solved=await _solved(merged, None, outcome.config),
        solved_beside=beside.solved,
    )


async def _logprobs(engine: Engine, name: str | None, rows: Sequence[tuple[int, Tokens]]) -> NDArray[np.float64]:
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
        for strength in STRENGTHS:
            mine = _of(found, dtype, strength)
            told = compare_seeds([m.solved for m in mine], [m.solved_beside for m in mine], SOLVED_MARGIN)
            findings.append(Finding(f"solved: merged in {dtype} beside not merged, {_strength(strength)}", told.verdict, told.numbers))
    for dtype in DTYPES[1:]:
        for strength in STRENGTHS:
            shares = [m.gap_share for m in _of(found, dtype, strength)]
            asked = f"of the adapter's effect on log-probabilities, what storing it in {dtype} adds as noise, {_strength(strength)}"
            findings.append(Finding(asked, f"{t_interval(shares).value:.2f}", _interval(shares)))
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


def _strength(strength: float) -> str:
    return "at full strength" if strength == 1 else f"at {strength:g} of its strength"


def _interval(values: Sequence[float]) -> str:
    mean = t_interval(values)
    return f"{mean.value:.3g} [{mean.low:.3g}, {mean.high:.3g}]"


def _tables(found: Sequence[Merged], outcomes: Sequence[Outcome]) -> str:
    lines = ["| stored in | strength | lost of the update | weights that moved | largest gap, nats | gap over effect | solved | beside |"]
    lines.append("|---" * 8 + "|")
    for dtype in DTYPES:
        for strength in STRENGTHS:
            mine = _of(found, dtype, strength)
            columns = ("lost", "changed", "gap", "gap_share", "solved", "solved_beside")
            cells = [_interval([getattr(one, column) for one in mine]) for column in columns]
            lines.append(f"| {dtype} | {strength:g} | {' | '.join(cells)} |")
    trained = ", ".join(f"{o.score_before:.3f} -> {o.score:.3f}" + (" (diverged)" if o.diverged else "") for o in outcomes)
    lines += [
        "",
        "Means over seeds with 95% intervals; lost and gap over effect are of root mean squares: 0 is all there, 1 as much noise as",
    ]
    lines += [f"update. The adapters' rewards on held-out problems, before and after training: {trained}."]
    return "\n".join(lines) + "\n"


def _draw(found: Sequence[Merged], path: Path) -> None:
    """Left: what storing loses, by strength. Right: what is solved, merged and beside."""
    with picture(path, 8.4, 3.2) as figure:
        left, right = figure.subplots(1, 2)
        for dtype, colour in zip(DTYPES, ("#555555", "#0066cc", "#cc5500"), strict=True):
            for axes, column in ((left, "gap_share"), (right, "solved")):
                around = [t_interval([getattr(one, column) for one in _of(found, dtype, strength)]) for strength in STRENGTHS]
                bars = [[m.value - m.low for m in around], [m.high - m.value for m in around]]
                axes.errorbar(
                    STRENGTHS, [m.value for m in around], yerr=bars, color=colour, marker="o", markersize=3, capsize=3, label=f"in {dtype}"
                )
        beside = [t_interval([one.solved_beside for one in _of(found, DTYPES[0], strength)]).value for strength in STRENGTHS]
        right.plot(STRENGTHS, beside, color="black", linestyle=":", label="not merged")
        left.set(xscale="log", yscale="log", xlabel="strength of the adapter", ylabel="noise over effect on log-probabilities")
        right.set(xscale="log", xlabel="strength of the adapter", ylabel="share of held-out problems solved", ylim=(0, 1))
        left.legend(frameon=False, fontsize=7)
        right.legend(frameon=False, fontsize=7)

"""What does it cost to switch a behaviour on and off? Adapters over one base, request by request and within a context.

An adapter that is not merged is a sum beside the base's products, so leaving it out should leave the base: the same bits as on an engine
that has never seen an adapter. Activated LoRA goes further and lets an adapter act from some token on, over keys and values that the
base has computed already (https://arxiv.org/abs/2504.12397); an adapter that acts on the whole context must read it anew.

The engine is asked before any adapter is there. Then adapters are trained, one a seed, by reinforcement learning of a few steps, and
loaded beside each other. Clocks run on requests for one token behind prompts that nobody has read: the second of three follows a request
with another behaviour, the third one with its own, and the switch costs the difference. Both kinds take turns, so that a busy machine
slows both; a seed's figures are medians over neighbours. Adapters in the base's own weights are the study ``merging``'s.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from veneer.envs import load_env
from veneer.measure.verdict import compare_seeds, t_interval
from veneer.store.adapters import read_adapter
from veneer.store.stack import stack_adapters
from veneer.studies.contest import Arm, Terms, overridden
from veneer.studies.drawing import picture
from veneer.studies.lab import ADAPTER, Lab, Outcome, Place
from veneer.studies.result import Finding, Result
from veneer.train.config import RunConfig, make_config
from veneer.train.evaluate import evaluate
from veneer.train.rollouts import Policy, closing, derive_seed
from veneer.types import AdapterError, Checkpoint, Sample, SamplingParams, Switch, Tokens

QUESTION = "What does it cost to switch a behaviour on and off?"
CLAIMS = (22,)
SHARED: Mapping[str, Any] = {
    "env": {"name": "arithmetic"},
    "rl": {"steps": 10, "groups_per_batch": 8, "group_size": 8},
    "eval": {"problems": 64, "every": 10},
}
LOW_RANK = Arm("adapter", {"weights": "lora"}, ())
"""What the study is about: it stays."""
PROMPTS, ANSWERS, LENGTH = 16, 4, 32
"""Held-out problems that the base is asked before and after, answers of each, and their longest."""
REPEATS = 100
"""Of each timed request, a seed."""
SHORT, CONTEXT, TAIL = 32, 256, 16
"""Tokens of a prompt whose behaviour is switched as a whole, of one within which it is switched, and of the part behind the switch."""
SWITCH_MARGIN = 1.0
"""Milliseconds: less is none that matters."""
RATIO_MARGIN = 0.05
SCALES: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0)
SCALED, PROBLEMS = "scaled", 128
"""What a scaled adapter is called; the held-out problems that it is given."""


async def conduct(lab: Lab, terms: Terms) -> Result:
    """Raises:
    ConfigError: an override that cannot be applied, or is of what the study itself decides.
    Interrupted, VeneerError: as ``Lab.run``.
    """
    shared = {**overridden(SHARED, [LOW_RANK], terms), **LOW_RANK.settings}
    configs = [make_config({**shared, "seed": seed}) for seed in range(terms.seeds)]
    place = lab.place(configs[0], fresh=True)
    prompts = await problem_prompts(place, configs[0])
    before = await ask(place, prompts, [None])
    outcomes = await lab.run(configs, here=True)  # what is asked is whether this engine's base is what it was before
    place = lab.place(configs[0])
    adapters = {f"seed-{outcome.config.seed}": read_adapter(outcome.folder / ADAPTER)[0] for outcome in outcomes}
    try:
        for name, checkpoint in adapters.items():
            await place.engine.load_state(name, checkpoint)
        bits = await compare_bits(place, prompts, before[None], list(adapters))
        costs = [clock(lab, place, seed, list(adapters)) for seed in range(terms.seeds)]
        doses = [await dose(lab, place, prompts, before[None], name, adapters[name], configs[0]) for name in adapters]
    finally:
        for name in (*adapters, SCALED):
            with suppress(AdapterError):  # it was not loaded yet
                place.engine.remove_adapter(name)
    return toggle_result(bits, costs, doses, outcomes)


# ---------------------------------------------------------------- the same bits?

Answers = Mapping[str | None, Sequence[Sequence[Sample]]]
"""By adapter; [prompt][answer]."""


async def problem_prompts(place: Place, config: RunConfig) -> list[Tokens]:
    """Of held-out problems, as a policy sees them."""
    prompts = []
    async with closing(load_env(config.env.name, config.env.args)) as dataset:
        for index in range(PROMPTS):
            shown = await dataset.env("eval", index).initial_observation()
            prompts.append(place.renderer.build_generation_prompt(shown.messages, shown.tools))
    return prompts


async def ask(place: Place, prompts: Sequence[Tokens], names: Sequence[str | None]) -> Answers:
    """What the base (None) and adapters answer, all at once, with the log-probabilities of every token."""
    asked = {
        name: [
            place.engine.sample(prompt, name, SamplingParams(max_tokens=LENGTH, seed=i), ANSWERS, prompt_logprobs=True)
            for i, prompt in enumerate(prompts)
        ]
        for name in names
    }
    return {name: [await future for future in futures] for name, futures in asked.items()}


def bits_of(answers: Sequence[Sequence[Sample]]) -> list[tuple[bytes, bytes, bytes]]:
    """Every answer's tokens and log-probabilities, and its prompt's log-probabilities."""
    return [
        (sample.tokens.tobytes(), sample.logprobs.tobytes(), b"" if sample.prompt_logprobs is None else sample.prompt_logprobs.tobytes())
        for samples in answers
        for sample in samples
    ]


def differing(one: Sequence[Sequence[Sample]], other: Sequence[Sequence[Sample]]) -> int:
    """Answers that are not the same to the last bit."""
    return sum(a != b for a, b in zip(bits_of(one), bits_of(other), strict=True))


@dataclass(frozen=True)
class Bits:
    """Answers that differ in any bit."""

    answers: int
    """Of the base, and of each adapter."""
    adapters: int
    base_beside: int
    """The base's, asked with all adapters in one batch, from those of the time before there was any."""
    base_after: int
    """The same, asked alone when adapters had answered."""
    adapters_beside: int
    """Of all adapters: in one batch with the base and the others, from those alone."""
    adapters_alike: int
    """Of all adapters: those that do not differ from the base's."""
    digest_kept: bool
    """The base's weights in memory are what they were."""


async def compare_bits(place: Place, prompts: Sequence[Tokens], before: Sequence[Sequence[Sample]], names: Sequence[str]) -> Bits:
    together = await ask(place, prompts, [None, *names])
    alone = {name: (await ask(place, prompts, [name]))[name] for name in names}
    after = (await ask(place, prompts, [None]))[None]
    total = sum(map(len, before))
    return Bits(
        answers=total,
        adapters=len(names),
        base_beside=differing(before, together[None]),
        base_after=differing(before, after),
        adapters_beside=sum(differing(alone[name], together[name]) for name in names),
        adapters_alike=sum(total - differing(before, alone[name]) for name in names),
        digest_kept=place.engine.measure_base_digest() == place.engine.base_digest,
    )


# ---------------------------------------------------------------- what it costs


@dataclass(frozen=True)
class Costs:
    """Of one seed: milliseconds of every timed request."""

    same: Sequence[float]
    """With the behaviour of the request before."""
    switched: Sequence[float]
    """With another."""
    within: Sequence[float]
    """The adapter acts on the last TAIL tokens of a context that the base has read."""
    anew: Sequence[float]
    """It acts on all of it."""
    kept: int
    """Tokens of the context whose keys and values the switch within it could use, the least over all requests."""
    untouched: bool
    """Before the switch, the context's log-probabilities are the base's to the last bit; behind it they are not."""

    @property
    def switch(self) -> float:
        """Milliseconds that it costs, the median over neighbours."""
        return statistics.median(b - a for a, b in zip(self.same, self.switched, strict=True))

    @property
    def switch_ratio(self) -> float:
        return statistics.median(b / a for a, b in zip(self.same, self.switched, strict=True))

    @property
    def within_ratio(self) -> float:
        return statistics.median(b / a for a, b in zip(self.anew, self.within, strict=True))


def clock(lab: Lab, place: Place, seed: int, names: Sequence[str]) -> Costs:
    """Time the seed's own adapter against the base and against another adapter, in turns."""
    engine, rng = place.engine, np.random.default_rng(derive_seed("toggle", seed))
    mine, other = names[seed], names[(seed + 1) % len(names)]

    def prompt(length: int) -> Tokens:
        return rng.integers(0, place.renderer.vocab_size, length)

    def timed(tokens: Tokens, name: str | None, switches: Sequence[Switch] = ()) -> tuple[float, Sample]:
        begun = time.perf_counter()
        (sample,) = engine.sample(tokens, name, SamplingParams(max_tokens=1, stop_token_ids=()), switches=switches).result()
        return 1e3 * (time.perf_counter() - begun), sample

    same, switched = list[float](), list[float]()
    turns = itertools.cycle([(None, mine), (mine, None), (other, mine), (mine, other)])
    for first, second in itertools.islice(turns, REPEATS):
        timed(prompt(SHORT), first)
        switched.append(timed(prompt(SHORT), second)[0])
        same.append(timed(prompt(SHORT), second)[0])
        lab.go_on()
    within, anew, kept = list[float](), list[float](), CONTEXT
    length = min(CONTEXT, engine.context_length - 1)
    acts = [Switch(mine, at=length - TAIL)]
    for turn in range(REPEATS):
        tokens = prompt(length)
        timed(tokens, None)  # an earlier turn of the conversation, without the behaviour
        for one in ("within", "anew") if turn % 2 else ("anew", "within"):
            if one == "anew":
                anew.append(timed(tokens, mine)[0])
            else:
                took, sample = timed(tokens, None, acts)
                within.append(took)
                kept = min(kept, sample.cached_tokens)
        lab.go_on()
    return Costs(same, switched, within, anew, kept, _untouched(place, prompt(length), acts))


def _untouched(place: Place, tokens: Tokens, acts: Sequence[Switch]) -> bool:
    params, at = SamplingParams(max_tokens=0), acts[0].at
    rows = [place.engine.sample(tokens, None, params, prompt_logprobs=True, switches=switches) for switches in ((), acts)]
    (base,), (switched,) = (row.result() for row in rows)
    assert base.prompt_logprobs is not None
    assert switched.prompt_logprobs is not None
    assert at is not None
    before = base.prompt_logprobs[: at + 1].tobytes() == switched.prompt_logprobs[: at + 1].tobytes()
    return before and base.prompt_logprobs[at + 1 :].tobytes() != switched.prompt_logprobs[at + 1 :].tobytes()


# ---------------------------------------------------------------- more and less of it


@dataclass(frozen=True)
class Dose:
    """What one adapter does at each of SCALES."""

    kl: Sequence[float]
    """From the base, nats a token: on the base's own answers, so at full strength an estimate of KL(base || adapter)."""
    solved: Sequence[float]
    ends_hold: bool
    """At 0 it answers as the base, at 1 as the adapter, to the last bit."""

    @property
    def rises(self) -> bool:
        return all(a < b for a, b in itertools.pairwise(self.kl))


async def dose(
    lab: Lab,
    place: Place,
    prompts: Sequence[Tokens],
    base: Sequence[Sequence[Sample]],
    name: str,
    checkpoint: Checkpoint,
    config: RunConfig,
) -> Dose:
    whole = (await ask(place, prompts, [name]))[name]
    kl, solved, ends = list[float](), list[float](), list[bool]()
    policy = Policy(place.engine, place.renderer, SCALED, SamplingParams(max_tokens=config.rl.max_tokens), config.env.seconds)
    for scale in SCALES:
        lab.go_on()
        await place.engine.load_state(SCALED, stack_adapters([(checkpoint, scale)], SCALED))
        if scale in (0.0, 1.0):
            scaled = (await ask(place, prompts, [SCALED]))[SCALED]
            ends.append(differing(scaled, whole if scale else base) == 0)
        kl.append(await _kl(place, prompts, base))
        async with closing(load_env(config.env.name, config.env.args)) as dataset:
            solved.append((await evaluate(policy, dataset, PROBLEMS, 0)).solved.value)
    return Dose(kl, solved, all(ends))


async def _kl(place: Place, prompts: Sequence[Tokens], base: Sequence[Sequence[Sample]]) -> float:
    """Mean over the tokens of the base's answers: their log-probability under the base less that under the scaled adapter."""
    rows = [
        (len(prompt), np.concatenate([prompt, sample.tokens])) for prompt, samples in zip(prompts, base, strict=True) for sample in samples
    ]

    def read(name: str | None) -> list[Any]:
        return [place.engine.sample(row, name, SamplingParams(max_tokens=0), prompt_logprobs=True) for _, row in rows]

    theirs, ours = read(None), read(SCALED)
    lost = []
    for (start, _), one, other in zip(rows, theirs, ours, strict=True):
        (a,), (b,) = await asyncio.gather(one, other)
        lost.append((a.prompt_logprobs - b.prompt_logprobs)[start:].astype(np.float64))
    return float(np.concatenate(lost).mean())


# ---------------------------------------------------------------- what it says


def toggle_result(bits: Bits, costs: Sequence[Costs], doses: Sequence[Dose], outcomes: Sequence[Outcome]) -> Result:
    findings = [*_of_bits(bits, costs), *_of_costs(costs), _of_doses(doses)]
    document = {
        "bits": asdict(bits),
        "costs_ms": [asdict(one) for one in costs],
        "scales": list(SCALES),
        "doses": [asdict(one) for one in doses],
        "trained": [{"seed": o.config.seed, "before": o.score_before, "after": o.score, "diverged": o.diverged} for o in outcomes],
    }
    return Result(findings, _tables(costs, doses, outcomes), document, partial(_draw, costs, doses))


def _of_bits(bits: Bits, costs: Sequence[Costs]) -> list[Finding]:
    off = f"{bits.base_beside} of {bits.answers} answers differ in any bit in one batch with {bits.adapters} adapters"
    off += f", {bits.base_after} after them; the base's digest is {'the same' if bits.digest_kept else 'another'}"
    of_adapters = bits.answers * bits.adapters
    return [
        Finding(
            "with the adapter off, the base answers as it did before any adapter was there, to the last bit",
            "equal" if bits.digest_kept and not bits.base_beside + bits.base_after else "differs",
            off,
        ),
        Finding(
            "with an adapter on, every answer or its log-probabilities are others",
            "broken" if bits.adapters_alike else "holds",
            f"{of_adapters - bits.adapters_alike} of {of_adapters}",
        ),
        Finding(
            "adapters in one batch answer as each does alone, to the last bit",
            "differs" if bits.adapters_beside else "equal",
            f"{bits.adapters_beside} of {of_adapters} answers differ in any bit",
        ),
        Finding(
            "a switch within a context leaves all before it to the last bit, and changes what is behind it",
            "holds" if all(one.untouched for one in costs) else "broken",
            f"{sum(one.untouched for one in costs)} of {len(costs)} contexts",
        ),
    ]


def _of_costs(costs: Sequence[Costs]) -> list[Finding]:
    switch, zeros = [one.switch for one in costs], [0.0] * len(costs)
    ratios, ones = [one.switch_ratio for one in costs], [1.0] * len(costs)
    within = [one.within_ratio for one in costs]
    longer, times_longer = compare_seeds(switch, zeros, SWITCH_MARGIN), compare_seeds(ratios, ones, RATIO_MARGIN)
    less = compare_seeds(within, ones, RATIO_MARGIN)
    times = {name: statistics.median(getattr(one, name)[i] for one in costs for i in range(REPEATS)) for name in TIMED}
    return [
        Finding(
            "a request that switches the behaviour takes as long as one that does not, to a millisecond",
            longer.said("higher", "lower"),
            f"{t_interval(switch)} ms longer, margin {SWITCH_MARGIN:g} ms{longer.wanted}",
        ),
        Finding(
            "the same in proportion",
            times_longer.said("higher", "lower"),
            f"{_share(ratios)} times {times['same']:.2f} ms, margin {RATIO_MARGIN:g}{times_longer.wanted}",
        ),
        Finding(
            f"a behaviour switched on for the last {TAIL} of {CONTEXT} tokens that the base has read, beside reading all of them with it",
            less.said("higher", "lower"),
            f"{_share(within)} of {times['anew']:.2f} ms; {min(one.kept for one in costs)} tokens or more were not read again{less.wanted}",
        ),
    ]


def _of_doses(doses: Sequence[Dose]) -> Finding:
    means = np.mean([one.kl for one in doses], axis=0)
    course = ", ".join(f"{mean:.4f} at {scale:g}" for scale, mean in zip(SCALES, means, strict=True))
    return Finding(
        "a scaled adapter goes from the base to the adapter: their bits at 0 and 1, and a divergence from the base that rises between",
        "holds" if all(one.ends_hold and one.rises for one in doses) else "broken",
        f"{sum(one.ends_hold and one.rises for one in doses)} of {len(doses)} adapters; KL from the base in nats a token {course}",
    )


def _share(values: Sequence[float]) -> str:
    mean = t_interval(values)
    return f"{mean.value:.3f} [{mean.low:.3f}, {mean.high:.3f}]"


TIMED = {
    "same": "with the behaviour of the request before",
    "switched": "with another",
    "within": f"{CONTEXT} tokens, the behaviour on for the last {TAIL}",
    "anew": f"{CONTEXT} tokens, the behaviour on for all",
}


def _tables(costs: Sequence[Costs], doses: Sequence[Dose], outcomes: Sequence[Outcome]) -> str:
    lines = [f"Milliseconds to a request's one token, {REPEATS} of each kind and seed:", ""]
    lines += ["| request | median of the seeds' medians | seeds | 90th percentile of all |", "|---|---|---|---|"]
    for name, words in TIMED.items():
        medians = sorted(statistics.median(getattr(one, name)) for one in costs)
        late = float(np.percentile([ms for one in costs for ms in getattr(one, name)], 90))
        lines.append(f"| {words} | {statistics.median(medians):.2f} | {medians[0]:.2f} to {medians[-1]:.2f} | {late:.2f} |")
    lines += ["", f"Adapters by scale; solved are {PROBLEMS} held-out problems:", ""]
    lines += ["| scale | KL from the base, nats a token | solved |", "|---|---|---|"]
    for i, scale in enumerate(SCALES):
        lines.append(f"| {scale:g} | {_share([one.kl[i] for one in doses])} | {_share([one.solved[i] for one in doses])} |")
    trained = ", ".join(f"{o.score_before:.3f} -> {o.score:.3f}" + (" (diverged)" if o.diverged else "") for o in outcomes)
    return "\n".join([*lines, "", f"The adapters' rewards on held-out problems, before and after training: {trained}."]) + "\n"


# ---------------------------------------------------------------- picture


def _draw(costs: Sequence[Costs], doses: Sequence[Dose], path: Path) -> None:
    """Left: a request that switches and one that does not. Middle: a switch within a context and the whole of it. Right: more and less of
    an adapter."""
    with picture(path, 10.2, 3.2) as figure:
        *clocks, amounts = figure.subplots(1, 3)
        pairs = (("same", "#555555"), ("switched", "#cc5500")), (("within", "#0066cc"), ("anew", "#555555"))
        titles = (f"one token behind a prompt of {SHORT}", f"one token in a context of {CONTEXT}")
        labels = {
            "same": "behaviour as before",
            "switched": "switched",
            "within": f"on for the last {TAIL}",
            "anew": "on for all, read anew",
        }
        for axes, pair, title in zip(clocks, pairs, titles, strict=True):
            for name, colour in pair:
                times = np.sort([ms for one in costs for ms in getattr(one, name)])
                axes.plot(times, np.arange(1, len(times) + 1) / len(times), color=colour, linewidth=1.2, label=labels[name])
            most = max(float(np.percentile([ms for one in costs for ms in getattr(one, name)], 99)) for name, _ in pair)
            axes.set(xlim=(0, 1.1 * most), ylim=(0, 1.02), xlabel="milliseconds", ylabel="share of requests answered")
            axes.set_title(title, fontsize=9)
            axes.legend(frameon=False, fontsize=7, loc="lower right" if pair[0][0] == "within" else "upper left")
        for one in doses:
            amounts.plot(SCALES, one.solved, color="#0066cc", alpha=0.35, linewidth=0.8)
        amounts.plot(SCALES, np.mean([one.solved for one in doses], axis=0), color="#0066cc", marker="o", markersize=3)
        amounts.set(ylim=(0, 1), xlabel="scale of the adapter")
        amounts.set_ylabel("share of held-out problems solved", color="#0066cc")
        apart = amounts.twinx()
        apart.spines.right.set_visible(True)
        apart.plot(SCALES, np.mean([one.kl for one in doses], axis=0), color="#aa3377", linestyle="--", marker="s", markersize=3)
        apart.set_ylabel("KL from the base, nats a token", color="#aa3377")
        apart.set_ylim(0, None)
        amounts.set_title("more and less of an adapter", fontsize=9)

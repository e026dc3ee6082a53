"""Does a thin adapter save a third of the arithmetic, and of the time? Training passes and whole steps, counted, weighed and timed.

A linear map of W products a token costs full fine-tuning 3 W a training pass: its output, the gradient of its input and that of its
weights. With a frozen base the last is not made, and an adapter of rank r on d_in inputs and d_out outputs adds 3 r (d_in + d_out), all
maps together (2 W + 3 r P1) / 3 W: a third less for thin adapters of wide maps ("LoRA Without Regret", section on compute,
https://thinkingmachines.ai/blog/lora/). A step of reinforcement learning also draws its tokens, with one forward pass each that nothing
saves: (1 + 2) / (1 + 3), and (2 + 2) / (2 + 3) where the trainer reads the log-probabilities once more.

Products are counted by torch's own counter while our engines train: on the base, and on small random models, one deep and one wide.
Attention's own products, of which an adapter saves nothing, are left out of ratios. Passes are of rows in which every token is trained, so
that the formula is about all of it; steps are the real sampler, trainer and optimizer on prompts of an environment, with every episode
trained on, once with answers of one length and once with answers that end where the model ends them.

Clocks run where an adapter and full fine-tuning take turns, pass by pass, on one thread. The engine runs adapters of the Llama family in
layers that it writes out itself and full fine-tuning through transformers' modules, so their times say more of the layers than of the
adapter. What an adapter saves is timed where it runs through transformers' modules too, as those of every other family do: the same
models, which the engine is kept from recognising. Memory is that of the tensors at their peak: the base, the adapter or copy with its
gradient and moments, and what a pass, or a pass and an optimizer step, make beside them. These are small models on this machine; of
Qwen3-0.6B at rank 16 prime-rl reports 0.65 to 1.12 times the speed by GPU and length, and 0.41 of the memory
(benchmarks/results/BENCHMARKS.md of https://github.com/PrimeIntellect-ai/prime-rl).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.measure.verdict import compare_seeds, t_interval
from veneer.studies.contest import Terms
from veneer.studies.drawing import picture
from veneer.studies.lab import Lab
from veneer.studies.passes import (
    DEEP,
    LLAMA,
    PUBLISHED,
    WIDE,
    Clocked,
    Counted,
    Formulas,
    Step,
    Subject,
    Weighed,
    clock,
    count_passes,
    count_step,
    formula_of,
    problem_prompts,
    weigh,
    wide_step,
)
from veneer.studies.result import Finding, Result
from veneer.train.config import make_config
from veneer.types import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

QUESTION = "Does a thin adapter save a third of the arithmetic, and of the time?"
CLAIMS = (3, 4, 5)
PASS_MARGIN, STEP_MARGIN = 0.01, 0.02
"""Of a number of FLOPs, as a share, in a training pass and in a step."""
TIME_MARGIN = 0.05
"""Of full fine-tuning's time."""
THIRD = 2 / 3
"""What is left if a third is saved."""
STEPS: Mapping[bool, float] = {False: 3 / 4, True: 4 / 5}
"""What is claimed of a whole step, without and with the log-probabilities read once more."""
STEP_CLAIM = "a step of reinforcement learning makes 0.75 of full fine-tuning's FLOPs, 0.8 if log-probabilities are read once more"


async def conduct(lab: Lab, terms: Terms) -> Result:
    """Raises:
    ConfigError: an override of what nothing here depends on, or nothing to count with.
    BaseError: the base cannot be run.
    Interrupted: ``lab.stop`` was set.
    """
    base, bench = _base(terms), lab.bench
    if bench is None:
        raise ConfigError("this study counts and times what engines do, and was started without anything to do that with")
    name = bench.shape_of(base).name
    written, modules, wide = (
        Subject(name, base),
        Subject(f"{name} as modules", base, as_modules=True),
        Subject("wide as modules", WIDE, as_modules=True),
    )
    counts = list[Counted]()
    for subject in (written, modules, wide, Subject("wide", WIDE), Subject("deep", DEEP)):
        lab.go_on()
        counts += count_passes(bench, subject)
    prompts, steps = await problem_prompts(base), list[Step]()
    for even in (True, False):
        lab.go_on()
        steps.append(count_step(bench, base, prompts, even=even))
    clocks, weights = list[Clocked](), list[Weighed]()
    for subject in (modules, wide, written):
        clocks += clock(lab, bench, subject, terms.seeds)
        weights += weigh(bench, subject)
    formulas = Formulas([(*row, formula_of(bench.shape_of(row[0]), row[1])) for row in PUBLISHED], wide_step(bench.shape_of(LLAMA)))
    return cost_result(counts, formulas, steps, clocks, weights)


def _base(terms: Terms) -> str:
    for override in terms.overrides:
        if override.partition("=")[0].strip() != "base":
            raise ConfigError(f"--set {override}: this study trains nothing to an end; what can be set is base")
    return make_config({}, terms.overrides).base


# ---------------------------------------------------------------- what it says


def cost_result(
    counts: Sequence[Counted], formulas: Formulas, steps: Sequence[Step], clocks: Sequence[Clocked], weights: Sequence[Weighed]
) -> Result:
    findings = [*_of_passes(counts), *_of_formulas(formulas), *_of_steps(steps), *_of_clocks(counts, clocks), *_of_weights(weights)]
    document = {
        "passes": [asdict(one) | {"ratio": one.ratio} for one in counts],
        "published": [dict(zip(("model", "rank", "published", "formula"), row, strict=True)) for row in formulas.published],
        "wide_step": {"without_old": formulas.steps[False], "with_old": formulas.steps[True]},
        "steps": [_step_document(step) for step in steps],
        "clocks": [asdict(one) | {"pass_ratios": one.pass_ratios, "step_ratios": one.step_ratios} for one in clocks],
        "memory": [asdict(one) for one in weights],
    }
    return Result(findings, _tables(counts, formulas, steps, clocks, weights), document, partial(_draw, counts, steps, clocks))


def _step_document(step: Step) -> dict[str, Any]:
    ratios = {name: {"counted": step.ratio(old), "stages": step.stages[old]} for name, old in (("without_old", False), ("with_old", True))}
    return {"even": step.even, "lora": asdict(step.lora), "full": asdict(step.full), **ratios}


def same(found: float, expected: float, margin: float) -> str:
    """Whether a count, which has no noise, is what it should be; ``margin`` as a share."""
    return "equal" if abs(found / expected - 1) <= margin else "differs"


def _all_same(pairs: Sequence[tuple[float, float]], margin: float) -> str:
    return "differs" if any(same(*pair, margin) == "differs" for pair in pairs) else "equal"


def _off(found: float, expected: float) -> str:
    return f"{found / expected - 1:+.2%}"


def by_subject(counts: Sequence[Counted]) -> dict[str, list[Counted]]:
    return {name: [one for one in counts if one.subject == name] for name in dict.fromkeys(one.subject for one in counts)}


def _of_passes(counts: Sequence[Counted]) -> list[Finding]:
    thin = [one for one in counts if one.rank == 1]
    third = Finding(
        "at rank 1 a training pass saves a third of full fine-tuning's FLOPs, counted, in every model",
        _all_same([(one.ratio, THIRD) for one in thin], PASS_MARGIN),
        ", ".join(f"{one.subject} {one.ratio:.3f}" for one in thin) + f" for {THIRD:.3f}; margin {PASS_MARGIN:.0%}",
    )
    wrong = [one for one in counts if (one.ratio > 1) != (one.rank > one.break_even)]
    exceptions = ", ".join(f"{one.subject} makes {one.ratio:.3f} at rank {one.rank}, above {one.break_even:.1f}" for one in wrong)
    edge = Finding(
        "an adapter makes more than full fine-tuning if its rank is above W / (3 P1), and less below, counted",
        "broken" if wrong else "holds",
        f"{len(counts) - len(wrong)} of {len(counts)} counts" + (f"; {exceptions}" if wrong else ""),
    )
    predicted = [_of_prediction([one for one in counts if one.written_out == kind], kind) for kind in (True, False)]
    return [third, *(_of_formula(name, own) for name, own in by_subject(counts).items()), edge, *filter(None, predicted)]


def _of_formula(name: str, counts: Sequence[Counted]) -> Finding:
    worst = max(counts, key=lambda one: abs(one.ratio / one.formula - 1))
    found = ", ".join(f"{one.ratio:.3f} at rank {one.rank}" for one in counts)
    return Finding(
        f"{name}, {counts[0].layers} layers: a training pass makes (2 W + 3 r P1) / 3 W of full fine-tuning's FLOPs, counted",
        _all_same([(one.ratio, one.formula) for one in counts], PASS_MARGIN),
        f"{found}; furthest off {_off(worst.ratio, worst.formula)}, at rank {worst.rank}; margin {PASS_MARGIN:.0%}",
    )


def _of_prediction(counts: Sequence[Counted], written_out: bool) -> Finding | None:
    if not counts:
        return None
    pairs = [pair for one in counts for pair in ((one.lora, one.planned_lora), (one.full, one.planned_full))]
    worst = max(pairs, key=lambda pair: abs(pair[0] / pair[1] - 1))
    layers = "layers that the engine writes out" if written_out else "transformers' modules"
    return Finding(
        f"FLOPs of a training pass are what measure/flops.py says, without the gradient of the first layer's input: in {layers}",
        _all_same(pairs, PASS_MARGIN),
        f"furthest off {_off(*worst)}, of {len(pairs)} counts; margin {PASS_MARGIN:.0%}",
    )


def _of_formulas(formulas: Formulas) -> list[Finding]:
    alike = [f"{found:.{len(said.partition('.')[2])}f}" == said for _, _, said, found in formulas.published]
    found = [f"{name.rpartition('/')[2]} {ratio:.4f} at rank {rank} for {said}" for name, rank, said, ratio in formulas.published]
    model = LLAMA.rpartition("/")[2]
    return [
        Finding(
            "the formula over the maps of the layers comes to what is published, from configurations alone",
            "equal" if all(alike) else "differs",
            ", ".join(found),
        ),
        Finding(
            f"{STEP_CLAIM}: computed",
            _all_same([(ratio, STEPS[old]) for old, ratio in formulas.steps.items()], STEP_MARGIN),
            f"{_two(formulas.steps)} for {model} at rank 1, without prompts; margin {STEP_MARGIN:.0%}",
        ),
    ]


def _two(ratios: Mapping[bool, float]) -> str:
    return f"{ratios[False]:.4f} and {ratios[True]:.4f}"


def _answers(step: Step) -> str:
    return "answers of one length" if step.even else "answers that end where the model ends them"


def _of_steps(steps: Sequence[Step]) -> list[Finding]:
    counted = [
        Finding(
            f"{STEP_CLAIM}: counted, {_answers(step)}",
            _all_same([(step.ratio(old), STEPS[old]) for old in STEPS], STEP_MARGIN),
            f"{_two({old: step.ratio(old) for old in STEPS})} at rank 1, over {step.lora.drawn:,} and {step.full.drawn:,} tokens drawn; "
            f"margin {STEP_MARGIN:.0%}",
        )
        for step in steps
    ]
    predicted = [
        Finding(
            f"FLOPs of a step are what measure/flops.py says, which knows what Veneer leaves out: {_answers(step)}",
            _all_same([(step.ratio(old), step.planned(old)) for old in STEPS], STEP_MARGIN),
            f"LoRA over full {_two({old: step.ratio(old) for old in STEPS})} counted, {_two({old: step.planned(old) for old in STEPS})} "
            f"computed; margin {STEP_MARGIN:.0%}",
        )
        for step in steps
    ]
    return [*counted, *predicted]


def _way(one: Clocked | Weighed) -> str:
    return "the adapter in layers that the engine writes out" if one.written_out else "both through transformers' modules"


def _of_clocks(counts: Sequence[Counted], clocks: Sequence[Clocked]) -> list[Finding]:
    flops = {(one.subject, one.rank): one.ratio for one in counts}
    findings = []
    for one in clocks:
        if one.rank != 1:
            continue
        for what, ratios in (("a training pass", one.pass_ratios), ("a pass with its optimizer step", one.step_ratios)):
            mean, told = t_interval(ratios), compare_seeds(ratios, [THIRD] * len(ratios), TIME_MARGIN)
            findings.append(
                Finding(
                    f"{one.subject}, {_way(one)}: at rank 1 {what} takes two thirds of full fine-tuning's time",
                    told.said("higher", "lower"),
                    f"{_share(ratios)} of it, {1 / mean.value:.2f} times as fast, at {flops[one.subject, 1]:.3f} of the FLOPs of a pass; "
                    f"margin {TIME_MARGIN:g}{told.wanted}",
                )
            )
    return findings


def _of_weights(weights: Sequence[Weighed]) -> list[Finding]:
    return [
        Finding(
            f"{one.subject}, {_way(one)}: memory of training at rank 1 over full fine-tuning's",
            f"{one.lora.step / one.full.step:.2f}",
            f"{_mib(one.lora.step)} for {_mib(one.full.step)} MiB at the peak of a pass with its optimizer step, "
            f"{_mib(one.lora.one_pass)} for {_mib(one.full.one_pass)} at that of the pass",
        )
        for one in weights
        if one.rank == 1
    ]


def _share(values: Sequence[float]) -> str:
    mean = t_interval(values)
    return f"{mean.value:.3f} [{mean.low:.3f}, {mean.high:.3f}]"


def _mib(count: float) -> str:
    return f"{count / 2**20:.1f}"


# ---------------------------------------------------------------- tables


def _tables(
    counts: Sequence[Counted], formulas: Formulas, steps: Sequence[Step], clocks: Sequence[Clocked], weights: Sequence[Weighed]
) -> str:
    parts = (_pass_table(counts), _step_table(steps), _stage_table(steps), _clock_table(clocks), _memory_table(weights))
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def _pass_table(counts: Sequence[Counted]) -> list[str]:
    lines = [
        "Training passes: FLOPs of products with weights, LoRA over full fine-tuning. At rank 1 the engine adds B to the outputs without a"
    ]
    lines += ["product of matrices, which is not counted:", ""]
    lines += ["| model | layers | adapters run in | rank | counted | formula | measure/flops.py |", "|---|---|---|---|---|---|---|"]
    for one in counts:
        way, planned = "written-out layers" if one.written_out else "modules", one.planned_lora / one.planned_full
        lines.append(f"| {one.subject} | {one.layers} | {way} | {one.rank} | {one.ratio:.4f} | {one.formula:.4f} | {planned:.4f} |")
    return lines


def _step_table(steps: Sequence[Step]) -> list[str]:
    lines = [
        "Steps of reinforcement learning on the base, GFLOP of products with weights; what the counter cannot see of the adapter while"
    ]
    lines += [
        "sampling is computed:",
        "",
        "| step | weights | tokens drawn | sampling | not seen | log-probabilities once more | training |",
    ]
    lines += ["|---|---|---|---|---|---|---|"]
    for step in steps:
        for name, side in (("rank 1", step.lora), ("all", step.full)):
            gflops = " | ".join(f"{flops / 1e9:.3f}" for flops in (side.sampling, side.unseen, side.old, side.training))
            lines.append(f"| {_answers(step)} | {name} | {side.drawn:,} | {gflops} |")
    return lines


def _stage_table(steps: Sequence[Step]) -> list[str]:
    lines = ["From the formula to what was counted, LoRA of rank 1 over full fine-tuning, one difference after the other:", ""]
    header = [f"{_answers(step)}{', read once more' if old else ''}" for step in steps for old in (False, True)]
    lines += [f"| | {' | '.join(header)} |", "|---" * (1 + len(header)) + "|"]
    for stage in steps[0].stages[False]:
        lines.append(f"| {stage} | {' | '.join(f'{step.stages[old][stage]:.4f}' for step in steps for old in (False, True))} |")
    found = " | ".join(f"{step.ratio(old):.4f}" for step in steps for old in (False, True))
    return [*lines, f"| counted: few answers that go on are filled up to 16 rows | {found} |"]


def _clock_table(clocks: Sequence[Clocked]) -> list[str]:
    lines = [
        "Time, LoRA over full fine-tuning: medians over rounds in which they took turns, means and 95% intervals over seeds, one thread:",
        "",
    ]
    lines += ["| model | adapters run in | rank | pass | pass and optimizer step | full fine-tuning's, ms |", "|---|---|---|---|---|---|"]
    for one in clocks:
        way, full = "written-out layers" if one.written_out else "modules", 1e3 * one.full_seconds
        lines.append(f"| {one.subject} | {way} | {one.rank} | {_share(one.pass_ratios)} | {_share(one.step_ratios)} | {full:.1f} |")
    return lines


def _memory_table(weights: Sequence[Weighed]) -> list[str]:
    lines = ["Memory of the tensors at their peak, MiB, the base's among them:", ""]
    lines += ["| model | adapters run in | rank | base | pass, LoRA | pass, full | with the optimizer step, LoRA | the same, full |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for one in weights:
        way = "written-out layers" if one.written_out else "modules"
        sizes = (one.base, one.lora.one_pass, one.full.one_pass, one.lora.step, one.full.step)
        lines.append(f"| {one.subject} | {way} | {one.rank} | {' | '.join(map(_mib, sizes))} |")
    return lines


# ---------------------------------------------------------------- picture

COLOURS = ("#0066cc", "#cc5500", "#228833", "#997700", "#aa3377")


def _draw(counts: Sequence[Counted], steps: Sequence[Step], clocks: Sequence[Clocked], path: Path) -> None:
    """Left: FLOPs of a pass by rank, in units of the rank at which nothing is saved, beside the formula. Middle: FLOPs of a pass and of
    steps. Right: time over FLOPs."""
    colours = dict(zip(by_subject(counts), COLOURS, strict=False))
    with picture(path, 10.2, 3.4) as figure:
        passes, bars, times = figure.subplots(1, 3)
        _draw_passes(passes, counts, colours)
        _draw_steps(bars, counts, steps)
        _draw_times(times, counts, clocks, colours)


def _draw_passes(axes: Axes, counts: Sequence[Counted], colours: Mapping[str, str]) -> None:
    most = max(one.rank / one.break_even for one in counts)
    axes.plot([0, most], [THIRD, THIRD + most / 3], color="#bbbbbb", linewidth=1, label="formula")  # r P1 / W is a third of r over the edge
    for name, own in by_subject(counts).items():
        ranks = [one.rank / one.break_even for one in own]
        axes.plot(ranks, [one.ratio for one in own], color=colours[name], marker="o", markersize=3, linestyle="none", label=name)
    axes.axhline(1, color="#888888", linewidth=0.6, linestyle=":")
    axes.set(xlabel="rank over W / (3 P1)", ylabel="LoRA over full, FLOPs of a pass", ylim=(0.5, None))
    axes.legend(frameon=False, fontsize=7)


def _draw_steps(axes: Axes, counts: Sequence[Counted], steps: Sequence[Step]) -> None:
    thin = counts[0]
    claimed, found, labels = [THIRD], [thin.ratio], ["pass"]
    for step in steps:
        for old in (False, True):
            claimed.append(STEPS[old])
            found.append(step.ratio(old))
            labels.append(f"step,\n{'even' if step.even else 'ended'}" + (",\ntwice" if old else ""))
    places = range(len(labels))
    axes.bar([at - 0.2 for at in places], claimed, 0.38, color="#bbbbbb", label="claimed")
    axes.bar([at + 0.2 for at in places], found, 0.38, color="#0066cc", label=f"counted, {thin.subject}, rank {thin.rank}")
    axes.set_xticks([*places], labels, fontsize=7)
    axes.set(ylim=(0, 1.15), ylabel="LoRA over full, FLOPs")
    axes.axhline(1, color="#888888", linewidth=0.6, linestyle=":")
    axes.legend(frameon=False, fontsize=7, loc="upper left")


def _draw_times(axes: Axes, counts: Sequence[Counted], clocks: Sequence[Clocked], colours: Mapping[str, str]) -> None:
    flops = {(one.subject, one.rank): one.ratio for one in counts}
    axes.plot([0.6, 1.2], [0.6, 1.2], color="#bbbbbb", linewidth=1, label="time as FLOPs")
    for name in dict.fromkeys(one.subject for one in clocks):
        own = [one for one in clocks if one.subject == name]
        means = [t_interval(one.pass_ratios) for one in own]
        spans = [[mean.value - mean.low for mean in means], [mean.high - mean.value for mean in means]]
        at = [flops[name, one.rank] for one in own]
        axes.errorbar(at, [mean.value for mean in means], spans, color=colours[name], marker="o", markersize=3, linewidth=1, label=name)
    axes.axhline(1, color="#888888", linewidth=0.6, linestyle=":")
    axes.set(xlabel="LoRA over full, FLOPs of a pass", ylabel="LoRA over full, time of a pass", ylim=(0, None))
    axes.legend(frameon=False, fontsize=7, loc="lower right")

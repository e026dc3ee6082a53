"""The study of what an adapter saves: exact ratios, counts that are off and are found to be, and a small one as a whole."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_lab import lab, never

from tiny_models import CONFIGS
from veneer.engine import counting
from veneer.engine.flat import TILE
from veneer.engine.fused import FusedLayer
from veneer.engine.shapes import count_shape
from veneer.measure.flops import StepWork, Trained, step_flops
from veneer.studies import cost, passes
from veneer.studies.contest import Terms
from veneer.studies.cost import STEPS, conduct, same
from veneer.studies.passes import LLAMA, PUBLISHED, SMALL, Clocked, Counted, Formulas, Peak, Side, Step, Subject, Weighed
from veneer.studies.result import Finding
from veneer.types import ConfigError, LoraConfig

TINY: Mapping[str, Any] = {**CONFIGS["qwen3"]().to_dict()}


# ---------------------------------------------------------------- exact numbers


@pytest.mark.parametrize(("model", "rank", "published"), PUBLISHED)
def test_published_ratios_come_out(model: str, rank: int, published: str) -> None:
    """(2 W + 3 r P1) / 3 W worked out here from the configuration's own widths."""
    widths = {
        LLAMA: [(4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), (4096, 14336), (4096, 14336), (14336, 4096)],
        SMALL: [(1024, 2048), (1024, 1024), (1024, 1024), (2048, 1024), (1024, 3072), (1024, 3072), (3072, 1024)],
    }[model]
    products, sums = sum(a * b for a, b in widths), sum(a + b for a, b in widths)
    found = passes.formula_of(count_shape(model), rank)
    assert found == pytest.approx((2 * products + 3 * rank * sums) / (3 * products))
    assert f"{found:.{len(published) - 2}f}" == published


def test_a_step_of_a_wide_model() -> None:
    ratios = passes.wide_step(count_shape(LLAMA))
    assert ratios[False] == pytest.approx(0.75, rel=0.01)
    assert ratios[True] == pytest.approx(0.80, rel=0.01)


@pytest.mark.parametrize("old", [False, True])
def test_stages_lead_from_the_formula_to_what_veneer_does(old: bool) -> None:
    """The first is the published number, the last that of ``step_flops``; without prompts and with a wide model all are one."""
    shape = count_shape("nano")
    work = StepWork(8, 8, 21.0, 12.5, 72.0, old)
    stages = [*passes.stages_of(shape, work, old).values()]
    trained = Trained(passes.adapted(shape), 1)
    assert stages[0] == pytest.approx(STEPS[old])
    assert stages[-1] == pytest.approx(step_flops(shape, work, trained).linear / step_flops(shape, work).linear)
    wide = passes.stages_of(count_shape("meta-llama/Llama-3.3-70B-Instruct"), replace(work, prompt_tokens=0.0), old)
    assert list(wide.values()) == pytest.approx([STEPS[old]] * 5, rel=0.005)


def test_ranks_that_do_not_fit_are_left_out() -> None:
    """And one that costs more than it saves is there where it fits."""
    assert passes.ranks_of(count_shape("nano")) == [1, 8, 32, 47]
    assert passes.ranks_of(count_shape(TINY)) == [1, 8, 10]


# ---------------------------------------------------------------- counts


@pytest.mark.parametrize("as_modules", [False, True])
def test_real_passes_are_counted(as_modules: bool) -> None:
    """Full fine-tuning to the last product; an adapter as PEFT has it is ``tests/measure/test_flops.py``'s."""
    bench = counting.Bench()
    found = passes.count_passes(bench, Subject("tiny", TINY, as_modules))
    assert [one.rank for one in found] == [1, 8, 10]
    assert all(one.full == one.planned_full == 6 * 8 * 64 * count_shape(TINY).products for one in found)
    assert all(one.written_out != as_modules for one in found)
    assert [one.ratio for one in found] == sorted(one.ratio for one in found)
    if as_modules:  # they make the gradient of the first layer's input, so the formula is all of it
        assert all(one.ratio == pytest.approx(one.formula, rel=1e-9) for one in found if one.rank > 1)
    else:
        assert all(one.lora == pytest.approx(one.planned_lora, rel=1e-9) for one in found if one.rank > 1)


def test_a_real_step_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of one length leave no row empty, so every part is known to the product."""
    monkeypatch.setattr(passes, "EVEN", 9)
    shape, prompts = count_shape("nano"), asyncio.run(passes.problem_prompts("nano"))[:4]
    step = passes.count_step(counting.Bench(), "nano", prompts, even=True)
    rows, read = 4 * 8, sum(map(len, prompts))
    head = shape.maps[-1].products
    body = shape.products - head
    assert step.lora.drawn == step.full.drawn == rows * 9
    for side in (step.lora, step.full):
        assert side.sampling == 2 * (body * (read + rows * 8) + head * (TILE + rows * 8))  # four first tokens are filled up
    assert step.full.unseen == 0 < step.lora.unseen < 0.02 * step.lora.sampling
    assert step.full.old == pytest.approx(2 * (body * (read - 4 + rows * 9) + head * rows * 9), rel=0.01)
    assert step.full.training == pytest.approx(3 * step.full.old, rel=0.001)
    assert step.ratio(False) == pytest.approx(0.75, rel=0.02)
    assert step.ratio(True) == pytest.approx(0.80, rel=0.02)


# ---------------------------------------------------------------- verdicts


@pytest.mark.parametrize(("off", "verdict"), [(0.0, "equal"), (0.009, "equal"), (-0.009, "equal"), (0.02, "differs"), (-0.02, "differs")])
def test_a_count_that_is_two_in_a_hundred_off_differs(off: float, verdict: str) -> None:
    assert same(0.7 * (1 + off), 0.7, cost.PASS_MARGIN) == verdict


def counted(rank: int, off: float = 0.0, subject: str = "a", edge: float = 20.0) -> Counted:
    formula = 2 / 3 + rank / (3 * edge)
    return Counted(subject, 4, True, rank, 300.0 * formula * (1 + off), 300.0, 300.0 * formula, 300.0, formula, edge)


def by_question(findings: list[Finding], part: str) -> Finding:
    (found,) = [finding for finding in findings if part in finding.question]
    return found


def test_words_for_passes() -> None:
    """One count of three that is off makes its model's verdict, and no other's."""
    good, bad = [counted(rank, subject="good") for rank in (1, 8, 30)], [counted(rank, off, "bad") for rank, off in ((1, 0), (8, 0.02))]
    findings = cost._of_passes([*good, *bad])
    assert by_question(findings, "good, 4 layers").verdict == "equal"
    assert by_question(findings, "bad, 4 layers").verdict == "differs"
    assert "+2.00%, at rank 8" in by_question(findings, "bad, 4 layers").numbers
    assert by_question(findings, "what measure/flops.py says").verdict == "differs"
    assert by_question(findings, "if its rank is above").verdict == "holds"
    assert by_question(findings, "saves a third").verdict == "differs"  # at rank 1 of an edge of 20 it is .683
    assert by_question(cost._of_passes([counted(1, edge=100.0)]), "saves a third").verdict == "equal"
    assert by_question(cost._of_passes([counted(19, 0.05)]), "if its rank is above").verdict == "broken"


def test_words_for_formulas() -> None:
    published = [("a/B", 1, "0.667", 0.6671), ("a/B", 256, "1.03", 1.0333)]
    findings = cost._of_formulas(Formulas(published, {False: 0.7495, True: 0.7997}))
    assert [finding.verdict for finding in findings] == ["equal", "equal"]
    off = cost._of_formulas(Formulas([("a/B", 1, "0.667", 0.6676)], {False: 0.7495, True: 0.7997 * 1.03}))
    assert [finding.verdict for finding in off] == ["differs", "differs"]


def step(even: bool, training: float) -> Step:
    mine, full = Side(100, 100.0, 0.0, 100.0, training), Side(100, 100.0, 0.0, 100.0, 300.0)
    return Step(even, mine, full, {False: {"formula": 0.75, "veneer": 0.76}, True: {"formula": 0.80, "veneer": 0.81}})


@pytest.mark.parametrize(
    ("training", "verdict", "predicted"), [(200.0, "equal", "equal"), (195.0, "equal", "differs"), (209.0, "differs", "equal")]
)
def test_words_for_steps(training: float, verdict: str, predicted: str) -> None:
    assert [finding.verdict for finding in cost._of_steps([step(True, training)])] == [verdict, predicted]


def clocked(ratios: tuple[float, ...]) -> Clocked:
    mine, full = [[ratio * 2.0] * 3 for ratio in ratios], [[2.0] * 3 for _ in ratios]
    return Clocked("a", False, 1, mine, full, [[seconds[0] + 1.0] * 3 for seconds in mine], [[4.0] * 3 for _ in full])


@pytest.mark.parametrize(
    ("ratios", "word"),
    [
        ((0.66, 0.67, 0.665), "equal"),
        ((0.99, 1.0, 1.01), "higher"),
        ((0.4, 0.41, 0.42), "lower"),
        ((0.4, 1.2, 0.7), "undecided"),
    ],
)
def test_words_for_times(ratios: tuple[float, ...], word: str) -> None:
    first, second = cost._of_clocks([counted(1)], [clocked(ratios), replace(clocked(ratios), rank=8)])
    assert first.verdict == word
    assert "both through transformers' modules" in first.question
    assert f"{sum(ratios) / len(ratios):.3f}" in first.numbers
    assert "with its optimizer step" in second.question


def test_times_are_medians_of_neighbours() -> None:
    one = Clocked("a", True, 1, [[1.0, 1.0, 50.0]], [[2.0, 2.0, 2.0]], [[1.0] * 3], [[4.0, 4.0, 1.0]])
    assert (one.pass_ratios, one.step_ratios, one.full_seconds) == ([0.5], [0.25], 2.0)


def test_words_for_memory() -> None:
    peak = Peak(2**20, 2**21)
    (found,) = cost._of_weights([Weighed("a", True, rank, peak, Peak(2**22, 2**23), 5) for rank in (1, 8)])
    assert found.verdict == "0.25"
    assert "layers that the engine writes out" in found.question
    assert found.numbers.startswith("2.0 for 8.0 MiB")


# ---------------------------------------------------------------- as a whole


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    more: dict[str, Any] = {"DEEP": TINY, "WIDE": TINY, "ROWS": 2, "LENGTH": 32, "GROUPS": 2, "SIZE": 2, "EVEN": 4, "REPEATS": 1}
    for name, value in more.items():
        monkeypatch.setattr(passes, name, value)
    for name in ("DEEP", "WIDE"):
        monkeypatch.setattr(cost, name, TINY)


@pytest.mark.usefixtures("small")
def test_the_whole_study_runs(tmp_path: Path) -> None:
    result = asyncio.run(conduct(lab(tmp_path, never, bench=counting.Bench()), Terms(2, 1)))
    findings = list(result.findings)
    assert by_question(findings, "input: in layers that the engine writes out").verdict == "equal"
    assert by_question(findings, "nano as modules, 4 layers").verdict == "equal"
    assert by_question(findings, "comes to what is published").verdict == "equal"
    assert by_question(findings, "read once more: computed").verdict == "equal"
    memory = [one for one in findings if "memory of training" in one.question]
    assert len(memory) == 3
    assert all(0 < float(one.verdict) < 1 for one in memory)
    document = json.loads(json.dumps(result.document))
    assert {one["subject"] for one in document["passes"]} == {"nano", "nano as modules", "wide", "wide as modules", "deep"}
    assert [step["even"] for step in document["steps"]] == [True, False]
    assert all(len(one["passes"]) == 2 and len(one["passes"][0]) == 1 for one in document["clocks"])
    assert result.tables.count("\n\n|") == 5
    result.draw(tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text().count("<svg") == 1


def test_an_engine_that_makes_a_product_too_many_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first layer's input gradient is made, as a backward pass that does not know the base is frozen makes it."""
    backward = FusedLayer.backward
    monkeypatch.setattr(FusedLayer, "backward", lambda *args, input_too: backward(*args, input_too=True))
    findings = cost._of_passes(passes.count_passes(counting.Bench(), Subject("tiny", TINY)))
    assert by_question(findings, "input: in layers that the engine writes out").verdict == "differs"
    assert by_question(findings, "tiny, 2 layers").verdict == "equal"


def test_a_lab_without_a_bench_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="without anything to do that with"):
        asyncio.run(conduct(lab(tmp_path, never), Terms(2, 1)))


def test_another_base_can_be_measured() -> None:
    assert cost._base(Terms(2, 1, ("base=some/folder",))) == "some/folder"
    with pytest.raises(ConfigError, match="trains nothing to an end"):
        cost._base(Terms(2, 1, ("env.name=sort",)))


def test_adapters_of_the_study_are_those_of_a_run() -> None:
    assert passes.adapted(count_shape("nano")) == count_shape("nano").adapted(LoraConfig(8))

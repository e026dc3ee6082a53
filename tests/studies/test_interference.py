"""Interference: arms side by side are what each is alone, and harm is told from none."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from veneer.engine import LocalEngine, LoraEngine, load_base
from veneer.envs import load_env
from veneer.measure.canary import canary_tokens, with_canary
from veneer.render import Renderer, load_renderer
from veneer.studies.interference import Matrix, Task, as_document, as_table, draw, interfere
from veneer.train.evaluate import evaluate
from veneer.train.rollouts import Policy
from veneer.types import AdapterError, AttestationError, Checkpoint, LoraConfig, SamplingParams

PROBLEMS = 64
TASKS = {name: Task(name, load_env(name), 40) for name in ("sort", "count")}
OWN = {"null": TASKS["sort"], "noise": TASKS["count"]}


@pytest.fixture(scope="module")
def engine() -> LocalEngine:
    return LoraEngine(load_base("nano"))


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return load_renderer("nano")


@pytest.fixture(scope="module")
def adapters(engine: LocalEngine) -> dict[str, Checkpoint]:
    """One that does nothing, as B is zero, and one that ruins everything."""
    made: dict[str, Checkpoint] = {}
    for name, scale in (("null", 0.0), ("noise", 0.3)):
        engine.create_adapter(name, LoraConfig(rank=2))
        fresh = engine.save_state(name, "sampler").result()
        rng = np.random.default_rng(1)
        weights = {k: a if "lora_A" in k else rng.normal(0, scale, a.shape).astype(np.float32) for k, a in fresh.weights.items()}
        engine.load_state(name, dataclasses.replace(fresh, weights=weights)).result()
        made[name] = with_canary(engine, name, engine.save_state(name, "sampler").result(), canary_tokens(576))
        engine.remove_adapter(name)
    return made


@pytest.fixture(scope="module")
def matrix(engine: LocalEngine, renderer: Renderer, adapters: dict[str, Checkpoint]) -> Matrix:
    return asyncio.run(interfere(engine, renderer, adapters, OWN, PROBLEMS, seed=3))


def test_every_arm_on_every_task(matrix: Matrix) -> None:
    assert matrix.arms == ("base", "null", "noise", "null+noise")
    assert matrix.tasks == ("sort", "count")
    assert set(matrix.cells) == {(arm, task) for arm in matrix.arms for task in matrix.tasks}
    assert all(len(cell.wins) == PROBLEMS and sum(cell.wins) == cell.solved.successes for cell in matrix.cells.values())


def test_company_changes_no_arm(matrix: Matrix, engine: LocalEngine, renderer: Renderer, adapters: dict[str, Checkpoint]) -> None:
    """Each cell again, alone on the engine: the same problems are solved."""
    for name in (None, *adapters):
        if name is not None:
            engine.load_state(name, adapters[name]).result()
        policy = Policy(engine, renderer, name, SamplingParams(max_tokens=40))
        alone = asyncio.run(evaluate(policy, TASKS["count"].dataset, PROBLEMS, 3))
        assert tuple(t.reward >= 1 for t in alone.trajectories) == matrix.cells[name or "base", "count"].wins
        if name is not None:
            engine.remove_adapter(name)


def test_an_adapter_that_does_nothing_interferes_with_nothing(matrix: Matrix) -> None:
    """The same draws: not one problem differs, and the verdict does not pretend to more than the number of problems allows."""
    for task in matrix.tasks:
        assert matrix.cells["null", task].wins == matrix.cells["base", task].wins
        assert matrix.cells["null+noise", task].wins == matrix.cells["noise", task].wins
    (finding,) = [f for f in matrix.findings if (f.arm, f.against) == ("null", "base")]
    assert finding.difference.value == 0
    assert finding.verdict == "none"


def test_an_adapter_that_ruins_everything_is_told(matrix: Matrix) -> None:
    """On the other's task alone, and in the stack; on its own it has nothing to lose."""
    verdicts = {(f.arm, f.against, f.task): f.verdict for f in matrix.findings}
    assert verdicts["noise", "base", "sort"] == "harms"
    assert verdicts["null+noise", "null", "sort"] == "harms"
    assert verdicts["null+noise", "noise", "count"] != "harms"
    assert len(verdicts) == 4


def test_what_is_written(matrix: Matrix, tmp_path: Path) -> None:
    """Numbers, table and picture tell the same story, and the picture the same bytes twice."""
    document = json.loads(json.dumps(as_document(matrix)))
    assert document["arms"] == list(matrix.arms)
    cell = next(c for c in document["solved"] if (c["arm"], c["task"]) == ("base", "sort"))
    assert cell["low"] < cell["value"] < cell["high"]
    table = as_table(matrix)
    for number in (cell["value"], cell["low"], cell["high"]):
        assert f"{number:.3f}" in table
    draw(matrix, tmp_path / "a.svg")
    draw(matrix, tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "a.svg").read_text().count("<text") + (tmp_path / "a.svg").read_text().count("<!--") > 8


def test_nothing_is_left_in_the_engine(matrix: Matrix, engine: LocalEngine) -> None:
    """A study must not fill the engine that it was lent."""
    for arm in matrix.arms[1:]:
        with pytest.raises(AdapterError, match="there is no adapter"):
            engine.sample(canary_tokens(576), arm, SamplingParams(max_tokens=1))


def test_one_adapter_is_no_matrix(engine: LocalEngine, renderer: Renderer, adapters: dict[str, Checkpoint]) -> None:
    with pytest.raises(AdapterError, match="two adapters or more"):
        asyncio.run(interfere(engine, renderer, {"null": adapters["null"]}, OWN, 4, 0))


def test_an_arm_that_is_not_applied_stops_the_study(
    engine: LocalEngine, renderer: Renderer, adapters: dict[str, Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A matrix of the base against itself would show no interference at all."""
    monkeypatch.setattr(engine._stack.thin, "slots", lambda segments, counts: np.full(sum(counts), -1))
    with pytest.raises(AttestationError, match="has no effect here"):
        asyncio.run(interfere(engine, renderer, adapters, OWN, 4, 0))

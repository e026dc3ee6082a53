"""Measures beside a run, and the same afterwards: real processes."""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path

import pytest

from processes import Result, Veneer, forking_veneer, small_run

FEW = ("--set=scorecard.problems=3", "--set=scorecard.tries=8", '--set=scorecard.envs=["count"]', "--set=scorecard.elsewhere=4")
MORE = ("--problems=3", "--tries=8", "--elsewhere=count", "--elsewhere-problems=4")

pytestmark = pytest.mark.xdist_group("scorecard")


@pytest.fixture(scope="module")
def veneer(tmp_path_factory: pytest.TempPathFactory) -> Generator[Veneer, None, None]:
    with forking_veneer(tmp_path_factory.mktemp("veneer")) as veneer:
        yield veneer


@pytest.fixture(scope="module")
def trained(veneer: Veneer, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    folder = tmp_path_factory.mktemp("trained")
    done = veneer(folder / "home", "train", small_run(folder / "files"), *FEW, "--json")
    assert done.code == 0, done.err
    return folder / "home", done


def test_a_run_brings_its_measures(trained: tuple[Path, Result]) -> None:
    home, done = trained
    summary = done.document
    steps = sum(
        line["episodes"] for line in map(json.loads, (home / "runs/small/metrics.jsonl").read_text().splitlines()) if "episodes" in line
    )
    assert f"scorecard behind the last step: up to 56 episodes, beside {steps:,} of the steps" in done.err.splitlines()[0]
    assert summary["scorecard"]["episodes"] == 56
    card = summary["scorecard"]["card"]
    assert (card["problems"], card["tries"], list(card["pass_at_k"])) == (3, 8, ["1", "2", "4"])
    assert [other["env"] for other in summary["scorecard"]["elsewhere"]] == ["count"]
    assert summary["bits_per_episode"] == pytest.approx(summary["bits"] / summary["episodes"])
    assert summary["saturation"] == pytest.approx(summary["bits"] / summary["trainable_parameters"])
    assert summary["dead_episodes"] <= summary["episodes"]
    shown = {(one["dtype"], one["tolerance"]): one for one in summary["anatomy"]["visible"]}
    assert shown["float32", 0.0]["measured"] > shown["bfloat16", 0.0]["measured"] > 0
    assert sum(summary["anatomy"]["by_layer"].values()) == pytest.approx(1.0)
    metrics = [json.loads(line) for line in (home / "runs/small/metrics.jsonl").read_text().splitlines()]
    assert any("noise/trace" in line for line in metrics)
    page = (home / "runs/small/report.html").read_text()
    for words in ("<h2>Scorecard</h2>", "<h2>pass@k</h2>", "reward in count", "<h2>Update</h2>", "bits per episode"):
        assert words in page


def test_the_verb_says_later_what_the_run_said(veneer: Veneer, trained: tuple[Path, Result]) -> None:
    home, done = trained
    later = veneer(home, "scorecard", "small", *MORE, "--json")
    assert later.code == 0, later.err
    document = later.document
    assert (document["adapter"], document["start"], document["env"]) == ("small@1", "nano", done.document["env"])
    mine, theirs = ({key: value for key, value in one.items() if key != "seconds"} for one in (document, done.document["scorecard"]))
    assert {key: mine[key] for key in theirs} == theirs


def test_beside_itself_nothing_differs(veneer: Veneer, trained: tuple[Path, Result]) -> None:
    home, _ = trained
    done = veneer(home, "scorecard", "small", "--start", "small@1", "--problems=2", "--tries=4")
    assert done.code == 0, done.err
    assert "playing up to 24 episodes" in done.err, "eight of them the base's"
    assert "24 episodes, " in done.out
    assert "+0.00 [+0.00, +0.00]" in done.out
    assert max(map(len, done.out.splitlines())) <= 80
    assert "0 gained that the start never solved, 0 lost" in done.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nobody"], "nobody"),
        (["small", "--start", "nobody"], "nobody"),
        (["small", "--elsewhere", "sorrt"], "sorrt"),
        (["small", "--problems", "1"], "1 is not in the range"),
        (["small", "--env", "sorrt"], "sorrt"),
    ],
)
def test_mistakes_cost_one_line(veneer: Veneer, trained: tuple[Path, Result], arguments: list[str], words: str) -> None:
    done = veneer(trained[0], "scorecard", *arguments)
    assert done.code == 2, done.err
    assert words in done.err
    assert len(done.err.strip().splitlines()) == 1


def test_a_wrong_environment_is_refused_before_the_run(veneer: Veneer, home: Path, tmp_path: Path) -> None:
    """It was told when all was trained."""
    done = veneer(home, "train", small_run(tmp_path), "--set=scorecard.problems=2", '--set=scorecard.envs=["sorrt"]')
    assert done.code == 2
    assert done.err.strip() == "veneer: scorecard.envs: no environment 'sorrt'; did you mean 'sort'?"
    assert not (home / "runs").exists()


def test_one_problem_is_refused_before_the_run(veneer: Veneer, home: Path, tmp_path: Path) -> None:
    done = veneer(home, "train", small_run(tmp_path), "--set=scorecard.problems=1")
    assert done.code == 2
    assert "one problem has no interval" in done.err

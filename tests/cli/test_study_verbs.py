"""``veneer study`` as people use it: real processes."""

from __future__ import annotations

import signal
from collections.abc import Generator
from pathlib import Path

import pytest

from processes import Veneer, forking_veneer, until

SMALL = ["--seeds", "2", "--choice-seeds", "1", "--threads", "1"]
SMALL += [f"--set={o}" for o in ("rl.steps=1", "eval.problems=2", "rl.groups_per_batch=1", "rl.group_size=2", "rl.max_tokens=4")]
RUNS = 4 * 5 + 4 * 2 + 2
"""Four arms at five learning rates, each at its best on two seeds, and the reference on two others; grids may be widened."""


@pytest.fixture(scope="module")
def veneer(tmp_path_factory: pytest.TempPathFactory) -> Generator[Veneer, None, None]:
    with forking_veneer(tmp_path_factory.mktemp("veneer")) as veneer:
        yield veneer


def test_a_study_is_interrupted_goes_on_and_is_reported(veneer: Veneer, home: Path) -> None:
    running = veneer.start(home, "study", "run", "rank", *SMALL, "--processes", "2")
    until(lambda: len(list(home.glob("studies/runs/*/outcome.json"))) >= 3)
    running.kill(signal.SIGINT)
    stopped = running.wait()
    assert stopped.code == 130, stopped.err
    assert "the same command goes on" in stopped.err
    made = {path: path.stat().st_mtime_ns for path in home.glob("studies/runs/*/outcome.json")}
    assert 3 <= len(made) < RUNS
    assert veneer(home, "study", "report", "--json").document == []

    done = veneer(home, "study", "run", "rank", *SMALL, "--json")
    assert done.code == 0, done.err
    document = done.document
    assert {path: path.stat().st_mtime_ns for path in made} == made  # nothing was made again
    assert len(list(home.glob("studies/runs/*/outcome.json"))) >= RUNS
    assert [arm["arm"] for arm in document["arms"]] == ["full", "rank 1", "rank 4", "rank 32"]
    assert all(len(arm["scores"]) == 2 for arm in document["arms"])
    folder = Path(document["folder"])
    assert {path.name for path in folder.iterdir()} == {"study.json", "study.md", "study.svg"}
    assert "--set rl.steps=1" in (folder / "study.md").read_text()

    assert [one["study"] for one in veneer(home, "study", "report", "--json").document] == ["rank"]
    told = " ".join(veneer(home, "study", "report").out.split())
    assert "noise floor" in told
    assert "rank --seeds 2 --choice-seeds 1 --set rl.steps=1" in told  # nobody takes a first look for the study
    listed = {one["name"]: one for one in veneer(home, "study", "list", "--json").document}
    assert listed["rank"]["answered"]
    within = veneer(home, "study", "run", "rank", "--budget", "10m", *SMALL, "--json")
    assert within.code == 0, within.err
    ((one,), told) = within.document, within.err
    assert (one["study"], one["shrunk"]) == ("rank", "in full")
    assert one["command"].startswith("veneer study run rank --seeds 2 --choice-seeds 1 --set rl.steps=1")
    assert one["findings"] == document["findings"]  # made before, and taken over
    assert "rank: every second learning rate" in told
    assert veneer(home, "study", "report", "--json").document[0]["terms"]["coarse"] is False

    written = veneer(home, "study", "article", "--json").document
    assert written == {"file": str(home / "studies/article.md"), "studies": ["rank"]}
    assert "](rank/study.svg)" in Path(written["file"]).read_text()
    elsewhere = home / "more" / "argument.md"
    assert veneer(home, "study", "article", "--out", str(elsewhere)).out.endswith("argument.md: from rank\n")
    assert "](../studies/rank/study.md)" in elsewhere.read_text()
    assert not list(home.glob("runs/*"))
    assert veneer(home, "adapters", "list", "--json").document == []  # what a study trains is no behaviour to be served


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "rankk"], "did you mean 'rank'?"),
        (["run", "nothing-like-it"], "there are rank"),
        (["run", "rank", "--set", "rl.stebs=3"], "unknown key 'rl.stebs'; did you mean 'rl.steps'?"),
        (["run", "rank", "--set", "env.name=sorrt"], "sorrt"),
        (["run", "rank", "--set", "seed=5"], "the study itself decides seed"),
        (["run", "rank", "--set", "rl.learning_rate=1e-3"], "the study itself decides rl.learning_rate"),
        (["run", "rank", "--set", "lora.rank=8"], "the study itself decides lora.rank"),
        (["run", "rank", "--set", "weights=full"], "the study itself decides weights"),
        (["run", "learning_rate", "--set", "lora.alpha=8"], "the study itself decides lora.alpha"),
        (["run", "learning_rate", "--set", "rl.steps=3"], "runs of this study are of kind sft"),
        (["run", "rank", "--set", "kind=sft"], "the study itself decides kind"),
        (["run", "bandit", "--set", "rl.steps=3"], "there is nothing to set"),
        (["run", "groups", "--set", "rl.steps=3"], "this study only plays the base"),
        (["run", "groups", "--set", "env.name=sorrt"], "sorrt"),
        (["run", "toggle", "--set", "weights=full"], "the study itself decides weights"),
        (["run", "rank", "--set", "rl.steps=-1"], "rl.steps"),
        (["run", "rank", "--set", "base=/nowhere"], "no such folder"),
        (["run", "rank", "--seeds", "1"], "1 is not in the range"),
        (["run", "all", "--budget", "2"], "write a time such as 2h"),
        (["run", "rank", "--device", "tpu"], "tpu"),
    ],
)
def test_mistakes_cost_one_line(veneer: Veneer, home: Path, arguments: list[str], words: str) -> None:
    done = veneer(home, "study", *arguments)
    assert done.code == 2, done.err
    assert words in done.err
    assert "Traceback" not in done.err
    assert len(done.err.strip().splitlines()) == 1


def test_no_time_is_one_line_and_the_next_time_goes_on(veneer: Veneer, home: Path) -> None:
    few = [f"--set={o}" for o in ("rl.steps=400", "eval.problems=2", "rl.groups_per_batch=1", "rl.group_size=2")]
    done = veneer(home, "study", "run", "all", "--budget", "0.1s", *few)
    assert done.code == 1, done.err
    last = done.err.strip().splitlines()[-1]
    assert "no study was finished" in last
    assert "the same command goes on from there" in last

"""``veneer env``: what a newcomer types to find, see, write and check an environment."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from processes import Veneer, forking_veneer
from veneer.envs import ENVIRONMENTS
from veneer.envs.gym_tasks import DATASETS
from veneer.render import load_renderer

pytestmark = pytest.mark.xdist_group("env")


@pytest.fixture(scope="module")
def veneer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Veneer]:
    with forking_veneer(tmp_path_factory.mktemp("streams")) as runner:
        yield runner


def test_list(veneer: Veneer, home: Path) -> None:
    """Every environment with what it is, and every task of a family."""
    listed = veneer(home, "env", "list", "--json").document
    assert {*ENVIRONMENTS, "reasoning_gym:ID"} <= {d["name"] for d in listed}
    assert all(d["about"].endswith(".") for d in listed)
    assert next(d["args"] for d in listed if d["name"] == "arithmetic") == "min_terms=3, max_terms=5, seed=0"
    assert "arithmetic" in veneer(home, "env", "list").out
    assert veneer(home, "env", "list", "reasoning_gym", "--json").document == [f"reasoning_gym:{name}" for name in sorted(DATASETS)]
    wrong = veneer(home, "env", "list", "nothing")
    assert (wrong.code, wrong.err) == (2, "veneer: no list of 'nothing'; there is one of reasoning_gym\n")


def test_show(veneer: Veneer, home: Path) -> None:
    """The first problem as it is said and as it is read."""
    document = veneer(home, "env", "show", "calculator", "--json").document
    (message,) = document["messages"]
    assert document["gold"]["content"] == str(eval(message["content"].removesuffix("=?")))
    renderer = load_renderer("nano")
    assert document["tokens"] == renderer.build_generation_prompt(document["messages"], document["tools"]).tolist()
    shown = veneer(home, "env", "show", "arithmetic", "--env-arg", "max_terms=3", "--split", "eval", "--index", "4")
    assert shown.code == 0
    assert "[user] " in shown.out
    assert "<|im_start|>assistant" in shown.out
    assert "solution: " in shown.out


def test_new_writes_what_works_at_once(veneer: Veneer, home: Path, tmp_path: Path) -> None:
    """The file is fit as it is written, and as short as it is said to be; tests/test_docs.py trains on it."""
    made = veneer(home, "env", "new", "my_digits", "--json", cwd=tmp_path)
    assert made.document == {"code": "my_digits.py", "config": "my_digits.toml", "env": "my_digits.py:my_digits"}
    source = (tmp_path / "my_digits.py").read_text()
    assert len(source.splitlines()) <= 65
    assert "example" not in source.lower()
    assert "TODO" not in source
    checked = veneer(home, "env", "check", "my_digits.py:my_digits", "--problems", 8, "--json", cwd=tmp_path)
    assert checked.code == 0, checked.out + checked.err
    verdicts = {f["name"]: f["verdict"] for f in checked.document["findings"]}
    assert verdicts["gold"] == verdicts["pure"] == verdicts["disjoint"] == "ok"


def test_new_overwrites_nothing(veneer: Veneer, home: Path, tmp_path: Path) -> None:
    """Neither file, also if only one of the two is there."""
    (tmp_path / "mine.toml").write_text("mine")
    refused = veneer(home, "env", "new", "mine", cwd=tmp_path)
    assert (refused.code, refused.err) == (2, "veneer: mine.toml is there already; choose another name, or take it away\n")
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith("mine")) == ["mine.toml"]
    assert (tmp_path / "mine.toml").read_text() == "mine"


@pytest.mark.parametrize("name", ["no-name", "1st", "class", "../up", "random", "Episode"])
def test_new_takes_names_that_python_takes(veneer: Veneer, home: Path, tmp_path: Path, name: str) -> None:
    refused = veneer(home, "env", "new", name, cwd=tmp_path)
    assert refused.code == 2
    assert refused.err.count("\n") == 1
    assert not list(tmp_path.glob("*.py"))


def test_check_fails_with_exit_code_1(veneer: Veneer, home: Path, tmp_path: Path) -> None:
    """And says what is wrong, with --json too; without sampling it needs no weights."""
    veneer(home, "env", "new", "wrong", cwd=tmp_path)
    path = tmp_path / "wrong.py"
    path.write_text(path.read_text().replace('"content": self.problem.answer}', '"content": "no"}'))
    done = veneer(home, "env", "check", "wrong.py:wrong", "--problems", 4, "--no-sample", cwd=tmp_path)
    assert done.code == 1
    assert "FAILED   gold             8 of 8 solutions do not earn 1" in done.out
    assert "difficulty" not in done.out
    assert done.err == ""
    again = veneer(home, "env", "check", "wrong.py:wrong", "--problems", 4, "--no-sample", "--json", cwd=tmp_path)
    assert (again.code, again.document["passed"]) == (1, False)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("check", "arithmetik"), "did you mean 'arithmetic'"),
        (("show", "math"), "missing a required argument: 'data'"),
        (("check", "math", "--env-arg", "data=gone.jsonl"), "there is no file 'gone.jsonl'"),
        (("show", "gone.py:f"), "there is no file gone.py"),
        (("check", "sort", "--env-arg", "hardness=3"), "env.args"),
    ],
)
def test_mistakes(veneer: Veneer, home: Path, arguments: tuple[str, ...], words: str) -> None:
    """One line and exit code 2; one JSON document if that was asked for."""
    done = veneer(home, "env", *arguments)
    assert done.code == 2
    assert words in done.err
    assert done.err.count("\n") == 1
    assert json.loads(veneer(home, "env", *arguments, "--json").out)["exit_code"] == 2

"""``veneer plan``: from a name and a task to figures with their sources, and to a file that trains."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from processes import Veneer, forking_veneer

pytestmark = pytest.mark.xdist_group("plan")
LLAMA, MOE = "meta-llama/Llama-3.1-8B", "Qwen/Qwen3-30B-A3B"


@pytest.fixture(scope="module")
def veneer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Veneer]:
    with forking_veneer(tmp_path_factory.mktemp("streams")) as runner:
        yield runner


def figures(document: dict) -> dict[str, dict]:
    return {figure["name"]: figure for section in document["sections"].values() for figure in section}


def test_a_task_is_measured_planned_and_trained(veneer: Veneer, home: Path, tmp_path: Path) -> None:
    """From the task's name to a finished run: rates are measured, and the file is one that trains."""
    options = ("--env", "arithmetic", "--env-arg", "max_terms=3", "--problems", 4, "--full-lr", 1.5e-4, "--steps", 2, "--groups", 2)
    planned = veneer(home, "plan", "nano", *options, "--group-size", 4, "--device", "cpu", "--write", "mine.toml", "--json", cwd=tmp_path)
    assert planned.code == 0, planned.err
    found = figures(planned.document)
    assert found["adapter parameters"]["value"] == 8 * 11_264
    rate = 1.5e-4 * 3**0.5 * 160 / 32  # the mean input width of nano's maps is 160
    assert found["learning rate"]["value"] == pytest.approx(rate)
    assert 0 < found["pass rate"]["value"] < 1
    assert "8 tries at each of 4" in found["group size"]["formula"]
    assert found["the run"]["low"] < found["the run"]["value"] < found["the run"]["high"]
    assert 10 < planned.document["step"]["prompt_tokens"] < 40
    written = tomllib.loads((tmp_path / "mine.toml").read_text())
    assert written["rl"] == {
        "steps": 2,
        "learning_rate": pytest.approx(rate, rel=1e-3),
        "groups_per_batch": 2,
        "group_size": 4,
        "max_tokens": 72,
    }
    assert written["env"] == {"name": "arithmetic", "args": {"max_terms": 3}}
    trained = veneer(home, "train", "mine.toml", "--set", "eval.problems=8", "--json", cwd=tmp_path)
    assert trained.code == 0, trained.err
    assert trained.document["trainable_parameters"] == found["adapter parameters"]["value"]


def test_a_file_of_demonstrations_is_planned_and_trained(veneer: Veneer, home: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}+{i}=?", "completion": str(2 * i)} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--kind", "sft", "--tokens", 4000, "--first-loss", 0.7, "--drawn-tokens", 20, "--prompt-tokens", 10, "--batch-size", 8)
    planned = veneer(
        home, "plan", "nano", *options, "--lr", 1e-3, "--steps", 2, "--data", "rows.jsonl", "--write", "mine.toml", "--json", cwd=tmp_path
    )
    assert planned.code == 0, planned.err
    found = figures(planned.document)
    assert found["bits demanded"]["value"] == pytest.approx(2 * 8 * 20 * 0.7 / 0.6931, rel=1e-3)
    assert any("small batches" in warning for warning in planned.document["warnings"])
    trained = veneer(home, "train", "mine.toml", cwd=tmp_path)
    assert trained.code == 0, trained.err


def test_a_range_test_runs(veneer: Veneer, home: Path, tmp_path: Path) -> None:
    """Five rates on two seeds for a few steps of two short episodes, kept like a study's: nothing is learned, and it says so."""
    options = (
        "--env",
        "sort",
        "--pass-rates",
        "0.5",
        "--groups",
        1,
        "--group-size",
        2,
        "--max-tokens",
        4,
        "--range-test",
        "--range-steps",
        2,
        "--range-seeds",
        2,
        "--json",
    )
    done = veneer(home, "plan", "nano", *options, cwd=tmp_path)
    assert done.code == 0, done.err
    assert done.err.count("range test") == 10
    rate = figures(done.document)["learning rate"]
    assert (rate["value"], rate["note"]) == (None, "no rate improved on the base: an easier task, or demonstrations first")
    assert "2 steps each" in rate["source"]
    assert "2 seeds" in rate["source"]
    assert len(list((home / "studies" / "runs").iterdir())) == 10


def test_a_person_reads_it(veneer: Veneer, home: Path) -> None:
    """The short table, and with --explain where everything is from."""
    short = veneer(home, "plan", LLAMA, "--pass-rates", "0.1,0.3,0.5", "--full-lr", 1e-6, "--rank", 1, "--device", "h100", "--price", 2)
    assert short.code == 0, short.err
    assert "8,030,261,248 parameters, 32 layers; linear maps adapted: 128 attention, 96 mlp" in short.out
    assert "2,621,440" in short.out
    assert "5e-06" in short.out
    for section in ("adapter", "learning", "memory", "compute", "time"):
        assert section in short.out
    assert "https" not in short.out
    long = veneer(home, "plan", LLAMA, "--pass-rates", "0.1,0.3,0.5", "--full-lr", 1e-6, "--rank", 1, "--explain")
    assert "https://thinkingmachines.ai/blog/lora/" in long.out
    assert "(2 W + 3 r P1) / 3 W" in long.out
    assert "llama-factory" in long.out
    assert [line.split()[1:] for line in long.out.splitlines() if line.startswith("mlp.up_proj")] == [
        ["mlp", "4096", "14336", "32", "1", "yes"]
    ]


def test_every_figure_has_a_formula_and_a_source(veneer: Veneer, home: Path) -> None:
    """With its range, or with words about what is not known."""
    done = veneer(
        home, "plan", MOE, "--pass-rates", "0,0.2,0.7", "--tries", 10, "--full-lr", 1e-6, "--device", "h200", "--price", 3, "--json"
    )
    assert done.code == 0, done.err
    found = figures(done.document)
    assert len(found) >= 25
    for figure in found.values():
        assert figure["formula"]
        assert figure["source"]
        exact = figure["source"].startswith("exact")
        assert exact or figure["note"] or figure["low"] is not None, f"{figure['name']}: how far can it be trusted?"
    assert {one["kind"] for one in done.document["model"]["linear_maps"]} == {"attention", "expert", "unembedding", "other"}
    assert any("does not adapt them yet" in warning for warning in done.document["warnings"])
    assert [one["library"] for one in done.document["elsewhere"]][:3] == ["peft", "trl", "verl"]


def test_a_budget_sets_the_steps(veneer: Veneer, home: Path) -> None:
    """All of them fit even if every step takes as long as it may; money is time."""
    options = ("plan", LLAMA, "--pass-rates", "0.3", "--full-lr", 1e-6, "--device", "h100", "--json")
    hours = veneer(home, *options, "--budget", "2h").document
    assert 3600 < figures(hours)["the run"]["high"] <= 7200
    money = veneer(home, *options, "--budget", "$20", "--price", 5).document
    assert figures(money)["cost"]["high"] <= 20
    assert money["steps"] == pytest.approx(2 * hours["steps"], abs=1)
    episodes = veneer(home, *options, "--budget", "1,000episodes", "--groups", 10, "--group-size", 10).document
    assert episodes["steps"] == 10


def test_rates_of_other_libraries(veneer: Veneer, home: Path) -> None:
    """TRL's alpha is ours; Unsloth's is half of it."""
    options = ("plan", LLAMA, "--pass-rates", "0.3", "--lr", 1e-5, "--json")
    assert figures(veneer(home, *options, "--from", "trl").document)["learning rate"]["value"] == pytest.approx(1e-5)
    other = figures(veneer(home, *options, "--from", "unsloth").document)["learning rate"]
    assert (other["low"], other["high"]) == (pytest.approx(0.5e-5), pytest.approx(0.5**0.5 * 1e-5))
    assert "unslothai/unsloth" in other["source"]


def test_rates_in_a_file(veneer: Veneer, home: Path, tmp_path: Path) -> None:
    (tmp_path / "rates.json").write_text("[0.0, 0.25,\n 1.0]")
    done = veneer(home, "plan", LLAMA, "--pass-rates", "rates.json", "--useful", 0.2, "--full-lr", 1e-6, "--json", cwd=tmp_path)
    assert figures(done.document)["pass rate"]["value"] == pytest.approx(1.25 / 3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("nano", "--range-test"), "name one with --env"),
        (("nobody/nothing",), "no such folder or config.json"),
        (("nano", "--rank", "65"), "rank 65 does not fit: it must be from 1 to 64"),
        (("nano", "--pass-rates", "0.1,2"), "give shares from 0 to 1"),
        (("nano", "--env", "arithmetik"), "did you mean 'arithmetic'"),
        (("nano", "--budget", "2h"), "give --device"),
        (("nano", "--budget", "$5", "--device", "h100"), "give --price"),
        (("nano", "--budget", "soon"), "write 2h, 30m, $20 or 5000episodes"),
        ((LLAMA, "--budget", "1s", "--device", "l4"), "lower --groups or --group-size"),
        (("nano", "--from", "verl", "--lr", "1e-5"), "give --from-rank"),
        (("nano", "--write", "x.toml"), "name the task with --env"),
        (("nano", "--kind", "sft", "--lr", "1e-3", "--write", "x.toml"), "with --data"),
        ((MOE, "--write", "x.toml", "--env", "arithmetic"), "the engine does not adapt experts yet; give --no-mlp"),
        (("nano", "--env", "arithmetic", "--pass-rates", "0.5", "--write", "there.toml"), "there.toml is there already"),
        (("config.json", "--env", "arithmetic", "--lr", "1e-3", "--write", "x.toml"), "holds no weights"),
    ],
)
def test_mistakes_are_one_line(veneer: Veneer, home: Path, tmp_path: Path, options: tuple[str, ...], words: str) -> None:
    (tmp_path / "there.toml").write_text("mine")
    (tmp_path / "config.json").write_text((Path(__file__).parents[2] / "src/veneer/assets/nano/config.json").read_text())
    done = veneer(home, "plan", *options, "--json", cwd=tmp_path)
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert words in done.err
    assert done.document["exit_code"] == 2
    assert not (tmp_path / "x.toml").exists()
    assert (tmp_path / "there.toml").read_text() == "mine"

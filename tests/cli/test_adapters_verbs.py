"""``veneer adapters``: a line of adapters from SFT by RL to a fork, promoted, rolled back, moved to another home, and forgotten."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from processes import Result, Veneer, forking_veneer, small_run
from veneer.store.registry import Registry

pytestmark = pytest.mark.xdist_group("cli")


@pytest.fixture(scope="module")
def veneer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Veneer]:
    with forking_veneer(tmp_path_factory.mktemp("streams")) as runner:
        yield runner


@pytest.fixture
def line(veneer: Veneer, tmp_path: Path) -> Path:
    """A home in which ``taught`` (SFT) became ``small`` (RL, two versions)."""
    home, files = tmp_path / "home", tmp_path / "files"
    rows = [json.dumps({"prompt": f"a{i}", "completion": "b"}) for i in range(8)]
    small_run(files)
    (files / "rows.jsonl").write_text("\n".join(rows))
    (files / "taught.toml").write_text(f'kind = "sft"\n[lora]\nrank = 1\n[sft]\ndata = "{files}/rows.jsonl"\nsteps = 1\nbatch_size = 4\n')
    assert veneer(home, "train", files / "taught.toml").code == 0
    short = ("--set", "rl.steps=1", "--set", "eval.problems=2", "--json")
    first = veneer(home, "train", files / "small.toml", "--set", "init=taught", *short)
    assert (first.code, first.document["adapter"]) == (0, "small@1"), first.err
    settings = ("--set", f"folder={home}/runs/again", "--set", "init=small@1", "--set", "seed=1")
    again = veneer(home, "train", files / "small.toml", *settings, *short)
    assert (again.code, again.document["adapter"]) == (0, "small@2"), again.err
    return home


def ask(veneer: Veneer, home: Path, *arguments: object) -> Any:
    result = veneer(home, "adapters", *arguments, "--json")
    assert result.code == 0, result.err
    assert result.err == ""
    return result.document


def refused(result: Result, code: int = 2) -> str:
    assert result.code == code, (result.out, result.err)
    assert result.err.count("\n") == 1
    return result.err


def test_a_line_of_adapters(veneer: Veneer, line: Path) -> None:
    """Lineage through runs, labels that move, a fork, a stack, and forgetting."""
    forked = ask(veneer, line, "fork", "small", "customer")
    assert (forked["reference"], forked["parents"][0]["reference"]) == ("customer@1", "small@2")
    chain = [(a["reference"], a["stage"], a["state"]) for a in ask(veneer, line, "lineage", "customer")]
    made = [("customer@1", "fork"), ("small@2", "rl"), ("small@1", "rl"), ("taught@1", "sft"), ("nano", "base")]
    assert chain == [(reference, stage, "here") for reference, stage in made]
    digests = {d["reference"]: d["digest"] for d in ask(veneer, line, "list")}
    assert len(set(digests.values())) == 3

    asked = ("sample", "hi", "--adapter", "small", "--max-tokens", 1, "--json")
    for verb, version in ((("promote", "small@1"), 1), (("promote", "small@2"), 2), (("rollback", "small"), 1)):
        moved = ask(veneer, line, *verb)
        assert (moved["adapter"], moved["labels"]) == (f"small@{version}", {"live": version})
        assert veneer(line, *asked).document["adapter"]["digest"] == digests[f"small@{version}"]
    assert [move["version"] for move in moved["history"]] == [1, 2, 1]
    ask(veneer, line, "promote", "small@2", "--label", "beta")
    assert ask(veneer, line, "show", "small@beta")["reference"] == "small@2"

    stacked = ask(veneer, line, "stack", "both", "small@1", "small@2:-0.5")
    assert (stacked["rank"], [p["scale"] for p in stacked["parents"]]) == (2, [1.0, -0.5])
    assert veneer(line, "sample", "hi", "--adapter", "both", "--max-tokens", 1, "--json").code == 0
    assert ask(veneer, line, "stack", "alone", "small@1")["digest"] == digests["small@1"]

    assert "--with-children" in refused(veneer(line, "adapters", "forget", "small"))
    receipt = ask(veneer, line, "forget", "small@1", "--keep-children", "--reason", "tidying")
    assert [r["reference"] for r in receipt["forgotten"]] == ["small@1"]
    assert {kept["what"] for kept in receipt["left"]} == {
        "small@2",
        "both@1",
        "alone@1",
        str(line / "runs/small"),
        str(line / "runs/again"),
    }
    assert "forgotten" in refused(veneer(line, "sample", "hi", "--adapter", "small@1"))
    assert ask(veneer, line, "lineage", "customer")[2]["state"] == "forgotten"
    receipt = ask(veneer, line, "forget", "taught", "--with-children", "--with-runs")
    assert {r["reference"] for r in receipt["forgotten"]} == {"taught@1"}
    assert {Path(run).name for run in receipt["runs"]} == {"taught", "small"}, "the first checkpoint of small is taught@1"


def test_verify_and_reindex(veneer: Veneer, line: Path) -> None:
    """Damage is found without loading a base; the index comes back from the folders."""
    documents = ask(veneer, line, "verify")
    assert [(d["reference"], d["intact"], d["trusted"]) for d in documents] == [(r, True, True) for r in ("small@1", "small@2", "taught@1")]
    with (Registry(line).resolve("small@2").folder / "README.md").open("a") as card:
        card.write("!")
    result = veneer(line, "adapters", "verify", "--json")
    assert result.code == 1
    (bad,) = (d for d in result.document if not d["intact"])
    assert (bad["reference"], "README.md was changed" in bad["problem"]) == ("small@2", True)
    assert [d["intact"] for d in ask(veneer, line, "verify", "small@1")] == [True]
    (line / "adapters/index.sqlite").write_bytes(b"\0" * 100)
    assert "veneer adapters reindex" in refused(veneer(line, "adapters", "list"), 1)
    found = ask(veneer, line, "reindex")
    assert (sorted(found["added"]), len(found["left_out"])) == (["small@1", "taught@1"], 1)
    assert [d["reference"] for d in ask(veneer, line, "list")] == ["small@1", "taught@1"]


def test_trust_between_homes(veneer: Veneer, line: Path, tmp_path: Path) -> None:
    """What comes from a home that is trusted comes in signed; what anybody vouches for, too; the rest does not."""
    other = tmp_path / "other"
    exported = ask(veneer, line, "export", "small@1", tmp_path / "out")
    key = ask(veneer, line, "trust")["own"]
    assert ask(veneer, other, "trust") == {"own": None, "trusted": {}}
    assert ask(veneer, other, "import", tmp_path / "out", "--name", "a")["signed_by"] is None
    assert ask(veneer, other, "trust", key, "--note", "the first team") == {"own": None, "trusted": {key: "the first team"}}
    trusted = ask(veneer, other, "import", tmp_path / "out", "--name", "b")
    own = ask(veneer, other, "trust")["own"]
    assert (trusted["signed_by"], trusted["trusted"], trusted["digest"]) == (own, True, exported["digest"])
    assert own not in (None, key)
    assert ask(veneer, other, "trust", key, "--remove") == {"own": own, "trusted": {}}
    assert ask(veneer, other, "import", tmp_path / "out", "--name", "c")["trusted"] is False
    assert ask(veneer, other, "import", tmp_path / "out", "--name", "d", "--sign")["trusted"] is True
    chain = [(a["reference"], a["state"]) for a in ask(veneer, other, "lineage", "b")]
    assert chain == [("b@1", "here"), ("small@1", "elsewhere"), ("nano", "here")]


def test_people_read_it(veneer: Veneer, line: Path, tmp_path: Path) -> None:
    """Without --json: lines and tables, nothing on stderr."""
    verbs: list[tuple[object, ...]] = [("list",), ("show", "small"), ("lineage", "small"), ("verify",), ("promote", "small@1"), ("trust",)]
    verbs += [("fork", "small", "mine"), ("stack", "both", "small@1", "taught:2"), ("export", "small", tmp_path / "out")]
    for verb in [*verbs, ("promote", "small@2"), ("rollback", "small"), ("forget", "mine"), ("reindex",)]:
        result = veneer(line, "adapters", *verb)
        assert (result.code, result.err) == (0, ""), verb
        assert result.out
        assert not result.out.startswith(("{", "["))
    assert "small@live -> small@1" in veneer(line, "adapters", "promote", "small@1").out
    assert "taught@1" in veneer(line, "adapters", "lineage", "small@2").out

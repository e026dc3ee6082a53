"""A pipeline of every supervised kind in real processes: lineage, kills, going on, and whose mistake it is."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from processes import Veneer, differences, forking_veneer, leftovers, until
from veneer.store.registry import Registry

pytestmark = pytest.mark.xdist_group("cli")

PIPELINE = """
checkpoint_every = 2
lora.rank = 1
env.name = "sort"
eval = { problems = 8, every = 3 }
[[stages]]
name = "first"
kind = "sft"
sft = { data = "rows.jsonl", steps = 4, batch_size = 4, held_out = 0.2 }
[[stages]]
name = "second"
kind = "dpo"
dpo = { data = "pairs.jsonl", steps = 4, batch_size = 4, held_out = 0.2 }
[[stages]]
name = "third"
kind = "rejection"
rejection = { rounds = 2, problems = 8, group_size = 4, steps = 3, batch_size = 4 }
[[stages]]
name = "fourth"
kind = "distill"
distill = { teacher = "first", teacher_prompt = "x", steps = 4, groups_per_batch = 2, group_size = 2, on_policy = false, top_k = 4 }
"""
STAGES = {"first": 4, "second": 4, "third": 6, "fourth": 4}


@pytest.fixture(scope="module")
def veneer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Veneer]:
    with forking_veneer(tmp_path_factory.mktemp("streams")) as runner:
        yield runner


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    digits = [f"{i * 7919 % 100000:05}" for i in range(24)]
    rows = [{"prompt": f"sort {d}", "completion": "".join(sorted(d))} for d in digits]
    pairs = [{"prompt": f"sort {d}", "chosen": "".join(sorted(d)), "rejected": d} for d in digits]
    for name, lines in (("rows", rows), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "all.toml").write_text(PIPELINE)
    return folder


def evidence(home: Path) -> dict[str, bytes]:
    """Everything of the finished stages that must not depend on interruptions."""
    found: dict[str, bytes] = {}
    for name, steps in STAGES.items():
        run = home / "runs" / name
        paths = [
            run / "metrics.jsonl",
            run / "config.toml",
            *run.glob("rollouts/*"),
            *run.glob(f"checkpoints/step-{steps:06d}/*.safetensors"),
        ]
        found |= {str(p.relative_to(home)): p.read_bytes() for p in paths}
        for entry in Registry(home).entries(name):
            found[entry.reference] = (entry.folder / "adapter_model.safetensors").read_bytes()
    return found


def lines(home: Path) -> int:
    """Of all stages' metrics."""
    return sum(path.read_text().count("\n") for path in home.glob("runs/*/metrics.jsonl"))


@pytest.fixture(scope="module")
def whole(veneer: Veneer, files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home of an uninterrupted pipeline; its document is in whole.json."""
    home = tmp_path_factory.mktemp("whole")
    result = veneer(home, "train", "all.toml", "--json", cwd=files)
    assert result.code == 0, result.err
    (home / "whole.json").write_text(result.out)
    return home


def test_one_document_and_the_whole_lineage(veneer: Veneer, whole: Path) -> None:
    """Every stage's summary, and from the last adapter back to the base."""
    document = json.loads((whole / "whole.json").read_text())
    assert [(s["kind"], s["adapter"]) for s in document["stages"]] == [
        ("sft", "first@1"),
        ("dpo", "second@1"),
        ("rejection", "third@1"),
        ("distill", "fourth@1"),
    ]
    shown = veneer(whole, "adapters", "show", "fourth", "--json").document
    assert shown["lineage"] == ["fourth@1", "third@1", "first@1", "second@1", "nano"]
    assert [parent["reference"] for parent in shown["parents"]] == ["third@1", "first@1"], "the teacher is one"
    assert veneer(whole, "adapters", "show", "second", "--json").document["lineage"] == ["second@1", "first@1", "nano"]
    rows = {row["name"]: row for row in veneer(whole, "runs", "--json").document}
    assert {name: (row["steps"], row["of"], row["done"]) for name, row in rows.items()} == {n: (s, s, True) for n, s in STAGES.items()}
    assert [rows[name]["env"] for name in STAGES] == [None, None, "sort", "sort"]


def test_interrupted_at_any_moment(veneer: Veneer, files: Path, whole: Path, tmp_path: Path) -> None:
    """Ctrl-C, then power cuts in every stage and in the middle of a round of episodes: the same command ends with the same bytes."""
    running = veneer.start(tmp_path, "train", "all.toml", "--json", cwd=files)
    until(lambda: lines(tmp_path) >= 7)
    running.kill(signal.SIGINT)
    result = running.wait()
    assert (result.code, result.document["exit_code"]) == (130, 130)
    assert result.document["error"].startswith("stage 1 (second): interrupted after step")
    rng, kills = random.Random(1), 0
    for wanted in (9, 14, 16, 20):
        running = veneer.start(tmp_path, "train", "all.toml", "--json", cwd=files)
        until(lambda wanted=wanted: lines(tmp_path) >= wanted)
        time.sleep(rng.random() * 0.05)
        running.kill(signal.SIGKILL)
        kills += running.wait().code == -signal.SIGKILL
    result = veneer(tmp_path, "train", "all.toml", "--json", cwd=files)
    assert result.code == 0, result.err
    assert kills == 4
    assert differences(evidence(tmp_path), evidence(whole)) == []
    assert leftovers(tmp_path) == []
    again = veneer(tmp_path, "train", "all.toml", "--json", cwd=files)
    assert again.document == result.document, "what is finished is left as it is"


def test_a_mistake_in_a_later_stage_names_it_and_loses_nothing(veneer: Veneer, files: Path, whole: Path, tmp_path: Path) -> None:
    """The first stage may have taken a night."""
    result = veneer(tmp_path, "train", "all.toml", "--json", "--set", "stages.1.dpo.data=none.jsonl", cwd=files)
    assert result.code == 2
    assert result.document["error"] == "stage 1 (second): dpo.data: there is no file 'none.jsonl'"
    before = (tmp_path / "runs/first/metrics.jsonl").stat()
    cut = veneer(tmp_path, "train", "all.toml", "--json", "--set", "stages.2.rejection.bar=7", cwd=files)
    assert (cut.code, cut.document["error"].split(":")[0]) == (1, "stage 2 (third)")
    after = (tmp_path / "runs/first/metrics.jsonl").stat()
    assert (before.st_size, after.st_size) == (after.st_size, (whole / "runs/first/metrics.jsonl").stat().st_size)
    assert [entry.reference for entry in Registry(tmp_path).entries()] == ["first@1", "second@1"]

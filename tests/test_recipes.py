"""The bundled base comes from its recipe, and the recipes' data from their script."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from processes import Veneer, forking_veneer
from veneer.assets import NANO_FOLDER
from veneer.envs.dataset import held_out

ROOT = Path(__file__).parents[1]


def made(script: str, folder: Path, *arguments: object) -> dict[str, bytes]:
    command = [sys.executable, ROOT / f"recipes/{script}.py", "--out", folder, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_making_the_base_is_deterministic_and_ends_at_what_is_shipped(tmp_path: Path) -> None:
    """Whoever runs both recipes twice gets the same bytes, and the tokenizer, template, shape and size that are shipped. The worlds'
    tokens come behind those of the skills: what the base knows by those stays where it was."""
    skills, again = (made("pretrain_nano", tmp_path / name, "--steps", 3, "--rows", 8) for name in ("skills", "again"))
    assert skills == again
    first, second = (
        made("teach_nano", tmp_path / name, "--start", tmp_path / "skills", "--steps", 2, "--rows", 4) for name in ("first", "second")
    )
    assert first == second
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json", "generation_config.json"):
        assert first[name] == (NANO_FOLDER / name).read_bytes(), name
    assert len(first["model.safetensors"]) == (NANO_FOLDER / "model.safetensors").stat().st_size
    before, after = (json.loads(files["tokenizer.json"]) for files in (skills, first))
    assert after["model"]["vocab"] == before["model"]["vocab"]
    old, new = ({token["content"]: token["id"] for token in tokenizer["added_tokens"]} for tokenizer in (before, after))
    assert old.items() <= new.items()
    assert len(new) > len(old)


def test_a_narrower_base_is_one_of_the_same_kind(tmp_path: Path) -> None:
    """All that another width changes is the width."""
    narrow = made("pretrain_nano", tmp_path / "narrow", "--width", 64, "--steps", 1, "--rows", 4, "--threads", 1)
    mine, shipped = (json.loads(text) for text in (narrow["config.json"], (NANO_FOLDER / "config.json").read_bytes()))
    differ = {key for key in mine if mine[key] != shipped[key]} - {"vocab_size"}
    assert differ == {"hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"}
    assert [2 * mine[key] for key in sorted(differ)] == [shipped[key] for key in sorted(differ)]
    command = [sys.executable, ROOT / "recipes/pretrain_nano.py", "--out", tmp_path / "odd", "--width", "100"]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "--width 100: heads are 32 wide and go in pairs; give a multiple of 64" in refused.stderr


def test_the_base_is_small() -> None:
    assert sum(path.stat().st_size for path in NANO_FOLDER.iterdir()) < 10e6


def test_the_recipes_data_are_what_their_script_writes(tmp_path: Path) -> None:
    """And no problem of a demonstration is one that scores are measured on."""
    done = subprocess.run([sys.executable, ROOT / "recipes/demonstrations.py", "--out", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shipped = {path.name: path.read_bytes() for path in (ROOT / "recipes/data").iterdir()}
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == shipped
    assert len(shipped) == 8
    for name, text in shipped.items():
        rows = [json.loads(line) for line in text.splitlines()]
        if name in ("questions.jsonl", "digits.jsonl", "functions.jsonl"):
            texts = [row.get("question", row.get("prompt")) for row in rows]
            assert len(set(texts)) == len(texts) == 768
            assert sum(map(held_out, texts)) == 256
            continue
        for row in rows:
            questions = [m["content"] for m in row.get("messages", row.get("prompt")) if m["role"] == "user"]
            assert len(questions) == 1
            assert not held_out(questions[0])


@pytest.fixture(scope="module")
def veneer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Veneer]:
    with forking_veneer(tmp_path_factory.mktemp("streams")) as runner:
        yield runner


@pytest.mark.parametrize("recipe", sorted(path.stem for path in (ROOT / "recipes").glob("*.toml")))
def test_every_recipe_runs(veneer: Veneer, tmp_path: Path, recipe: str) -> None:
    """A step of each stage, from the repository as its first line says."""
    if recipe == "code" and shutil.which("bwrap") is None:
        pytest.skip("needs bubblewrap, the sandbox's walls")
    text = (ROOT / f"recipes/{recipe}.toml").read_text()
    assert text.splitlines()[0].endswith(f": veneer train recipes/{recipe}.toml")
    document = tomllib.loads(text)
    short = ["eval.problems=2"]
    for prefix, stage in [(f"stages.{i}.", stage) for i, stage in enumerate(document.get("stages", []))] or [("", document)]:
        kind = stage.get("kind", "rl")
        short += [f"{prefix}{kind}.steps=1"]
        short += [f"{prefix}{kind}.{key}=2" for key in ("groups_per_batch", "group_size") if key in stage[kind]]
    result = veneer(tmp_path, "train", f"recipes/{recipe}.toml", "--json", *(part for one in short for part in ("--set", one)), cwd=ROOT)
    assert result.code == 0, result.err
    assert result.document.get("stages", [result.document])[-1]["adapter"].endswith("@1")

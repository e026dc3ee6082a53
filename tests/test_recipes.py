"""The bundled base comes from its recipe, and the recipes' data from their script."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from veneer.assets import NANO_FOLDER
from veneer.envs.dataset import held_out

ROOT = Path(__file__).parents[1]


def pretrain(folder: Path) -> dict[str, bytes]:
    command = [sys.executable, ROOT / "recipes/pretrain_nano.py", "--steps", "3", "--rows", "8", "--out", folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_pretraining_is_deterministic_and_makes_the_bundled_tokenizer(tmp_path: Path) -> None:
    """Whoever runs the recipe twice gets the same bytes, and the tokenizer, template and shape that are shipped."""
    first, second = pretrain(tmp_path / "first"), pretrain(tmp_path / "second")
    assert first == second
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"):
        assert first[name] == (NANO_FOLDER / name).read_bytes(), name
    assert len(first["model.safetensors"]) == (NANO_FOLDER / "model.safetensors").stat().st_size


def test_the_recipes_data_are_what_their_script_writes(tmp_path: Path) -> None:
    """And no problem in them is one that scores are measured on."""
    done = subprocess.run([sys.executable, ROOT / "recipes/demonstrations.py", "--out", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shipped = {path.name: path.read_bytes() for path in (ROOT / "recipes/data").iterdir()}
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == shipped
    assert len(shipped) == 3
    for text in shipped.values():
        for line in text.splitlines():
            row = json.loads(line)
            questions = [m["content"] for m in row.get("messages", row.get("prompt")) if m["role"] == "user"]
            assert len(questions) == 1
            assert not held_out(questions[0])


def teach(folder: Path) -> dict[str, bytes]:
    command = [sys.executable, ROOT / "recipes/teach_nano.py", "--start", NANO_FOLDER, "--out", folder, "--steps", "2", "--rows", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_teaching_is_deterministic_and_keeps_what_tokens_mean(tmp_path: Path) -> None:
    """The worlds' tokens come behind those that there are: what the base knows by its old ones stays where it was."""
    first, second = teach(tmp_path / "first"), teach(tmp_path / "second")
    assert first == second
    before, after = (json.loads(text) for text in ((NANO_FOLDER / "tokenizer.json").read_bytes(), first["tokenizer.json"]))
    assert after["model"]["vocab"] == before["model"]["vocab"]
    old, new = ({token["content"]: token["id"] for token in tokenizer["added_tokens"]} for tokenizer in (before, after))
    assert old.items() <= new.items()
    assert len(new) > len(old)

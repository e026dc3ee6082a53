"""The bundled base comes from its recipe."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from veneer.assets import NANO_FOLDER

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

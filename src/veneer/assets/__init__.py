"""The bundled base model, the one place that knows its name, and the shapes of models that people name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NANO = "nano"
NANO_FOLDER = Path(__file__).parent / "nano"
CONFIGS = Path(__file__).parent / "configs.json"


def resolve_base(name: str) -> str:
    """``nano`` -> its folder; anything else is a hub name or a local folder and stays as it is."""
    return str(NANO_FOLDER) if name == NANO else name


def known_configs() -> dict[str, dict[str, Any]]:
    """Hub name -> what decides the model's shape in its config.json."""
    found: dict[str, dict[str, Any]] = json.loads(CONFIGS.read_text())["models"]
    return {name: {**found[config["same_as"]]} if "same_as" in config else config for name, config in found.items()}

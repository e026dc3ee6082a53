"""The bundled base model, and the one place that knows its name."""

from pathlib import Path

NANO = "nano"
NANO_FOLDER = Path(__file__).parent / "nano"


def resolve_base(name: str) -> str:
    """``nano`` -> its folder; anything else is a hub name or a local folder and stays as it is."""
    return str(NANO_FOLDER) if name == NANO else name

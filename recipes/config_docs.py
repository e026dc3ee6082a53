"""Write docs/configuration.md from the settings' own docstrings.

python recipes/config_docs.py
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel

from veneer.train.config import RunConfig

TARGET = Path(__file__).parents[1] / "docs/configuration.md"


def page() -> str:
    lines = [
        "# Configuration",
        "",
        "One TOML file a run, and `--set KEY=VALUE` on the command line. An unknown key is an error that names the nearest one.",
        "The resolved configuration, every key written out, is kept in the run's folder. Written by `recipes/config_docs.py`.",
        "",
        "| key | default | what it does |",
        "|---|---|---|",
        *rows(RunConfig, ""),
        "",
    ]
    return "\n".join(lines)


def rows(model: type[BaseModel], prefix: str) -> list[str]:
    plain: list[str] = []
    sections: list[str] = []
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            sections += rows(info.annotation, f"{prefix}{name}.")
        else:
            shown = list(info.default) if isinstance(info.default, tuple) else info.default
            plain.append(f"| `{prefix}{name}` | `{shown!r}` | {info.description} |")
    return plain + sections


if __name__ == "__main__":
    TARGET.write_text(page())

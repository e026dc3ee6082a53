"""Several runs in one TOML file: ``[[stages]]``, each a run's configuration, over keys that all share.

A stage goes on from the adapter of the one before, unless it says ``init`` itself; ``init = ""`` begins anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.train.config import RunConfig, make_config, override_in, read_toml
from veneer.types import ConfigError

STAGES = "stages"


@dataclass(frozen=True)
class Stage:
    config: RunConfig
    follows: bool
    """It begins with the adapter of the stage before."""


def load_stages(path: Path, overrides: Sequence[str] = ()) -> list[Stage]:
    """The stages of a file, in order; none if it is a single run's. Overrides reach into them: ``stages.0.sft.steps=3``.

    Raises:
        ConfigError: the file, a key or a value is wrong; names the stage.
    """
    values = read_toml(path)
    if STAGES not in values:
        return []
    for override in overrides:
        override_in(values, override)
    tables = values.pop(STAGES)
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise ConfigError(f"{path}: stages are tables, [[stages]] above each, at least one")
    stages: list[Stage] = []
    for number, table in enumerate(tables):
        tree = _merged(values, table)
        tree.setdefault("name", f"{path.stem}-{tree.get('kind', RunConfig().kind)}")
        if "name" in values and "name" not in table:
            raise ConfigError(f"{path}: stages have names of their own; put name into each, not above them")
        try:
            stages.append(Stage(make_config(tree), number > 0 and "init" not in tree))
        except ConfigError as error:
            raise ConfigError(f"stage {number} ({tree['name']}): {error}") from error
    for number, stage in enumerate(stages):
        twin = next(i for i, other in enumerate(stages) if _place(other.config) == _place(stage.config))
        if twin != number:
            raise ConfigError(f"{path}: stages {twin} and {number} are both kept in {_place(stage.config)}; give each a name of its own")
    return stages


def _place(config: RunConfig) -> str:
    return config.folder or config.name


def _merged(shared: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """What a stage says over what all share; tables are merged key by key."""
    tree = dict(shared)
    for key, value in own.items():
        below = tree.get(key)
        tree[key] = _merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return tree

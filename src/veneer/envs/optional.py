"""Packages that only some environments need."""

from __future__ import annotations

import importlib.util

from veneer.types import ConfigError


def need(module: str) -> None:
    """Raises:
    ConfigError: the module is not installed; says how to get it.
    """
    if importlib.util.find_spec(module) is None:
        raise ConfigError(f"env.name: the package {module} is not installed; pip install 'veneer[envs]'")

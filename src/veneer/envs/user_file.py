"""Functions from a user's own file, as ``path/to/file.py:function``."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from veneer.types import ConfigError


def from_file(reference: str, key: str) -> Callable[..., Any]:
    """The function. ``key``: where the reference stands in the configuration, for messages.

    Raises:
        ConfigError: there is no such file or function, or the file does not run.
    """
    path, _, attribute = reference.rpartition(":")
    if not Path(path).is_file():
        raise ConfigError(f"{key}: there is no file {path}")
    try:
        module = _module(str(Path(path).resolve()), Path(path).stat().st_mtime_ns)
    except Exception as error:  # the user's own code may raise anything
        raise ConfigError(f"{key}: {path} cannot be imported ({type(error).__name__}: {error})") from error
    if not callable(getattr(module, attribute, None)):
        raise ConfigError(f"{key}: {path} has no function {attribute!r}")
    return getattr(module, attribute)


@lru_cache(maxsize=64)
def _module(path: str, changed: int) -> ModuleType:
    """Run once, however many of its functions are asked for."""
    spec = importlib.util.spec_from_file_location(f"veneer_env_{Path(path).stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module

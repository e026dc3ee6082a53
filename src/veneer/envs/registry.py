"""Names of environments, and how to load one from a user's file."""

from __future__ import annotations

import difflib
import functools
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from veneer.envs.arithmetic import arithmetic
from veneer.envs.calculator import calculator
from veneer.envs.digits import count, reverse, sort
from veneer.envs.reasoning import reasoning_gym, task_names
from veneer.types import ConfigError, EnvDataset, in_one_line

Factory = Callable[..., EnvDataset]

ENVIRONMENTS: dict[str, Factory] = {
    "arithmetic": arithmetic,
    "sort": sort,
    "reverse": reverse,
    "count": count,
    "calculator": calculator,
}

FAMILIES: dict[str, Factory] = {
    "reasoning_gym": reasoning_gym,
}
"""Environments of other libraries and places, as ``FAMILY:ID``: the factory's first argument is what stands behind the colon."""

MEMBERS: dict[str, Callable[[], list[str]]] = {
    "reasoning_gym": task_names,
}
"""Every ID of a family that can list them."""


def load_env(name: str, args: Mapping[str, Any] | None = None) -> EnvDataset:
    """A dataset of problems by name, ``family:id`` for one of another library's, or ``path/to/file.py:factory`` for the user's own.

    Raises:
        ConfigError: no such environment, file or argument.
    """
    factory = _from_file(name) if ".py:" in name else _built_in(name)
    try:
        inspect.signature(factory).bind(**(args or {}))
    except TypeError as error:
        raise ConfigError(f"env.args: {error}; {name} takes {inspect.signature(factory)}") from error
    try:
        dataset = factory(**(args or {}))
    except ConfigError:
        raise
    except Exception as error:  # the user's own code may raise anything
        raise ConfigError(f"env.name: {name} raised {in_one_line(error)}") from error
    if not isinstance(getattr(dataset, "name", None), str) or not callable(getattr(dataset, "env", None)):
        raise ConfigError(f"env.name: {name} must return an object with a name and a method env(split, index), not {dataset!r:.80}")
    return dataset


def _built_in(name: str) -> Factory:
    family, colon, identity = name.partition(":")
    if colon and family in FAMILIES:
        return functools.partial(FAMILIES[family], identity)
    if name in ENVIRONMENTS:
        return ENVIRONMENTS[name]
    known = [*ENVIRONMENTS, *(f"{family}:ID" for family in FAMILIES)]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}, or FILE.py:FACTORY"
    raise ConfigError(f"env.name: no environment {name!r}; {hint}")


def _from_file(name: str) -> Factory:
    path, _, attribute = name.rpartition(":")
    if not Path(path).is_file():
        raise ConfigError(f"env.name: there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"veneer_env_{Path(path).stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's own code may raise anything
        raise ConfigError(f"env.name: {path} cannot be imported ({type(error).__name__}: {error})") from error
    if not callable(getattr(module, attribute, None)):
        raise ConfigError(f"env.name: {path} has no function {attribute!r}")
    return getattr(module, attribute)

"""Names of environments, and how to load one from a user's file."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from veneer.envs.arithmetic import arithmetic
from veneer.envs.bridges.openenv import openenv
from veneer.envs.bridges.verifiers import verifiers
from veneer.envs.calculator import calculator
from veneer.envs.code import code
from veneer.envs.digits import count, reverse, sort
from veneer.envs.questions import jsonl, math
from veneer.envs.reasoning import reasoning_gym, task_names
from veneer.envs.tools.questions import tools
from veneer.envs.user_file import from_file
from veneer.envs.worlds import browse, shop, workflow
from veneer.types import ConfigError, EnvDataset, RequestError, in_one_line

Factory = Callable[..., EnvDataset]

ENVIRONMENTS: dict[str, Factory] = {
    "arithmetic": arithmetic,
    "sort": sort,
    "reverse": reverse,
    "count": count,
    "calculator": calculator,
    "jsonl": jsonl,
    "math": math,
    "tools": tools,
    "code": code,
    "browse": browse,
    "workflow": workflow,
    "shop": shop,
}

FAMILIES: dict[str, Factory] = {"reasoning_gym": reasoning_gym, "verifiers": verifiers, "openenv": openenv}
"""Environments of other libraries and places, as ``FAMILY:ID``: the factory's first argument is what stands behind the colon."""

MEMBERS: dict[str, Callable[[], list[str]]] = {
    "reasoning_gym": task_names,
}
"""Every ID of a family that can list them."""


def load_env(name: str, args: Mapping[str, Any] | None = None, *, key: str = "env.name") -> EnvDataset:
    """A dataset of problems by name, ``family:id`` for one of another library's, or ``path/to/file.py:factory`` for the user's own.
    ``key``: where the user wrote it, for what is said of mistakes.

    Raises:
        ConfigError: no such environment, file or argument.
    """
    factory = from_file(name, key) if ".py:" in name else _built_in(name, key)
    try:
        inspect.signature(factory).bind(**(args or {}))
    except TypeError as error:
        raise ConfigError(f"{'env.args' if key == 'env.name' else key}: {error}; {name} takes {inspect.signature(factory)}") from error
    try:
        dataset = factory(**(args or {}))
    except RequestError:
        raise
    except Exception as error:  # the user's own code may raise anything
        raise ConfigError(f"{key}: {name} raised {in_one_line(error)}") from error
    if not isinstance(getattr(dataset, "name", None), str) or not callable(getattr(dataset, "env", None)):
        raise ConfigError(f"{key}: {name} must return an object with a name and a method env(split, index), not {dataset!r:.80}")
    return dataset


def _built_in(name: str, key: str) -> Factory:
    family, colon, identity = name.partition(":")
    if colon and family in FAMILIES:
        return functools.partial(FAMILIES[family], identity)
    if name in ENVIRONMENTS:
        return ENVIRONMENTS[name]
    known = [*ENVIRONMENTS, *(f"{family}:ID" for family in FAMILIES)]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}, or FILE.py:FACTORY"
    raise ConfigError(f"{key}: no environment {name!r}; {hint}")

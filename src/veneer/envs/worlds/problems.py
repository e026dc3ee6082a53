"""Problems of a world: drawn from a seed, split by what defines them, sized by arguments."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Protocol, TypeVar

from veneer.envs.dataset import held_out
from veneer.types import ConfigError, Split


class Defined(Protocol):
    @property
    def definition(self) -> str:
        """What makes it another problem than the next one; decides which split it belongs to."""
        ...


P = TypeVar("P", bound=Defined)


def draw(generate: Callable[[random.Random], P], split: Split, index: int, salt: str) -> P:
    """The index-th problem of a split. ``salt`` keeps the streams of different datasets and seeds apart."""
    rng = random.Random(f"{salt}/{split}/{index}")
    while True:
        problem = generate(rng)
        if held_out(problem.definition) == (split == "eval"):
            return problem


def check_whole(name: str, value: object, low: int, high: int) -> None:
    """Raises:
    ConfigError: the argument is no whole number from ``low`` to ``high``.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"env.args.{name}: {value!r} must be a whole number from {low} to {high}")

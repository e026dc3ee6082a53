"""Functions that a model writes, and what they are worth."""

from veneer.envs.code.environment import code

__all__ = ["code"]

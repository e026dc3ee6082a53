"""Environments by name, or from a user's file."""

from veneer.envs.registry import ENVIRONMENTS, load_env

__all__ = ["ENVIRONMENTS", "load_env"]

"""A reward function as TRL takes it, for recipes/jsonl.toml."""

from __future__ import annotations

from typing import Any


def in_order(completions: list[str], solution: list[str], **columns: Any) -> list[float]:
    """1 where what stands behind the thinking is the solution."""
    said = [completion.rpartition("</think>")[2].strip() for completion in completions]
    return [float(text == right) for text, right in zip(said, solution, strict=True)]

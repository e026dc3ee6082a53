"""What the registry knows of one version of an adapter, and whether it fits a base."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from veneer.types import AdapterError


@dataclass(frozen=True)
class Parent:
    """An adapter that another one was made from."""

    reference: str
    """NAME@VERSION, as it was called where the child was made."""
    digest: str
    scale: float = 1.0
    """How much of it a stack took."""


@dataclass(frozen=True)
class Score:
    """A mean reward on held-out problems, as it was measured, with its 95% interval; of pass or fail it is the share solved."""

    env: str
    value: float
    low: float
    high: float
    problems: int
    seed: int
    measured: str
    """When: ISO 8601, UTC."""
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What else decides the number: arguments of the environment, ``max_tokens``."""


@dataclass(frozen=True)
class Entry:
    """One version of an adapter, or an adapter folder somewhere else."""

    name: str
    version: int
    """Counts from 1; 0 for a folder that never was in a registry. Not the number of optimizer steps."""
    digest: str
    """SHA-256 of the weights and their scale: what the adapter does."""
    base_id: str
    base_digest: str
    tokenizer_digest: str | None
    template_digest: str | None
    stage: str
    """What made it: a kind of run ("sft", "dpo", "rejection", "distill", "rl"), "import", "fork", "stack"."""
    rank: int | None
    """None: a fully fine-tuned copy."""
    created: str
    """ISO 8601, UTC."""
    signed_by: str | None
    """The public key whose signature the folder has, as "ed25519:HEX"."""
    trusted: bool
    """Signed by the key of this home or one that it trusts."""
    folder: Path
    parents: tuple[Parent, ...] = ()
    scores: tuple[Score, ...] = ()
    labels: tuple[str, ...] = ()
    """Those that point here now."""

    @property
    def reference(self) -> str:
        return f"{self.name}@{self.version}" if self.version else str(self.folder)

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {"reference": self.reference, **dataclasses.asdict(self), "folder": str(self.folder)}


@dataclass(frozen=True)
class Ancestor:
    """A step on the way from an adapter back to its base."""

    reference: str
    digest: str
    depth: int
    """0 is the adapter itself."""
    stage: str | None
    """None: the folder that knew is not here. "base" is the last."""
    state: Literal["here", "forgotten", "elsewhere"]


@dataclass(frozen=True)
class Tombstone:
    """A version that was forgotten: that it was there, and nothing that it held."""

    name: str
    version: int
    digest: str
    at: str
    """ISO 8601, UTC."""
    reason: str

    @property
    def reference(self) -> str:
        return f"{self.name}@{self.version}"


def check_compatible(
    made: Entry | Mapping[str, Any],
    base_digest: str,
    tokenizer_digest: str | None,
    template_digest: str | None,
    what: str | None = None,
) -> None:
    """An adapter, or the manifest of one, must have been made on these very weights, tokenizer and chat template. A tokenizer or
    template that either side leaves open is not compared.

    Raises:
        AdapterError: it was not; ``what`` names the adapter in the message.
    """
    manifest = made if isinstance(made, Mapping) else dataclasses.asdict(made)
    called = what or f"adapter {manifest.get('name')!r}"
    for key, mine in (("tokenizer_digest", tokenizer_digest), ("template_digest", template_digest)):
        theirs = manifest.get(key)
        if theirs is not None and mine is not None and theirs != mine:
            part = key.removesuffix("_digest").replace("template", "chat template")
            raise AdapterError(f"{called} was made with another {part} ({theirs[:12]}; this base has {mine[:12]})")
    if manifest["base_digest"] != base_digest:
        raise AdapterError(
            f"{called} was made for base {manifest.get('base_id')!r} ({manifest['base_digest'][:12]}); "
            f"this one has the digest {base_digest[:12]}"
        )


def now() -> str:
    """ISO 8601, UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def parents_of(manifest: Mapping[str, Any]) -> tuple[Parent, ...]:
    return tuple(Parent(**parent) for parent in _rows(manifest, "parents"))


def scores_of(manifest: Mapping[str, Any]) -> tuple[Score, ...]:
    return tuple(Score(**score) for score in _rows(manifest, "scores"))


def _rows(manifest: Mapping[str, Any], key: str) -> Sequence[Mapping[str, Any]]:
    return manifest.get(key) or []

"""Adapters by name: ``$VENEER_HOME/adapters/NAME/VERSION/``, each version a folder that never changes."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import filelock

from veneer.store.adapters import facts_of, read_adapter, read_manifest, write_adapter
from veneer.store.files import storage_errors, veneer_home
from veneer.types import AdapterError, Checkpoint

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Registry:
    """The adapters of one home."""

    def __init__(self, home: Path | None = None) -> None:
        self.folder = (home or veneer_home()) / "adapters"

    def names(self) -> list[str]:
        return sorted(p.name for p in self.folder.iterdir() if _NAME.fullmatch(p.name)) if self.folder.is_dir() else []

    def versions(self, name: str) -> list[int]:
        """Ascending; empty if there is no such adapter."""
        check_name(name)
        folder = self.folder / name
        return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []

    def put(self, name: str, checkpoint: Checkpoint, facts: dict[str, Any]) -> int:
        """Add a version and return its number. The same weights again give the number they have."""
        check_name(name)
        with storage_errors(self.folder):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        wanted = {"digest": checkpoint.adapter.digest, "base_digest": checkpoint.adapter.base_digest}
        wanted |= {key: facts[key] for key in ("tokenizer_digest", "template_digest") if key in facts}
        with filelock.FileLock(self.folder / name / ".lock"):  # two processes must not take one number
            versions = self.versions(name)
            for version in versions:
                manifest = read_manifest(self.path(name, version))
                if all(manifest.get(key) == value for key, value in wanted.items()):
                    return version
            version = max(versions, default=0) + 1
            adapter = dataclasses.replace(checkpoint.adapter, name=name)
            write_adapter(self.path(name, version), dataclasses.replace(checkpoint, adapter=adapter, kind="sampler", optimizer={}), facts)
            return version

    def path(self, name: str, version: int) -> Path:
        check_name(name)
        return self.folder / name / str(version)

    def find(self, reference: str) -> Path:
        """``name`` (its newest version), ``name@3``, or a path to an adapter folder.

        Raises:
            AdapterError: there is none.
        """
        if "/" in reference or reference.startswith("."):
            if not Path(reference).is_dir():
                raise AdapterError(f"there is no adapter folder {reference}")
            return Path(reference)
        name, _, wanted = reference.partition("@")
        versions = self.versions(name)
        if not versions:
            raise AdapterError(f"there is no adapter {name!r}; there are: {', '.join(self.names()) or 'none'}")
        if wanted and (not wanted.isdigit() or int(wanted) not in versions):
            raise AdapterError(f"adapter {name!r} has no version {wanted!r}; it has {', '.join(map(str, versions))}")
        return self.path(name, int(wanted) if wanted else versions[-1])

    def export(self, reference: str, target: Path) -> None:
        """Copy an adapter to a folder that stock PEFT loads.

        Raises:
            AdapterError: the target exists, or the adapter is a fully fine-tuned copy.
        """
        checkpoint, manifest = read_adapter(self.find(reference))
        if checkpoint.config is None:
            raise AdapterError(f"{reference} is a fully fine-tuned copy, which PEFT has no format for")
        if target.exists():
            raise AdapterError(f"{target} exists already; give another folder")
        write_adapter(target, dataclasses.replace(checkpoint, kind="sampler", optimizer={}), facts_of(manifest))


def check_name(name: str) -> None:
    """Names become folders: letters, digits, dot, dash and underscore.

    Raises:
        AdapterError: anything else.
    """
    if not _NAME.fullmatch(name):
        raise AdapterError(f"{name!r} is no adapter name: use letters, digits, '.', '-' and '_', at most 64")

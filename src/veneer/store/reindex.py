"""Building the registry's index again from the folders, for when it is lost or damaged."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from veneer.store.adapters import read_manifest
from veneer.store.entry import Entry, Tombstone
from veneer.store.files import ASIDE, remove_abandoned
from veneer.store.forget import FORGOTTEN, read_receipt
from veneer.store.registry import Registry, check_name, identity_of
from veneer.store.signature import check_signature
from veneer.types import AdapterError


@dataclass(frozen=True)
class Reindexed:
    """What building the index again found."""

    added: tuple[str, ...]
    """Versions that the index did not know."""
    missing: tuple[str, ...]
    """Versions whose folders are not there."""
    left_out: tuple[tuple[str, str], ...]
    """Folders and receipts that were not taken, and why."""
    set_aside: str | None
    """Where the unreadable index was moved to. Where labels pointed, and scores of ``veneer eval``, were in it alone."""


def reindex(registry: Registry) -> Reindexed:
    """Enter every folder that the index does not know, and every receipt; what it knows already stays as it is."""
    index = registry.index
    set_aside = index.set_aside() if index.is_damaged() else None
    left_out = [*_bury_forgotten(registry)]
    buried = {(stone.reference, stone.digest) for _, stone in index.tombstones()}
    known = {entry.folder.name for entry in registry.entries()}
    added: list[str] = []
    remove_abandoned(registry.objects)
    for folder in sorted(registry.objects.iterdir()) if registry.objects.is_dir() else ():
        if folder.name.startswith(FORGOTTEN):
            shutil.rmtree(folder)  # a process was stopped while it forgot
        elif folder.name not in known and not folder.name.startswith(ASIDE):
            try:
                entry = _checked(registry, folder)
                if (entry.reference, entry.digest) in buried:
                    raise AdapterError(f"{entry.reference} was forgotten; delete this folder")
                version, key = index.add(entry, identity_of(read_manifest(folder)))
                if key != folder.name:
                    raise AdapterError(f"the index has the weights of {entry.reference} as {entry.name}@{version}; delete this folder")
                added.append(entry.reference)
            except AdapterError as error:
                left_out.append((str(folder), str(error)))
    missing = [entry.reference for entry in registry.entries() if not entry.folder.is_dir()]
    return Reindexed(tuple(added), tuple(missing), tuple(left_out), None if set_aside is None else str(set_aside))


def _bury_forgotten(registry: Registry) -> list[tuple[str, str]]:
    """Set the tombstones that receipts tell of. Returns receipts that tell nothing."""
    there = {(stone.reference, stone.digest) for _, stone in registry.index.tombstones()}
    bad: list[tuple[str, str]] = []
    for path in sorted((registry.folder / "receipts").glob("*.json")):
        try:
            statement = read_receipt(path).statement
        except AdapterError as error:
            bad.append((str(path), str(error)))
            continue
        for record in statement["forgotten"]:
            name, _, version = record["reference"].partition("@")
            if (record["reference"], record["digest"]) not in there:
                registry.index.bury(Tombstone(name, int(version), record["digest"], statement["at"], statement["reason"]))
    return bad


def _checked(registry: Registry, folder: Path) -> Entry:
    """Raises:
    AdapterError: the folder is not what its name, its signature and its manifest say.
    """
    signer, manifest = check_signature(folder), read_manifest(folder)
    entry = registry.entry_at(folder, manifest, signer)
    check_name(entry.name)
    if entry.version < 1:
        raise AdapterError(f"{folder} was not put there by a registry; import it: veneer adapters import")
    registry.check_place(entry, manifest)
    return entry

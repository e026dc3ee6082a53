"""Forgetting: the files of a version are gone, a tombstone and a signed receipt say so.

Files go first: they are renamed out of reach before the index is touched, so whatever interrupts it, no half-forgotten
version can be read, and the same command again brings it to its end.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import filelock
from cryptography.exceptions import InvalidSignature

from veneer.store.adapters import read_manifest
from veneer.store.entry import Entry, now
from veneer.store.files import remove_abandoned, storage_errors, write_text
from veneer.store.signature import canonical, check_sealed, sign
from veneer.types import AdapterError, RunError, in_one_line

if TYPE_CHECKING:
    from veneer.store.registry import Registry

Children = Literal["refuse", "forget", "keep"]
FORGOTTEN = ".veneer-forgotten-"
"""Folders on their way out."""


@dataclass(frozen=True)
class Receipt:
    """What was deleted, signed by the home that did it."""

    path: Path
    statement: Mapping[str, Any]
    """``at``, ``reason``, ``forgotten`` (reference, digest, labels and files with their SHA-256 and bytes), ``runs`` (folders that were
    deleted) and ``left`` (copies that are known to be left, and why)."""
    key: str

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {"receipt": str(self.path), "signed_by": self.key, **self.statement}


def forget_all(registry: Registry, chosen: Sequence[Entry], reason: str, children: Children, *, with_runs: bool) -> Receipt:
    """Delete versions, and write the receipt.

    Raises:
        AdapterError: one has children, and ``children`` is "refuse".
        RunError: a process is working on a run that is to be deleted.
    """
    entries, kept = _with_children(registry, chosen, children)
    gone = {entry.reference: entry for entry in entries}
    digests = {entry.digest for entry in entries}
    runs = _runs_with(registry.home, digests)
    left = [{"what": child.reference, "why": "it was made from what was forgotten"} for child in kept]
    twins = [entry for entry in registry.entries() if entry.digest in digests and entry.reference not in gone]
    left += [{"what": twin.reference, "why": "it has the same weights"} for twin in twins]
    left += [] if with_runs else [{"what": str(run), "why": "the run's checkpoints hold the same weights"} for run in runs]
    records = [_record(entry) for entry in entries]
    at = now()
    with ExitStack() as locks:
        for run in runs if with_runs else ():
            locks.enter_context(_alone(run))
        remove_abandoned(registry.objects)
        strays = _strays(registry, {(entry.name, entry.digest) for entry in entries})
        asides = [_out_of_reach(registry, folder) for folder in [*(entry.folder for entry in entries), *strays]]
        for entry in entries:
            registry.index.remove(entry, reason, at)
        for folder in [*asides, *(runs if with_runs else ())]:
            if folder.is_dir():
                shutil.rmtree(folder)
    removed = [str(run) for run in runs] if with_runs else []
    statement = {"at": at, "reason": reason, "forgotten": records, "runs": removed, "left": left}
    return _write_receipt(registry, statement)


def read_receipt(path: Path) -> Receipt:
    """Raises:
    AdapterError: it is damaged, or was changed after it was signed.
    """
    try:
        document = json.loads(path.read_text())
        check_sealed({"receipt": document["receipt"]}, document)
        return Receipt(path, document["receipt"], document["key"])
    except InvalidSignature as error:
        raise AdapterError(f"{path} was changed after it was signed") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"{path} is no receipt ({in_one_line(error)})") from error


def _with_children(registry: Registry, chosen: Sequence[Entry], children: Children) -> tuple[list[Entry], list[Entry]]:
    """What is to go, and the children that stay behind."""
    gone = {entry.reference: entry for entry in chosen}
    waiting, kept = list(chosen), {}
    while waiting:
        for child in registry.children(waiting.pop()):
            if child.reference in gone:
                continue
            if children == "forget":
                gone[child.reference] = child
                waiting.append(child)
            else:
                kept[child.reference] = child
    if kept and children == "refuse":
        raise AdapterError(
            f"{', '.join(kept)} {'was' if len(kept) == 1 else 'were'} made from {chosen[0].reference} and may know what it knew; "
            "forget them too (--with-children), or say that they stay (--keep-children)"
        )
    return list(gone.values()), list(kept.values())


def _record(entry: Entry) -> dict[str, Any]:
    files = sorted(entry.folder.iterdir()) if entry.folder.is_dir() else []
    table = [{"file": path.name, "sha256": _sha256(path), "bytes": path.stat().st_size} for path in files if path.is_file()]
    return {"reference": entry.reference, "digest": entry.digest, "object": entry.folder.name, "labels": list(entry.labels), "files": table}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _runs_with(home: Path, digests: set[str]) -> list[Path]:
    """Run folders of the home with a checkpoint of these weights."""
    checkpoints = (home / "runs").glob("*/checkpoints/step-*")
    return sorted({folder.parent.parent for folder in checkpoints if read_manifest(folder).get("digest") in digests})


def _alone(run: Path) -> filelock.BaseFileLock:
    lock = filelock.FileLock(run / ".lock")
    try:
        return lock.acquire(timeout=0).lock
    except filelock.Timeout as error:
        raise RunError(f"another process is working on {run}; nothing was forgotten. Wait for it, or stop it first") from error


def _strays(registry: Registry, gone: set[tuple[str, str]]) -> list[Path]:
    """Folders of these names and weights that no index entry means: a process was killed before it could enter them."""
    known = {entry.folder for entry in registry.entries()}
    unknown = [folder for folder in registry.objects.glob("*") if folder not in known and not folder.name.startswith(".")]
    manifests = ((folder, read_manifest(folder)) for folder in unknown)
    return sorted(folder for folder, manifest in manifests if (manifest.get("name"), manifest.get("digest")) in gone)


def _out_of_reach(registry: Registry, folder: Path) -> Path:
    aside = registry.objects / (FORGOTTEN + folder.name)
    with storage_errors(folder):
        if folder.is_dir():
            folder.rename(aside)
    return aside


def _write_receipt(registry: Registry, statement: dict[str, Any]) -> Receipt:
    seal = sign({"receipt": statement}, registry.keys.signing_key())
    text = json.dumps({"format": 1, "receipt": statement, **seal}, indent=2) + "\n"
    moment = statement["at"].replace(":", "").replace("-", "")
    path = registry.folder / "receipts" / f"{moment}-{hashlib.sha256(canonical(statement)).hexdigest()[:12]}.json"
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    return Receipt(path, statement, seal["key"])

"""Adapters by name: an index over folders that never change.

``$VENEER_HOME/adapters/objects/KEY/`` holds one version each, a folder that stock PEFT opens; KEY is the SHA-256 of its table of
files. Which versions a name has, where its labels point, lineage and scores are in the index (``index.py``), an SQLite file
beside the objects or any database that ``$VENEER_REGISTRY`` names. Every ``veneer.json`` names its name, version and
parents, so the index can be built again from the folders. Versions with the same weights share the file of the weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import filecmp
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from veneer.store.adapters import (
    ALORA,
    FULL_WEIGHTS,
    MANIFEST,
    WEIGHTS,
    facts_of,
    fill_adapter,
    read_adapter,
    read_manifest,
    write_adapter,
)
from veneer.store.entry import Ancestor, Entry, Parent, Score, Tombstone, parents_of, scores_of
from veneer.store.files import ASIDE, aside_folder, remove_abandoned, settle, settle_once, veneer_home
from veneer.store.forget import Children, Receipt, forget_all
from veneer.store.index import VERSIONS, Index, sqlite_url
from veneer.store.signature import KeyRing, canonical, check_signature, content_key, hash_files, read_table, write_signature
from veneer.types import AdapterError, Checkpoint, in_one_line

LIVE = "live"
"""The label that a bare name means."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LABEL = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,63}")
_VERSION = re.compile(r"[0-9]{1,9}")
_DIGEST = re.compile(r"sha256:([0-9a-f]{1,64})")


class Registry:
    """The adapters of one home. Threads and processes may share it."""

    def __init__(self, home: Path | None = None, url: str | None = None, *, require_signed: bool = False) -> None:
        """``url``: an SQLAlchemy URL for the index, instead of ``$VENEER_REGISTRY`` or an SQLite file in the home. ``require_signed``:
        read nothing that is not signed by a key that the home trusts.

        Raises:
            ConfigError: the URL cannot be used.
        """
        self.home = home or veneer_home()
        self.folder = self.home / "adapters"
        self.objects = self.folder / "objects"
        self.index = Index(url or os.environ.get("VENEER_REGISTRY") or sqlite_url(self.folder / "index.sqlite"), self.objects)
        self.keys = KeyRing(self.home)
        self.require_signed = require_signed
        self._on_forget: list[Callable[[Tombstone], None]] = []
        self._noticed: set[int] = set()

    # ------------------------------------------------ what there is

    def names(self) -> list[str]:
        return sorted({entry.name for entry in self.entries()})

    def versions(self, name: str) -> list[int]:
        """Ascending; empty if there is no such adapter."""
        return [entry.version for entry in self.entries(name)]

    def entries(self, name: str | None = None) -> list[Entry]:
        """All versions, of one name or of all, by name and version."""
        if name is not None:
            check_name(name)
        return self._trusting(self.index.entries(*([] if name is None else [VERSIONS.c.name == name])))

    def changes(self, name: str) -> int | None:
        """How often versions, labels or scores of a name were changed, by whatever process; None: there is no such name. As long as it
        stays, so does what a reference to the name means."""
        return self.index.changes(name)

    def resolve(self, reference: str) -> Entry:
        """NAME (what its label ``live`` points to, else its newest version), NAME@3, NAME@LABEL, sha256:DIGEST or a beginning of one,
        or the path of an adapter folder.

        Raises:
            AdapterError: there is none; names what there is.
        """
        if is_path(reference):
            return self._resolve_path(Path(reference))
        if reference.startswith("sha256:"):
            return self._resolve_digest(reference)
        name, _, wanted = reference.partition("@")
        entries = {entry.version: entry for entry in self.entries(name)}
        if not entries:
            raise AdapterError(self._no_such_name(name, wanted))
        if _VERSION.fullmatch(wanted):
            version = int(wanted)
        elif wanted:
            version = self._labelled(name, wanted, entries)
        else:
            version = next((v for v, entry in entries.items() if LIVE in entry.labels), max(entries))
        if version not in entries:
            raise AdapterError(self._gone(name, version) or f"adapter {name!r} has no version {version}; it has {_listed(entries)}")
        return entries[version]

    def read(self, reference: str | Entry) -> tuple[Checkpoint, Entry]:
        """The weights, after comparing every file with its signature, its digest and the folder's key.

        Raises:
            AdapterError: there is no such adapter, it is damaged, or not signed as the registry requires.
        """
        entry = self.resolve(reference) if isinstance(reference, str) else reference
        if self.require_signed and not entry.trusted:
            signer = f"it is signed by {entry.signed_by}" if entry.signed_by else "it is unsigned"
            raise AdapterError(f"{entry.reference} is not signed by a key that this home trusts: {signer}; see: veneer adapters trust")
        if not entry.folder.is_dir():
            raise AdapterError(f"the files of {entry.reference} are not in this home: there is no {entry.folder}")
        checkpoint, manifest = read_adapter(entry.folder)
        if entry.version:
            self.check_place(entry, manifest)
        return checkpoint, entry

    def lineage(self, reference: str) -> list[Ancestor]:
        """The adapter, what it was made from, and so on, nearest first; the base is the last."""
        entry = self.resolve(reference)
        chain, waiting, seen = [_ancestor(entry, 0)], [(parent, 1) for parent in entry.parents], {entry.reference}
        buried = {(stone.reference, stone.digest) for _, stone in self.index.tombstones()} if entry.parents else set()
        while waiting:
            parent, depth = waiting.pop(0)
            if parent.reference in seen:
                continue
            seen.add(parent.reference)
            found = self._find(parent)
            if found is not None:
                chain.append(_ancestor(found, depth))
                waiting += [(above, depth + 1) for above in found.parents]
            else:
                forgotten = (parent.reference, parent.digest) in buried
                chain.append(Ancestor(parent.reference, parent.digest, depth, None, "forgotten" if forgotten else "elsewhere"))
        return [*chain, Ancestor(entry.base_id, entry.base_digest, chain[-1].depth + 1, "base", "here")]

    def children(self, entry: Entry) -> list[Entry]:
        """Versions that were made from this one."""
        return self._trusting(self.index.children(entry))

    # ------------------------------------------------ in and out

    def put(self, name: str, checkpoint: Checkpoint, facts: Mapping[str, Any], *, signed: bool = True) -> int:
        """Add a version and return its number, which no other version of the name ever had. The same weights for the same base,
        tokenizer and template again give the number they have.

        ``facts`` go into ``veneer.json``; of these ``tokenizer_digest``, ``template_digest``, ``stage``, ``parents`` and ``scores`` (see
        ``Parent`` and ``Score``) also into the index. ``signed``: this home vouches for it.
        """
        check_name(name)
        identity = identity_of({**facts, "digest": checkpoint.adapter.digest, "base_digest": checkpoint.adapter.base_digest})
        known = self.index.with_identity(name, identity)
        if known is not None:
            return known
        twin = next(iter(self.index.entries(VERSIONS.c.digest == checkpoint.adapter.digest)), None)
        version, created = self.index.promise(name, identity)
        place = {"registry": {"version": version, "created": created}}
        adapter = dataclasses.replace(checkpoint.adapter, name=name)
        mine = dataclasses.replace(checkpoint, adapter=adapter, kind="sampler", optimizer={})
        remove_abandoned(self.objects)
        with aside_folder(self.objects, name) as aside:
            fill_adapter(aside, mine, {**facts, **place})
            if twin is not None:
                _share(twin.folder, aside)
            files = hash_files(aside)
            if signed:
                write_signature(aside, files, self.keys.signing_key())
            folder = self.objects / content_key(files)
            settle_once(aside, folder)
        entry = self.entry_at(folder, read_manifest(folder), self.keys.own() if signed else None)
        version, key = self.index.add(entry, identity)
        if key != folder.name:  # other processes put the same meanwhile
            shutil.rmtree(folder, ignore_errors=True)  # two of them may clear away one folder
        return version

    def fork(self, reference: str, name: str) -> Entry:
        """Begin a line of its own: the same weights as version 1 of a new name, whose parent is that version.

        Raises:
            AdapterError: there is no such adapter, or the name is taken.
        """
        checkpoint, entry = self.read(reference)
        if self.versions(name):
            raise AdapterError(f"there is an adapter {name!r} already; give the fork a name of its own")
        facts = facts_of(read_manifest(entry.folder)) | {"stage": "fork", "parents": [dataclasses.asdict(as_parent(entry))]}
        return self.resolve(f"{name}@{self.put(name, checkpoint, facts, signed=entry.trusted)}")

    def export(self, reference: str, target: Path) -> Entry:
        """Copy an adapter, with its signature, to a folder that stock PEFT loads.

        Raises:
            AdapterError: the target exists, or the adapter is a fully fine-tuned copy.
        """
        checkpoint, entry = self.read(reference)
        if checkpoint.config is None:
            raise AdapterError(f"{reference} is a fully fine-tuned copy, which PEFT has no format for")
        if target.exists():
            raise AdapterError(f"{target} exists already; give another folder")
        if checkpoint.kind == "training":
            facts = facts_of(read_manifest(entry.folder))
            write_adapter(target, dataclasses.replace(checkpoint, kind="sampler", optimizer={}), facts)
        else:
            with aside_folder(target.parent, target.name) as aside:
                for path in entry.folder.iterdir():
                    shutil.copyfile(path, aside / path.name)
                settle(aside, target)
        return entry

    def add_score(self, reference: str, score: Score) -> None:
        """Keep what a version scored, beside what it scored before.

        Raises:
            AdapterError: there is no such version in the registry.
        """
        entry = self.resolve(reference)
        if not entry.version:
            raise AdapterError(f"{reference} is a folder outside of the registry, which keeps no scores for it; import it first")
        self.index.add_score(entry, score)

    # ------------------------------------------------ labels

    def promote(self, name: str, version: int, label: str = LIVE) -> Entry:
        """Point a label to a version, after checking its files. One who resolves the label meanwhile gets the old version or the new one.

        Raises:
            AdapterError: there is no such version, it is damaged, or the label is no label.
        """
        if not _LABEL.fullmatch(label):
            raise AdapterError(f"{label!r} is no label: it must begin with a letter and have letters, digits, '.', '-' and '_', at most 64")
        _, entry = self.read(f"{name}@{version}")
        self.index.promote(name, version, label)
        return self.resolve(entry.reference)

    def rollback(self, name: str, label: str = LIVE) -> Entry:
        """Point a label to where it pointed before; again, to where it pointed before that. The history is kept.

        Raises:
            AdapterError: it has pointed nowhere before.
        """
        check_name(name)
        return self.resolve(f"{name}@{self.index.rollback(name, label)}")

    def labels(self, name: str) -> dict[str, int]:
        """Label -> the version it points to."""
        check_name(name)
        return self.index.labels(name)

    def history(self, name: str, label: str = LIVE) -> list[tuple[str, int | None]]:
        """When a label was moved (ISO 8601, UTC), and where to; None: it was taken away."""
        check_name(name)
        return self.index.history(name, label)

    # ------------------------------------------------ forgetting

    def forget(self, reference: str, reason: str = "", children: Children = "refuse", *, with_runs: bool = False) -> Receipt:
        """Delete a version (NAME@3), or all of a name (NAME): files, rows and labels. A signed receipt says what was deleted and which
        copies are known to be left. Callbacks are told.

        ``children``: versions that were made from it carry what it learned; "forget" them too, or "keep" them. ``with_runs``: delete
        the run folders that hold the same weights in a checkpoint, with all they recorded.

        Raises:
            AdapterError: there is none, or it has children and was not told what to do with them.
        """
        whole = not is_path(reference) and "@" not in reference and ":" not in reference and self.versions(reference)
        chosen = self.entries(reference) if whole else [self.resolve(reference)]
        if not chosen[0].version:
            raise AdapterError(f"{reference} is a folder outside of the registry; delete it yourself")
        receipt = forget_all(self, chosen, reason, children, with_runs=with_runs)
        self.notice_forgotten()
        return receipt

    def on_forget(self, callback: Callable[[Tombstone], None]) -> None:
        """Have ``callback`` told of every version that is forgotten from now on: at once by this registry's ``forget``, and by
        ``notice_forgotten`` if another process did it. Whoever holds weights in memory drops them."""
        if not self._on_forget:
            self._noticed = {number for number, _ in self.index.tombstones()}
        self._on_forget.append(callback)

    def notice_forgotten(self) -> list[Tombstone]:
        """Tell the callbacks what was forgotten since they were last told, by whichever process. One query."""
        stones = {number: stone for number, stone in self.index.tombstones() if number not in self._noticed}
        self._noticed |= set(stones)
        for stone in stones.values():
            for callback in self._on_forget:
                callback(stone)
        return list(stones.values())

    # ------------------------------------------------ looking things up

    def _trusting(self, entries: list[Entry]) -> list[Entry]:
        """With the home's word on who signed them."""
        trusted = {key: self.keys.trusts(key) for key in {entry.signed_by for entry in entries}}
        return [dataclasses.replace(entry, trusted=trusted[entry.signed_by]) for entry in entries]

    def _resolve_path(self, folder: Path) -> Entry:
        if not folder.is_dir():
            raise AdapterError(f"there is no adapter folder {folder}")
        manifest = read_manifest(folder)
        if not manifest:
            read_adapter(folder)  # says what is wrong
        return dataclasses.replace(self.entry_at(folder, manifest, check_signature(folder)), version=0)

    def _resolve_digest(self, reference: str) -> Entry:
        match = _DIGEST.fullmatch(reference)
        if match is None:
            raise AdapterError(f"{reference!r} is no digest; write sha256: and up to 64 hexadecimal digits")
        found = self._trusting(self.index.entries(VERSIONS.c.digest.startswith(match[1], autoescape=True)))
        if len({entry.digest for entry in found}) != 1:
            there = f"these begin so: {', '.join(e.reference for e in found[:8])}" if found else "no adapter begins so"
            raise AdapterError(f"{reference!r} names no one adapter: {there}")
        return min(found, key=lambda entry: (entry.created, entry.name, entry.version))

    def _labelled(self, name: str, label: str, entries: Mapping[int, Entry]) -> int:
        for version, entry in entries.items():
            if label in entry.labels:
                return version
        labels = sorted({label for entry in entries.values() for label in entry.labels})
        also = f", and the labels {', '.join(labels)}" if labels else ""
        raise AdapterError(f"adapter {name!r} has no version {label!r} and no label of that name; it has {_listed(entries)}{also}")

    def _no_such_name(self, name: str, wanted: str) -> str:
        names = self.names()
        near = difflib.get_close_matches(name, names, 1)
        buried = [stone for _, stone in self.index.tombstones() if stone.name == name and wanted in ("", str(stone.version))]
        why = f" (forgotten {buried[-1].at})" if buried else f"; did you mean {near[0]!r}?" if near else ""
        return f"there is no adapter {name!r}{why}; there are: {_listed(names) or 'none'}"

    def _gone(self, name: str, version: int) -> str | None:
        stones = [stone for _, stone in self.index.tombstones() if (stone.name, stone.version) == (name, version)]
        reason = f": {stones[-1].reason}" if stones and stones[-1].reason else ""
        return f"{name}@{version} was forgotten {stones[-1].at}{reason}" if stones else None

    def _find(self, parent: Parent) -> Entry | None:
        """The version that is called so and has these weights."""
        name, _, version = parent.reference.partition("@")
        if not _VERSION.fullmatch(version):
            return None
        found = self.index.entries(VERSIONS.c.name == name, VERSIONS.c.version == int(version), VERSIONS.c.digest == parent.digest)
        return found[0] if found else None

    def entry_at(self, folder: Path, manifest: Mapping[str, Any], signed_by: str | None) -> Entry:
        """What a folder says of itself.

        Raises:
            AdapterError: it does not say enough.
        """
        try:
            place = manifest.get("registry") or {"version": 0, "created": ""}
            return Entry(
                name=manifest["name"],
                version=int(place["version"]),
                digest=manifest["digest"],
                base_id=manifest["base_id"],
                base_digest=manifest["base_digest"],
                tokenizer_digest=manifest.get("tokenizer_digest"),
                template_digest=manifest.get("template_digest"),
                created=str(place["created"]),
                stage=manifest.get("stage") or "unknown",
                rank=None if manifest["lora"] is None else manifest["lora"]["rank"],
                signed_by=signed_by,
                trusted=self.keys.trusts(signed_by),
                folder=folder,
                parents=parents_of(manifest),
                scores=scores_of(manifest),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise AdapterError(f"{folder} is damaged: {MANIFEST} does not say what it is ({in_one_line(error)})") from error

    def check_place(self, entry: Entry, manifest: Mapping[str, Any]) -> None:
        """The folder of a version must be the one that the index means: by its content, its signer and its own word.

        Raises:
            AdapterError: it is not.
        """
        files, signed_by = read_table(entry.folder)
        said = self.entry_at(entry.folder, manifest, signed_by)
        if content_key(files) != entry.folder.name or signed_by != entry.signed_by:
            raise AdapterError(f"{entry.folder} is not what was put there as {entry.reference}: its files or its signature were changed")
        if (said.name, said.version, said.digest) != (entry.name, entry.version, entry.digest):
            raise AdapterError(f"{entry.folder} is {said.reference}, not {entry.reference}; build the index again: veneer adapters reindex")


def is_path(reference: str) -> bool:
    return "/" in reference or reference.startswith(".")


def as_parent(entry: Entry, scale: float = 1.0) -> Parent:
    return Parent(entry.reference if entry.version else entry.name, entry.digest, scale)


def identity_of(manifest: Mapping[str, Any]) -> str:
    """What must be the same for two versions of a name to be one."""
    parts = [manifest.get(key) for key in ("digest", "base_digest", "tokenizer_digest", "template_digest", ALORA)]
    return hashlib.sha256(canonical(parts)).hexdigest()


def check_name(name: str) -> None:
    """Names are letters, digits, dot, dash and underscore.

    Raises:
        AdapterError: anything else.
    """
    if not _NAME.fullmatch(name):
        raise AdapterError(f"{name!r} is no adapter name: use letters, digits, '.', '-' and '_', at most 64")


def _ancestor(entry: Entry, depth: int) -> Ancestor:
    return Ancestor(entry.reference, entry.digest, depth, entry.stage, "here")


def _listed(things: Iterable[object]) -> str:
    shown = [str(thing) for thing in things]
    return ", ".join(shown[:12]) + (f" and {len(shown) - 12} more" if len(shown) > 12 else "")


def _share(twin: Path, folder: Path) -> None:
    """Make the weights in ``folder`` the same file as those of a twin, if they are the same bytes and the file system has links."""
    for name in (WEIGHTS, FULL_WEIGHTS):
        theirs, mine = twin / name, folder / name
        if mine.is_file() and theirs.is_file() and filecmp.cmp(theirs, mine, shallow=False):
            linked = folder / (ASIDE + name)
            with contextlib.suppress(OSError):
                os.link(theirs, linked)
                linked.replace(mine)

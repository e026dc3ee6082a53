"""Checkpoints by their ``tinker://`` path: a row in the journal, a folder with a name of our own on the disk."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import re
import secrets
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyrage import encrypt, x25519  # pyright: ignore[reportAttributeAccessIssue]  written in Rust, without types

from veneer.server.errors import NotFound
from veneer.server.journal import Journal
from veneer.server.tinker.state import CheckpointRow, RunRow, put, row_of
from veneer.store.adapters import CARD, CONFIG, MANIFEST, WEIGHTS, write_adapter
from veneer.types import AdapterError, Checkpoint, RequestError

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+=@-]{0,127}")
KINDS = ("weights", "sampler_weights", "external_weights")
TYPES = {"weights": "training", "sampler_weights": "sampler", "external_weights": "external"}
LINK_SECONDS = 3600.0
PUBLIC_FILES = (CONFIG, WEIGHTS, CARD, MANIFEST)


class Checkpoints:
    def __init__(self, journal: Journal, folder: Path) -> None:
        self.journal, self.folder = journal, folder
        self._rows: dict[str, CheckpointRow] = {
            row["path"]: row_of(CheckpointRow, row) for row in journal.read("SELECT * FROM checkpoints")
        }

    # ------------------------------------------------ looking up

    def find(self, path: str, owner: str, kinds: Sequence[str] = KINDS) -> CheckpointRow:
        """
        Raises:
            NotFound: there is none that this owner may see.
            AdapterError: it is of another kind.
        """
        row = self._rows.get(path)
        if row is None or not (row.public or row.owner == owner) or (row.expires is not None and row.expires <= time.time()):
            raise NotFound(f"there is no checkpoint {path!r}")
        if row.kind not in kinds:
            raise AdapterError(f"{path!r} is a checkpoint of kind {row.kind}; wanted is {' or '.join(kinds)}")
        return row

    def of_owner(self, owner: str, run_id: str | None = None) -> list[CheckpointRow]:
        """Newest first."""
        now = time.time()
        mine = [row for row in self._rows.values() if row.owner == owner and (row.expires is None or row.expires > now)]
        return sorted((row for row in mine if run_id in (None, row.run_id)), key=lambda row: -row.created)

    # ------------------------------------------------ saving

    def check(self, run_id: str, kind: str, name: str, ttl_seconds: int | None, overwrite: bool) -> None:
        """
        Raises:
            RequestError: the name cannot be used.
        """
        if not NAME.fullmatch(name):
            raise RequestError(f"checkpoint name {name!r}: use letters, digits and . _ - + = @, at most 128 of them")
        row = self._rows.get(f"tinker://{run_id}/{kind}/{name}")
        if row is not None and not overwrite and kind != "external_weights":
            raise RequestError(f"there is a checkpoint {row.path!r} already; give another name, or overwrite=True for save_state")

    def recipients(self, keys: Sequence[str] | None) -> list[Any]:
        """Age public keys, parsed (https://age-encryption.org/v1).

        Raises:
            RequestError: one of them is none.
        """
        parsed: list[Any] = []
        for key in keys or ():
            try:
                parsed.append(x25519.Recipient.from_str(key))
            except Exception as error:  # pyrage raises its own kinds
                raise RequestError(f"age_encryption_recipients: {key[:16]!r}... is no age X25519 public key") from error
        return parsed

    async def save(
        self,
        run: RunRow,
        kind: str,
        name: str,
        checkpoint: Checkpoint,
        ttl_seconds: int | None,
        user_metadata: dict[str, Any] | None,
        recipients: Sequence[Any] = (),
    ) -> str:
        """Write a checkpoint and return its path; one of that name is replaced."""
        path, folder = f"tinker://{run.id}/{kind}/{name}", self.folder / secrets.token_hex(16)
        await asyncio.to_thread(write_adapter, folder, checkpoint, {"training_run": run.id})
        if kind == "external_weights":
            await asyncio.to_thread(_make_external, folder, recipients)
        size = sum(file.stat().st_size for file in folder.iterdir())
        expires = None if ttl_seconds is None else time.time() + ttl_seconds
        row = CheckpointRow(
            path, run.id, run.owner, kind, name, str(folder), checkpoint.adapter.digest, run.base, run.lora, size, time.time(), expires,
            user_metadata=user_metadata,
        )  # fmt: skip
        try:
            await self.journal.write(put(row))
        except BaseException:
            self.remove_folder(folder)
            raise
        old = self._rows.get(path)
        self._rows[path] = row
        if old is not None:
            await asyncio.to_thread(self.remove_folder, Path(old.folder))
        return path

    async def copy(self, source: CheckpointRow, run: RunRow, ttl_seconds: int | None) -> str:
        """A checkpoint of another run with the same files, which take no room of their own."""
        path, folder = f"tinker://{run.id}/{source.kind}/{source.name}", self.folder / secrets.token_hex(16)
        await asyncio.to_thread(shutil.copytree, source.folder, folder, copy_function=os.link)
        expires = None if ttl_seconds is None else time.time() + ttl_seconds
        changes = {"path": path, "run_id": run.id, "owner": run.owner, "folder": str(folder), "created": time.time(), "expires": expires}
        row = dataclasses.replace(source, **changes, public=False)
        await self.journal.write(put(row), put(run))
        self._rows[path] = row
        return path

    # ------------------------------------------------ changing

    async def change(self, row: CheckpointRow, **changes: Any) -> None:
        for name, value in changes.items():
            setattr(row, name, value)
        await self.journal.write(put(row))

    async def set_ttl(self, row: CheckpointRow, seconds: int | None) -> None:
        """From now on; None: it never expires."""
        await self.change(row, expires=None if seconds is None else time.time() + seconds)

    async def delete(self, row: CheckpointRow) -> None:
        await self.journal.write(("DELETE FROM checkpoints WHERE path = ?", [row.path]), ("DELETE FROM links WHERE path = ?", [row.path]))
        if self._rows.get(row.path) is row:
            del self._rows[row.path]
        await asyncio.to_thread(self.remove_folder, Path(row.folder))

    async def expire(self) -> None:
        """Delete what has outlived its time."""
        now = time.time()
        for row in [row for row in self._rows.values() if row.expires is not None and row.expires <= now]:
            await self.delete(row)
        self.journal.note(("DELETE FROM links WHERE expires <= ?", [now]))

    def remove_folder(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)

    # ------------------------------------------------ files for everyone who has the link

    async def link(self, row: CheckpointRow) -> tuple[str, list[str], float]:
        """A token that opens the files of an external checkpoint for an hour, the files, and when it ends."""
        token, expires = secrets.token_urlsafe(24), time.time() + LINK_SECONDS
        await self.journal.write(("INSERT INTO links (token, path, expires) VALUES (?, ?, ?)", (token, row.path, expires)))
        return token, sorted(file.name for file in Path(row.folder).iterdir()), expires

    def linked_file(self, token: str, name: str) -> Path | None:
        """The file behind a link; None: there is none. ``name`` is compared with the names in the folder, never used as a path."""
        found = self.journal.read("SELECT path FROM links WHERE token = ? AND expires > ?", (token, time.time()))
        row = self._rows.get(found[0]["path"]) if found else None
        return None if row is None else next((file for file in Path(row.folder).iterdir() if file.name == name), None)


def _make_external(folder: Path, recipients: Sequence[Any]) -> None:
    """Leave a plain PEFT folder, every file of it encrypted if there are recipients."""
    for file in list(folder.iterdir()):
        if file.name not in PUBLIC_FILES:
            file.unlink()
        elif recipients:
            file.with_name(file.name + ".age").write_bytes(encrypt(file.read_bytes(), list(recipients)))
            file.unlink()


def info(row: CheckpointRow) -> dict[str, Any]:
    """``weights_info``."""
    lora = row.lora
    return {
        "base_model": row.base,
        "optimizer_config": {"type": "adamw"},
        "is_lora": True,
        "lora_rank": lora.rank,
        "train_unembed": lora.train_unembed,
        "train_mlp": lora.train_mlp,
        "train_attn": lora.train_attn,
    }

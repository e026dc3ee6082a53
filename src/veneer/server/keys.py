"""Keys: who may call the server. Made and revoked by ``veneer keys``, looked up at every request.

A key is ``tml-ID-SECRET``, where ``tml-`` is what the Tinker SDK insists on. The file holds the id and a SHA-256 of the whole key; a fast
hash is right here, as a secret of 256 random bits cannot be guessed at any speed.
"""

from __future__ import annotations

import difflib
import hashlib
import hmac
import json
import logging
import math
import os
import re
import secrets
import sqlite3
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from veneer.types import ConfigError, StorageError

LOG = logging.getLogger("veneer.server")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
SCHEMA = """
CREATE TABLE IF NOT EXISTS keys (
  id TEXT PRIMARY KEY, hash TEXT NOT NULL, name TEXT NOT NULL UNIQUE, adapters TEXT NOT NULL, created REAL NOT NULL, used REAL)
"""
NOBODY = "0" * 64
"""No key has this hash: what a key with an unknown id is compared with. Ids are no secret: that one is unknown shows in the time."""
USED_EVERY = 60.0
"""Seconds after which the time of the last use is written again."""
LOOK = 0.1
"""Seconds for which the file is taken to be as it was: looking gives the interpreter away several times, and with an engine at work each
time waits for it."""


@dataclass(frozen=True)
class Key:
    """What is known of a key: everything but the key."""

    id: str
    name: str
    """The tenant: what was made under a name is seen under that name alone."""
    adapters: tuple[str, ...]
    """Patterns of the registry's adapters that it may see."""
    created: float
    used: float | None
    """Seconds since 1970; None: never."""


class Keys:
    """The keys of one home. Several processes may hold it; what one has changed the others know when ``create`` or ``revoke`` returns."""

    def __init__(self, home: Path) -> None:
        """``home``: the server's folder.

        Raises:
            StorageError: the file cannot be made or opened.
        """
        self.path = home / "keys.sqlite"
        with self._storage_errors():
            home.mkdir(parents=True, exist_ok=True)
            os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))
            self.path.chmod(0o600)  # SQLite gives its side files the same rights
            self._db = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
            for pragma in ("busy_timeout=10000", "journal_mode=WAL"):
                self._db.execute(f"PRAGMA {pragma}")
            self._db.execute(SCHEMA)
        self._seen: object = None
        self._looked = -math.inf
        self._by_id: dict[str, tuple[str, Key]] = {}

    @contextmanager
    def _storage_errors(self) -> Generator[None, None, None]:
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            raise StorageError(f"cannot use {self.path}: {error}; check the path and its permissions") from error

    # ------------------------------------------------ for the server

    def any(self) -> bool:
        self._refresh(LOOK)
        return bool(self._by_id)

    def find(self, key: str) -> Key | None:
        """Whose key it is; None: nobody's."""
        self._refresh(LOOK)
        if _id(key) not in self._by_id:
            self._refresh()
        hashed, known = self._by_id.get(_id(key), (NOBODY, None))
        return known if hmac.compare_digest(_hash(key), hashed) else None

    def note_use(self, key: Key) -> None:
        """Remember when a key was used last, to a minute."""
        if key.used is not None and time.time() - key.used < USED_EVERY:
            return
        try:
            self._db.execute("UPDATE keys SET used = ? WHERE id = ?", (time.time(), key.id))
        except sqlite3.Error as error:  # a full disk is no reason to lock anybody out
            LOG.warning("the use of key %s was not noted: %s", key.id, error)
        self._changed()

    def _changed(self) -> None:
        """By this holder, of which the version of the file says nothing."""
        self._seen, self._looked = None, -math.inf

    def _published(self) -> None:
        """A key is made or gone: wait until every server has looked."""
        self._changed()
        time.sleep(LOOK)

    def _refresh(self, after: float = 0.0) -> None:
        """Read the table again if it was changed and last looked at ``after`` seconds ago or earlier:
        https://sqlite.org/pragma.html#pragma_data_version"""
        now = time.monotonic()
        if now - self._looked < after:
            return
        with self._storage_errors():
            version = self._db.execute("PRAGMA data_version").fetchone()[0]
            if version != self._seen:
                rows = self._db.execute("SELECT id, hash, name, adapters, created, used FROM keys ORDER BY created").fetchall()
                self._by_id = {row[0]: (row[1], Key(row[0], row[2], tuple(json.loads(row[3])), row[4], row[5])) for row in rows}
                self._seen = version
        self._looked = now  # not where looking failed: the next request is to fail too, and not to be let in by what was known before

    # ------------------------------------------------ for the command line

    def all(self) -> list[Key]:
        """Oldest first."""
        self._refresh()
        return [key for _, key in self._by_id.values()]

    def create(self, name: str, adapters: Sequence[str]) -> tuple[str, Key]:
        """A new key, which is nowhere but in the answer, and what is known of it.

        Raises:
            ConfigError: the name cannot be used, or has a key.
        """
        if not NAME.fullmatch(name):
            raise ConfigError(f"{name!r} is no name for a key: use letters, digits and . _ @ -, at most 64 of them")
        known = Key(secrets.token_hex(4), name, tuple(adapters), time.time(), None)
        key = f"tml-{known.id}-{secrets.token_urlsafe(32)}"
        try:
            with self._storage_errors():
                self._db.execute(
                    "INSERT INTO keys (id, hash, name, adapters, created) VALUES (?, ?, ?, ?, ?)",
                    (known.id, _hash(key), name, json.dumps(known.adapters), known.created),
                )
        except StorageError as error:
            if isinstance(error.__cause__, sqlite3.IntegrityError):
                raise ConfigError(f"{name!r} has a key; revoke it first: veneer keys revoke {name}") from error
            raise
        self._published()
        return key, known

    def revoke(self, name: str) -> Key:
        """
        Raises:
            ConfigError: no key has that name.
        """
        known = {key.name: key for key in self.all()}
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(known) or 'none'}"
            raise ConfigError(f"there is no key of name {name!r}; {hint}")
        with self._storage_errors():
            self._db.execute("DELETE FROM keys WHERE name = ?", [name])
        self._published()
        return known[name]

    def close(self) -> None:
        self._db.close()


def _id(key: str) -> str:
    return key[4:12] if key.startswith("tml-") else ""


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()

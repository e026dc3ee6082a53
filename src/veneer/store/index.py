"""The registry's tables, in any database that SQLAlchemy speaks to: names, versions, parents, scores, labels, tombstones.

Every change of a name first updates the name's row, so that changes of one name wait for each other in SQLite, PostgreSQL
and MySQL alike. Labels are a history that only grows; what a label points to is its last row.
"""

from __future__ import annotations

import errno
import json
import os
import threading
from collections import defaultdict
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import ArgumentError, DatabaseError, DBAPIError, IntegrityError, NoSuchModuleError, SQLAlchemyError

from veneer.store.entry import Entry, Parent, Score, Tombstone, now
from veneer.store.files import storage_errors
from veneer.types import AdapterError, ConfigError, StorageError, in_one_line

PATIENCE = 60
"""Seconds that a process waits for another one's change to the same SQLite file."""
METADATA = sa.MetaData()
NAME, DIGEST, MOMENT = sa.String(64), sa.String(64), sa.String(32)
NAMES = sa.Table(
    "adapter_names",
    METADATA,
    sa.Column("name", NAME, primary_key=True),
    sa.Column("newest", sa.Integer, nullable=False),  # the highest number ever given: numbers of forgotten versions do not come back
    sa.Column("changes", sa.Integer, nullable=False),
)
VERSIONS = sa.Table(
    "adapter_versions",
    METADATA,
    sa.Column("name", NAME, primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("identity", DIGEST, nullable=False),
    sa.Column("object", DIGEST, nullable=False),
    sa.Column("digest", DIGEST, nullable=False),
    sa.Column("base_id", sa.String(512), nullable=False),
    sa.Column("base_digest", DIGEST, nullable=False),
    sa.Column("tokenizer_digest", DIGEST),
    sa.Column("template_digest", DIGEST),
    sa.Column("stage", sa.String(32), nullable=False),
    sa.Column("rank", sa.Integer),
    sa.Column("created", MOMENT, nullable=False),
    sa.Column("signed_by", sa.String(80)),
    sa.UniqueConstraint("name", "identity", name="adapter_versions_identity"),
)
PROMISES = sa.Table(  # numbers on their way: who was killed while it put a version finds its number again
    "adapter_promises",
    METADATA,
    sa.Column("name", NAME, primary_key=True),
    sa.Column("identity", DIGEST, primary_key=True),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("created", MOMENT, nullable=False),
)
PARENTS = sa.Table(
    "adapter_parents",
    METADATA,
    sa.Column("name", NAME, primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("position", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("reference", sa.String(255), nullable=False),
    sa.Column("digest", DIGEST, nullable=False),
    sa.Column("scale", sa.Double, nullable=False),
)
SCORES = sa.Table(
    "adapter_scores",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("name", NAME, nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("env", sa.String(255), nullable=False),
    sa.Column("value", sa.Double, nullable=False),
    sa.Column("low", sa.Double, nullable=False),
    sa.Column("high", sa.Double, nullable=False),
    sa.Column("problems", sa.Integer, nullable=False),
    sa.Column("seed", sa.BigInteger, nullable=False),
    sa.Column("measured", MOMENT, nullable=False),
    sa.Column("settings", sa.Text, nullable=False),
)
LABELS = sa.Table(
    "adapter_labels",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("name", NAME, nullable=False),
    sa.Column("label", NAME, nullable=False),
    sa.Column("version", sa.Integer),  # NULL: the label was taken away
    sa.Column("back_to", sa.Integer),  # the row that a rollback returns to
    sa.Column("at", MOMENT, nullable=False),
)
TOMBSTONES = sa.Table(
    "adapter_tombstones",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("name", NAME, nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("digest", DIGEST, nullable=False),
    sa.Column("at", MOMENT, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
)


class Index:
    """One database. Threads and processes share it; a forked child may use its parent's, as nothing stays open in between."""

    def __init__(self, url: str | sa.URL, objects: Path) -> None:
        """``objects``: the folder in which entries have theirs.

        Raises:
            ConfigError: the URL is none, or its driver is not installed.
        """
        try:
            self.url = sa.make_url(url)
        except ArgumentError as error:
            raise ConfigError(f"the registry's URL {str(url)!r} is no URL; write one such as postgresql://user@host/database") from error
        try:
            sqlite = self.url.get_backend_name() == "sqlite"
            options: dict[str, Any] = {"connect_args": {"timeout": PATIENCE}} if sqlite else {}
            self.engine = sa.create_engine(self.url, poolclass=sa.NullPool, **options)
            if sqlite:
                event.listen(self.engine, "connect", _overwrite_what_is_deleted)
        except (ArgumentError, NoSuchModuleError) as error:
            raise ConfigError(f"the registry's URL {self.shown} is none that SQLAlchemy knows ({in_one_line(error)})") from error
        except ModuleNotFoundError as error:
            raise ConfigError(f"the registry's URL {self.shown} needs the package {error.name!r}; install it with pip") from error
        self.objects = objects
        self.file = Path(self.url.database) if sqlite and self.url.database else None
        if sqlite and (self.file is None or self.file.name == ":memory:"):
            raise ConfigError(f"the registry's URL {self.shown} names no file; what is in memory is gone with its connection")
        self._ready, self._lock = False, threading.Lock()

    @property
    def shown(self) -> str:
        """The URL without its password."""
        return self.url.render_as_string(hide_password=True)

    # ------------------------------------------------ connections

    @contextmanager
    def reading(self) -> Generator[sa.Connection | None, None, None]:
        """One moment of the database, whatever others change meanwhile. None: there is no database yet, and looking makes none."""
        if self.file is not None and not self.file.is_file():
            yield None
            return
        with self._errors():
            self._make_tables()
            with self.engine.connect() as connection:
                if self.file is not None:
                    connection.exec_driver_sql("BEGIN")  # Python's driver begins nothing for a SELECT
                else:
                    connection = connection.execution_options(isolation_level="REPEATABLE READ")
                yield connection

    @contextmanager
    def changing(self, name: str) -> Generator[sa.Connection, None, None]:
        """A transaction that holds the row of ``name``."""
        with self._errors():
            self._make_tables()
            hold = sa.update(NAMES).where(NAMES.c.name == name).values(changes=NAMES.c.changes + 1)
            with self.engine.begin() as connection:
                if connection.execute(hold).rowcount:
                    yield connection
                    return
            try:
                with self.engine.begin() as connection:
                    connection.execute(sa.insert(NAMES).values(name=name, newest=0, changes=0))
            except IntegrityError:
                pass  # another process was first
            with self.engine.begin() as connection:
                connection.execute(hold)
                yield connection

    def _make_tables(self) -> None:
        with self._lock:
            if self._ready:
                return
            if self.file is not None:
                with storage_errors(self.file):
                    self.file.parent.mkdir(parents=True, exist_ok=True)
            for table in METADATA.sorted_tables:
                if not sa.inspect(self.engine).has_table(table.name):
                    self._make_table(table)
            self._ready = True

    def _make_table(self, table: sa.Table) -> None:
        try:
            with self.engine.begin() as connection:
                connection.execute(sa.schema.CreateTable(table, if_not_exists=True))
        except DBAPIError:  # PostgreSQL and MySQL: another process makes it just now
            if not sa.inspect(self.engine).has_table(table.name):
                raise

    @contextmanager
    def _errors(self) -> Generator[None, None, None]:
        try:
            yield
        except SQLAlchemyError as error:
            reason = in_one_line(error.orig if isinstance(error, DBAPIError) and error.orig is not None else error)
            advice = "check its path and permissions, or build it again from the folders: veneer adapters reindex"
            if "disk is full" in reason:  # SQLite's words
                reason, advice = os.strerror(errno.ENOSPC), "free some space and run the same command again"
            raise StorageError(f"the adapter index {self.shown} cannot be used ({reason}); {advice}") from error

    def is_damaged(self) -> bool:
        """Whether an SQLite file is there that is no database any more."""
        if self.file is None or not self.file.is_file():
            return False
        try:
            with self.engine.connect() as connection:
                return connection.execute(sa.text("PRAGMA quick_check")).scalar() != "ok"
        except DatabaseError as error:
            return type(error) is DatabaseError  # what is locked or cannot be opened is an OperationalError

    def set_aside(self) -> Path:
        """Give a damaged SQLite file another name, and begin anew."""
        assert self.file is not None
        aside = self.file.with_name(f"{self.file.name}.damaged-{now().replace(':', '')}")
        with storage_errors(self.file):
            self.file.rename(aside)
            for rest in self.file.parent.glob(self.file.name + "-*"):
                rest.unlink()  # a journal of what is no database would be played back into the new one
        self._ready = False
        return aside

    # ------------------------------------------------ versions

    def entries(self, *conditions: sa.ColumnElement[bool]) -> list[Entry]:
        """By name and version. ``trusted`` is left to who has the keys."""
        with self.reading() as connection:
            if connection is None:
                return []
            ordered = sa.select(VERSIONS).where(*conditions).order_by(VERSIONS.c.name, VERSIONS.c.version)
            rows = connection.execute(ordered).mappings().all()
            names = {row["name"] for row in rows}
            parents = _grouped(connection, sa.select(PARENTS).order_by(PARENTS.c.position), PARENTS, names)
            scores = _grouped(connection, sa.select(SCORES).order_by(SCORES.c.id), SCORES, names)
            labels = _grouped(connection, sa.select(LABELS).where(_is_current()).order_by(LABELS.c.label), LABELS, names)
        return [
            Entry(
                folder=self.objects / row["object"],
                trusted=False,
                parents=tuple(Parent(p["reference"], p["digest"], p["scale"]) for p in parents[row["name"], row["version"]]),
                scores=tuple(_score(s) for s in scores[row["name"], row["version"]]),
                labels=tuple(m["label"] for m in labels[row["name"], row["version"]]),
                **{key: row[key] for key in row if key not in ("identity", "object")},
            )
            for row in rows
        ]

    def changes(self, name: str) -> int | None:
        """How often a name was changed, by whatever process; None: there is none. As long as it stays, what was read of the name is
        current."""
        with self.reading() as connection:
            return None if connection is None else connection.execute(_CHANGES, {"name": name}).scalar()

    def with_identity(self, name: str, identity: str) -> int | None:
        """The version of ``name`` that has these weights, base, tokenizer and template."""
        found = self.entries(VERSIONS.c.name == name, VERSIONS.c.identity == identity)
        return found[0].version if found else None

    def promise(self, name: str, identity: str) -> tuple[int, str]:
        """The number that a version of this identity has or will have, and when that was first said. Nobody else gets the number."""
        key = {"name": name, "identity": identity}
        with self.changing(name) as connection:
            for table in (VERSIONS, PROMISES):
                said = connection.execute(sa.select(table.c.version, table.c.created).filter_by(**key)).first()
                if said is not None:
                    return said.version, said.created
            connection.execute(sa.update(NAMES).where(NAMES.c.name == name).values(newest=NAMES.c.newest + 1))
            version, created = connection.execute(sa.select(NAMES.c.newest).where(NAMES.c.name == name)).scalar_one(), now()
            connection.execute(sa.insert(PROMISES).values(**key, version=version, created=created))
            return version, created

    def add(self, entry: Entry, identity: str) -> tuple[int, str]:
        """Enter a version with its parents and scores. Returns the number and the object that the index has for this identity: others,
        if the same was entered meanwhile.

        Raises:
            AdapterError: other weights have the number.
        """
        with self.changing(entry.name) as connection:
            mine = VERSIONS.c.name == entry.name
            connection.execute(sa.delete(PROMISES).where(PROMISES.c.name == entry.name, PROMISES.c.identity == identity))
            same = connection.execute(sa.select(VERSIONS.c.version, VERSIONS.c.object).where(mine, VERSIONS.c.identity == identity)).first()
            if same is not None:
                return same.version, same.object
            if connection.execute(sa.select(VERSIONS.c.version).where(mine, VERSIONS.c.version == entry.version)).scalar() is not None:
                raise AdapterError(f"there is another {entry.reference} already")
            own = {column.name: getattr(entry, column.name) for column in VERSIONS.c if column.name not in ("identity", "object")}
            connection.execute(sa.insert(VERSIONS).values(**own, identity=identity, object=entry.folder.name))
            key = {"name": entry.name, "version": entry.version}
            connection.execute(sa.delete(PARENTS).filter_by(**key))  # of a row that was lost alone
            for position, parent in enumerate(entry.parents):
                connection.execute(sa.insert(PARENTS).values(**key, position=position, **asdict(parent)))
            measured = connection.execute(sa.select(SCORES.c.id).filter_by(**key)).first()
            for score in () if measured else entry.scores:
                connection.execute(_insert_score(entry, score))
            behind = sa.and_(NAMES.c.name == entry.name, NAMES.c.newest < entry.version)
            connection.execute(sa.update(NAMES).where(behind).values(newest=entry.version))
            return entry.version, entry.folder.name

    def children(self, entry: Entry) -> list[Entry]:
        """Versions that were made from this one."""
        with self.reading() as connection:
            if connection is None:
                return []
            of_this = sa.and_(PARENTS.c.reference == entry.reference, PARENTS.c.digest == entry.digest)
            keys = connection.execute(sa.select(PARENTS.c.name, PARENTS.c.version).where(of_this).distinct()).all()
        return [e for name, version in keys for e in self.entries(VERSIONS.c.name == name, VERSIONS.c.version == version)]

    def add_score(self, entry: Entry, score: Score) -> None:
        with self.changing(entry.name) as connection:
            connection.execute(_insert_score(entry, score))

    # ------------------------------------------------ labels

    def labels(self, name: str) -> dict[str, int]:
        """Where each label of a name points now."""
        with self.reading() as connection:
            if connection is None:
                return {}
            rows = connection.execute(sa.select(LABELS).where(LABELS.c.name == name, _is_current()).order_by(LABELS.c.label)).mappings()
            return {row["label"]: row["version"] for row in rows if row["version"] is not None}

    def history(self, name: str, label: str) -> list[tuple[str, int | None]]:
        """When a label was moved, and where to; None: it was taken away."""
        with self.reading() as connection:
            if connection is None:
                return []
            moves = sa.select(LABELS.c.at, LABELS.c.version).where(LABELS.c.name == name, LABELS.c.label == label).order_by(LABELS.c.id)
            return [(at, version) for at, version in connection.execute(moves)]

    def promote(self, name: str, version: int, label: str) -> None:
        """Raises:
        AdapterError: the version has been forgotten meanwhile.
        """
        with self.changing(name) as connection:
            if version not in _versions(connection, name):
                raise AdapterError(f"there is no {name}@{version} to promote")
            current = _current(connection, name, label)
            if current is None or current["version"] != version:
                _move(connection, name, label, version, None if current is None else current["id"])

    def rollback(self, name: str, label: str) -> int:
        """Raises:
        AdapterError: the label has pointed nowhere else before, or only to what is forgotten.
        """
        with self.changing(name) as connection:
            current, there = _current(connection, name, label), _versions(connection, name)
            if current is None:
                raise AdapterError(f"{name!r} has no label {label!r}; promote a version first")
            earlier = _row(connection, current["back_to"])
            while earlier is not None and (earlier["version"] not in there or earlier["version"] == current["version"]):
                earlier = _row(connection, earlier["back_to"])
            if earlier is None:
                raise AdapterError(f"label {label!r} of {name!r} has pointed to no other version before")
            _move(connection, name, label, earlier["version"], earlier["back_to"])
            return earlier["version"]

    # ------------------------------------------------ forgetting

    def remove(self, entry: Entry, reason: str, at: str) -> None:
        """Leave a tombstone in place of a version; labels that point there are taken away."""
        with self.changing(entry.name) as connection:
            here = sa.select(LABELS).where(LABELS.c.name == entry.name, LABELS.c.version == entry.version, _is_current())
            for row in connection.execute(here).mappings().all():
                _move(connection, entry.name, row["label"], None, row["id"])
            for table in (VERSIONS, PARENTS, SCORES):
                connection.execute(sa.delete(table).where(table.c.name == entry.name, table.c.version == entry.version))
            _bury(connection, Tombstone(entry.name, entry.version, entry.digest, at, reason))

    def bury(self, tombstone: Tombstone) -> None:
        """Set a tombstone that a lost index had."""
        with self.changing(tombstone.name) as connection:
            _bury(connection, tombstone)
            behind = sa.and_(NAMES.c.name == tombstone.name, NAMES.c.newest < tombstone.version)
            connection.execute(sa.update(NAMES).where(behind).values(newest=tombstone.version))

    def tombstones(self) -> list[tuple[int, Tombstone]]:
        """In the order in which they were set, each with its number."""
        with self.reading() as connection:
            if connection is None:
                return []
            rows = connection.execute(sa.select(TOMBSTONES).order_by(TOMBSTONES.c.id)).mappings()
            return [(row["id"], Tombstone(**{key: row[key] for key in row if key != "id"})) for row in rows]


_CHANGES = sa.select(NAMES.c.changes).where(NAMES.c.name == sa.bindparam("name"))


def sqlite_url(file: Path) -> sa.URL:
    """Of an SQLite file, whatever characters its path has."""
    return sa.URL.create("sqlite", database=str(file.absolute()))


def _overwrite_what_is_deleted(connection: Any, _record: object) -> None:
    """SQLite leaves deleted rows in its file until the space is needed (https://sqlite.org/pragma.html#pragma_secure_delete)."""
    connection.execute("PRAGMA secure_delete = ON")


Row = Mapping[str, Any]


def _grouped(connection: sa.Connection, query: sa.Select[Any], table: sa.Table, names: set[str]) -> defaultdict[tuple[str, int], list[Row]]:
    """Rows of a table by name and version."""
    groups: defaultdict[tuple[str, int], list[Row]] = defaultdict(list)
    one = query.where(table.c.name == next(iter(names))) if len(names) == 1 else query
    for row in connection.execute(one).mappings() if names else ():
        groups[row["name"], row["version"]].append(dict(row))
    return groups


def _score(row: Row) -> Score:
    kept = {key: row[key] for key in row if key not in ("id", "name", "version", "settings")}
    return Score(**kept, settings=json.loads(row["settings"]))


def _insert_score(entry: Entry, score: Score) -> sa.Insert:
    row = asdict(score) | {"settings": json.dumps(dict(score.settings), sort_keys=True)}
    return sa.insert(SCORES).values(name=entry.name, version=entry.version, **row)


def _is_current() -> sa.ColumnElement[bool]:
    last = sa.select(sa.func.max(LABELS.c.id)).group_by(LABELS.c.name, LABELS.c.label)
    return LABELS.c.id.in_(last)


def _current(connection: sa.Connection, name: str, label: str) -> Row | None:
    mine = sa.select(LABELS).where(LABELS.c.name == name, LABELS.c.label == label)
    return _first(connection, mine.order_by(LABELS.c.id.desc()).limit(1))


def _row(connection: sa.Connection, number: int | None) -> Row | None:
    return None if number is None else _first(connection, sa.select(LABELS).where(LABELS.c.id == number))


def _first(connection: sa.Connection, query: sa.Select[Any]) -> Row | None:
    row = connection.execute(query).mappings().first()
    return None if row is None else {str(key): value for key, value in row.items()}


def _move(connection: sa.Connection, name: str, label: str, version: int | None, back_to: int | None) -> None:
    connection.execute(sa.insert(LABELS).values(name=name, label=label, version=version, back_to=back_to, at=now()))


def _versions(connection: sa.Connection, name: str) -> Sequence[int]:
    return connection.execute(sa.select(VERSIONS.c.version).where(VERSIONS.c.name == name)).scalars().all()


def _bury(connection: sa.Connection, tombstone: Tombstone) -> None:
    connection.execute(sa.insert(TOMBSTONES).values(**asdict(tombstone)))

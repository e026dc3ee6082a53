"""What the Tinker side keeps: the tables, and rows as Python sees them."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from sqlite3 import Row
from typing import Any, TypeVar

from veneer.server.journal import Statement
from veneer.types import LoraConfig

T = TypeVar("T")

SCHEMA = """
CREATE TABLE IF NOT EXISTS sessions (
  id TEXT PRIMARY KEY, owner TEXT NOT NULL, facts TEXT NOT NULL, created REAL NOT NULL, seen REAL NOT NULL, finished REAL);
CREATE TABLE IF NOT EXISTS runs (
  id TEXT PRIMARY KEY, session_id TEXT NOT NULL, owner TEXT NOT NULL, base TEXT NOT NULL, lora TEXT NOT NULL, user_metadata TEXT,
  created REAL NOT NULL, state_seq INTEGER, state_folder TEXT);
CREATE TABLE IF NOT EXISTS samplers (
  id TEXT PRIMARY KEY, session_id TEXT NOT NULL, owner TEXT NOT NULL, base TEXT NOT NULL, kind TEXT NOT NULL, path TEXT, run_id TEXT,
  digest TEXT, folder TEXT, created REAL NOT NULL);
CREATE TABLE IF NOT EXISTS promises (
  number INTEGER PRIMARY KEY, id TEXT NOT NULL, owner TEXT NOT NULL, target TEXT NOT NULL, seq INTEGER NOT NULL, kind TEXT NOT NULL,
  body BLOB, facts TEXT NOT NULL, created REAL NOT NULL, done REAL, media_type TEXT, answer BLOB, UNIQUE (target, seq));
CREATE INDEX IF NOT EXISTS promises_by_id ON promises (id);
CREATE TABLE IF NOT EXISTS checkpoints (
  path TEXT PRIMARY KEY, run_id TEXT NOT NULL, owner TEXT NOT NULL, kind TEXT NOT NULL, name TEXT NOT NULL, folder TEXT NOT NULL,
  digest TEXT NOT NULL, base TEXT NOT NULL, lora TEXT NOT NULL, size INTEGER NOT NULL, created REAL NOT NULL, expires REAL,
  public INTEGER NOT NULL DEFAULT 0, user_metadata TEXT);
CREATE TABLE IF NOT EXISTS links (token TEXT PRIMARY KEY, path TEXT NOT NULL, expires REAL NOT NULL);
"""


@dataclass
class Session:
    id: str
    owner: str
    facts: dict[str, Any]
    """tags, user_metadata, sdk_version, display_name"""
    created: float
    seen: float
    finished: float | None = None


@dataclass
class RunRow:
    """A training run: a model that a client trains."""

    id: str
    session_id: str
    owner: str
    base: str
    """As the client named it."""
    lora: LoraConfig
    user_metadata: dict[str, Any] | None
    created: float
    state_seq: int | None = None
    """The state on disk is that after this operation; None: there is none, the run starts with a fresh adapter."""
    state_folder: str | None = None


@dataclass
class SamplerRow:
    """A sampling session."""

    id: str
    session_id: str
    owner: str
    base: str
    kind: str
    """base, checkpoint, snapshot or inflight"""
    path: str | None
    """Of the checkpoint, as the client named it."""
    run_id: str | None
    digest: str | None
    folder: str | None
    """Where the weights lie; None: the base alone."""
    created: float


@dataclass
class CheckpointRow:
    path: str
    """tinker://RUN/KIND/NAME"""
    run_id: str
    owner: str
    kind: str
    """weights, sampler_weights or external_weights"""
    name: str
    folder: str
    digest: str
    base: str
    lora: LoraConfig
    size: int
    created: float
    expires: float | None = None
    public: bool = False
    user_metadata: dict[str, Any] | None = None

    @property
    def id(self) -> str:
        return f"{self.kind}/{self.name}"


TABLES: dict[type, str] = {Session: "sessions", RunRow: "runs", SamplerRow: "samplers", CheckpointRow: "checkpoints"}
JSON_FIELDS = ("facts", "lora", "user_metadata")


def put(row: Any) -> Statement:
    """The statement that writes a row, in place of an older one."""
    values = {f.name: getattr(row, f.name) for f in dataclasses.fields(row)}
    for name in JSON_FIELDS:
        if values.get(name) is not None:
            value = values[name]
            values[name] = json.dumps(dataclasses.asdict(value) if isinstance(value, LoraConfig) else value)
    columns = ", ".join(values)
    return f"INSERT OR REPLACE INTO {TABLES[type(row)]} ({columns}) VALUES ({', '.join('?' * len(values))})", list(values.values())


def row_of(kind: type[T], found: Row) -> T:
    """A row as its class."""
    values: dict[str, Any] = dict(zip(found.keys(), found, strict=True))
    for name in JSON_FIELDS:
        if values.get(name) is not None:
            values[name] = json.loads(values[name])
    if "lora" in values:
        values["lora"] = LoraConfig(**{**values["lora"], "target_modules": tuple(values["lora"]["target_modules"])})
    if "public" in values:
        values["public"] = bool(values["public"])
    return kind(**values)


def timestamp(seconds: float) -> str:
    """ISO 8601 with its zone, which the SDK compares with aware times."""
    return datetime.fromtimestamp(seconds, UTC).isoformat()

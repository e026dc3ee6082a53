"""Promises: what was asked and acknowledged, and its answer when there is one.

A promise is on the disk before its id is given out, so a server that was killed goes on with it. Its answer is written too, but
nobody waits for that: a lost answer is made again.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import secrets
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from veneer.server.errors import UNKNOWN, told
from veneer.server.journal import Journal, Statement
from veneer.types import RequestError, VeneerError

LOG = logging.getLogger("veneer.server")
KEPT = 24 * 3600.0
"""Seconds for which an answer can be fetched."""
IN_MEMORY = 300.0
"""Seconds after which an answer is on the disk alone."""
JSON = "application/json"


@dataclass(eq=False)
class Promise:
    number: int
    id: str
    owner: str
    target: str
    """The run, session or sampler whose operation it is."""
    seq: int
    kind: str
    body: bytes
    facts: dict[str, Any]
    created: float
    media_type: str | None = None
    answer: bytes | None = None
    done_at: float | None = None
    over: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def done(self) -> bool:
        return self.done_at is not None


class Promises:
    """Every promise that is open or whose answer may still be fetched."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self._by_id: dict[str, Promise] = {}
        self._by_seq: dict[tuple[str, int], Promise] = {}
        self._writing: dict[tuple[str, int], asyncio.Future[Promise]] = {}
        self._last: dict[str, int] = {}
        """By target, the largest sequence number that was ever asked for: what comes behind it is new, and nobody need look for it."""
        self._salt = secrets.token_bytes(16)
        self._next = 1 + (journal.read("SELECT max(number) FROM promises")[0][0] or 0)
        self._open: Counter[str] = Counter()
        """By owner."""

    def open(self, owner: str | None = None) -> int:
        """How many have no answer yet, of one owner or of all."""
        return self._open.total() if owner is None else self._open[owner]

    def open_targets(self) -> list[str]:
        """Whose promises were open when the last process ended."""
        return [row["target"] for row in self.journal.read("SELECT DISTINCT target FROM promises WHERE done IS NULL")]

    def to_do(self, target: str, after: int = -1) -> list[Promise]:
        """Operations whose bodies are still there, behind number ``after``: open ones, and those that a run repeats; in order."""
        rows = self.journal.read("SELECT * FROM promises WHERE target = ? AND seq > ? AND body IS NOT NULL ORDER BY seq", (target, after))
        return [self._by_id.get(row["id"]) or self._keep(self._of(row)) for row in rows]

    def completed(self, target: str, first: int, last: int, cursor: int) -> list[tuple[int, str, bool, int]]:
        """(cursor, request id, whether it failed, bytes) of the answers to a target's operations ``first`` to ``last`` that came after
        ``cursor``, in microseconds."""
        rows = self.journal.read(
            "SELECT id, cast(done * 1e6 AS INTEGER) AS at, media_type, length(answer) AS size FROM promises "
            "WHERE target = ? AND seq BETWEEN ? AND ? AND cast(done * 1e6 AS INTEGER) > ? ORDER BY done",
            (target, first, last, cursor),
        )
        return [(row["at"], row["id"], row["media_type"] == JSON, row["size"]) for row in rows]

    def _of(self, row: Any) -> Promise:
        promise = Promise(
            row["number"], row["id"], row["owner"], row["target"], row["seq"], row["kind"], row["body"] or b"", json.loads(row["facts"]),
            row["created"], row["media_type"], row["answer"], row["done"],
        )  # fmt: skip
        if promise.done:
            promise.over.set()
        return promise

    def _keep(self, promise: Promise) -> Promise:
        self._index(promise)
        self._open[promise.owner] += not promise.done
        return promise

    def _index(self, promise: Promise) -> None:
        self._by_id[promise.id] = self._by_seq[promise.target, promise.seq] = promise

    async def accept(
        self,
        owner: str,
        target: str,
        seq: int,
        kind: str,
        body: bytes,
        facts: dict[str, Any],
        *also: Statement,
        begin: Callable[[Promise], asyncio.Task[None]] | None = None,
    ) -> tuple[Promise, bool]:
        """The promise for an operation, and whether it is new. A repeated (target, seq) gets the one it had. ``also`` is written in the
        same transaction; ``begin`` starts work that waits for no disk, and is in vain if nothing can be written."""
        known = self._by_seq.get((target, seq)) or await self._waiting(target, seq) or self._earlier(target, seq)
        if known is not None:
            return known, False
        number, self._next = self._next, self._next + 1
        promise = Promise(number, self._id(number), owner, target, seq, kind, body, facts, time.time())
        written = self._writing[target, seq] = asyncio.get_running_loop().create_future()
        self._open[owner] += 1
        self._last[target] = max(self._last[target], seq)
        work = None if begin is None else begin(promise)
        try:
            sql = "INSERT INTO promises (number, id, owner, target, seq, kind, body, facts, created) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
            values = (number, promise.id, owner, target, seq, kind, body, json.dumps(facts), promise.created)
            await self.journal.write(*also, (sql, values))
        except BaseException as error:
            written.set_exception(error)
            written.exception()  # seen
            if work is not None:
                work.cancel()
            if not promise.done:
                promise.done_at = time.time()
                self._open[owner] -= 1
            raise
        finally:
            del self._writing[target, seq]
        self._index(promise)
        written.set_result(promise)
        return promise, True

    async def _waiting(self, target: str, seq: int) -> Promise | None:
        """A twin that is being written."""
        written = self._writing.get((target, seq))
        return None if written is None else await asyncio.shield(written)

    def _id(self, number: int) -> str:
        """That nobody can guess; of the system's own random numbers each would give the interpreter away."""
        return f"{number}-{hashlib.blake2b(str(number).encode(), key=self._salt, digest_size=8).hexdigest()}"

    def _earlier(self, target: str, seq: int) -> Promise | None:
        """One that is not in memory any more."""
        if target not in self._last:
            last = self.journal.read("SELECT max(seq) FROM promises WHERE target = ?", [target])[0][0]
            self._last[target] = -1 if last is None else last
        return self._stored("target = ? AND seq = ?", target, seq) if seq <= self._last[target] else None

    def _stored(self, where: str, *values: Any) -> Promise | None:
        rows = self.journal.read(f"SELECT * FROM promises WHERE {where}", values)
        return self._of(rows[0]) if rows else None

    def find(self, request_id: str) -> Promise | None:
        return self._by_id.get(request_id) or self._stored("id = ?", request_id)

    def was_given_out(self, request_id: str) -> bool:
        """Whether an id that is not found may have been one of ours."""
        number = request_id.partition("-")[0]
        return number.isascii() and number.isdigit() and len(number) < 19 and int(number) < self._next

    # ------------------------------------------------ answers

    def resolve(self, promise: Promise, answer: dict[str, Any] | bytes, media_type: str = JSON) -> None:
        """Answer a promise; one that is answered, because it ran again after a restart, keeps its answer."""
        if promise.done:
            return
        promise.answer = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        promise.media_type, promise.done_at = media_type, time.time()
        self._open[promise.owner] -= 1
        self.journal.note(
            (
                "UPDATE promises SET done = ?, media_type = ?, answer = ? WHERE number = ?",
                (promise.done_at, media_type, promise.answer, promise.number),
            )
        )
        promise.over.set()

    def fail(self, promise: Promise, error: BaseException) -> None:
        """Answer with an error: of category user if the request was wrong. What is no error of ours is logged, not shown."""
        if isinstance(error, VeneerError):
            text, category = told(error), "user" if isinstance(error, RequestError) else "server"
        else:
            LOG.error("%s %s failed", promise.kind, promise.id, exc_info=error)
            text, category = UNKNOWN, "server"
        self.resolve(promise, {"error": text, "category": category})

    def forget_body(self, *promises: Promise) -> None:
        """The operation need not run again after a restart."""
        for promise in promises:
            promise.body = b""
        self.journal.note(*(("UPDATE promises SET body = NULL WHERE number = ?", (p.number,)) for p in promises))

    def tidy(self) -> None:
        """Drop what nobody will fetch."""
        now = time.time()
        for promise in [p for p in self._by_id.values() if p.done_at is not None and now - p.done_at > IN_MEMORY and not p.body]:
            del self._by_id[promise.id], self._by_seq[promise.target, promise.seq]
        at_hand = {target for target, _ in (*self._by_seq, *self._writing)}
        self._last = {target: last for target, last in self._last.items() if target in at_hand}
        self.journal.note(("DELETE FROM promises WHERE done < ? AND body IS NULL", (now - KEPT,)))

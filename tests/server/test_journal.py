"""What was acknowledged is on the disk, and what nobody waits for comes there soon, in order."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from veneer.server import journal as journals
from veneer.server.journal import Journal
from veneer.types import StorageError

SCHEMA = "CREATE TABLE IF NOT EXISTS words (number INTEGER PRIMARY KEY, word TEXT NOT NULL);"
ADD = "INSERT INTO words (word) VALUES (?)"


def words(path: Path) -> list[str]:
    with sqlite3.connect(path) as db:
        return [word for (word,) in db.execute("SELECT word FROM words ORDER BY number")]


def in_a_journal(path: Path, work: Callable[[Journal], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        journal = Journal(path, SCHEMA)
        try:
            await work(journal)
        finally:
            journal.close()

    asyncio.run(run())


def test_a_note_is_written_soon_though_nobody_writes(tmp_path: Path) -> None:
    """A server that is killed a second later finds the answer."""

    async def work(journal: Journal) -> None:
        for word in ("a", "b"):
            journal.note((ADD, [word]))
        async with asyncio.timeout(10):
            while words(journal.path) != ["a", "b"]:
                await asyncio.sleep(0.01)
        journal.note((ADD, ["c"]))
        async with asyncio.timeout(10):
            while words(journal.path) != ["a", "b", "c"]:
                await asyncio.sleep(0.01)

    in_a_journal(tmp_path / "x.sqlite", work)


def test_notes_go_with_what_is_written_behind_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer is never on the disk before its operation is."""
    monkeypatch.setattr(journals, "SOON", 3600.0)

    async def work(journal: Journal) -> None:
        journal.note((ADD, ["a"]))
        journal.note((ADD, ["b"]))
        await journal.write((ADD, ["c"]))
        assert words(journal.path) == ["a", "b", "c"]
        journal.note((ADD, ["d"]))

    in_a_journal(tmp_path / "x.sqlite", work)
    assert words(tmp_path / "x.sqlite") == ["a", "b", "c", "d"], "closing writes what is left"


def test_one_that_cannot_be_written_takes_no_other_with_it(tmp_path: Path) -> None:
    async def work(journal: Journal) -> None:
        journal.note((ADD, ["a"]))
        journal.note((ADD, [None]))
        found = await asyncio.gather(journal.write((ADD, [None])), journal.write((ADD, ["b"])), return_exceptions=True)
        assert isinstance(found[0], StorageError)
        assert found[1] is None
        assert words(journal.path) == ["a", "b"]

    in_a_journal(tmp_path / "x.sqlite", work)

"""Problems from a file: jsonl, json or csv, a problem a row."""

from __future__ import annotations

import csv
import difflib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.envs.dataset import held_out
from veneer.jsonl import read_jsonl
from veneer.types import DataError, Message, Split, in_one_line

PROMPTS = ("prompt", "problem", "question")
ANSWERS = ("answer", "solution", "ground_truth")
"""Columns that are found by themselves, in this order."""
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Row:
    """One problem: its columns as they stand in the file, and where."""

    columns: Mapping[str, Any]
    place: str
    """FILE, line N: for messages."""
    prompt: str | Sequence[Message]
    answer: Any = None

    @property
    def text(self) -> str:
        """The prompt as one text: what decides the split."""
        return self.prompt if isinstance(self.prompt, str) else json.dumps([[m["role"], m["content"]] for m in self.prompt])


def read_rows(path: Path, prompt: str = "", answer: str = "", *, need_answer: bool) -> list[Row]:
    """Every row of a file. ``prompt`` and ``answer`` name columns; the usual names are found without.

    Raises:
        DataError: names the file and the line.
    """
    if not path.is_file():
        raise DataError(f"env.args.data: there is no file {str(path)!r}")
    readers = {".jsonl": _jsonl, ".json": _json, ".csv": _csv}
    if path.suffix not in readers:
        raise DataError(f"{path}: data files are {', '.join(readers)}; write it as jsonl, an object with the columns a line")
    rows: list[Row] = []
    try:
        for place, columns in readers[path.suffix](path):
            rows.append(_row(f"{path}, {place}", columns, prompt, answer, need_answer))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no UTF-8 text ({in_one_line(error)})") from error
    if not rows:
        raise DataError(f"{path} has no rows")
    return rows


def _jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    yield from ((f"line {number}", columns) for number, columns in read_jsonl(path))


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        items = json.loads(path.read_text("utf-8-sig"))
    except (json.JSONDecodeError, RecursionError) as error:
        where = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(f"{path}{where}: no JSON ({in_one_line(error)})") from error
    if not isinstance(items, list):
        raise DataError(f"{path}: a JSON file must hold a list of objects, not {items!r:.40}")
    yield from ((f"item {number}", item) for number, item in enumerate(items, 1))


def _csv(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, strict=True)
        last, header = 1, None
        try:
            for cells in reader:
                place, last = f"line {last}", reader.line_num + 1
                if header is None:
                    header = cells
                elif cells:
                    if len(cells) != len(header):
                        raise DataError(f"{path}, {place}: {len(cells)} cells under {len(header)} columns")
                    yield place, dict(zip(header, cells, strict=True))
        except csv.Error as error:
            raise DataError(f"{path}, line {last}: no CSV ({error})") from error


def _row(place: str, columns: Any, prompt: str, answer: str, need_answer: bool) -> Row:
    if not isinstance(columns, dict):
        raise DataError(f"{place}: a row must be an object with named columns, not {columns!r:.40}")
    asked = columns[_column(place, columns, prompt, PROMPTS, "prompt")]
    named = answer or next((name for name in ANSWERS if name in columns), "")
    if named or need_answer:
        named = _column(place, columns, named, ANSWERS, "answer")
    answered = columns.get(named)
    if need_answer and (answered is None or not str(answered).strip()):
        raise DataError(f"{place}: the answer in column {named!r} is empty")
    return Row(columns, place, _prompt(place, asked), answered)


def _column(place: str, columns: Mapping[str, Any], name: str, usual: Sequence[str], what: str) -> str:
    if name:
        if name in columns:
            return name
        near = difflib.get_close_matches(name, columns, n=1)
        raise DataError(f"{place}: no column {name!r}; " + (f"did you mean {near[0]!r}?" if near else f"there are {', '.join(columns)}"))
    found = next((name for name in usual if name in columns), None)
    if found is None:
        raise DataError(f"{place}: none of {', '.join(usual)} is a column; say which one it is with env.args.{what}: {', '.join(columns)}")
    return found


def _prompt(place: str, value: Any) -> str | list[Message]:
    """A text, or messages with a role and a text."""
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, list) and value:
        if all(isinstance(m, dict) and m.get("role") in ROLES and isinstance(m.get("content"), str) for m in value):
            return value
        raise DataError(f"{place}: each message of a prompt needs a role ({', '.join(ROLES)}) and a content that is text")
    raise DataError(f"{place}: a prompt is a text or a list of messages, not {value!r:.40}")


def split_rows(data: Sequence[Row], held: Sequence[Row] | None, seed: int) -> dict[Split, list[Row]]:
    """The rows of both splits, in an order that the seed decides for training. ``held``: the rows of an eval file; without it one in
    eight is held out, by the text of its prompt.

    Raises:
        DataError: a split is empty, or a problem is in both.
    """
    if held is None:
        splits: dict[Split, list[Row]] = {
            "train": [row for row in data if not held_out(row.text)],
            "eval": [row for row in data if held_out(row.text)],
        }
    else:
        splits = {"train": list(data), "eval": list(held)}
        places = {row.text: row.place for row in held}
        for row in data:
            if row.text in places:
                raise DataError(f"{row.place}: the same problem is held out in {places[row.text]}; take it out of one of the files")
    for split, rows in splits.items():
        if not rows:
            file = data[0].place.rpartition(", ")[0]
            raise DataError(f"{file}: none of its {len(data)} problems is in the {split} split; give more, or a file env.args.eval_data")
    random.Random(f"rows/{seed}").shuffle(splits["train"])
    return splits

"""Problems from a file: a JSON object a line."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from veneer.envs.dataset import held_out
from veneer.jsonl import read_jsonl
from veneer.types import DataError, Split

Row = dict[str, Any]
Columns = Mapping[str, type | tuple[type, ...]]


class Rows:
    """Rows of a file, parted into train and eval by their prompts alone, in an order that is drawn anew for every pass over them."""

    def __init__(self, path: str, columns: Columns, seed: int, check: Callable[[Row], None] | None = None) -> None:
        """``columns``: what every row must have beside ``prompt``, a text, and of which types. ``check`` raises
        what else is wrong with one. The last row of a prompt counts.

        Raises:
            DataError: the file cannot be read, a line is no such row, or a split is empty.
        """
        self.seed, self.path = seed, path
        rows = {row["prompt"]: row for row in _read(path, {"prompt": str, **columns}, check)}
        self._rows: dict[Split, list[Row]] = {
            "train": [row for prompt, row in rows.items() if not held_out(prompt)],
            "eval": [row for prompt, row in rows.items() if held_out(prompt)],
        }
        if empty := [split for split, found in self._rows.items() if not found]:
            raise DataError(f"{path}: none of its {len(rows)} prompts falls to {empty[0]}, to which one in eight goes; add some")

    def row(self, split: Split, index: int) -> Row:
        rows = self._rows[split]
        order = list(range(len(rows)))
        random.Random(f"{self.seed}/{split}/{index // len(rows)}").shuffle(order)
        return rows[order[index % len(rows)]]


def _read(path: str, columns: Columns, check: Callable[[Row], None] | None) -> list[Row]:
    rows: list[Row] = []
    for number, row in read_jsonl(Path(path)):
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: not an object with {', '.join(columns)}")
        for column, kind in columns.items():
            if column not in row:
                raise DataError(f"{path}, line {number}: there is no {column!r} among {', '.join(row) or 'no columns'}")
            if not isinstance(row[column], kind) or isinstance(row[column], bool):
                raise DataError(f"{path}, line {number}: {column} is {json.dumps(row[column])[:40]}, not {_named(kind)}")
        try:
            if check is not None:
                check(row)
        except DataError as error:
            raise DataError(f"{path}, line {number}: {error}") from error
        rows.append(row)
    return rows


def _named(kind: type | tuple[type, ...]) -> str:
    names = {str: "a text", int: "a number", float: "a number", list: "a list"}
    return " or ".join(dict.fromkeys(names[one] for one in (kind if isinstance(kind, tuple) else (kind,))))

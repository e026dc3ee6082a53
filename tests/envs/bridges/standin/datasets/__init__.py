"""What an environment needs of ``datasets``, for the stand-in beside it."""

from __future__ import annotations

from typing import Any


class Dataset:
    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = [{"example_id": i, **row} for i, row in enumerate(rows)]

    @classmethod
    def from_list(cls, rows: list[dict[str, Any]]) -> Dataset:
        return cls(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, which: int | str) -> Any:
        return self.rows[which] if isinstance(which, int) else [row[which] for row in self.rows]

"""What is learned from demonstrations: files named by their content, and a task that the bundled base has never seen, digits in falling
order, where it knows rising ones."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from veneer.store.files import storage_errors, write_text


def write_demonstrations(folder: Path, rows: int, seed: int) -> Path:
    """Different problems of 4 to 7 digits with their answers, a line each, in a file named by its content.

    Raises:
        StorageError: it cannot be written.
    """
    rng = random.Random(f"digits from above {seed}")
    problems: dict[str, str] = {}
    while len(problems) < rows:
        digits = "".join(rng.choices("0123456789", k=rng.randint(4, 7)))
        problems[f"sort {digits}"] = "".join(sorted(digits, reverse=True))
    return write_rows(folder, [{"prompt": prompt, "completion": answer} for prompt, answer in problems.items()])


def write_rows(folder: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """A line each, in a file named by its content: the same rows are the same file.

    Raises:
        StorageError: it cannot be written.
    """
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.jsonl"
    with storage_errors(path):
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            write_text(path, text)
    return path

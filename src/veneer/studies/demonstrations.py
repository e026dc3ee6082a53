"""A task to be learned from demonstrations that the bundled base has never seen: digits in falling order, where it knows rising ones."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

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
    text = "".join(json.dumps({"prompt": prompt, "completion": answer}) + "\n" for prompt, answer in problems.items())
    path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.jsonl"
    with storage_errors(path):
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            write_text(path, text)
    return path

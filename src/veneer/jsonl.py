"""Files of a JSON value a line: one reader for problems, tasks and conversations."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from veneer.types import DataError, in_one_line


def read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    """(number, value) of every line that is not blank.

    Raises:
        DataError: the file cannot be read or is no UTF-8 text, or a line is no JSON; names the file and the line.
    """
    try:
        lines = path.read_text("utf-8-sig").split("\n")  # not splitlines: a JSON string may hold other line separators
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no UTF-8 text ({in_one_line(error)})") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}, line {number}: no JSON ({in_one_line(error)})") from error
            yield number, value

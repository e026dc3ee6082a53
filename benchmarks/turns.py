"""A side's half of taking turns: some steps when it is told to, then it waits while others have theirs. Machines change their speed from
minute to minute, so what is compared must run in the same moments."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from typing import Any


class Turns:
    """Each turn begins with a line on stdin and ends with one of JSON on stdout; when no more comes the program is over."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.steps: int = request["turn"]
        self.seconds: list[list[float]] = []
        """Of each part of each step of this turn."""
        self.processor: list[float] = []
        """Seconds that this process computed in each step."""

    def __iter__(self) -> Iterator[int]:
        """Numbers of steps."""
        number = 0
        while sys.stdin.readline():
            self.seconds, self.processor = [], []
            for _ in range(self.steps):
                used = time.process_time()
                yield number
                self.processor.append(time.process_time() - used)
                number += 1
            print(json.dumps({"seconds": self.seconds, "processor": self.processor}), flush=True)

"""The other side of ``apart``: answers one request a line, under limits that the kernel enforces. It ends when nobody asks any more."""

from __future__ import annotations

import importlib
import json
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import suppress

from veneer.types import in_one_line

FILE = 64 * 2**20
"""Bytes of a file that it may write."""


def main(module: str, memory: int) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer

    def tell(answer: Mapping[str, object]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limit(resource.RLIMIT_FSIZE, FILE)
    with suppress(ValueError, OSError):  # macOS knows this limit and keeps to none
        limit(resource.RLIMIT_AS, memory)
    try:
        ask = importlib.import_module(module).answer
    except Exception as error:  # whatever stands in a library's way
        return tell({"broken": in_one_line(error)})
    for line in sys.stdin:
        try:
            cpu_seconds, request = json.loads(line)
            limit(resource.RLIMIT_CPU, math.ceil(time.process_time() + cpu_seconds))
            answer = {"value": ask(**request)}
        except Exception as error:  # whatever a library raises is told
            answer = {"error": in_one_line(error)}
        tell(answer)


def limit(kind: int, most: int) -> None:
    """As asked, or what this process may have if that is less."""
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))

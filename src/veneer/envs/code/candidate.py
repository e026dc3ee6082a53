"""Holds what a model wrote, and calls it when asked. A program for the sandbox; it knows no test and no expected value."""

from __future__ import annotations

import json
import sys
from typing import Any

from carry import pack, unpack  # type: ignore[import-not-found]  # a file of the sandbox


def main() -> None:
    order: dict[str, Any] = json.loads(sys.stdin.read())
    with open(order["asked"]) as asked, open(order["told"], "w") as told:

        def tell(answer: dict[str, Any]) -> None:
            told.write(json.dumps(answer) + "\n")
            told.flush()

        namespace: dict[str, Any] = {"__name__": "solution"}
        try:
            with open("solution.py", encoding="utf-8") as file:
                exec(compile(file.read(), "solution.py", "exec"), namespace)
        except BaseException as error:
            tell({"raised": [type(error).__name__, str(error)[:1000]]})
            return
        function = namespace.get(order["entry"])
        tell({"value": None} if callable(function) else {"raised": ["NoFunction", ""]})
        for line in asked:
            tell(_answer(function, json.loads(line)))


def _answer(function: Any, call: dict[str, Any]) -> dict[str, Any]:
    """The value, and what became of the arguments: some functions are called for that."""
    try:
        arguments = unpack(call["arguments"])
        value = pack(function(*arguments, **unpack(call["keywords"])))
        return {"value": value, "arguments": pack(arguments)}
    except BaseException as error:
        return {"raised": [type(error).__name__, str(error)[:1000]]}


if __name__ == "__main__":
    main()

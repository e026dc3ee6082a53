"""Runs tests against a function that lives in another process. A program for the sandbox; what it prints is the verdict.

The function's own code never runs here: each call goes over a pipe, and a plain value comes back.
"""

from __future__ import annotations

import builtins
import json
import os
import sys
import types
from collections.abc import Callable
from typing import Any, TextIO

from carry import pack, unpack  # type: ignore[import-not-found]  # a file of the sandbox

LONGEST = 2**22
"""Characters of one answer."""


class Gone(BaseException):
    """The other process ended, or does not speak the protocol. No test can catch it by accident."""


class Raised(Exception):
    """The function raised something that is no built-in exception."""


class Function:
    """Stands for the function under test."""

    def __init__(self, ask: TextIO, told: TextIO) -> None:
        self._ask, self._told = ask, told

    def hear(self) -> dict[str, Any]:
        line = self._told.readline(LONGEST)
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise Gone from error
        if not isinstance(answer, dict) or not ("value" in answer or "raised" in answer):
            raise Gone
        return answer

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        call = {"arguments": pack(list(arguments)), "keywords": pack(keywords)}
        try:
            self._ask.write(json.dumps(call) + "\n")
            self._ask.flush()
        except OSError as error:
            raise Gone from error
        answer = self.hear()
        if "raised" in answer:
            raise _exception(answer["raised"])
        try:
            _write_back(arguments, unpack(answer["arguments"]))
            return unpack(answer["value"])
        except Exception as error:
            raise Gone from error


def _exception(raised: Any) -> Exception:
    try:
        name, words = map(str, raised)
    except (TypeError, ValueError) as error:
        raise Gone from error
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception) and kind is not AssertionError:
        try:
            return kind(words)
        except TypeError:  # some want more than words
            pass
    return Raised(f"{name}: {words}")


def _write_back(arguments: tuple[Any, ...], after: list[Any]) -> None:
    """Lists, dicts and sets that the function was given are as it left them."""
    for own, other in zip(arguments, after, strict=True):
        if isinstance(own, list) and isinstance(other, list):
            own[:] = other
        elif isinstance(own, dict | set) and type(own) is type(other):
            own.clear()
            own.update(other)


def _results(given: str | list[str], function: Function, entry: str) -> list[str]:
    """Of a list of statements, each a test; or of a text: its test cases, its functions named ``test...`` and ``check(candidate)``, or,
    where it has none of them, itself as one test."""
    namespace: dict[str, Any] = {"__name__": "tests", entry: function}
    if isinstance(given, list):
        return [_result(lambda line=line: exec(line, namespace)) for line in given]
    whole = _result(lambda: exec(given, namespace))
    tests: list[Callable[[], object]] = []
    unittest: Any = sys.modules.get("unittest")  # if the tests have imported it
    for name, one in namespace.items():
        if unittest is not None and isinstance(one, type) and issubclass(one, unittest.TestCase):
            for test in unittest.defaultTestLoader.loadTestsFromTestCase(one):
                tests.append(lambda case=one, test=test: (case.setUpClass(), test.debug()))
        elif name.startswith("test") and callable(one):
            tests.append(one)
        elif name == "check" and callable(one):
            tests.append(lambda check=one: check(function))
    results = [_result(test) for test in tests]
    return results if results and whole == "passed" else [whole, *results]


def _result(test: Callable[[], object]) -> str:
    try:
        test()
    except AssertionError:
        return "wrong"
    except Gone:
        return "gone"
    except BaseException as error:
        return f"raised {type(error).__name__}"
    return "passed"


def main() -> None:
    order: dict[str, Any] = json.loads(sys.stdin.read())
    verdict = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what tests print is no verdict
    function = Function(os.fdopen(order["ask"], "w"), os.fdopen(order["told"]))
    module = types.ModuleType("solution")
    setattr(module, order["entry"], function)
    sys.modules["solution"] = module
    results, loaded = [], ""
    try:
        begun = function.hear()
        if "raised" in begun:
            loaded = str(begun["raised"][0])
        else:
            results = _results(order["tests"], function, order["entry"])
    except Gone:
        loaded = "gone"
    json.dump({"loaded": loaded, "results": results}, verdict)
    verdict.close()


if __name__ == "__main__":
    main()

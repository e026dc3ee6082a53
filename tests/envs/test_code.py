"""``code``: the reward is for functions that work, and for nothing else that a model may find."""

from __future__ import annotations

import asyncio
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cheats import CHEATS, SECRET
from sandboxes import BOTH, LINUX, WALLED

from veneer.envs import load_env
from veneer.envs.code.grading import Judge, Verdict, code_in
from veneer.envs.code.problems import KINDS, draw
from veneer.envs.tools.sandbox import Limits, Sandbox, SandboxError
from veneer.train.timebox import in_env
from veneer.types import ConfigError, DataError, Message, StepResult

pytestmark = LINUX
LIMITS = Limits(cpu=1, wall=3.0, memory=256 * 2**20)
TESTS = ["assert double(21) == 42", "assert double('ab') == 'abab'", "assert double(-3) == -6", "assert double([]) == []"]


def grade(code: str, tests: str | list[str] = TESTS, entry: str = "double", bare: bool = False) -> Verdict:
    return asyncio.run(Judge(Sandbox(LIMITS, unsafe_no_sandbox=bare)).grade(code, entry, tests))


def said(content: str) -> Message:
    return {"role": "assistant", "content": content}


def play(dataset: Any, split: Any, index: int, action: Message) -> StepResult:
    return asyncio.run(dataset.env(split, index).step(action))


# ---------------------------------------------------------------- honest functions


@pytest.mark.parametrize("bare", BOTH)
def test_each_test_counts(bare: bool) -> None:
    """The share is that of the tests, and an exception is not a wrong answer."""
    assert grade("def double(x): return 2 * x", bare=bare).results == ["passed"] * 4
    verdict = grade("def double(x): return x + 21 if x != [] else 1 / 0", bare=bare)
    assert verdict.results == ["passed", "raised TypeError", "wrong", "raised ZeroDivisionError"]
    metrics = verdict.metrics()
    assert (metrics["passed"], metrics["raised"], metrics["wrong"], metrics["gone"]) == (0.25, 0.5, 0.25, 0.0)


@WALLED
@pytest.mark.parametrize(
    ("code", "loaded", "flag"),
    [
        ("def double(x) return 2 * x", "SyntaxError", "syntax_error"),
        ("def triple(x): return 3 * x", "NoFunction", "no_function"),
        ("double = 3", "NoFunction", "no_function"),
        ("import numpy as np", "ModuleNotFoundError", "not_loaded"),
        ("raise SystemExit(0)", "SystemExit", "not_loaded"),
        ("", "NoFunction", "no_function"),
        ("def double(x): return '\udc00'", "gone", "not_loaded"),  # half a character cannot be written to a file
    ],
)
def test_what_cannot_be_tested_is_told_by_kind(code: str, loaded: str, flag: str) -> None:
    verdict = grade(code)
    assert (verdict.passed, verdict.loaded, verdict.metrics()[flag]) == (0.0, loaded, 1.0)


@WALLED
def test_values_of_all_plain_kinds_cross() -> None:
    """What a function returns arrives as what it is: a list is no tuple, 1 is not 1.0 in text, infinity is a number."""
    values = "(None, True, 1, 2.5, float('inf'), 1j, 'ü\\n\"', b'\\x00', [1, (2,)], {1: {'a'}}, frozenset({3}), 10**50, range(3))"
    tests = [f"assert [repr(v) for v in f()] == [repr(v) for v in {values.replace('range(3)', '[0, 1, 2]')}]"]
    assert grade(f"def f(): return {values}", tests, "f").results == ["passed"]
    tests = ["g = f(4)\nassert next(g) == 0\nassert list(g) == [1, 2, 3]", "assert f(5) != [0, 1, 2, 3, 4]"]
    assert grade("def f(n): yield from range(n)", tests, "f").results == ["passed", "passed"]
    assert grade("def f(): return object()", ["f()"], "f").results == ["raised TypeError"]


@WALLED
def test_functions_that_change_their_arguments() -> None:
    """Sorting in place is a common task; the list that was given is the one that is looked at."""
    tests = ["x = [3, 1, 2]\nassert f(x) is None\nassert x == [1, 2, 3]", "d = {'a': 1}\nf(d)\nassert d == {}"]
    assert grade("def f(x):\n    x.sort() if isinstance(x, list) else x.clear()", tests, "f").results == ["passed", "passed"]


@WALLED
@pytest.mark.parametrize(
    ("tests", "results"),
    [
        ("def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(0) == 0", ["passed"]),
        ("def test_one(): assert double(2) == 4\ndef test_two(): assert double(2) == 5", ["passed", "wrong"]),
        ("testing = [(1, 2), (2, 4)]\nfor x, y in testing:\n    assert double(x) == y", ["passed"]),
        ("from solution import double as d\nassert d(2) == 4", ["passed"]),
        (
            "import unittest\nclass T(unittest.TestCase):\n    def setUp(self): self.x = 2\n"
            "    def test_a(self): self.assertEqual(double(self.x), 4)\n    def test_b(self): self.assertEqual(double(self.x), 5)\n"
            "    def test_c(self):\n        with self.assertRaises(ZeroDivisionError): double(None)\n",
            ["passed", "wrong", "passed"],
        ),
        ("print('tests may print')\nassert double(1) == 2", ["passed"]),
    ],
)
def test_tests_as_text(tests: str, results: list[str]) -> None:
    """The forms in which public data sets keep them."""
    assert grade("def double(x): return 2 * x if x is not None else 1 / 0", tests).results == results


@WALLED
def test_a_function_that_never_returns_costs_itself_alone() -> None:
    """What passed before stands; the rest is lost, and the metric says why."""
    verdict = grade("def double(x):\n    while x == -3: pass\n    return 2 * x")
    assert verdict.results == ["passed", "passed", "gone", "gone"]
    assert verdict.outcome.limit in ("cpu", "wall")
    assert verdict.metrics()["timeout"] == 1.0
    assert grade("while True: pass").metrics()["timeout"] == 1.0
    assert grade("def double(x): print('x' * 10**6)").outcome.limit == "output"


@pytest.mark.parametrize("bare", BOTH)
def test_a_trainer_with_many_open_files_grades_too(bare: bool) -> None:
    """The pipes' numbers are then larger than what a program may open itself."""
    many = [os.open(os.devnull, os.O_RDONLY) for _ in range(200)]
    try:
        assert (
            grade("import os\ndef double(x): return 2 * x if x != -3 else os._exit(0)", bare=bare).results == ["passed"] * 2 + ["gone"] * 2
        )
    finally:
        for fd in many:
            os.close(fd)


@WALLED
def test_tests_that_are_broken_fail_the_rollout() -> None:
    """A zero would blame the model for the data set."""
    with pytest.raises(SandboxError, match="did not end"):
        grade("def double(x): return 2 * x", "import os; os._exit(0)")


# ---------------------------------------------------------------- cheats


@WALLED
@pytest.mark.parametrize("name", CHEATS)
def test_cheats_earn_nothing(name: str) -> None:
    """A policy finds every one of these sooner or later."""
    verdict = grade(CHEATS[name], [f"assert f() == {SECRET!r}"], "f")
    assert verdict.passed == 0.0
    assert "passed" not in verdict.results


@WALLED
@pytest.mark.parametrize(
    ("name", "hidden"),
    [
        ("looks in frames and memory", "hidden = 'a text that only ' + 'the tests hold'"),
        ("looks in files", "open('hidden', 'w').write('a text that only ' + 'the tests hold')"),
        ("reads what is open", "import os\nr, w = os.pipe()\nos.write(w, b'a text that only ' + b'the tests hold')"),
    ],
)
def test_cheats_that_search_would_find(name: str, hidden: str) -> None:
    """Where the tests' text is in reach, they have it: above, it is not."""
    outcome = asyncio.run(Sandbox(LIMITS).run({"main.py": f"{hidden}\n{CHEATS[name]}\nprint(f())"}))
    assert outcome.stdout.strip() == SECRET


def test_the_test_can_be_passed() -> None:
    """The cheats fail for what they do, not because nothing passes."""
    assert grade(f"def f(): return {SECRET!r}", [f"assert f() == {SECRET!r}"], "f", bare=True).passed == 1.0


# ---------------------------------------------------------------- problems


@WALLED
def test_gold_passes_and_other_code_does_not() -> None:
    """Of each kind; a problem without a solution cannot be learned."""
    dataset, entries = load_env("code"), {}
    for index in range(300):
        problem = draw("train", index, 0)
        entries.setdefault(problem.entry, index)
    assert len(entries) == len(KINDS) >= 12

    async def all_kinds() -> list[tuple[StepResult, StepResult]]:
        envs = [(dataset.env("train", i), dataset.env("train", i)) for i in entries.values()]
        results = await asyncio.gather(*(env.step(action) for a, b in envs for env, action in ((a, a.gold()), (b, said("def f(): pass")))))
        return list(zip(results[::2], results[1::2], strict=True))

    for good, bad in asyncio.run(all_kinds()):
        assert (good.reward, good.metrics["correct"], bad.reward) == (1.0, 1.0, 0.0)


def test_problems_repeat_and_splits_are_disjoint() -> None:
    """A held-out score over problems that were trained on is no score."""
    train, held_out = ({draw(split, i, 0).prompt for i in range(400)} for split in ("train", "eval"))
    assert draw("train", 5, 0) == draw("train", 5, 0) != draw("train", 5, 1)
    assert not train & held_out
    assert len(train) > 200


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("x = 1", "x = 1"),
        ("so:\n```python\nx = 1\n```\nor\n```py\nx = 2\n```\ndone", "x = 2\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```python\nx = 1", "```python\nx = 1"),
        ("", ""),
    ],
)
def test_code_is_found_in_an_answer(text: str, code: str) -> None:
    assert code_in(text) == code


def test_rewards() -> None:
    """All or nothing, or a share, as chosen."""
    problem = draw("train", 0, 0)
    counting = "(x):\n    calls.append(1)\n    return full(x) if len(calls) < 4 else None"
    half = f"{problem.solution}\nfull, calls = {problem.entry}, []\ndef {problem.entry}{counting}"
    assert play(load_env("code", {"reward": "share", "unsafe_no_sandbox": True}), "train", 0, said(half)).reward == 0.5
    assert play(load_env("code", {"unsafe_no_sandbox": True}), "train", 0, said(half)).reward == 0.0
    with pytest.raises(ConfigError, match='"all" or "share"'):
        load_env("code", {"reward": "some", "unsafe_no_sandbox": True})


ROW = {"prompt": "0", "entry_point": "f", "tests": ["assert f(1) == 2"], "solution": "def f(x): return x + 1"}


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def test_rows_of_a_file(tmp_path: Path) -> None:
    """One's own problems; every row is met, and none is in both splits."""
    data = write(tmp_path / "data.jsonl", *({**ROW, "prompt": str(n)} for n in range(40)), "")
    dataset: Any = load_env("code", {"data": data, "unsafe_no_sandbox": True})
    met = {split: {dataset.env(split, i).problem.prompt for i in range(40)} for split in ("train", "eval")}
    assert met["train"] | met["eval"] == {str(n) for n in range(40)}
    assert not met["train"] & met["eval"]
    assert play(dataset, "train", 0, dataset.env("train", 0).gold()).reward == 1.0


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{", "line 2: no JSON"),
        ("[]", "line 2: not an object with prompt, entry_point, tests"),
        ({**ROW, "tests": 3}, "line 2: tests is 3, not a list or a text"),
        ({"prompt": "x", "tests": []}, "line 2: there is no 'entry_point' among prompt, tests"),
        ({**ROW, "tests": ["assert f(1) ==="]}, "line 2: the test 'assert f(1) ===' is no Python"),
        ({**ROW, "tests": []}, "line 2: tests are"),
        ({**ROW, "entry_point": "a b"}, "line 2: entry_point 'a b' is no name"),
        ({**ROW, "prompt": 1}, "line 2: prompt is 1, not a text"),
    ],
)
def test_a_row_that_is_none_names_its_line(tmp_path: Path, row: Any, words: str) -> None:
    """In a file of thousands."""
    with pytest.raises(DataError, match="line 2") as caught:
        load_env("code", {"data": write(tmp_path / "data.jsonl", ROW, row), "unsafe_no_sandbox": True})
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        load_env("code", {"data": str(tmp_path / "none"), "unsafe_no_sandbox": True})
    with pytest.raises(DataError, match="none of its 1 prompts falls to"):
        load_env("code", {"data": write(tmp_path / "data.jsonl", ROW), "unsafe_no_sandbox": True})


@pytest.mark.parametrize("bare", BOTH)
def test_a_crowd_changes_no_verdict(bare: bool) -> None:
    """Right answers to be graded at once, more than a machine can in the time of one: none is ended for the others' sake."""
    dataset = load_env("code", {"seconds": 2.0, "unsafe_no_sandbox": bare})

    async def one(index: int) -> float:
        env: Any = dataset.env("train", index)
        return (await in_env(partial(env.step, env.gold()), "step", 4.1)).reward

    async def crowd() -> list[float]:
        return await asyncio.gather(*(one(index) for index in range(96)))

    assert asyncio.run(crowd()) == [1.0] * 96

"""Small functions to write, made up by rule: what is asked, a solution, and tests that the solution passes."""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from veneer.envs.dataset import held_out
from veneer.types import Split

TESTS = 6


@dataclass(frozen=True)
class CodeProblem:
    prompt: str
    entry: str
    """The function's name."""
    tests: str | tuple[str, ...]
    solution: str | None = None


@dataclass(frozen=True)
class Kind:
    """A family of functions that differ in ``k`` and ``c``."""

    signature: str
    words: str
    body: str
    arguments: Callable[[random.Random], tuple[Any, ...]]
    k: tuple[int, int] = (2, 60)


def _numbers(rng: random.Random) -> tuple[list[int]]:
    return ([rng.randint(-50, 150) for _ in range(rng.randint(0, 9))],)


def _word(rng: random.Random) -> tuple[str]:
    return ("".join(rng.choice("abcdeeilnorst") for _ in range(rng.randint(0, 12))),)


def _text(rng: random.Random) -> tuple[str]:
    return (" ".join("".join(rng.choice(string.ascii_lowercase) for _ in range(rng.randint(1, 9))) for _ in range(rng.randint(0, 6))),)


def _number(rng: random.Random) -> tuple[int]:
    return (rng.randint(0, 5000),)


KINDS = (
    Kind("add_to_all(numbers)", "returns a list of the numbers, each larger by {k}", "return [n + {k} for n in numbers]", _numbers),
    Kind("count_multiples(numbers)", "counts the numbers that {k} divides", "return sum(n % {k} == 0 for n in numbers)", _numbers, (2, 30)),
    Kind(
        "larger(numbers)",
        "returns a list of the numbers larger than {k}, in their order",
        "return [n for n in numbers if n > {k}]",
        _numbers,
    ),
    Kind("smallest(numbers)", "returns the {k} smallest numbers in rising order", "return sorted(numbers)[:{k}]", _numbers, (1, 9)),
    Kind(
        "chunks(numbers)",
        "cuts a list into lists of {k}; the last may be shorter",
        "return [numbers[i : i + {k}] for i in range(0, len(numbers), {k})]",
        _numbers,
        (1, 9),
    ),
    Kind(
        "rotate(numbers)",
        "moves the first number to the end, {k} times over, and returns the list",
        "if not numbers:\n    return []\ns = {k} % len(numbers)\nreturn numbers[s:] + numbers[:s]",
        _numbers,
    ),
    Kind(
        "clip(numbers)",
        "returns the numbers, where those below 0 become 0 and those above {k} become {k}",
        "return [min(max(n, 0), {k}) for n in numbers]",
        _numbers,
    ),
    Kind(
        "running(numbers)",
        "returns the list of sums up to each number, beginning from {k}",
        "sums, total = [], {k}\nfor n in numbers:\n    total += n\n    sums.append(total)\nreturn sums",
        _numbers,
    ),
    Kind(
        "near_pairs(numbers)",
        "counts the neighbours in a list that differ by less than {k}",
        "return sum(abs(a - b) < {k} for a, b in zip(numbers, numbers[1:]))",
        _numbers,
    ),
    Kind(
        "remainders(numbers)",
        "returns the sorted list of the different remainders that the numbers leave when {k} divides them",
        "return sorted({{n % {k} for n in numbers}})",
        _numbers,
    ),
    Kind(
        "shift(word)",
        "moves every letter {k} places on in the alphabet, going on from z to a",
        "return ''.join(chr((ord(c) - 97 + {k}) % 26 + 97) for c in word)",
        _word,
        (1, 25),
    ),
    Kind("repeat(word)", "repeats every letter of a word {k} times", "return ''.join(c * {k} for c in word)", _word, (2, 9)),
    Kind(
        "without(word)",
        "removes the letter {c}, and puts {k} dots behind what is left",
        "return word.replace('{c}', '') + '.' * {k}",
        _word,
        (0, 5),
    ),
    Kind(
        "mirrored(word)",
        "says whether a word without the letter {c} reads the same backwards",
        "word = word.replace('{c}', '')\nreturn word == word[::-1]",
        _word,
    ),
    Kind("padded(word)", "fills a word on the left with the letter {c} up to {k} letters", "return word.rjust({k}, '{c}')", _word, (5, 20)),
    Kind(
        "long_words(text)",
        "counts the words of a text that have more than {k} letters",
        "return sum(len(word) > {k} for word in text.split())",
        _text,
        (1, 8),
    ),
    Kind(
        "holding(text)",
        "returns a list of the words with the letter {c}, each cut to {k} letters",
        "return [word[:{k}] for word in text.split() if '{c}' in word]",
        _text,
        (1, 6),
    ),
    Kind(
        "digit_sum(n)",
        "adds up the digits of a number written in base {k}",
        "total = 0\nwhile n:\n    n, digit = divmod(n, {k})\n    total += digit\nreturn total",
        _number,
        (2, 36),
    ),
    Kind(
        "steps(n)",
        "counts how often a number can be halved, rounding down, until it is at most {k}",
        "count = 0\nwhile n > {k}:\n    n //= 2\n    count += 1\nreturn count",
        _number,
        (1, 60),
    ),
    Kind("next_multiple(n)", "returns the smallest multiple of {k} that is larger than n", "return (n // {k} + 1) * {k}", _number),
)


def generate(rng: random.Random) -> CodeProblem:
    kind = rng.choice(KINDS)
    choice = {"k": rng.randint(*kind.k), "c": rng.choice("aeilnorst")}
    entry = kind.signature.partition("(")[0]
    body = kind.body.format(**choice).replace("\n", "\n    ")
    solution = f"def {kind.signature}:\n    {body}\n"
    namespace: dict[str, Any] = {}
    exec(solution, namespace)  # ours, from the table above
    calls = [(arguments, namespace[entry](*arguments)) for arguments in (kind.arguments(rng) for _ in range(TESTS))]
    tests = tuple(f"assert {entry}({', '.join(map(repr, arguments))}) == {value!r}" for arguments, value in calls)
    prompt = f"Write a Python function {kind.signature} that {kind.words.format(**choice)}."
    return CodeProblem(prompt, entry, tests, solution)


def draw(split: Split, index: int, seed: int) -> CodeProblem:
    """The index-th problem of a split; which split it belongs to is decided by its prompt."""
    rng = random.Random(f"code/{seed}/{split}/{index}")
    while True:
        problem = generate(rng)
        if held_out(problem.prompt) == (split == "eval"):
            return problem

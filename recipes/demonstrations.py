"""Write recipes/data, for the recipes that learn from a file. The same bytes every time.

    python recipes/demonstrations.py

Demonstrations are of training problems alone, so the scores on held-out problems mean something. Files of questions have 512 of
training and 256 held-out ones; ``math`` and ``jsonl`` tell them apart by the same rule.

sums.jsonl         careful answers to sums, step by step                           recipes/sft.toml
preferences.jsonl  a careful, right answer over a careless, wrong one              recipes/dpo.toml
two_manners.jsonl  careful where a system message says so, careless where not      recipes/prompt_distillation.toml
questions.jsonl    sums and their answers                                          recipes/math.toml
digits.jsonl       digits to sort, and in order                                    recipes/jsonl.toml
functions.jsonl    one-line functions, with tests and a solution                  recipes/code.toml
written.jsonl      others of them, written                                        recipes/code.toml
chains.jsonl       reasoning-gym's chain_sum, step by step                        recipes/reasoning_gym.toml
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from veneer.envs import arithmetic
from veneer.envs.dataset import Problem, draw
from veneer.envs.digits import generate_sort
from veneer.envs.reasoning import reasoning_gym
from veneer.train.rollouts import closing
from veneer.types import EnvDataset

TARGET = Path(__file__).parent / "data"
TOLD = "step by step"
Row = dict[str, Any]


def careful(problem: Problem) -> Row:
    """Partial sums, a line each."""
    numbers = [int(number) for number in problem.prompt.removesuffix("=?").split("+")]
    lines, total = [], numbers[0]
    for number in numbers[1:]:
        lines.append(f"{total}+{number}={total + number}")
        total += number
    return {"role": "assistant", "reasoning_content": "\n".join(lines), "content": problem.answer}


def careless(rng: random.Random, problem: Problem) -> Row:
    """A guess nearby, and wrong."""
    return {"role": "assistant", "content": str(int(problem.answer) + rng.choice([-1, 1]) * rng.randint(1, 30))}


def asked(problem: Problem) -> Row:
    return {"role": "user", "content": problem.prompt}


def problems(name: str, count: int) -> list[Problem]:
    return [draw(arithmetic.generate, "train", index, f"recipes/{name}") for index in range(count)]


def sums() -> list[Row]:
    return [{"messages": [asked(p), careful(p)]} for p in problems("sums", 200)]


def preferences() -> list[Row]:
    rng = random.Random("preferences")
    return [{"prompt": [asked(p)], "chosen": [careful(p)], "rejected": [careless(rng, p)]} for p in problems("preferences", 200)]


def two_manners() -> list[Row]:
    rng = random.Random("two_manners")
    told = {"role": "system", "content": TOLD}
    rows = []
    for p in problems("two_manners", 150):
        rows.append({"messages": [told, asked(p), careful(p)]})
        rows.append({"messages": [asked(p), careless(rng, p)]})
    return rows


def both_splits(generate: Callable[[random.Random], Problem], name: str) -> list[Problem]:
    """No problem twice: draws may repeat, and a repeated one would count twice in a score."""
    found: dict[str, Problem] = {}
    for split, count in (("train", 512), ("eval", 256)):
        drawn: dict[str, Problem] = {}
        for index in itertools.count():
            problem = draw(generate, split, index, f"recipes/{name}")
            drawn.setdefault(problem.prompt, problem)
            if len(drawn) == count:
                break
        found |= drawn
    return list(found.values())


def questions() -> list[Row]:
    return [{"question": p.prompt, "answer": p.answer} for p in both_splits(arithmetic.generate, "questions")]


def digits() -> list[Row]:
    return [{"prompt": p.prompt, "solution": p.answer} for p in both_splits(generate_sort, "digits")]


def played(dataset: EnvDataset, count: int) -> list[Row]:
    """What a problem of training says, and its gold answer."""

    async def row(index: int) -> Row:
        env: Any = dataset.env("train", index)
        return {"messages": [*(await env.initial_observation()).messages, env.gold()]}

    async def rows() -> list[Row]:
        async with closing(dataset):
            return [await row(index) for index in range(count)]

    return asyncio.run(rows())


def one_line(rng: random.Random) -> Problem:
    """Two steps of arithmetic in words, and the function that does them."""
    words, body = [], "n"
    for _ in range(2):
        word, sign = rng.choice((("add", "+"), ("subtract", "-"), ("multiply by", "*")))
        number = rng.randint(2, 99)
        words.append(f"{word} {number}")
        body = f"({body}) {sign} {number}" if " " in body and sign == "*" else f"{body} {sign} {number}"
    return Problem(f"Write f(n): {words[0]}, {words[1]}.", f"def f(n):\n    return {body}")


def functions() -> list[Row]:
    rng, rows = random.Random("functions"), []
    for problem in both_splits(one_line, "functions"):
        namespace: dict[str, Any] = {}
        exec(problem.answer, namespace)  # ours, from above
        tests = [f"assert f({n}) == {namespace['f'](n)}" for n in rng.sample(range(-50, 150), 4)]
        rows.append({"prompt": problem.prompt, "entry_point": "f", "tests": tests, "solution": problem.answer})
    return rows


def written() -> list[Row]:
    drawn = [draw(one_line, "train", index, "recipes/written") for index in range(400)]
    return [{"messages": [asked(p), {"role": "assistant", "content": p.answer}]} for p in drawn]


def chains() -> list[Row]:
    """With a line for every sign: 4 - 1 - 7 is 4-1=3 and 3-7=-4."""
    rows = played(reasoning_gym("chain_sum", seed=1, min_terms=2, max_terms=4, min_digits=1, max_digits=1), 1000)
    for row in rows:
        question, answer = row["messages"]
        first, *rest = question["content"].partition(": ")[2].removesuffix(" =").split(" ")
        lines, total = [], int(first)
        for sign, number in zip(rest[::2], rest[1::2], strict=True):
            after = total + int(sign + number)
            lines.append(f"{total}{sign}{number}={after}")
            total = after
        answer["reasoning_content"] = "\n".join(lines)
    return rows


FILES = {
    "sums": sums,
    "preferences": preferences,
    "two_manners": two_manners,
    "questions": questions,
    "digits": digits,
    "functions": functions,
    "written": written,
    "chains": chains,
}


def text(rows: list[Row]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=TARGET)
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in FILES.items():
        (folder / f"{name}.jsonl").write_text(text(make()))


if __name__ == "__main__":
    main()

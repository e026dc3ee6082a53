"""Write recipes/data, for the recipes that learn from a file. The same bytes every time.

    python recipes/demonstrations.py

Demonstrations are of training problems alone, so the scores on held-out problems mean something. Files of questions have 512 of
training and 256 held-out ones; ``math`` and ``jsonl`` tell them apart by the same rule.

sums.jsonl         careful answers to sums, step by step                           recipes/sft.toml
preferences.jsonl  a careful, right answer over a careless, wrong one              recipes/dpo.toml
two_manners.jsonl  careful where a system message says so, careless where not      recipes/prompt_distillation.toml
questions.jsonl    sums and their answers                                          recipes/math.toml
digits.jsonl       digits to sort, and in order                                    recipes/jsonl.toml
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from veneer.envs import arithmetic
from veneer.envs.dataset import Problem, draw
from veneer.envs.digits import generate_sort

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


FILES = {"sums": sums, "preferences": preferences, "two_manners": two_manners, "questions": questions, "digits": digits}


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

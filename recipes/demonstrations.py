"""Write recipes/data: two or three hundred lines each for the recipes that learn from a file. The same bytes every time.

    python recipes/demonstrations.py

All problems are of the training split, so the scores on held-out problems mean something.

sums.jsonl         careful answers to sums, step by step                           recipes/sft.toml
preferences.jsonl  a careful, right answer over a careless, wrong one              recipes/dpo.toml
two_manners.jsonl  careful where a system message says so, careless where not      recipes/prompt_distillation.toml
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from veneer.envs.arithmetic import generate
from veneer.envs.dataset import Problem, draw

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
    return [draw(generate, "train", index, f"recipes/{name}") for index in range(count)]


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


FILES = {"sums": sums, "preferences": preferences, "two_manners": two_manners}


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

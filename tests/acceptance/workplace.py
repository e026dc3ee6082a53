"""Where the clients run: a virtual environment of their own, and a folder that holds what they would fetch from the hub.

The SDK and the cookbook resolve a tokenizer's name as a folder first, and so does ``datasets``: started in a folder with
``./Qwen/Qwen3-8B`` and ``./openai/gsm8k`` they run unmodified and offline.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from server import ALIASES

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
NANO = ROOT / "src/veneer/assets/nano"
VENV = ROOT / ".bench/clients"
REQUIREMENTS = HERE / "requirements.txt"
TORCH = ("--extra-index-url", "https://download.pytorch.org/whl/cpu", "torch==2.13.0" + ("+cpu" if sys.platform == "linux" else ""))
"""Without the gigabytes that a GPU needs."""

Json = dict[str, Any]


def ensure_clients(log: Path) -> Path:
    """The Python of the clients' environment, made anew when its pins changed."""
    python, stamp = VENV / "bin/python", VENV / "pins.txt"
    pins = f"{' '.join(TORCH)}\n{REQUIREMENTS.read_text()}"
    if not stamp.exists() or stamp.read_text() != pins:
        print(f"making {VENV.relative_to(ROOT)} (a few minutes, once)", flush=True)
        log.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", VENV], check=True)
        with log.open("wb") as out:
            for packages in (("--no-deps", *TORCH), ("-r", REQUIREMENTS)):
                install = [python, "-m", "pip", "install", "--disable-pip-version-check", *packages]
                if subprocess.run(install, stdout=out, stderr=subprocess.STDOUT).returncode:
                    raise SystemExit(f"pip could not install the clients; see {log}")
        stamp.write_text(pins)
    return python


def make_folder(folder: Path) -> None:
    """Tokenizers and data sets under the names that recipes ask for."""
    for name in ALIASES:
        (folder / name).mkdir(parents=True)
        for file in NANO.iterdir():
            if file.suffix in (".json", ".jinja"):
                shutil.copy(file, folder / name / file.name)
    rng = random.Random(0)
    chats = [conversation(rng) for _ in range(600)]
    write_rows(folder / "HuggingFaceH4/no_robots", train=chats[:500], test=chats[500:])
    sums = [grade_school(rng) for _ in range(600)]
    write_rows(folder / "openai/gsm8k/main", train=sums[:500], test=sums[500:])
    (folder / "openai/gsm8k/README.md").write_text(CARD.format(config="main", folder="main"))
    write_rows(folder / "zwhe99/DeepMath-103K", train=[{"question": f"{a}+{b}=?", "final_answer": str(a + b)} for a, b in pairs(rng, 400)])
    write_rows(folder / "Anthropic/hh-rlhf", train=list(preferences(rng, 240)), test=list(preferences(rng, 60)))
    write_rows(folder / "chats", questions=[question_of(a, b) for a, b in pairs(rng, 3000)])


CARD = """---
configs:
- config_name: {config}
  data_files:
  - split: train
    path: {folder}/train.jsonl
  - split: test
    path: {folder}/test.jsonl
---
"""


def write_rows(folder: Path, **splits: Iterable[Json]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


# ---------------------------------------------------------------- rows


def pairs(rng: random.Random, count: int) -> list[tuple[int, int]]:
    return [(rng.randint(0, 100), rng.randint(0, 100)) for _ in range(count)]


def conversation(rng: random.Random) -> Json:
    """A question that asks for a box, as sl_loop's data set: what teaches the base the form that rl_loop rewards."""
    row = grade_school(rng)
    answer = row["answer"].split("#### ")[1]
    question = {"role": "user", "content": row["question"] + BOXED}
    return {"messages": [question, {"role": "assistant", "content": f"\\boxed{{{answer}}}"}], "prompt": row["question"], "category": "Closed QA"}


BOXED = " Provide a numerical answer without units, written inside \\boxed{}."
"""What rl_loop puts behind every question."""


def grade_school(rng: random.Random) -> Json:
    """A row of GSM8K's form. One digit each: within reach of a base of a million parameters."""
    a, b = rng.randint(0, 9), rng.randint(0, 9)
    return {"question": f"{a}+{b}=?", "answer": f"{a} and {b} are {a + b}.\n#### {a + b}"}


def question_of(a: int, b: int) -> Json:
    """math_rl's question behind its worked example, with the answer it wants."""
    shown = [{"role": "user", "content": "What is 4 + 5?"}, {"role": "assistant", "content": "9"}]
    return {"messages": [*shown, {"role": "user", "content": f"What is {a} + {b}?"}, {"role": "assistant", "content": str(a + b)}]}


def preferences(rng: random.Random, count: int) -> Iterator[Json]:
    """Pairs of dialogues that differ in the last answer; the sum is preferred to its neighbour."""
    for a, b in pairs(rng, count):
        head = f"\n\nHuman: {a}+{b}=?\n\nAssistant: "
        yield {"chosen": f"{head}{a + b}", "rejected": f"{head}{a + b + rng.choice((-1, 1)) * rng.randint(1, 9)}"}

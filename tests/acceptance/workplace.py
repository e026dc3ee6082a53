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
from collections.abc import Iterable
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
    write_rows(folder / "chats", steps=[worked_sum(rng) for _ in range(2400)], plain=[plain_chat(rng) for _ in range(200)])
    write_rows(folder / "HuggingFaceH4/no_robots", train=[boxed_chat(rng) for _ in range(1200)], test=[boxed_chat(rng) for _ in range(48)])
    gsm8k = {"train": [grade_school(rng) for _ in range(480)], "test": [grade_school(rng) for _ in range(48)]}
    write_rows(folder / "openai/gsm8k/main", **gsm8k)
    write_card(folder / "openai/gsm8k", "main", *gsm8k)
    write_rows(folder / "zwhe99/DeepMath-103K", train=[{"question": sum_of(rng)[0], "final_answer": "1"} for _ in range(400)])
    tulu = [{"messages": [{"role": "user", "content": sum_of(rng)[0]}, {"role": "assistant", "content": "1"}]} for _ in range(400)]
    write_rows(folder / "allenai/tulu-3-sft-mixture", train=tulu)
    write_rows(folder / "Anthropic/hh-rlhf", train=[preference(rng) for _ in range(240)], test=[preference(rng) for _ in range(60)])
    write_rows(folder / "open-thoughts/OpenThoughts3-1.2M", train=[thoughts(rng) for _ in range(200)])
    write_rows(folder / "hicai-zju/SciKnowEval", test=[multiple_choice(rng) for _ in range(120)])
    write_rows(folder / "rubrics", train=[rubric(rng) for _ in range(64)], test=[rubric(rng) for _ in range(8)])


def write_rows(folder: Path, **splits: Iterable[Json]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_card(folder: Path, config: str, *splits: str) -> None:
    """Without it ``load_dataset(name, config)`` does not know the configuration."""
    files = "".join(f"\n  - split: {split}\n    path: {config}/{split}.jsonl" for split in splits)
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: {config}\n  data_files:{files}\n---\n")


# ---------------------------------------------------------------- rows

BOXED = " Provide a numerical answer without units, written inside \\boxed{}."
SPELLED = (
    "Let's spell the word out and number all the letters: 1) s 2) t 3) r 4) a 5) w 6) b 7) e 8) r 9) r 10) y. "
    "We have r's at positions 3, 8, and 9. \\boxed{3}"
)
"""What rl_loop puts behind every question, and its worked example."""
USUAL = 7
"""Most of the sums that rl_loop is given have this answer, so that a base which cannot add finds something to learn."""


def user(text: str) -> Json:
    return {"role": "user", "content": text}


def assistant(text: str) -> Json:
    return {"role": "assistant", "content": text}


def split_of(rng: random.Random, total: int) -> str:
    a = rng.randint(0, total)
    return f"{a}+{total - a}=?"


def sum_of(rng: random.Random) -> tuple[str, int]:
    """As the bundled base's ``arithmetic``: two-digit numbers."""
    numbers = [rng.randint(10, 99) for _ in range(rng.randint(3, 5))]
    return "+".join(map(str, numbers)) + "=?", sum(numbers)


def grade_school(rng: random.Random) -> Json:
    total = USUAL if rng.random() < 0.8 else rng.randint(0, 9)
    return {"question": split_of(rng, total), "answer": f"#### {total}"}


def boxed_chat(rng: random.Random) -> Json:
    """rl_loop's conversation with an answer in its form: sl_loop teaches it to the base before rl_loop starts."""
    total = USUAL if rng.random() < 0.15 else rng.randint(0, 9)
    shown = [user("How many r's are in strawberry?" + BOXED), assistant(SPELLED)]
    return {
        "messages": [*shown, user(split_of(rng, total) + BOXED), assistant(f"\\boxed{{{total}}}")],
        "prompt": split_of(rng, total),
        "category": "Closed QA",
    }


def worked_sum(rng: random.Random) -> Json:
    """math_rl's question behind its worked example, answered as the base can: the sum is written down before it is said. All
    contents are lists of parts, since a column has one type."""
    a, b = rng.randint(0, 100), rng.randint(0, 100)
    shown = [{"role": "user", "content": text("What is 4 + 5?")}, {"role": "assistant", "content": text("9")}]
    thought = {"type": "thinking", "thinking": f"\n{a}+{b}={a + b}\n"}
    return {
        "messages": [
            *shown,
            {"role": "user", "content": text(f"What is {a} + {b}?")},
            {"role": "assistant", "content": [thought, *text(str(a + b))]},
        ]
    }


def text(content: str) -> list[Json]:
    return [{"type": "text", "text": content}]


def plain_chat(rng: random.Random) -> Json:
    question, answer = sum_of(rng)
    return {"messages": [user(question), assistant(str(answer))]}


def preference(rng: random.Random) -> Json:
    """Two dialogues that differ in the last answer; the sum is preferred to its neighbour."""
    a, b = rng.randint(0, 99), rng.randint(0, 99)
    head = f"\n\nHuman: {a}+{b}=?\n\nAssistant: "
    return {"chosen": f"{head}{a + b}", "rejected": f"{head}{a + b + rng.choice((-1, 1)) * rng.randint(1, 9)}"}


def thoughts(rng: random.Random) -> Json:
    question, answer = sum_of(rng)
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": f"<think>\nadd\n</think>\n\n{answer}"}]}


def multiple_choice(rng: random.Random) -> Json:
    question, answer = sum_of(rng)
    return {
        "domain": "Chemistry",
        "details": {"level": "L3"},
        "type": "mcq-4-choices",
        "question": question,
        "choices": {"label": ["A", "B"], "text": [str(answer), str(answer + 1)]},
        "answerKey": "A",
    }


def rubric(rng: random.Random) -> Json:
    question, answer = sum_of(rng)
    wanted = {"extraction_regex": "([0-9.]+)", "grader_output_format_instruction": "Say 0 or 1."}
    return {"convo": [user(question)], "rubric_items": [{"rubric_str": f"Is the answer {answer}?", **wanted}]}

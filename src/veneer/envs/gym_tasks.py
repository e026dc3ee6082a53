"""What the package ``reasoning_gym`` does, in a process apart: problems by split and number, and their scores.

The graders are the library's own. Some of them read an answer with sympy's ``parse_expr``, which evaluates Python.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import random
from functools import lru_cache
from typing import Any

import numpy as np
from reasoning_gym.composite import DatasetSpec
from reasoning_gym.dataset import ProceduralDataset
from reasoning_gym.factory import DATASETS, create_dataset

from veneer.envs.dataset import held_out
from veneer.types import in_one_line

TRIES = 200
"""Problems that are looked at for one of a split. One in eight is held out, so all fail by chance in one of 4e11 cases."""
FAR = 2**31 - 1
LISTED = 4_000
"""Problems of a task that makes or chooses all of them beforehand; ``size`` changes it."""


def answer(op: str, task: str = "", args: str = "{}", split: str = "", index: int = 0, said: str = "") -> Any:
    """One request: ``names``, ``open``, ``draw`` or ``score``. ``args``: the arguments of the task as JSON."""
    if op == "names":
        return sorted(DATASETS)
    if op == "open":
        return opened(task, args)
    entry = draw(task, args, split, index)
    if op == "draw":
        return {"question": entry["question"], "gold": entry["answer"]}
    dataset, _ = made(task, args)
    number("score", task, args, split, index, said)
    return float(dataset.score_answer(said, entry))


def opened(task: str, args: str) -> dict[str, Any]:
    """``problem``: why there is no such task with these arguments; ``solvable``: whether it knows its solutions."""
    if task not in DATASETS:
        near = difflib.get_close_matches(task, DATASETS, n=1)
        return {"problem": f"no task {task!r}; " + (f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(DATASETS))}")}
    try:
        made(task, args)
    except Exception as error:  # a task checks its arguments as it likes
        known = ", ".join(DATASETS[task][1].__dataclass_fields__)
        return {"problem": f"{task} refuses its arguments ({in_one_line(error)}); it has {known}"}
    return {"solvable": draw(task, args, "train", 0)["answer"] is not None}


@lru_cache(maxsize=4)
def made(task: str, args: str) -> tuple[ProceduralDataset, int]:
    """The task, and how many different numbers its problems have."""
    given = {"seed": 0, "size": LISTED, **json.loads(args)}
    if task == "composite":
        given["datasets"] = [DatasetSpec(**spec) for spec in given.get("datasets", [])]
    number("make", task, args)
    dataset = create_dataset(task, **given)
    if task != "composite":
        try:
            dataset[FAR]
        except IndexError:
            return dataset, given["size"]
        return dataset, FAR
    return dataset, given["size"]


@lru_cache(maxsize=4096)
def draw(task: str, args: str, split: str, index: int) -> dict[str, Any]:
    """The index-th problem of a split, by the text of its question, however often the task repeats itself.

    Raises:
        ValueError: none of many belongs to the split.
    """
    dataset, numbers = made(task, args)
    for attempt in range(TRIES):
        entry = dataset[number(task, args, split, index, attempt) % numbers]
        if held_out(entry["question"]) == (split == "eval"):
            return entry
    raise ValueError(f"of {TRIES} problems of {task} none is in the {split} split: too few are different; give it other arguments")


def number(*parts: Any) -> int:
    """A number from any parts. The global generators begin there too: some tasks draw from them."""
    value = int.from_bytes(hashlib.blake2b(json.dumps(parts).encode(), digest_size=4).digest(), "big")
    random.seed(value)
    np.random.seed(value)
    return value

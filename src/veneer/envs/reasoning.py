"""``reasoning_gym:NAME``: every task of the package of that name."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from veneer.envs.apart import Apart, Ended, Refused
from veneer.envs.dataset import final_answer
from veneer.envs.framing import Framing
from veneer.envs.optional import need
from veneer.types import ConfigError, DataError, Env, Message, Observation, Split, StepResult

DRAW, SCORE = 120, 5
"""CPU seconds that a problem and a score may take."""
OPEN, CLOSE = "<answer>", "</answer>"


def task_names() -> list[str]:
    """Every task of the package."""
    library = _library()
    try:
        return library.ask_now(DRAW, op="names")
    finally:
        library.close()


def _library() -> Apart:
    need("reasoning_gym")
    return Apart("veneer.envs.gym_tasks")


def reasoning_gym(task: str, system: str = "", suffix: str = "", seed: int = 0, **arguments: Any) -> GymDataset:
    """A task of reasoning-gym with its own arguments. The answer is what stands in the last <answer> tags, or all behind the thinking."""
    library, args = _library(), json.dumps({"seed": seed, **arguments})
    try:
        known = library.ask_now(DRAW, op="open", task=task, args=args)
    except (Ended, Refused) as error:
        library.close()
        raise ConfigError(f"env.name: reasoning_gym:{task} cannot be used: {error}") from error
    if "problem" in known:
        library.close()
        raise ConfigError(f"env.name: reasoning_gym: {known['problem']}")
    return GymDataset(f"reasoning_gym:{task}", task, args, Framing(system, suffix), library, known["solvable"])


@dataclass(frozen=True)
class GymDataset:
    name: str
    task: str
    args: str
    framing: Framing
    library: Apart
    solvable: bool
    """Whether the task knows solutions; of some it knows only how good an answer is."""

    def env(self, split: Split, index: int) -> Env:
        return (SolvableGymEnv if self.solvable else GymEnv)(self, split, index)

    async def close(self) -> None:
        self.library.close()


class GymEnv:
    """One problem, asked once. The reward is the library's score, as it is; ``correct`` says whether it is at least 1, ``ungraded`` that
    the library had none: its grader fell over the answer, or needed too long. Such an answer is wrong."""

    def __init__(self, dataset: GymDataset, split: Split, index: int) -> None:
        self.dataset = dataset
        self.problem = {"task": dataset.task, "args": dataset.args, "split": split, "index": index}

    async def initial_observation(self) -> Observation:
        try:
            drawn = await self.dataset.library.ask(DRAW, op="draw", **self.problem)
        except Refused as error:
            raise DataError(f"{self.dataset.name}: {error}") from error
        return Observation(self.dataset.framing.messages(drawn["question"]))

    async def step(self, action: Message) -> StepResult:
        try:
            reward = float(await self.dataset.library.ask(SCORE, op="score", said=tagged(final_answer(action)), **self.problem))
        except (Ended, Refused):
            return StepResult(0.0, episode_done=True, metrics={"correct": 0.0, "ungraded": 1.0})
        strange = {} if 0.0 <= reward <= 1.0 else {"out_of_range": 1.0}
        return StepResult(reward, episode_done=True, metrics={"correct": float(reward >= 1.0), **strange})


class SolvableGymEnv(GymEnv):
    def gold(self) -> Message:
        return {"role": "assistant", "content": self.dataset.library.ask_now(DRAW, op="draw", **self.problem)["gold"]}


def tagged(text: str) -> str:
    """What stands in the last answer tags; without any, all of it."""
    _, opened, rest = text.rpartition(OPEN)
    inside, closed, _ = rest.partition(CLOSE)
    return inside.strip() if opened and closed else text

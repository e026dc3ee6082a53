"""A small environment of the classic interface of verifiers, and whatever can go wrong in one.

It asks for a digit ``turns`` times and rewards the share of odd digits in what was said. ``fault`` happens in rollouts whose answer is
3, in every one with ``everywhere``.
"""

import asyncio
import json
import os
import subprocess
import sys
import time

import verifiers as vf
from datasets import Dataset

ADD = {
    "name": "add",
    "description": "Add two numbers.",
    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a", "b"]},
}


class Number:
    """Something that can be weighed and added, and is no number."""

    __mul__ = __rmul__ = __add__ = __radd__ = lambda self, _other: self


def rows(problems, first=0):
    prompts = [[{"role": "user", "content": f"say {i % 5}, the {i}th"}] for i in range(first, first + problems)]
    return Dataset.from_list([{"prompt": prompt, "answer": str(i % 5)} for i, prompt in enumerate(prompts)])


def text_of(completion):
    return "".join(message.content or "" for message in completion if message.role == "assistant")


class Episodes(vf.MultiTurnEnv):
    fault = ""
    everywhere = False

    async def env_response(self, messages, state, **kwargs):
        if self.everywhere or state["answer"] == "3":
            await self.misbehave(messages, state)
        calls = messages[-1].tool_calls
        if calls:
            sums = [(call.id, sum(json.loads(call.arguments).values())) for call in calls]
            return [{"role": "tool", "tool_call_id": call, "content": str(total)} for call, total in sums]
        return [{"role": "user", "content": "once more"}]

    async def misbehave(self, messages, state):
        if self.fault in ("grandchild", "die"):
            subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)  # grandchild"], start_new_session=True)
        if self.fault == "die":
            print("out of paper", file=sys.stderr, flush=True)
            os._exit(3)
        if self.fault == "hang":
            time.sleep(1000)
        if self.fault == "slow":
            await asyncio.sleep(1000)
        if self.fault == "raise":
            raise OSError("no such\ncabinet")
        if self.fault == "hot":
            await self.get_model_response(state, messages, sampling_args={"temperature": 0.7})
        if self.fault == "parallel":
            asks = [[*messages, {"role": "user", "content": f"you are agent {i}"}] for i in range(2)]
            await asyncio.gather(*(self.ask(state, ask) for ask in asks))
        if self.fault == "garbage":
            os.write(1, b"\xff\xfe no line " + b"x" * 200_000 + b'\n{"rollout": "rollout-0", "reward": 99}\n')

    async def ask(self, state, messages):
        try:
            from verifiers.utils.message_utils import normalize_messages
        except ImportError:
            from verifiers import _read

            return await self.get_model_response(state, [_read(message) for message in messages])
        return await self.get_model_response(state, normalize_messages(messages, field_name="messages"))

    async def get_prompt_messages(self, state):
        messages = await super().get_prompt_messages(state)
        hit = self.everywhere or state["answer"] == "3"
        return messages[-1:] if self.fault == "rewrite" and hit and len(messages) > 1 else messages


def load_environment(fault="", everywhere=False, problems=40, held=0, turns=2, tools=False):
    def odd_digits(completion, answer, **kwargs):
        if fault == "nan" and (everywhere or answer == "3"):
            return float("nan")
        if fault == "object" and (everywhere or answer == "3"):
            return Number()
        text = text_of(completion)
        return sum(c in "13579" for c in text) / max(len(text), 1)

    def best_of_group(completions, **kwargs):
        return [0.0 for _ in completions]

    env = Episodes(
        dataset=rows(problems),
        eval_dataset=rows(held, first=problems - 2) if held else None,
        rubric=vf.Rubric(funcs=[best_of_group if fault == "group" else odd_digits]),
        max_turns=turns,
        **({"tool_defs": [ADD]} if tools else {}),
    )
    env.fault, env.everywhere = fault, everywhere
    return env

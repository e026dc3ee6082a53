"""Scripted policies for browse, workflow and shop: demonstrations to pretrain a small base on, and numbers to compare a trained one with.

    python recipes/nano_worlds.py            # a demonstration of each kind, with its tokens

A policy is a generator: it yields the assistant's next message and is sent what the environment answered. It knows what a model
knows, the text of the conversation. Each world has a careful policy, which thinks first and nearly always succeeds, and a
careless one, which calls at once and mostly fails. So the two part at the first token of the first turn, ``<think>`` or
``<tool_call>``: the token to leave out of the loss for a base that can do both and prefers the careless way.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken

from veneer.envs.tools import ToolEnv
from veneer.envs.worlds import browse, shop, workflow
from veneer.envs.worlds.browse import BrowseTask
from veneer.envs.worlds.plan import LETTERS
from veneer.envs.worlds.site import COLOURS, RELATIONS, THINGS
from veneer.types import EnvDataset, Message, StepResult

Script = Generator[Message, str, None]
"""Yields the assistant's messages, is sent the tools' answers."""
Policy = Callable[[str, random.Random], Script]
"""(what the user asked, randomness) -> script."""
Conversation = tuple[list[dict[str, Any]], list[dict[str, Any]]]

SLIP = 0.25
"""Share of careful episodes with a slip that is noticed and taken back."""


def call(tool: str, thought: str = "", **arguments: Any) -> Message:
    return said("", thought) | {"tool_calls": [{"name": tool, "arguments": arguments}]}  # pyright: ignore[reportReturnType]


def said(content: str, thought: str = "") -> Message:
    message: Message = {"role": "assistant", "content": content}
    if thought:
        message["reasoning_content"] = thought
    return message


# ---------------------------------------------------------------- browse


def links(page: str) -> dict[str, str]:
    """Names of facts and the titles that they link to: "maker [firm52]"."""
    return dict(re.findall(r"(\w+) \[(\w+)\]", page))


def careful_browse(question: str, rng: random.Random) -> Script:
    """Says which facts to follow, and follows them."""
    *backwards, start = question.removesuffix("?").split(" of the ")
    relations = backwards[::-1]
    slip = rng.choice(("search", "title", "link")) if rng.random() < SLIP else ""
    thought = ", ".join((start, *relations))
    if slip == "search":
        yield call("search", thought, query=start.split()[1])
        thought = "too many, all words"
    title = yield call("search", thought, query=start)
    thought = f"{title}, its {relations[0]}"
    if slip == "title":
        yield call("open", thought, title=f"{title[:-1]}{(int(title[-1]) + 1) % 10}")
        thought = f"no, {title}"
    for i, relation in enumerate(relations):
        page = links((yield call("open", thought, title=title)))
        title = page[relation]
        thought = f"{relation} {title}"
        if i + 1 < len(relations):
            thought += f", its {relations[i + 1]}"
            other = next((link for link in page.values() if link != title), None)
            if slip == "link" and i == 0 and other is not None:
                yield call("open", thought, title=other)
                thought = f"no, {relation} {title}"
    yield said(title, thought)


def careless_browse(question: str, rng: random.Random) -> Script:
    """Searches for half of it or answers half-way; follows any link."""
    start = question.removesuffix("?").split(" of the ")[-1]
    hasty = rng.random() < 0.5
    found = yield call("search", query=rng.choice(start.split()) if hasty else start)
    page = links((yield call("open", title=found.split("; ")[0])))
    answer = rng.choice(list(page.values()))
    if hasty:
        page = links((yield call("open", title=answer)))
        answer = rng.choice(list(page.values()))
    yield said(answer)


# ---------------------------------------------------------------- workflow


@dataclass(frozen=True)
class Shown:
    """A plan as its text tells it."""

    goals: Sequence[str]
    needs: Mapping[str, Sequence[str]]
    """In the order of the text; spares are not among them."""
    spares: Mapping[str, str]

    @classmethod
    def read(cls, text: str) -> Shown:
        head, *lines = text.splitlines()
        goals = [goal.split(" by ")[0] for goal in head.removeprefix("goal ").split(", ")]
        needs: dict[str, Sequence[str]] = {}
        spares: dict[str, str] = {}
        for line in lines:
            _, name, _, what, *others = [*line.split(), "", ""]
            if what == "spare":
                spares[others[1]] = name
            else:
                needs[name] = [other for other in others if other]
        return cls(goals, needs, spares)

    def traced(self, goal: str) -> list[str]:
        """The goal, then what each in turn needs, again and again: whatever is needed stands behind all that need it."""
        found = [goal]
        for name in found:
            found += self.needs[name]
        return found

    def order(self) -> list[str]:
        """What the goals need and they themselves, each behind what it needs."""
        return list(dict.fromkeys(name for goal in self.goals for name in reversed(self.traced(goal))))


def careful_workflow(text: str, rng: random.Random) -> Script:
    """Works the order out from the goals backwards, then runs it and deals with what goes wrong."""
    plan = Shown.read(text)
    order = plan.order()
    traces = [f"goal {goal}: {', '.join(' '.join((name, *plan.needs[name])) for name in plan.traced(goal))}" for goal in plan.goals]
    thought = f"{'; '.join(traces)}; so {' '.join(order)}"
    waiting = [name for name in order if plan.needs[name]]
    if waiting and rng.random() < SLIP:
        early = rng.choice(waiting)
        missing = yield call("run", thought, task=early)
        thought = f"no, {missing.split(',')[0].removeprefix('error: needs ')} first"
    for name in order:
        outcome = (yield call("run", thought, task=name)).split(",")[0]
        thought = "next"
        if rng.random() < 0.03:
            yield call("status", "check")
        if outcome == "failed":
            yield call("retry", "failed, retry", task=name)
        elif outcome == "broken":
            yield call("run", f"broken, spare {plan.spares[name]}", task=plan.spares[name])
    yield said("done")


def careless_workflow(text: str, rng: random.Random) -> Script:
    """Runs tasks as they are listed, or the goal first; does not see to what failed."""
    plan = Shown.read(text)
    tasks = list(plan.needs)
    if rng.random() < 0.5:
        tasks = [*plan.goals, *plan.needs[plan.goals[0]], *plan.goals]
    for task in tasks:
        yield call("run", task=task)
    yield said("done")


# ---------------------------------------------------------------- shop


@dataclass(frozen=True)
class Offer:
    """What the prompt tells of a shop."""

    cost: int
    customers: int
    top: int

    @classmethod
    def read(cls, text: str) -> Offer:
        cost, customers, top = (int(re.search(pattern, text)[1]) for pattern in (r"cost (\d+)", r"customers (\d+)", r"to (\d+)"))  # pyright: ignore[reportOptionalSubscript]
        return cls(cost, customers, top)

    def buyers(self, price: int) -> float:
        """How many of the customers will pay it, on average."""
        return self.customers * max(0, self.top - price + 1) / self.top

    def good_price(self) -> int:
        """The lowest price of those that earn most if nothing is ever left or wanting."""
        return max(range(self.cost + 1, self.top + 1), key=lambda price: (price - self.cost) * (self.top - price + 1))


def seen(line: str) -> dict[str, int]:
    """The numbers of a morning's line, by name."""
    return {name: int(number) for name, number in re.findall(r"(\w+) (-?\d+)", line)}


def careful_shop(text: str, rng: random.Random) -> Script:
    """One good price, and every morning one unit more than will be wanted on average."""
    offer = Offer.read(text)
    price = offer.good_price()
    hold = round(offer.buyers(price)) + 1
    stock, thought = 0, f"price {price}, hold {hold}"
    slip = rng.random() < SLIP
    if slip:
        wrong = rng.choice((offer.cost, min(price + 3, 9)))
        line = yield call("day", f"price {wrong}, hold {hold}", price=wrong, order=hold)
        stock, thought = seen(line)["stock"], f"no, price {price}, hold {hold}"
    while True:
        line = yield call("day", thought, price=price, order=max(0, hold - stock))
        stock, thought = seen(line)["stock"], ""


def careless_shop(text: str, rng: random.Random) -> Script:
    """Any price that comes to mind, and the same large order every day."""
    offer = Offer.read(text)
    price, order = rng.choice(
        (
            (offer.cost + rng.randint(0, 1), offer.customers),
            (offer.top, offer.customers),
            (rng.randint(1, 9), 9),
            (rng.randint(offer.cost, offer.top), rng.randint(7, 9)),
        )
    )
    while True:
        yield call("day", price=price, order=order)


# ---------------------------------------------------------------- playing


WORLDS: dict[str, Callable[..., EnvDataset]] = {"browse": browse, "workflow": workflow, "shop": shop}
CAREFUL: dict[str, Policy] = {"browse": careful_browse, "workflow": careful_workflow, "shop": careful_shop}
CARELESS: dict[str, Policy] = {"browse": careless_browse, "workflow": careless_workflow, "shop": careless_shop}


async def play(env: ToolEnv, policy: Policy, rng: random.Random) -> tuple[Conversation, StepResult]:
    """The whole conversation, and its last step: an environment's tools answer every turn in one message each."""
    first = await env.initial_observation()
    messages = list(first.messages)
    script = policy(messages[-1]["content"], rng)
    action = next(script)
    while True:
        messages.append(action)
        result = await env.step(action)
        if result.episode_done:
            return ([dict(m) for m in messages], [dict(tool) for tool in first.tools]), result
        messages += result.next_messages
        action = script.send("\n".join(message["content"] for message in result.next_messages))


async def demonstrate(rng: random.Random, dataset: Any, policy: Policy) -> Conversation:
    """One training problem, played. ``dataset``: browse(), workflow() or shop()."""
    conversation, _ = await play(dataset.env("train", rng.randrange(10**9)), policy, rng)
    return conversation


# ---------------------------------------------------------------- what a tokenizer for them needs

FACTS = [name for kind in ("item", "firm", "person") for name in RELATIONS[kind]]
LOOKS, NAMES = (*COLOURS[:3], *THINGS[:3]), LETTERS[:7]
"""Those that occur at the default sizes, and of plans a little larger."""
PLAIN = "too goal next check done failed broken days price"
SPACED = "its many all words by after so done broken retry spare first cost rent customers pay to price hold"
WORDS = [
    *(*LOOKS, *RELATIONS, *FACTS, *PLAIN.split()),
    *(f" {word}" for word in (*THINGS[:3], *RELATIONS, *FACTS, *SPACED.split(), *NAMES)),
]
"""Words that should be a token each, as they stand in demonstrations, many with the space in front."""
FIXED = [
    *('\n{"name": "search", "arguments": {"query": "', '\n{"name": "open", "arguments": {"title": "'),
    *('\n{"name": "run", "arguments": {"task": "', '\n{"name": "retry", "arguments": {"task": "'),
    '\n{"name": "status", "arguments": {}}\n',
    *('\n{"name": "day", "arguments": {"price": ', ', "order": ', '"}}\n', "}}\n"),
    *(" of the ", " [", "]; ", "error: no such page", "day ", " cash ", " stock ", " sold "),
    *(", time ", " spare of ", "error: needs "),
]
"""The JSON around the arguments of every call, and the fixed texts of what is asked and answered."""
FRAME = ["\n<|im_start|>user\n<tool_response>\n", "\n</tool_response>", "\n<|im_start|>assistant\n"]
"""What Qwen3's template puts around a tool's answer: eleven tokens a turn without them, of the shop's twenty turns."""


def phrases() -> list[str]:
    """Texts that should be a token each: what every problem begins with, the tools' schemas among it, and ``FIXED``."""
    tasks: list[Any] = [BrowseTask(browse().site("train", 0), 0, ""), workflow().env("train", 0).task, shop().env("train", 0).task]
    texts: list[str] = []
    for task in tasks:
        texts.append(f"{task.messages[0]['content']}\n\n")
        texts += [json.dumps(tool.schema()) for tool in task.tools]
    return [*dict.fromkeys(texts), *FIXED]


def added_tokens() -> list[str]:
    """All of them, for a tokenizer that adds tokens and merges nothing."""
    return [*phrases(), *FRAME, *WORDS]


def fit(tokenizer: Any) -> None:
    """Add to a Hugging Face tokenizer those that it does not have."""
    known = tokenizer.get_vocab()
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in added_tokens() if text not in known])


def main() -> None:
    from veneer.render import load_renderer

    renderer = load_renderer("nano")
    fit(renderer.tokenizer)
    for name, make in WORLDS.items():
        dataset: Any = make()
        for policy in (CAREFUL[name], CARELESS[name]):
            rng = random.Random(name)
            messages, tools = asyncio.run(demonstrate(rng, dataset, policy))
            text = renderer.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
            print(f"---------------- {policy.__name__}: {len(renderer.encode(str(text)))} tokens\n{text}")
        if name == "browse":
            asyncio.run(dataset.close())


if __name__ == "__main__":
    main()

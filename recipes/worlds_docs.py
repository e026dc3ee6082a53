"""Write docs/worlds.md: browse, workflow and shop, with an episode and the scores of scripted policies. Half a minute of one CPU core.

python recipes/worlds_docs.py
"""

from __future__ import annotations

import asyncio
import inspect
import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from nano_worlds import CAREFUL, CARELESS, WORLDS, Offer, Policy, Script, Shown, call, careless_browse, play, said, seen
from veneer.measure.intervals import mean_interval, wilson
from veneer.types import Message

TARGET = Path(__file__).parents[1] / "docs/worlds.md"
PROBLEMS = 100
Numbers = dict[str, list[float]]
"""Metrics of a policy's episodes, the reward among them."""

# ---------------------------------------------------------------- policies beside those of nano_worlds


def guess(question: str, rng: random.Random) -> Script:
    """Answers at once, with a name of a kind that fits."""
    kinds = {"city": "town", "home": "town", "boss": "person", "mayor": "person", "job": "firm"}
    yield said(f"{kinds[question.split()[0]]}{rng.randint(10, 99)}")


def as_listed(text: str, _rng: random.Random) -> Script:
    """Runs the tasks in the order of the text, twice over."""
    for task in 2 * list(Shown.read(text).needs):
        yield call("run", task=task)
    yield said("done")


def in_order(text: str, _rng: random.Random) -> Script:
    """Knows the order, and takes no notice of what fails."""
    for task in Shown.read(text).order():
        yield call("run", task=task)
    yield said("done")


def at_random(_text: str, rng: random.Random) -> Script:
    while True:
        yield call("day", price=rng.randint(1, 9), order=rng.randint(0, 9))


def every_day(rule: Callable[[Offer], tuple[int, int]], text: str, _rng: random.Random) -> Script:
    """The same price and order whatever happens."""
    price, order = rule(Offer.read(text))
    while True:
        yield call("day", price=price, order=order)


def fill_up(more: int, text: str, _rng: random.Random) -> Script:
    """A good price, and as much stock every morning as will be wanted, and ``more``."""
    offer, stock = Offer.read(text), 0
    price = offer.good_price()
    while True:
        line = yield call("day", price=price, order=max(0, round(offer.buyers(price)) + more - stock))
        stock = seen(line)["stock"]


POLICIES: dict[str, dict[str, Policy | None]] = {
    "browse": {
        "a guess of the right kind": guess,
        "careless: half of the search, or half of the way": careless_browse,
        "careful, with slips": CAREFUL["browse"],
        "gold": None,
    },
    "workflow": {
        "tasks as they are listed, twice over": as_listed,
        "the right order, whatever fails": in_order,
        "careless: as listed, or the goal first": CARELESS["workflow"],
        "careful, with slips": CAREFUL["workflow"],
        "gold": None,
    },
    "shop": {
        "no orders": partial(every_day, lambda _: (5, 0)),
        "random price and order": at_random,
        "1 above cost, a unit for every customer": partial(every_day, lambda o: (o.cost + 1, o.customers)),
        "what only the richest pay, a unit for every customer": partial(every_day, lambda o: (o.top, o.customers)),
        "a good price, a unit for every customer": partial(every_day, lambda o: (o.good_price(), o.customers)),
        "a good price, 9 units": partial(every_day, lambda o: (o.good_price(), 9)),
        "careless": CARELESS["shop"],
        "price 5, order 3, whatever the market": partial(every_day, lambda _: (5, 3)),
        "a good price, as many units as buyers on average": partial(every_day, lambda o: (o.good_price(), round(o.buyers(o.good_price())))),
        "a good price, stock filled up to that many": partial(fill_up, 0),
        "a good price, stock filled up to one more": partial(fill_up, 1),
        "careful, with slips": CAREFUL["shop"],
        "gold: the oracle": None,
    },
}


async def play_gold(env: Any) -> tuple[list[Message], Any]:
    first = await env.initial_observation()
    messages: list[Message] = list(first.messages)
    while True:
        messages.append(env.gold())
        result = await env.step(messages[-1])
        if result.episode_done:
            return messages, result
        messages += result.next_messages


async def measure(dataset: Any, policy: Policy | None, problems: int) -> Numbers:
    """Held-out problems 0 to ``problems`` - 1, once each."""
    numbers: Numbers = {}
    for index in range(problems):
        env = dataset.env("eval", index)
        result = (await (play_gold(env) if policy is None else play(env, policy, random.Random(index))))[1]
        for name, value in {"reward": result.reward, **result.metrics}.items():
            numbers.setdefault(name, []).append(value)
    return numbers


# ---------------------------------------------------------------- the page


def episode(messages: list[Message], limit: int) -> str:
    """A conversation as text, a line or so a message; of a long one the beginning and the end."""
    lines = []
    for message in messages:
        body = " ".join(json.dumps(c) for c in message.get("tool_calls", [])) or message["content"]
        lines.append(f"{message['role']}: {body}".replace("\n", "\n    "))
    if len(lines) > limit:
        lines = [*lines[: limit - 3], "...", *lines[-2:]]
    return "\n".join(["```text", *lines, "```"])


def share(values: list[float]) -> str:
    return str(wilson(int(sum(values)), len(values)))


def score(values: list[float]) -> str:
    mean = mean_interval(values)
    return f"{mean.value:.3f} [{mean.low:.3f}, {mean.high:.3f}]"


def quoted(name: str) -> str:
    return f"`{name}`"


def mean(values: list[float]) -> str:
    return f"{sum(values) / len(values):.1f}"


COLUMNS: dict[str, dict[str, tuple[str, Callable[[list[float]], str]]]] = {
    "browse": {"right": ("reward", share), "pages of the chain": ("hops", mean), "turns": ("turns", mean)},
    "workflow": {
        "in time": ("reward", share),
        "required tasks done": ("required_done", score),
        "refused calls": ("refused", mean),
        "turns": ("turns", mean),
    },
    "shop": {
        "reward": ("reward", score),
        "profit": ("profit", mean),
        "oracle's": ("oracle_profit", mean),
        "stockouts": ("stockouts", mean),
        "spoiled": ("spoiled", mean),
        "bankrupt": ("bankrupt", lambda values: f"{sum(values) / len(values):.2f}"),
    },
}


async def table(name: str, dataset: Any) -> list[str]:
    columns = COLUMNS[name]
    lines = [f"| policy | {' | '.join(columns)} |", "|" + "---|" * (len(columns) + 1)]
    for title, policy in POLICIES[name].items():
        numbers = await measure(dataset, policy, PROBLEMS)
        lines.append(f"| {title} | {' | '.join(show(numbers[key]) for key, show in columns.values())} |")
    return lines


async def world(name: str) -> list[str]:
    dataset: Any = WORLDS[name]()
    env = dataset.env("train", 0)
    tools = [tool.schema()["function"] for tool in env.task.tools]
    messages, _ = await play_gold(env)
    defaults = ", ".join(f"`{key}={p.default!r}`" for key, p in inspect.signature(WORLDS[name]).parameters.items())
    lines = [
        *(f"## {name}", "", inspect.cleandoc(TEXTS[name]), ""),
        *("| tool | what the model is told | arguments |", "|---|---|---|"),
        *(
            f"| `{t['name']}` | {t['description']} | {', '.join(f'`{a}`' for a in t['parameters']['properties']) or 'none'} |"
            for t in tools
        ),
        *("", f"Arguments: {defaults}.", "", "Training problem 0, as gold plays it:", "", episode(messages, 12), ""),
        *(f"Scripted policies on {PROBLEMS} held-out problems, with 95% intervals:", "", *(await table(name, dataset)), ""),
    ]
    if hasattr(dataset, "close"):
        await dataset.close()
    return lines


TEXTS = {
    "browse": """
        A question about a website of made-up things, firms, people and towns. The item in question is searched for by how it
        looks, and from its page a fact names the next page, `hops` pages in all. Every name is a kind and a number, so that it
        cannot be guessed, and every kind of fact is one to one: the same facts followed from a wrong item lead elsewhere.

        The site is real: an HTTP server on 127.0.0.1 that starts with the first episode and stops when the dataset is closed.
        Every problem has a folder of its own, `/SPLIT/INDEX/`, in which its tools stay; titles are quoted, and no path reaches a
        file. `latency` is the seconds that every answer waits, for loops that sample while tools work; `facts` puts numbers on
        every page that lead nowhere.

        Reward: 1 for the answer itself, 0 for anything else. Metrics: `hops` (pages of the chain that were read), `pages` (pages
        read), `unread` (it answered before it had read the chain).
    """,
    "workflow": """
        A plan: goals with the time when they are due; tasks with the time they take and the tasks they come after; spares, which
        do another task's work. One task runs at a time. Some fail when they are run first and work when they are retried, some
        are broken and their spare has to be run; which, shows only when they run. What is refused (a task whose needs are not
        done, one that is done before, a retry of what did not fail) costs a unit of time. `extra` tasks lead nowhere and cost
        time.

        A goal is due `slack` after the time at which a policy is done that runs what is needed and nothing else, the earliest
        goal first, what fails included. So whoever works the order out and sees to what fails is always in time, and any task
        that need not be run is too much. The episode ends when every goal is done or too late.

        Reward: 1 if the validator finds in the log of what ran that every required task was done after those it needs and before
        the first goal that needs it is due, and 0 otherwise; with `partial_credit` the share of required tasks of which that is
        true. Metrics: `required_done` (that share), `refused`, `needless` (tasks run that lead nowhere), `gave_up` (it said that
        it was done and was not).
    """,
    "shop": """
        A shop for `days` days. Every call sets a price and an order and plays a day: the order arrives (`lead=1`: the next
        morning), each customer buys a unit if the price is at most what he will pay, one in `spoil` of the units left spoils,
        rounded down, and the rent is paid. Below 0 cash the shop closes; the rent of all days is owed, so closing early saves
        nothing. What each customer will pay is 1 to a top, all amounts alike. Cost, rent, customers, top and cash differ from
        problem to problem; prices, orders and customers go up to `most`. With `known=False` the prompt keeps customers and top
        for itself.

        Reward: profit / the oracle's profit on the same customers, cut to [0, 1]. The oracle is the policy with the best expected
        profit, computed exactly by dynamic programming over the days and the stock, for the same prices and orders that the tool
        takes. It knows how likely a customer pays what, and never who will come; it is never short of cash, so no policy earns
        more in expectation. Gold plays it and earns exactly 1. On lucky days another policy may earn more than the oracle did;
        the cut keeps its reward at 1. Half of what the oracle expects to earn goes into rent, so that profit tells the careful
        from the careless. Customers who leave the oracle with less than half of its expectation, or bankrupt, are drawn anew, so
        that there is a profit to compare with.

        Metrics: `profit`, `oracle_profit`, `regret` (their difference), `days`, `stockouts` (days on which somebody left
        without), `spoiled` (units), `bankrupt`.
    """,
}


async def page() -> str:
    lines = [
        "# Worlds",
        "",
        "Three small environments in which a model acts with tools over several turns: it reads a website, carries out a plan, runs a",
        "shop. Defaults are small enough for a base of a million parameters; larger arguments make them harder for larger",
        "models: `veneer train my.toml --set env.name=browse --set env.args.hops=4`. The code is in `src/veneer/envs/worlds/`.",
        "",
        "The same seed, split and index give the same problem, and no problem is in both splits: sites by all their pages, plans",
        "and shops by what is shown of them. Scripted policies and demonstrations are in `recipes/nano_worlds.py`. Written by",
        "`recipes/worlds_docs.py`.",
        "",
    ]
    for name in WORLDS:
        lines += await world(name)
    return "\n".join(lines)


if __name__ == "__main__":
    TARGET.write_text(asyncio.run(page()))

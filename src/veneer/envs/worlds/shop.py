"""``shop``: run a small business. Every day takes a price and an order; the reward is the profit beside that of an oracle."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

from veneer.envs.tools import Tool, ToolEnv
from veneer.envs.worlds.oracle import Market, solve
from veneer.envs.worlds.problems import check_whole, draw
from veneer.types import ConfigError, Message, Split

RENT = 0.5
"""Share of what the oracle may expect to earn that goes into rent: what is left tells the careful from the careless."""
POOR = 0.5
"""A draw of customers that leaves the oracle with less than this share of its expectation is drawn anew."""
SPARE_TURNS = 6
"""Turns beside one a day, for calls that are refused."""


@dataclass(frozen=True)
class Business:
    """A market, and who comes."""

    market: Market
    rent: int
    cash: int
    wishes: tuple[tuple[int, ...], ...]
    """[days][customers] What each will pay at most: the same for every policy, so that policies differ by nothing else."""
    known: bool

    @property
    def definition(self) -> str:
        return self.text

    @property
    def text(self) -> str:
        market = self.market
        customers = f", customers {market.customers}, pay 1 to {market.top}" if self.known else ""
        return f"days {market.days}, cost {market.cost}, rent {self.rent}{customers}, cash {self.cash}"

    @property
    def rules(self) -> str:
        """The same for all problems of one size."""
        arrives = "tomorrow" if self.market.lead else "at once"
        return (
            f"Run a shop for profit, a call a day. An order arrives {arrives} and costs the cost for each unit. "
            "Every customer buys a unit if the price is at most what he will pay, any amount alike. "
            f"Of the units left one in {self.market.spoil} spoils overnight, rounded down. "
            "Rent is due every evening, to the last day; below 0 cash the shop closes. Stock is worth nothing in the end."
        )

    @cached_property
    def oracle(self) -> Books:
        """The books of the policy that is best in expectation, on these customers."""
        books, policy = Books(self), solve(self.market)
        while books.open:
            books.trade(int(policy.price[books.day, books.stock]), int(policy.order[books.day, books.stock]))
        return books


class Books:
    """A shop day by day."""

    def __init__(self, business: Business) -> None:
        self.business, self.cash = business, business.cash
        self.day = self.stock = self.sold = self.stockouts = self.spoiled = 0

    @property
    def profit(self) -> int:
        """So far, if it were left now: the rent of all days is owed whether it is open or not, so that closing early saves nothing."""
        return self.cash - self.business.cash - self.business.rent * (self.business.market.days - self.day)

    @property
    def open(self) -> bool:
        return self.cash >= 0 and self.day < self.business.market.days

    def trade(self, price: int, order: int) -> None:
        """One day: the order, if it comes at once; sales; the evening, in which things spoil and the rent is paid; the order, if not."""
        market = self.business.market
        shelf = self.stock + (0 if market.lead else order)
        wanted = sum(wish >= price for wish in self.business.wishes[self.day])
        self.sold = min(shelf, wanted)
        self.stockouts += wanted > shelf
        spoiled = market.spoiled(shelf - self.sold)
        self.spoiled += spoiled
        self.stock = shelf - self.sold - spoiled + (order if market.lead else 0)
        self.cash += price * self.sold - market.cost * order - self.business.rent
        self.day += 1


class ShopTask:
    """One business, from its first day to its last, or until its cash is below 0."""

    def __init__(self, business: Business) -> None:
        self.business, self.books = business, Books(business)
        most = business.market.most
        price, order = ({"type": "integer", "minimum": low, "maximum": most} for low in (1, 0))
        parameters = {"type": "object", "properties": {"price": price, "order": order}, "required": ["price", "order"]}
        self.messages: Sequence[Message] = [
            {"role": "system", "content": business.rules},
            {"role": "user", "content": business.text},
        ]
        self.tools: Sequence[Tool] = [Tool("day", "Set the price, order, and sell for a day.", parameters, self._day)]

    def _day(self, price: int, order: int) -> str:
        if self.books.open:  # a turn may call more often than there are days
            self.books.trade(int(price), int(order))  # JSON's 3.0 is a whole number too
        return self.line()

    def line(self) -> str:
        """How the morning looks; ``sold`` is yesterday's."""
        books = self.books
        return f"day {books.day + 1} cash {books.cash} stock {books.stock} sold {books.sold}"

    def over(self) -> bool:
        return not self.books.open

    async def score(self, answer: Message | None) -> Mapping[str, float]:
        """``reward``: profit / the oracle's profit on the same customers, cut to [0, 1]."""
        books, oracle = self.books, self.business.oracle
        return {
            "reward": min(1.0, max(0.0, books.profit / oracle.profit)),
            "profit": float(books.profit),
            "oracle_profit": float(oracle.profit),
            "regret": float(oracle.profit - books.profit),
            "days": float(books.day),
            "stockouts": float(books.stockouts),
            "spoiled": float(books.spoiled),
            "bankrupt": float(books.cash < 0),
        }

    def gold(self) -> Message:
        if not self.books.open:
            return {"role": "assistant", "content": "done"}
        policy, at = solve(self.business.market), (self.books.day, self.books.stock)
        arguments = {"price": int(policy.price[at]), "order": int(policy.order[at])}
        return {"role": "assistant", "content": "", "tool_calls": [{"name": "day", "arguments": arguments}]}


@dataclass(frozen=True)
class Size:
    days: int
    most: int
    spoil: int
    lead: int
    known: bool


def generate(rng: random.Random, size: Size) -> Business:
    """A business that pays: an oracle expects to earn a unit of cash a day before rent, and has no bad luck with these customers."""
    while True:
        cost, customers = rng.randint(1, size.most // 2), rng.randint((size.most + 1) // 2, size.most)
        top = rng.randint(cost + size.most // 3, size.most)
        market = Market(size.days, cost, customers, top, size.most, size.spoil, size.lead)
        expected = float(solve(market).value[0, 0])
        rent = int(RENT * expected / size.days)
        cash = rng.randint(2 * cost * customers, 4 * cost * customers)
        wishes = tuple(tuple(rng.randint(1, top) for _ in range(customers)) for _ in range(size.days))
        business = Business(market, rent, cash, wishes, size.known)
        left = expected - rent * size.days
        if expected >= size.days and business.oracle.cash >= 0 and business.oracle.profit >= POOR * left:
            return business


@dataclass(frozen=True)
class Shop:
    """Businesses by split and index."""

    size: Size
    seed: int
    name: str = "shop"

    def env(self, split: Split, index: int) -> ToolEnv:
        business = draw(partial(generate, size=self.size), split, index, f"shop/{self.seed}")
        return ToolEnv(ShopTask(business), self.size.days + SPARE_TURNS)


def shop(days: int = 20, most: int = 9, spoil: int = 3, lead: int = 0, known: bool = True, seed: int = 0) -> Shop:
    """Businesses that are open for ``days`` days, with prices, orders and customers up to ``most``, of whose stock one in ``spoil``
    spoils every night, and whose orders arrive after ``lead`` nights (0 or 1). ``known``: the prompt tells how many customers
    come and what they pay; otherwise that has to be found out."""
    check_whole("days", days, 2, 60)
    check_whole("most", most, 4, 20)
    check_whole("spoil", spoil, 1, 10)
    check_whole("lead", lead, 0, 1)
    if not isinstance(known, bool):
        raise ConfigError(f"env.args.known: {known!r} must be true or false")
    return Shop(Size(days, most, spoil, lead, known), seed)

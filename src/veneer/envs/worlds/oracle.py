"""The best that a shop can do in expectation, by dynamic programming over its stock and the days that are left."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Market:
    """What decides how much can be earned."""

    days: int
    cost: int
    """Of one unit, paid when it is ordered."""
    customers: int
    """A day. Each wants one unit."""
    top: int
    """Each customer will pay up to a whole amount of his own: 1 to ``top``, all alike."""
    most: int
    """Prices are 1 to ``most``, orders 0 to ``most``."""
    spoil: int
    """Of what is left in the evening one unit in ``spoil`` spoils, rounded down."""
    lead: int
    """Mornings until an order is there: 0 the same one, 1 the next."""

    def spoiled(self, left: int) -> int:
        return left // self.spoil

    @cached_property
    def fullest(self) -> int:
        """The largest stock that a morning can bring."""
        stock = 0
        for _ in range(self.days):
            left = stock + (0 if self.lead else self.most)
            stock = left - self.spoiled(left) + (self.most if self.lead else 0)
        return stock


@dataclass(frozen=True)
class Policy:
    """What to do, [days, stocks] in the morning of a day with a stock, and what it is worth, [days + 1, stocks]."""

    price: NDArray[np.int64]
    order: NDArray[np.int64]
    value: NDArray[np.float64]


def demand(market: Market) -> NDArray[np.float64]:
    """[most, customers + 1] The probability that d customers will pay price p + 1: binomial, since each does by himself."""
    n = market.customers
    table = np.zeros((market.most, n + 1))
    for price in range(1, market.most + 1):
        buys = max(0, market.top - price + 1) / market.top
        table[price - 1] = [math.comb(n, d) * buys**d * (1 - buys) ** (n - d) for d in range(n + 1)]
    return table


@lru_cache(4096)
def solve(market: Market) -> Policy:
    """Backward induction (Bellman): V_t(s) = max over price and order of E[price * sold - cost * order + V_{t+1}(s')], with
    V_days = 0. Rent is the same whatever is done and is left out; stock is worth nothing in the end. Cash is no part of the state: the
    oracle is one that is never short of it, so a shop that may close can do no better."""
    likely = demand(market)
    stocks, orders = np.arange(market.fullest + 1), np.arange(market.most + 1)
    shelf = stocks if market.lead else np.arange(market.fullest + market.most + 1)  # what can be sold from
    sold = np.minimum(shelf[:, None], np.arange(market.customers + 1))  # [shelf, demand]
    left = shelf[:, None] - sold
    kept = left - left // market.spoil
    income = np.arange(1, market.most + 1) * (sold @ likely.T)  # [shelf, price]
    value = np.zeros((market.days + 1, len(stocks)))
    price, order = (np.zeros((market.days, len(stocks)), np.int64) for _ in range(2))
    for day in reversed(range(market.days)):
        # Stocks that no day can bring meet the edge; their values are never asked for.
        following = np.append(value[day + 1], np.repeat(value[day + 1, -1], market.most))
        if market.lead:
            later = following[kept[:, :, None] + orders]  # [shelf, demand, order]
            worth = income[:, :, None] + likely @ later - market.cost * orders
        else:
            by_shelf = income + following[kept] @ likely.T  # [shelf, price]
            worth = by_shelf[stocks[:, None] + orders].transpose(0, 2, 1) - market.cost * orders  # [stock, price, order]
        flat = np.round(worth, 9).reshape(len(stocks), -1)  # ties go to the lowest price and order, whatever the last bits are
        best = flat.argmax(1)
        value[day] = flat[stocks, best]
        price[day], order[day] = best // len(orders) + 1, best % len(orders)
    return Policy(price, order, value)

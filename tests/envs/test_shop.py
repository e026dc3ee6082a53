"""shop: the oracle is the best there is, the comparison with it is fair, and carelessness does not pay."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from itertools import product
from math import comb
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from world_play import answered, called, gold, play_wild, played, recipe, said, wild

from veneer.envs import load_env
from veneer.envs.tools import ToolEnv
from veneer.envs.worlds.oracle import Market, demand, solve
from veneer.envs.worlds.shop import RENT, Books, Business, ShopTask, shop
from veneer.types import ConfigError, Split

SIZES: list[dict[str, Any]] = [
    {},
    {"days": 60, "lead": 1},
    {"days": 2, "most": 4, "spoil": 1},
    {"most": 20, "days": 5, "known": False},
    {"spoil": 10, "lead": 1, "days": 10},
]
MARKETS = st.builds(
    Market,
    days=st.integers(1, 3),
    cost=st.integers(1, 2),
    customers=st.integers(1, 3),
    top=st.integers(2, 4),
    most=st.integers(2, 4),
    spoil=st.integers(1, 4),
    lead=st.integers(0, 1),
)


def business(size: dict[str, Any], split: Split, index: int) -> Business:
    task: Any = shop(**size).env(split, index).task
    return task.business


# ---------------------------------------------------------------- the oracle


def night(market: Market, left: int) -> int:
    """What of the evening's stock is there in the morning: the third, sixth, ninth unit spoils if one in three does."""
    return sum(unit % market.spoil != 0 for unit in range(1, left + 1))


def outcomes(market: Market, stock: int, price: int, order: int) -> list[tuple[Fraction, int, int]]:
    """(probability, income, next morning's stock) of a day, customer by customer in exact numbers."""
    willing = Fraction(max(0, market.top - price + 1), market.top)
    found = []
    for wanted in range(market.customers + 1):
        chance = comb(market.customers, wanted) * willing**wanted * (1 - willing) ** (market.customers - wanted)
        shelf = stock if market.lead else stock + order
        sold = min(shelf, wanted)
        morning = night(market, shelf - sold) + (order if market.lead else 0)
        found.append((chance, price * sold - market.cost * order, morning))
    return found


def actions(market: Market) -> list[tuple[int, int]]:
    return list(product(range(1, market.most + 1), range(market.most + 1)))


@settings(max_examples=40, deadline=None)
@given(market=MARKETS)
def test_dynamic_programming_is_exact(market: Market) -> None:
    """Against every policy there is, tried out in exact fractions without a table: values and actions on all that can happen."""

    @lru_cache(None)
    def best(day: int, stock: int) -> Fraction:
        if day == market.days:
            return Fraction(0)
        return max(worth(day, stock, *action) for action in actions(market))

    @lru_cache(None)
    def worth(day: int, stock: int, price: int, order: int) -> Fraction:
        return sum((p * (income + best(day + 1, then)) for p, income, then in outcomes(market, stock, price, order)), Fraction(0))

    policy = solve(market)
    mornings = {0}
    for day in range(market.days):
        for stock in mornings:
            assert policy.value[day, stock] == pytest.approx(float(best(day, stock)), abs=1e-7)
            chosen = int(policy.price[day, stock]), int(policy.order[day, stock])
            assert float(worth(day, stock, *chosen)) == pytest.approx(float(best(day, stock)), abs=1e-7)
        mornings = {then for stock in mornings for action in actions(market) for _, _, then in outcomes(market, stock, *action)}
    assert max(mornings) <= market.fullest


def expected(market: Market, act: Callable[[int, int], tuple[int, int]]) -> float:
    """What a policy (day, stock) -> (price, order) earns on average, rent aside: the chain of its stocks, carried forward."""
    stocks, total = {0: 1.0}, 0.0
    for day in range(market.days):
        after: dict[int, float] = {}
        for stock, weight in stocks.items():
            for p, income, then in outcomes(market, stock, *act(day, stock)):
                total += weight * float(p) * income
                after[then] = after.get(then, 0.0) + weight * float(p)
        stocks = after
    return total


@pytest.mark.parametrize("lead", [0, 1])
def test_the_oracle_earns_what_it_promises_and_beats_every_constant_policy(lead: int) -> None:
    """All ninety prices and orders, and filling up to any stock at any price, in exact expectation."""
    market = Market(days=8, cost=2, customers=5, top=8, most=9, spoil=3, lead=lead)
    policy = solve(market)
    promised = float(policy.value[0, 0])
    assert expected(market, lambda day, stock: (int(policy.price[day, stock]), int(policy.order[day, stock]))) == pytest.approx(promised)
    constant = max(expected(market, lambda _day, _stock, a=a: a) for a in actions(market))
    filled = max(expected(market, lambda _day, stock, a=a: (a[0], max(0, a[1] - stock))) for a in actions(market))
    assert max(constant, filled) < promised - 0.05
    assert constant > 0.7 * promised, "a sensible constant policy is worth something"


def test_demand_by_hand() -> None:
    """Two customers who pay 1 to 4: at a price of 3 each buys with one half; above 4 nobody does."""
    table = demand(Market(days=1, cost=1, customers=2, top=4, most=5, spoil=3, lead=0))
    assert table.tolist() == [[0, 0, 1], [1 / 16, 6 / 16, 9 / 16], [1 / 4, 1 / 2, 1 / 4], [9 / 16, 6 / 16, 1 / 16], [1, 0, 0]]


@pytest.mark.parametrize("lead", [0, 1])
def test_the_books_are_the_model(lead: int) -> None:
    """Real customers, day by day, bring the oracle on average what the dynamic programme says: 4 standard errors of 2000 shops."""
    market = Market(days=12, cost=2, customers=6, top=8, most=9, spoil=3, lead=lead)
    policy, rng = solve(market), random.Random(5)
    profits = []
    for _ in range(2000):
        wishes = tuple(tuple(rng.randint(1, market.top) for _ in range(market.customers)) for _ in range(market.days))
        books = Books(Business(market, rent=3, cash=1000, wishes=wishes, known=True))
        while books.open:
            books.trade(int(policy.price[books.day, books.stock]), int(policy.order[books.day, books.stock]))
        profits.append(books.profit)
    error = np.std(profits) / np.sqrt(len(profits))
    assert np.mean(profits) == pytest.approx(policy.value[0, 0] - 3 * market.days, abs=4 * error)


def test_days_by_hand() -> None:
    """Four days of a shop, with paper and pencil: sales, waste, rent and the cash that is left."""
    market = Market(days=4, cost=2, customers=3, top=9, most=9, spoil=3, lead=0)
    here = Business(market, rent=1, cash=20, wishes=((5, 6, 7), (9, 9, 1), (1, 1, 1), (2, 8, 8)), known=True)

    async def main() -> None:
        task = ShopTask(here)
        env = ToolEnv(task, 9)
        assert task.messages[1]["content"] == "days 4, cost 2, rent 1, customers 3, pay 1 to 9, cash 20"
        assert await answered(env, "day", price=6, order=3) == "day 2 cash 25 stock 1 sold 2"  # 20 - 6 + 12 - 1
        assert await answered(env, "day", price=2, order=0) == "day 3 cash 26 stock 0 sold 1"  # two wanted it, one was there
        assert await answered(env, "day", price=3, order=7) == "day 4 cash 11 stock 5 sold 0"  # of 7 left 2 spoil
        result = await env.step(called("day", price=8, order=0))
        assert result.episode_done
        metrics = result.metrics
        assert (metrics["profit"], metrics["days"], metrics["stockouts"], metrics["spoiled"]) == (11 + 16 - 1 - 20, 4, 1, 2 + 1)
        assert result.reward == pytest.approx(max(0.0, min(1.0, 6 / metrics["oracle_profit"])))
        assert metrics["regret"] == metrics["oracle_profit"] - 6

    asyncio.run(main())


def test_an_order_of_tomorrow_is_not_sold_today() -> None:
    market = Market(days=3, cost=1, customers=1, top=5, most=9, spoil=9, lead=1)
    books = Books(Business(market, rent=0, cash=9, wishes=((5,), (5,), (5,)), known=True))
    books.trade(5, 2)
    assert (books.sold, books.stock, books.cash, books.stockouts) == (0, 2, 7, 1)
    books.trade(5, 0)
    assert (books.sold, books.stock, books.cash, books.stockouts) == (1, 1, 12, 1)


# ---------------------------------------------------------------- the reward


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("split", ["train", "eval"])
def test_gold_earns_exactly_one(size: dict[str, Any], split: Split) -> None:
    """Gold is the oracle on the same customers, so nothing is left of chance."""

    async def main() -> None:
        for index in range(20):
            _, result = await gold(shop(**size).env(split, index))
            assert result.reward == 1.0
            assert result.metrics["regret"] == 0
            assert result.metrics["profit"] > 0

    asyncio.run(main())


def test_rent_takes_its_share_and_the_oracle_lives() -> None:
    for index in range(100):
        here = business({}, "train", index)
        promised = float(solve(here.market).value[0, 0])
        assert 0 <= RENT * promised - here.rent * here.market.days < here.market.days
        assert here.oracle.day == here.market.days
        assert here.oracle.profit >= (promised - here.rent * here.market.days) / 2


def test_customers_come_whatever_is_done() -> None:
    """The same price meets the same demand on a day, whatever was done before: policies differ by what they do alone."""
    here = business({}, "train", 0)
    first, second = Books(here), Books(here)
    first.trade(1, 9)
    second.trade(9, 9)
    for day in range(1, 5):
        for books in (first, second):
            books.stock = 50  # enough for all who come
            books.trade(4, 0)
        assert first.sold == second.sold == sum(wish >= 4 for wish in here.wishes[day])


@pytest.mark.parametrize("lead", [0, 1])
def test_leaving_early_saves_nothing(lead: int) -> None:
    """If closing saved the rent, a policy that sells out and leaves could earn more than the oracle is able to."""

    async def main() -> None:
        nothing = await shop(lead=lead).env("train", 0).step(said("done"))
        here = business({"lead": lead}, "train", 0)
        assert (nothing.reward, nothing.metrics["days"], nothing.metrics["bankrupt"]) == (0.0, 0, 0)
        assert nothing.metrics["profit"] == -20 * here.rent < 0
        for days in (1, 5, 19):
            env, idle = shop(lead=lead).env("train", 0), shop(lead=lead).env("train", 0)
            for _ in range(days):
                action = env.gold()
                await env.step(action)
                await idle.step(action)
            left = await env.step(said("done"))
            idled = await played(idle, [called("day", price=9, order=0)] * 20)
            assert left.metrics["profit"] <= idled.metrics["profit"]
            assert left.metrics["profit"] < left.metrics["oracle_profit"]

    asyncio.run(main())


def test_no_cash_no_shop() -> None:
    """Ordering without end closes the shop, and nothing is earned."""

    async def main() -> None:
        result = await played(shop().env("train", 0), [called("day", price=9, order=9)] * 20)
        assert result.episode_done
        assert (result.reward, result.metrics["bankrupt"]) == (0.0, 1.0)
        assert result.metrics["days"] < 20

    asyncio.run(main())


def test_wrong_calls_cost_no_day_and_turns_run_out() -> None:
    async def main() -> None:
        env = shop().env("train", 0)
        assert await answered(env, "day", price=0, order=1) == "error: day: price: 0 is less than the minimum of 1"
        assert await answered(env, "day", price=3, order=10) == "error: day: order: 10 is greater than the maximum of 9"
        assert await answered(env, "day", price=2.5, order=1) == "error: day: price: 2.5 is not of type 'integer'"
        assert (await answered(env, "day", price=3.0, order=1)).startswith("day 2 ")
        result = await played(env, [called("day", price=0, order=0)] * 22)
        assert result.episode_done
        assert result.metrics["days"] == 1

    asyncio.run(main())


def test_a_turn_with_too_many_calls_plays_what_is_left() -> None:
    calls: Any = [{"name": "day", "arguments": {"price": 5, "order": 1}}] * 50
    result = asyncio.run(shop().env("train", 0).step({"role": "assistant", "content": "", "tool_calls": calls}))
    assert result.episode_done
    assert result.metrics["days"] <= 20


def test_unknown_markets_are_not_told() -> None:
    here, hidden = business({}, "train", 0), business({"known": False}, "train", 0)
    assert "customers" in here.text
    assert "customers" not in hidden.text
    assert "pay" not in hidden.text


def test_problems_repeat_and_splits_are_disjoint() -> None:
    """A held-out score over shops that were trained on is no score."""
    train = [business({}, "train", index) for index in range(300)]
    assert train == [business({}, "train", index) for index in range(300)]
    held_out = {business({"seed": seed}, "eval", index).text for index in range(300) for seed in (0, 1)}
    assert not {here.text for here in train} & held_out
    assert len({here.text for here in train}) > 250
    assert len({here.market for here in train}) > 40
    assert business({"seed": 1}, "train", 0) != train[0]


DAY = st.fixed_dictionaries({"price": st.integers(-1, 11), "order": st.integers(-1, 10)})
CALLS = st.fixed_dictionaries({"name": st.just("day"), "arguments": DAY})


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(actions=wild(CALLS), index=st.integers(0, 10**12), size=st.sampled_from(SIZES))
def test_anything_may_be_said(actions: list[Any], index: int, size: dict[str, Any]) -> None:
    play_wild(shop(**size).env("train", index), actions)


@pytest.mark.parametrize(
    ("args", "match"),
    [
        ({"days": 1}, r"env\.args\.days: 1 must be a whole number from 2 to 60"),
        ({"most": 3}, r"env\.args\.most: 3 must be"),
        ({"spoil": 0.5}, r"env\.args\.spoil: 0\.5 must be"),
        ({"lead": 2}, r"env\.args\.lead: 2 must be a whole number from 0 to 1"),
        ({"known": "yes"}, r"env\.args\.known: 'yes' must be true or false"),
    ],
)
def test_a_users_mistake_is_one_line(args: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        load_env("shop", args)


def test_careless_policies_earn_little_and_sensible_ones_most_of_it() -> None:
    """A trained policy is to be told from an untrained one, and the best from the sensible: at most 0.3, at least 0.7, less than 1."""
    scripts = recipe("worlds_docs")

    async def main() -> None:
        async def mean(title: str) -> float:
            return float(np.mean((await scripts.measure(shop(), scripts.POLICIES["shop"][title], 80))["reward"]))

        for title in (
            "no orders",
            "random price and order",
            "1 above cost, a unit for every customer",
            "a good price, 9 units",
            "careless",
        ):
            assert await mean(title) < 0.3, title
        for title in ("careful, with slips", "a good price, as many units as buyers on average"):
            assert 0.7 < await mean(title) < 0.97, title

    asyncio.run(main())

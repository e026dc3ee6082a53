"""``veneer scorecard``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import click

from veneer.cli.output import emit, json_option, print_table


@click.command("scorecard", short_help="What training did beside the reward: pass@k, diversity, drift, other tasks.")
@click.argument("adapter")
@click.option("--start", "started", help="Compare with this adapter; with the base, unless given.")
@click.option("--env", help="An environment, or FILE.py:FACTORY; that of its training, unless given.")
@click.option("--env-arg", "env_args", multiple=True, metavar="KEY=VALUE", help="An argument of the environment. Repeatable.")
@click.option("--problems", type=click.IntRange(2), default=64, show_default=True, help="Held-out problems.")
@click.option(
    "--tries", type=click.IntRange(2), default=128, show_default=True, help="At each by each of the two; pass@k up to half of them."
)
@click.option("--elsewhere", multiple=True, metavar="ENV", help="Another environment, tried once a problem. Repeatable.")
@click.option("--elsewhere-problems", type=click.IntRange(2), default=256, show_default=True)
@click.option("--max-tokens", type=click.IntRange(1), help="Limit of one turn; as in the adapter's training, unless given.")
@click.option("--base", default="nano", show_default=True, help="A Hugging Face name, a folder, or nano.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda or auto.")
@json_option
def command(
    adapter: str,
    started: str | None,
    env: str | None,
    env_args: tuple[str, ...],
    problems: int,
    tries: int,
    elsewhere: tuple[str, ...],
    elsewhere_problems: int,
    max_tokens: int | None,
    base: str,
    seed: int,
    threads: int,
    device: str,
    as_json: bool,
) -> None:
    """Let ADAPTER and what it began with try the same held-out problems many times each.

    Shown are the reward; pass@k, and the k from which on the start solves more; how many answers and solutions differ; problems gained
    and lost; the KL divergence both ways; and the reward in other environments. Differences are problem by problem, with 95% intervals.
    """
    import asyncio

    from veneer.cli.assemble import home_of, pinned, start_for
    from veneer.train.config import ScorecardSettings
    from veneer.train.rollouts import Policy, closing
    from veneer.train.scorecard import Measured, check_others, measure_scorecard, most_episodes
    from veneer.types import ConfigError, SamplingParams

    adapter = pinned(adapter)
    home = home_of(adapter, env, env_args, max_tokens)
    if home is None:
        raise ConfigError(f"adapter {adapter!r} was trained in no environment; give --env")
    dataset = home.dataset()
    settings = ScorecardSettings(problems=problems, tries=tries, envs=elsewhere, elsewhere=elsewhere_problems)
    asyncio.run(check_others(elsewhere, "--elsewhere"))
    machine, name = start_for(adapter, base, threads, device)
    before = None if started is None else machine.load(pinned(started))
    print(f"playing up to {most_episodes(settings, before is not None):,} episodes", file=sys.stderr, flush=True)

    def policy(acting: str | None) -> Policy:
        params = SamplingParams(max_tokens=home.max_tokens)
        return Policy(machine.engine, machine.renderer, acting, params, home.env.seconds, home.env.retries)

    async def measured() -> Measured:
        async with closing(dataset):
            base = None if before is None else policy(None)
            return await measure_scorecard(policy(before), policy(name), dataset, settings, home.env.max_failed_share, seed, base)

    found = asyncio.run(measured()).document()
    document = {"adapter": adapter, "start": started or machine.engine.base_id, "env": dataset.name, **found}
    emit(document, as_json, lambda: show_scorecard(document))


def show_scorecard(document: Mapping[str, Any]) -> None:
    """As a table."""
    card = document["card"]
    rows = [("reward", *_change(card["reward"]))]
    rows += [(f"pass@{k}", *_change(change)) for k, change in card["pass_at_k"].items()]
    rows.append(("bits of answers", *_change(card["answer_entropy"])))
    if card["distinct_solutions"]:
        rows.append(("distinct of 8", *_change(card["distinct_solutions"])))
    rows.append(("tokens", *_change(card["tokens"], 1)))
    rows += [(f"reward, {other['env']}", *_change(other["reward"])) for other in document["elsewhere"]]
    print_table(("", "start", "end", "difference"), rows, "")
    gained, lost = len(card["gained"]), len(card["lost"])
    print(f"{card['problems']} problems, {card['tries']} tries each: {gained} gained that the start never solved, {lost} lost")
    if card["crossover"]:
        print(f"from k = {card['crossover']} on the start solves as many problems, or more")
    kl = document["divergence"]
    print(f"nats: KL(start||end) {_mean(kl['forward'])}, KL(end||start) {_mean(kl['reverse'])}")
    if (far := document["from_base"]) is not None:
        print(f"nats: KL(base||end) {_mean(far['forward'])}, KL(end||base) {_mean(far['reverse'])}")
    print(f"{document['episodes']:,} episodes, {document['seconds']:.0f} s")
    for warning in card["warnings"]:
        print(f"warning: {warning}")


def _change(change: Mapping[str, Any], digits: int = 2) -> tuple[str, str, str]:
    """So short that a row has 80 columns."""
    start, end = (_mean(change[side], f".{digits}f") for side in ("start", "end"))
    return start, end, _mean(change["difference"], f"+.{digits}f")


def _mean(mean: Mapping[str, float], form: str = ".3f") -> str:
    return f"{mean['value']:{form}} [{mean['low']:{form}}, {mean['high']:{form}}]"

"""``veneer eval``."""

from __future__ import annotations

import dataclasses

import click

from veneer.cli.output import emit, format_rate, json_option


@click.command("eval", short_help="Score the base or an adapter on held-out problems, with an interval.")
@click.option("--env", default="arithmetic", show_default=True, help="An environment, or FILE.py:FACTORY.")
@click.option("--adapter", help="NAME, NAME@VERSION or a folder. Without it the base is scored.")
@click.option("--base", default="nano", show_default=True, help="A Hugging Face name, a folder, or nano.")
@click.option("--problems", type=click.IntRange(1), default=256, show_default=True)
@click.option("--max-tokens", type=click.IntRange(1), default=96, show_default=True, help="Limit of one turn.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@json_option
def command(env: str, adapter: str | None, base: str, problems: int, max_tokens: int, seed: int, threads: int, as_json: bool) -> None:
    """Play held-out problems once each at temperature 1."""
    import asyncio

    from veneer.envs import load_env

    dataset = load_env(env)
    from veneer.cli.assemble import start
    from veneer.train.evaluate import evaluate
    from veneer.train.rollouts import Policy
    from veneer.types import SamplingParams

    machine = start(base, threads)
    name = None if adapter is None else machine.load(adapter)
    policy = Policy(machine.engine, machine.renderer, name, SamplingParams(max_tokens=max_tokens))
    result = asyncio.run(evaluate(policy, dataset, problems, seed))
    rate = dataclasses.asdict(result.solved) | {"value": result.solved.value}
    document = {"env": dataset.name, "base": machine.engine.base_id, "adapter": adapter, "solved": rate, "means": result.means}

    def human() -> None:
        print(f"{dataset.name}: solved {format_rate(rate)} of {problems} held-out problems")
        for key, value in sorted(result.means.items()):
            print(f"  {key:<16} {value:.3f}")

    emit(document, as_json, human)

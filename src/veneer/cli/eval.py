"""``veneer eval``."""

from __future__ import annotations

import dataclasses

import click

from veneer.cli.output import emit, format_rate, json_option


@click.command("eval", short_help="Score the base or an adapter on held-out problems, with an interval.")
@click.option("--env", default="arithmetic", show_default=True, help="An environment, or FILE.py:FACTORY.")
@click.option("--env-arg", "env_args", multiple=True, metavar="KEY=VALUE", help="An argument of the environment. Repeatable.")
@click.option("--adapter", help="NAME, NAME@VERSION, NAME@LABEL or a folder. Without it the base is scored.")
@click.option("--base", default="nano", show_default=True, help="A Hugging Face name, a folder, or nano.")
@click.option("--problems", type=click.IntRange(1), default=256, show_default=True)
@click.option("--max-tokens", type=click.IntRange(1), default=72, show_default=True, help="Limit of one turn.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda or auto.")
@json_option
def command(
    env: str,
    env_args: tuple[str, ...],
    adapter: str | None,
    base: str,
    problems: int,
    max_tokens: int,
    seed: int,
    threads: int,
    device: str,
    as_json: bool,
) -> None:
    """Play held-out problems once each at temperature 1: what a run with this seed measures before and after.

    The score of an adapter in the registry is kept there, with its interval: see veneer adapters show.
    """
    import asyncio

    from veneer.envs import load_env
    from veneer.train.config import make_config

    settings = make_config({"env": {"name": env}}, [f"env.args.{argument}" for argument in env_args]).env
    dataset = load_env(settings.name, settings.args)
    from veneer.cli.assemble import pinned, score_of, start_for
    from veneer.store.registry import Registry, is_path
    from veneer.train.evaluate import Evaluation, evaluate
    from veneer.train.metrics import check_failures
    from veneer.train.rollouts import Policy, closing
    from veneer.types import SamplingParams

    adapter = None if adapter is None else pinned(adapter)
    machine, name = start_for(adapter, base, threads, device)
    policy = Policy(machine.engine, machine.renderer, name, SamplingParams(max_tokens=max_tokens), settings.seconds, settings.retries)

    async def played() -> Evaluation:
        async with closing(dataset):
            return await evaluate(policy, dataset, problems, seed)

    result = asyncio.run(played())
    check_failures([result.group()], settings.max_failed_share)
    solved = dataclasses.asdict(result.solved) | {"value": result.solved.value}
    score = dataclasses.asdict(result.reward) | {"trials": result.solved.trials}
    if adapter is not None and not is_path(adapter):
        Registry().add_score(adapter, score_of(dataset.name, score, seed, {"args": settings.args, "max_tokens": max_tokens}))
    document = {
        "env": dataset.name,
        "base": machine.engine.base_id,
        "adapter": adapter,
        "reward": score,
        "solved": solved,
        "means": result.means,
    }

    def human() -> None:
        print(f"{dataset.name}: reward {format_rate(score)} on {score['trials']} held-out problems, solved {format_rate(solved)}")
        for key, value in sorted(result.means.items()):
            print(f"  {key:<16} {value:.3f}")

    emit(document, as_json, human)

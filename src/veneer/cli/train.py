"""``veneer train``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from veneer.cli.output import emit, format_rate, json_option, progress

if TYPE_CHECKING:
    from veneer.train.config import RunConfig


@click.command("train", short_help="Train an adapter as a TOML file says, or go on with an interrupted run.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key, such as --set rl.steps=40. Repeatable.")
@json_option
def command(file: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Train an adapter as FILE.toml says.

    The run is kept in $VENEER_HOME/runs/NAME. The same command again goes on from the last checkpoint of an interrupted
    run, to the same bytes. A file with [[stages]] is a pipeline of runs. Keys are described in docs/configuration.md.
    """
    from veneer.train.config import load_config
    from veneer.train.pipeline import load_stages

    stages = load_stages(file, overrides)
    configs = [stage.config for stage in stages] or [load_config(file, overrides)]
    for config in configs:
        _check_scorecard(config)
    if stages:
        from veneer.cli.assemble import execute_stages

        def watch(number: int, config: Any) -> Any:
            print(f"stage {number}: {config.name} ({config.kind})", file=sys.stderr)
            _tell_scorecard(config)
            return progress(config.total_steps)

        summaries = execute_stages(stages, watch)

        def human_stages() -> None:
            for summary in summaries:
                _show(summary)

        emit({"stages": summaries}, as_json, human_stages)
        return
    from veneer.cli.assemble import execute

    _tell_scorecard(configs[0])
    with progress(configs[0].total_steps) as on_step:
        summary, _, _ = execute(configs[0], on_step)
    emit(summary, as_json, lambda: _show(summary))


def _check_scorecard(config: RunConfig) -> None:
    """It comes behind the last step, when a mistake in it would cost the run."""
    import asyncio

    from veneer.train.scorecard import check_others

    if config.scorecard.problems:
        asyncio.run(check_others(config.scorecard.envs, "scorecard.envs"))


def _tell_scorecard(config: RunConfig) -> None:
    """What one will cost, while it can still be left out."""
    from veneer.train.scorecard import most_episodes

    if not config.scorecard.problems:
        return
    beside = ""
    if config.kind == "rl":
        beside = f", beside {config.rl.steps * config.rl.groups_per_batch * config.rl.group_size:,} of the steps"
    most = most_episodes(config.scorecard, bool(config.init))
    print(f"scorecard behind the last step: up to {most:,} episodes{beside}", file=sys.stderr, flush=True)


def _show(summary: Mapping[str, Any]) -> None:
    from veneer.cli.scorecard import show_scorecard

    if "reward_before" in summary:
        print(f"held out: {format_rate(summary['reward_before'])} before, {format_rate(summary['reward_after'])} after")
    if "reward_teacher" in summary:
        print(f"the teacher: {format_rate(summary['reward_teacher'])}")
    if "nll_before" in summary:
        print(f"held-out nll: {summary['nll_before']:.4f} before, {summary['nll_after']:.4f} after")
    if "preferred_after" in summary:
        print(f"held-out pairs preferred: {format_rate(summary['preferred_after'])}, reward margin {summary['margin_after']:.3f}")
    if "kl_before" in summary:
        print(f"nats an episode from the teacher: {format_rate(summary['kl_before'])} before, {format_rate(summary['kl_after'])} after")
    if summary.get("stopped"):
        print(f"stopped early: {summary['stopped']}")
    if "scorecard" in summary:
        show_scorecard(summary["scorecard"])
    digest = summary["base_digest_after"][:16]
    print(f"adapter {summary['adapter']}, {summary['trainable_parameters']:,} parameters; base unchanged: {digest}")
    print(f"report: {summary['run_folder']}/report.html")

"""``veneer train``."""

from __future__ import annotations

from pathlib import Path

import click

from veneer.cli.output import emit, format_rate, json_option, progress


@click.command("train", short_help="Train an adapter as a TOML file says, or go on with an interrupted run.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key, such as --set rl.steps=40. Repeatable.")
@json_option
def command(file: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Train an adapter as FILE.toml says.

    The run is kept in $VENEER_HOME/runs/NAME. The same command again goes on from the last checkpoint of an interrupted
    run, to the same bytes. Keys are described in docs/configuration.md.
    """
    from veneer.train.config import load_config

    config = load_config(file, overrides)
    from veneer.cli.assemble import execute

    steps = config.rl.steps if config.kind == "rl" else config.sft.steps
    with progress(steps) as on_step:
        summary, _, _ = execute(config, on_step)

    def human() -> None:
        if "reward_before" in summary:
            print(f"held out: {format_rate(summary['reward_before'])} before, {format_rate(summary['reward_after'])} after")
        if "nll_before" in summary:
            print(f"held-out nll: {summary['nll_before']:.4f} before, {summary['nll_after']:.4f} after")
        if summary.get("stopped"):
            print(f"stopped early: {summary['stopped']}")
        digest = summary["base_digest_after"][:16]
        print(f"adapter {summary['adapter']}, {summary['trainable_parameters']:,} parameters; base unchanged: {digest}")
        print(f"report: {summary['run_folder']}/report.html")

    emit(summary, as_json, human)

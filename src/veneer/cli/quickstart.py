"""``veneer quickstart``."""

from __future__ import annotations

import os
import shutil
import sys
from typing import Any

import click

from veneer.cli.output import emit, format_rate, json_option, progress

SHOWN = 5
"""Problems that are answered with the adapter off and on at the end."""


@click.command("quickstart", short_help="Watch a rank-1 adapter learn from pass/fail rewards, then switch it on and off.")
@click.option("--seed", type=int, default=0, show_default=True, help="Fixes the adapter's start, the training problems and every draw.")
@click.option("--steps", type=click.IntRange(1), default=60, show_default=True, help="Optimizer steps of 64 episodes.")
@json_option
def command(seed: int, steps: int, as_json: bool) -> None:
    """Train a rank-1 adapter on the bundled base to add numbers step by step, from pass/fail rewards alone.

    Takes about a minute on a laptop's CPU. Shows the held-out score before and after, the proof that the base never
    changed, and the behaviour switched on and off. An interrupted quickstart goes on when it is started again.
    """
    from veneer.cli.assemble import execute, run_folder
    from veneer.store.run import SUMMARY
    from veneer.train.config import make_config

    def config_named(name: str):
        settings = {"kind": "rl", "name": name, "seed": seed, "lora": {"rank": 1}, "rl": {"steps": steps}}
        return make_config(settings)

    number, config = 1, config_named(f"quickstart-seed{seed}-{steps}")
    while (run_folder(config) / SUMMARY).exists():  # finished: a new one beside it
        number += 1
        config = config_named(f"quickstart-seed{seed}-{steps}-{number}")
    with progress(steps) as on_step:
        summary, machine, run = execute(config, on_step)
    summary |= _toggle(machine, config, run.metrics()[0], summary)
    document = {"rank": 1, **summary}
    emit(document, as_json, lambda: _show(document))
    if not summary["base_unchanged"]:
        raise click.exceptions.Exit(1)


def _toggle(machine: Any, config: Any, before: dict[str, Any], summary: dict[str, Any]) -> dict[str, Any]:
    """Answer held-out problems with the adapter off and on. Off must repeat the evaluation that was made before training."""
    import asyncio

    from veneer.envs import load_env
    from veneer.train.evaluate import evaluate
    from veneer.train.rollouts import Policy
    from veneer.types import SamplingParams

    dataset = load_env(config.env.name, config.env.args)
    params = SamplingParams(max_tokens=config.rl.max_tokens)
    answers = {}
    for label, adapter, problems in (("off", None, config.eval.problems), ("on", config.name, SHOWN)):
        policy = Policy(machine.engine, machine.renderer, adapter, params)
        answers[label] = asyncio.run(evaluate(policy, dataset, problems, config.seed))
    off_repeats = all(before[key] == value for key, value in answers["off"].metrics().items())
    shown = []
    for off, on in zip(answers["off"].trajectories[:SHOWN], answers["on"].trajectories, strict=True):
        texts = [machine.renderer.decode(t.transitions[0].sample.tokens) for t in (off, on)]
        prompt = machine.renderer.decode(off.transitions[0].prompt)
        question = prompt.split("<|im_start|>user\n")[-1].split("<|im_end|>")[0]
        shown.append({"prompt": question, "off": texts[0], "off_reward": off.reward, "on": texts[1], "on_reward": on.reward})
    return {
        "base_unchanged": summary["base_digest_before"] == machine.engine.measure_base_digest() and off_repeats,
        "off_repeats_base": off_repeats,
        "toggle": shown,
    }


def _show(d: dict[str, Any]) -> None:
    from rich.console import Console

    out = Console(highlight=False, soft_wrap=True)
    out.print(f"\n[bold]{d['episodes']:,} episodes, {d['bits']:,.0f} bits of reward, {d['seconds']:.0f} seconds[/bold]")
    out.print(f"  held-out sums solved   {format_rate(d['reward_before'])} before   {format_rate(d['reward_after'])} after")
    out.print(f"  answers step by step   {d['stepwise_before']:.3f} before   {d['stepwise_after']:.3f} after")
    out.print(f"  slips taken back       {d['self_corrected_before']:.3f} before   {d['self_corrected_after']:.3f} after")
    out.print(f"  adapter                rank 1, {d['trainable_parameters']:,} parameters, {d['adapter_bytes']:,} bytes: {d['adapter']}")
    out.print(f"  base digest            {d['base_digest_before'][:16]} before   {d['base_digest_after'][:16]} after")
    repeats = "the same answers as before training, token for token" if d["off_repeats_base"] else "NOT the answers it gave before training"
    out.print(f"  adapter off            {repeats}")
    if d["stopped"]:
        out.print(f"  stopped early          {d['stopped']}")
    for row in d["toggle"]:
        out.print(f"\n[bold]{row['prompt']}[/bold]")
        for switch in ("off", "on"):
            text = row[switch].replace("<|im_end|>", "").replace("<think>\n", "").replace("\n</think>\n\n", " -> ").replace("\n", "  ")
            out.print(f"  adapter {switch:<4} {'right' if row[switch + '_reward'] else 'wrong'}  {text.strip()}", markup=False)
    out.print(f"\nreport:  {d['run_folder']}/report.html")
    program = "veneer" if shutil.which("veneer") else os.path.relpath(sys.argv[0])  # as this shell finds it
    out.print(f"try it:  {program} sample '27+94+38=?'")
    out.print(f"         {program} sample '27+94+38=?' --adapter {d['adapter']}")

"""``veneer env``: what there is to be trained on, one's own among it, and whether it is fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from veneer.cli.output import emit, json_option, print_table

if TYPE_CHECKING:
    from veneer.train.config import EnvSettings

name_argument = click.argument("name")
args_option = click.option(
    "--env-arg",
    "env_args",
    multiple=True,
    metavar="KEY=VALUE",
    help="An argument of the environment. Repeatable.",
)
base_option = click.option("--base", default="nano", show_default=True, help="A Hugging Face name, a folder, or nano.")
MARKS = {"ok": "ok", "warning": "WARNING", "failed": "FAILED", "unknown": "-"}


@click.group("env", short_help="List, show, write and check environments.")
def command() -> None:
    """Environments: built in, of other libraries (FAMILY:ID), or in a file of one's own (FILE.py:FACTORY)."""


@command.command("list")
@click.argument("family", required=False)
@json_option
def list_envs(family: str | None, as_json: bool) -> None:
    """List the environments by name, or every ID of a FAMILY."""
    from veneer.envs.registry import ENVIRONMENTS, FAMILIES, MEMBERS
    from veneer.types import ConfigError

    if family is None:
        found = {**ENVIRONMENTS, **{f"{name}:ID": factory for name, factory in FAMILIES.items()}}
        documents = [{"name": name, "about": _about(factory), "args": _args(factory, name)} for name, factory in found.items()]

        def table() -> None:
            print_table(("environment", "what it is", "arguments"), [(d["name"], d["about"], d["args"]) for d in documents], "")

        emit(documents, as_json, table)
        return
    if family not in MEMBERS:
        raise ConfigError(f"no list of {family!r}; there is one of {', '.join(MEMBERS)}")
    names = [f"{family}:{member}" for member in MEMBERS[family]()]
    emit(names, as_json, lambda: print("\n".join(names)))


def _about(factory: Callable[..., Any]) -> str:
    """The first sentence of what it says of itself."""
    import re

    words = " ".join((factory.__doc__ or "").split("\n\n")[0].split())
    return re.split(r"(?<=\.) (?=[A-Z])", words)[0]


def _args(factory: Callable[..., Any], name: str) -> str:
    """As they are called; without the ID of a family."""
    import inspect

    parameters = list(inspect.signature(factory).parameters.values())[":" in name :]
    shown = [f"{p.name}={p.default!r}" if p.default is not p.empty else str(p).partition(":")[0].strip() for p in parameters]
    return ", ".join(shown)


def _settings(name: str, env_args: tuple[str, ...], **more: Any) -> EnvSettings:
    from veneer.train.config import make_config

    return make_config({"env": {"name": name, **more}}, [f"env.args.{argument}" for argument in env_args]).env


@command.command("show")
@name_argument
@args_option
@base_option
@click.option("--split", type=click.Choice(["train", "eval"]), default="train", show_default=True)
@click.option("--index", type=click.IntRange(0), default=0, show_default=True)
@json_option
def show(name: str, env_args: tuple[str, ...], base: str, split: Any, index: int, as_json: bool) -> None:
    """Show a problem of NAME as messages and as the base's tokens, and its solution."""
    import asyncio

    from veneer.envs import load_env

    settings = _settings(name, env_args)
    dataset = load_env(settings.name, settings.args)
    from veneer.render import load_renderer
    from veneer.train.env_check import shown_with_gold
    from veneer.train.rollouts import closing, rendered
    from veneer.types import Observation

    async def looked() -> tuple[Observation, Mapping[str, Any] | None]:
        async with closing(dataset):
            return await shown_with_gold(dataset, split, index, settings.seconds)

    first, gold = asyncio.run(looked())
    renderer = load_renderer(base)
    tokens = rendered(lambda: renderer.build_generation_prompt(first.messages, first.tools))
    document = {
        "env": dataset.name,
        "split": split,
        "index": index,
        "messages": list(first.messages),
        "tools": list(first.tools),
        "tokens": tokens.tolist(),
        "gold": gold,
    }

    def human() -> None:
        for message in first.messages:
            print(f"[{message['role']}] {message['content']}")
        for tool in first.tools:
            print(f"[tool] {tool['function']['name']}: {tool['function']['description']}")
        print(f"\n{len(tokens)} tokens on {base}:\n{renderer.decode(tokens)}")
        print(f"\nsolution: {gold['content'] or gold.get('tool_calls') if gold else 'the environment knows none'}")

    emit(document, as_json, human)


@command.command("new")
@name_argument
@json_option
def new(name: str, as_json: bool) -> None:
    """Write NAME.py, a small environment that works, and NAME.toml, which trains on it, into this folder."""
    import keyword

    from veneer.envs import example
    from veneer.types import ConfigError

    if not name.isidentifier() or keyword.iskeyword(name) or (name in vars(example) and name != "example"):
        raise ConfigError(f"{name!r} cannot name an environment: use letters, digits and _, and none of Python's own or the file's words")
    code, toml = Path(f"{name}.py"), Path(f"{name}.toml")
    for path in (code, toml):
        if path.exists():
            raise ConfigError(f"{path} is there already; choose another name, or take it away")
    source = Path(example.__file__).read_text()
    class_name = "".join(part.capitalize() for part in name.split("_") if part) + "Problems"
    code.write_text(source.replace("Example", class_name).replace("example", name))
    toml.write_text(TOML.format(name=name))
    document = {"code": str(code), "config": str(toml), "env": f"{code}:{name}"}

    def human() -> None:
        print(f"{code}, {toml}\ncheck it:  veneer env check {code}:{name}\ntrain:     veneer train {toml}")

    emit(document, as_json, human)


TOML = """# veneer train {name}.toml
kind = "rl"
base = "nano"

[lora]
rank = 1

[env]
name = "{name}.py:{name}"

[rl]
steps = 40
groups_per_batch = 8
group_size = 8
max_tokens = 48
learning_rate = 1.5e-3
"""


@command.command("check")
@name_argument
@args_option
@base_option
@click.option("--problems", type=click.IntRange(1), default=64, show_default=True, help="Of each split.")
@click.option("--group-size", type=click.IntRange(2), default=8, show_default=True, help="Of the run that is planned.")
@click.option("--max-tokens", type=click.IntRange(1), default=72, show_default=True, help="Limit of one turn.")
@click.option("--seconds", type=click.FloatRange(0, min_open=True), default=10.0, show_default=True, help="Limit of one call: env.seconds.")
@click.option("--sample/--no-sample", default=True, help="Try the problems with the base, or leave it out.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda or auto.")
@json_option
def check(
    name: str,
    env_args: tuple[str, ...],
    base: str,
    problems: int,
    group_size: int,
    max_tokens: int,
    seconds: float,
    sample: bool,
    seed: int,
    threads: int,
    device: str,
    as_json: bool,
) -> None:
    """Check that NAME can be trained on: exit code 1 if not.

    Its solution earns 1, its grader is pure and quick, its problems stay what they are, its splits share none, its prompts
    fit; and how hard it is for the base: pass@1, pass@8, and the share of groups that teach something.
    """
    import asyncio
    import dataclasses

    from veneer.envs import load_env

    settings = _settings(name, env_args, seconds=seconds)
    dataset = load_env(settings.name, settings.args)
    from veneer.render import load_renderer
    from veneer.train.env_check import Subject, check_env, passed

    if sample:
        from veneer.cli.assemble import start

        machine = start(base, threads, device=device)
        engine, renderer, context = machine.engine, machine.renderer, machine.engine.context_length
    else:
        engine, renderer = None, load_renderer(base)
        context = min(renderer.tokenizer.model_max_length, 2**31)  # what the tokenizer says: the weights are not read
    subject = Subject(dataset, renderer, context, problems, max_tokens, settings.seconds, settings.max_failed_share)
    findings = asyncio.run(check_env(subject, engine, group_size, seed))
    good = passed(findings)
    document = {"env": dataset.name, "base": base, "passed": good, "findings": [dataclasses.asdict(finding) for finding in findings]}

    def human() -> None:
        for finding in findings:
            print(f"{MARKS[finding.verdict]:<8} {finding.name:<16} {finding.detail}")

    emit(document, as_json, human)
    if not good:
        raise click.exceptions.Exit(1)

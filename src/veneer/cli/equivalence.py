"""``veneer adapters equivalence``."""

from __future__ import annotations

import click

from veneer.cli.output import emit, json_option, print_table


@click.command("equivalence", short_help="Compare trainer, server, stock PEFT and merged weights, token by token.")
@click.argument("adapter")
@click.option("--env", help="An environment, or FILE.py:FACTORY; the adapter's own, unless said otherwise.")
@click.option("--env-arg", "env_args", multiple=True, metavar="KEY=VALUE", help="An argument of the environment. Repeatable.")
@click.option(
    "--prompts", type=click.IntRange(2), default=64, show_default=True, help="Held-out problems; of an adapter without any, rows of tokens."
)
@click.option("--max-tokens", type=click.IntRange(1), help="Limit of one turn; as in the adapter's training, unless said otherwise.")
@click.option("--server", metavar="URL", help="A running veneer serve. Without it one is started.")
@click.option("--base", default="nano", show_default=True, help="A Hugging Face name, a folder, or nano.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda or auto.")
@json_option
def command(
    adapter: str,
    env: str | None,
    env_args: tuple[str, ...],
    prompts: int,
    max_tokens: int | None,
    server: str | None,
    base: str,
    seed: int,
    threads: int,
    device: str,
    as_json: bool,
) -> None:
    """Have ADAPTER write, and ask every program how likely each of its tokens was: the trainer, the sampler, a server over HTTP, PEFT in a
    process without Veneer, and the merged weights in stock transformers.

    A gap over its limit is exit code 1. Rewards are weighted by the gaps: what each program would have earned, from the same texts.
    $VENEER_API_KEY is the key of a server that asks for one.
    """
    from veneer.cli.assemble import home_of, pinned, start
    from veneer.cli.sides import compare_sides

    adapter = pinned(adapter)
    home = home_of(adapter, env, env_args, max_tokens)
    machine = start(base, threads, device=device)
    document = compare_sides(machine, adapter, home, prompts, seed, base, threads, server)

    def human() -> None:
        prompts_of = "rows of tokens" if document["env"] is None else f"problems of {document['env']}"
        print(f"{document['adapter']} on {document['base']}: {document['texts']} {prompts_of}, {document['tokens']:,} sampled tokens;")
        print("gaps to the trainer, in nats and in reward with 95% intervals")
        rows = [
            (
                name,
                f"{side['largest']:.1e}",
                f"{side['limit']:g}",
                "-" if side["reward"] is None else "{value:+.0e} [{low:+.0e}, {high:+.0e}]".format(**side["reward"]),
                "equal" if side["within"] else "DIFFERS",
            )
            for name, side in document["sides"].items()
        ]
        print_table(("side", "largest gap", "limit", "reward gap", "verdict"), rows, "")
        for name, why in document["left_out"].items():
            print(f"{name} was not asked: {why}")

    emit(document, as_json, human)
    if not document["equal"]:
        raise click.exceptions.Exit(1)

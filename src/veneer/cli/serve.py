"""``veneer serve``."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("serve", short_help="Train and answer over HTTP: the Tinker protocol and the OpenAI API.")
@click.option(
    "--base", "bases", multiple=True, default=("nano",), show_default=True, help="A Hugging Face name, a folder, or nano. Repeatable."
)
@click.option("--alias", "aliases", multiple=True, metavar="NAME=BASE", help="Another name for a base. Repeatable.")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=click.IntRange(0, 65535), default=8321, show_default=True, help="0 takes a free one.")
@click.option("--threads", type=click.IntRange(1), help="Of the engines. All cores unless said otherwise.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda or auto.")
@click.option("--max-body", type=click.IntRange(1), default=256, show_default=True, help="MiB of one request; of JSON at most 16.")
@click.option(
    "--adapter-memory",
    type=click.FloatRange(0, min_open=True),
    default=2.0,
    show_default=True,
    help="GiB for adapters that answer, on each base, and as much for those in training. What does nothing leaves for what is needed.",
)
@click.option("--rate", type=click.FloatRange(0, min_open=True), help="Requests a second of one key. No limit unless given.")
@click.option(
    "--log", type=click.Path(dir_okay=False, path_type=Path), help="Where a JSON line for each request goes. On stderr otherwise."
)
@click.option(
    "--lora-dir",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Clients may load adapters from inside of this folder (/v1/load_lora_adapter).",
)
def command(
    bases: tuple[str, ...],
    aliases: tuple[str, ...],
    host: str,
    port: int,
    threads: int | None,
    device: str,
    max_body: int,
    adapter_memory: float,
    rate: float | None,
    log: Path | None,
    lora_dir: Path | None,
) -> None:
    """Hold bases in memory; train and serve adapters on them. State is in $VENEER_HOME/server and outlives the process.

    With keys (veneer keys) every request needs one, but for /healthz, /api/v1/healthz and, from this machine, /metrics. Without keys the
    server listens on loopback only, and answers everyone there.
    """
    from veneer.cli.hosting import serve
    from veneer.server.limits import MIB, Limits

    serve(bases, aliases, host, port, threads, device, Limits(max_body * MIB, rate=rate), log, lora_dir, int(adapter_memory * 2**30))

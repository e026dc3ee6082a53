"""``veneer adapters interfere``."""

from __future__ import annotations

from pathlib import Path

import click

from veneer.cli.output import emit, json_option

MATRIX = "matrix.json"


@click.command("interfere", short_help="Measure adapters alone and stacked in pairs on each other's tasks.")
@click.argument("adapters", nargs=-1, required=True)
@click.option("--env", "envs", multiple=True, help="The task of each adapter, in their order; their own, unless given. Repeatable.")
@click.option("--problems", type=click.IntRange(1), default=256, show_default=True, help="Held-out problems of each task.")
@click.option("--max-tokens", type=click.IntRange(1), help="Limit of one turn; as in each adapter's training, unless said otherwise.")
@click.option("--scale", type=float, default=1.0, show_default=True, help="Of each part of a stack.")
@click.option("--base", default="nano", show_default=True, help="A Hugging Face name, a folder, or nano.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="A folder for table, picture and numbers; in $VENEER_HOME/studies, unless given."
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda or auto.")
@json_option
def command(
    adapters: tuple[str, ...],
    envs: tuple[str, ...],
    problems: int,
    max_tokens: int | None,
    scale: float,
    base: str,
    out: Path | None,
    seed: int,
    threads: int,
    device: str,
    as_json: bool,
) -> None:
    """Measure the base, each of ADAPTERS, and each two of them stacked, on every adapter's task: the same held-out problems and the same
    draws for all, compared problem by problem."""
    import asyncio
    import json

    from veneer.cli.assemble import home_of, pinned, start
    from veneer.store.files import new_folder, veneer_home
    from veneer.studies.interference import Task, as_document, as_table, draw, interfere
    from veneer.types import AdapterError, StorageError

    if len(adapters) < 2:
        raise click.UsageError("give two adapters or more")
    if envs and len(envs) != len(adapters):
        raise click.UsageError(f"--env is given {len(envs)} times for {len(adapters)} adapters; give one for each, or none")
    references = [pinned(reference) for reference in adapters]
    folder = out or veneer_home() / "studies" / ("interference-" + "+".join(reference.replace("/", "_") for reference in references))
    if folder.exists() and not (folder / MATRIX).is_file():
        raise StorageError(f"{folder} holds something else than a matrix; give another --out")
    tasks: dict[str, Task] = {}
    for reference, env in zip(references, envs or [None] * len(references), strict=True):
        home = home_of(reference, env, max_tokens=max_tokens)
        if home is None:
            raise AdapterError(f"adapter {reference!r} was trained in no environment; say by --env what each adapter is for")
        tasks[reference] = Task(home.env.name, home.dataset(), home.max_tokens)
    machine = start(base, threads, device=device)
    checkpoints = {reference: machine.read(reference) for reference in references}
    matrix = asyncio.run(interfere(machine.engine, machine.renderer, checkpoints, tasks, problems, seed, scale=scale))
    document = {"base": machine.engine.base_id, "problems": problems, "seed": seed, "scale": scale, **as_document(matrix)}
    with new_folder(folder) as aside:
        (aside / MATRIX).write_text(json.dumps(document, indent=1) + "\n")
        (aside / "matrix.md").write_text(as_table(matrix))
        draw(matrix, aside / "matrix.svg")

    def human() -> None:
        print(as_table(matrix))
        print(f"picture, table and numbers: {folder}")

    emit({"folder": str(folder), **document}, as_json, human)

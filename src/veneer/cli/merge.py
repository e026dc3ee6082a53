"""``veneer adapters merge``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from veneer.cli.output import emit, json_option

if TYPE_CHECKING:
    from veneer.types import Checkpoint

RECORD = "veneer-merge.json"


@click.command("merge", short_help="Add adapters to the base's own weights and write the model.")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER[:SCALE]...")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--base", default="nano", show_default=True, help="A Hugging Face name, a folder, or nano.")
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="What is stored. As the base is, unless said otherwise."
)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@json_option
def command(adapters: tuple[str, ...], folder: Path, base: str, dtype: str | None, threads: int, as_json: bool) -> None:
    """Write the base with ADAPTERS in its weights to FOLDER, as stock transformers loads it.

    What was written is read back and must say what base and adapters say; else nothing is left of it. A merged adapter cannot be switched
    off, and storing 16 bits loses the part of it that is smaller than a weight's last bit: the loss is told.
    """
    import dataclasses
    import json

    from veneer.cli.adapters import with_scale
    from veneer.cli.assemble import pinned, start
    from veneer.engine.merge import expect, verify_merged, write_merged
    from veneer.measure.canary import check_loaded
    from veneer.store.files import new_folder
    from veneer.types import AdapterError

    if folder.exists():
        raise AdapterError(f"{folder} exists already; give another folder")
    machine = start(base, threads, device="cpu")
    named = [(pinned(reference), scale) for reference, scale in map(with_scale, adapters)]
    parts = [(machine.read(reference), scale) for reference, scale in named]
    checkpoint = _sum(parts)
    machine.engine.load_state("merged", checkpoint).result()
    check_loaded(machine.engine, "merged", checkpoint, machine.canary)
    expected = expect(machine.engine, "merged", machine.canary)
    with new_folder(folder) as aside:
        rounding = write_merged(base, checkpoint, aside, dtype)
        gaps = verify_merged(aside, expected, rounding.dtype)
        document = {
            "base": machine.engine.base_id,
            "base_digest": machine.engine.base_digest,
            "adapters": [
                {"adapter": reference, "digest": checkpoint.adapter.digest, "scale": scale}
                for (reference, scale), (checkpoint, _) in zip(named, parts, strict=True)
            ],
            **dataclasses.asdict(rounding),
            "gaps": dataclasses.asdict(gaps),
        }
        (aside / RECORD).write_text(json.dumps(document, indent=2) + "\n")
        (aside / "README.md").write_text(_card(document))

    def human() -> None:
        print(f"{' + '.join(adapters)} -> {folder} ({rounding.dtype})")
        print(f"  lost to rounding            {rounding.lost:.2g} of the update; {rounding.changed:.3f} of the adapted weights moved")
        print(f"  largest gap to the adapter  {gaps.adapter:.2g} nats (limit {gaps.limit:g})")
        print(f"  largest gap to the base     {gaps.base:.2g} nats")

    emit({"folder": str(folder), **document}, as_json, human)


def _sum(parts: Sequence[tuple[Checkpoint, float]]) -> Checkpoint:
    from veneer.store.stack import stack_adapters
    from veneer.types import AdapterError

    for checkpoint, _ in parts:
        if checkpoint.config is None:
            raise AdapterError(f"adapter {checkpoint.adapter.name!r} is a fully fine-tuned copy: there is no update to merge")
    if len(parts) == 1 and parts[0][1] == 1:
        return parts[0][0]  # with its canary
    return stack_adapters(parts, "+".join(checkpoint.adapter.name for checkpoint, _ in parts))


def _card(document: dict[str, Any]) -> str:
    lines = ["---", f"base_model: {document['base']}", "library_name: transformers", "pipeline_tag: text-generation"]
    lines += ["tags: [merged, veneer]", "---", f"# {document['base']}, merged", ""]
    lines.append(f"The weights of `{document['base']}` (digest `{document['base_digest'][:16]}`) with these adapters added to them:")
    lines += ["", *(f"- `{a['adapter']}` (digest `{a['digest'][:16]}`), scale {a['scale']:g}" for a in document["adapters"]), ""]
    lines.append(f"Stored in {document['dtype']}, which cost {document['lost']:.2g} of the update (|stored - exact| / |update|).")
    if document["untied"]:
        lines.append("The unembedding, one with the embedding in the base, is a matrix of its own here, as it was adapted.")
    gaps = document["gaps"]
    lines.append(f"Read back by stock transformers, log-probabilities differ from base and adapter by up to {gaps['adapter']:.2g} nats,")
    lines.append(f"from the base alone by up to {gaps['base']:.2g}. Numbers are in `{RECORD}`.")
    return "\n".join(lines) + "\n"

"""``veneer adapters``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from veneer.cli.output import emit, format_rate, json_option, print_table


@click.group("adapters", short_help="List, show, export and import adapters.")
def command() -> None:
    """Adapters in $VENEER_HOME/adapters: PEFT folders with a manifest."""


@command.command("list")
@json_option
def list_adapters(as_json: bool) -> None:
    """List every version of every adapter."""
    from veneer.store.registry import Registry

    registry = Registry()
    documents = [_document(f"{name}@{version}") for name in registry.names() for version in registry.versions(name)]

    def human() -> None:
        rows = [
            (
                d["reference"],
                d["base_id"],
                d["lora"]["rank"] if d["lora"] else "full",
                d["digest"][:12],
                format_rate(d["scores"]["reward_after"]) if "reward_after" in d["scores"] else "-",
            )
            for d in documents
        ]
        print_table(("adapter", "base", "rank", "digest", "score"), rows, "no adapters yet; start with: veneer quickstart")

    emit(documents, as_json, human)


def _document(reference: str) -> dict[str, Any]:
    from veneer.store.adapters import read_adapter
    from veneer.store.registry import Registry

    folder = Registry().find(reference)
    checkpoint, manifest = read_adapter(folder)
    sizes = {"parameters": sum(a.size for a in checkpoint.weights.values()), "bytes": sum(a.nbytes for a in checkpoint.weights.values())}
    return {"reference": reference, "folder": str(folder), **sizes, **manifest, "scores": manifest.get("scores") or {}}


@command.command("show")
@click.argument("adapter")
@json_option
def show(adapter: str, as_json: bool) -> None:
    """Show an adapter's manifest, after checking its weights against their digest."""
    document = _document(adapter)

    def human() -> None:
        for key, value in document.items():
            print(f"{key:<18} {value}")

    emit(document, as_json, human)


@command.command("export")
@click.argument("adapter")
@click.argument("folder", type=click.Path(path_type=Path))
@json_option
def export(adapter: str, folder: Path, as_json: bool) -> None:
    """Copy ADAPTER to FOLDER, which stock PEFT loads."""
    from veneer.store.registry import Registry

    Registry().export(adapter, folder)
    emit({"adapter": adapter, "folder": str(folder)}, as_json, lambda: print(f"{adapter} -> {folder}"))


@command.command("import")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--name", required=True, help="Its name in the registry.")
@click.option("--base", help="The base that it was made for; without it, nano, and only if the folder names no other.")
@json_option
def import_(folder: Path, name: str, base: str | None, as_json: bool) -> None:
    """Import a PEFT LoRA FOLDER. What cannot be represented exactly is refused by name."""
    from veneer.assets import NANO
    from veneer.cli.assemble import start
    from veneer.measure.canary import check_loaded, with_canary
    from veneer.store.adapters import MANIFEST, facts_of, read_manifest, read_peft, recorded_base
    from veneer.store.registry import Registry, check_name
    from veneer.types import AdapterError

    check_name(name)
    recorded = recorded_base(folder)
    if base is None and Path(recorded or NANO).name != NANO:
        raise AdapterError(f"{folder} was made for base {recorded!r}; say which base it is to run on, such as --base {recorded}")
    machine = start(base or NANO, threads=1)
    if (folder / MANIFEST).is_file():
        checkpoint, facts = machine.read(str(folder.resolve())), facts_of(read_manifest(folder))
    else:
        checkpoint, facts = read_peft(folder, name, machine.engine.base_id, machine.engine.base_digest), {}
    machine.engine.load_state(name, checkpoint).result()
    check_loaded(machine.engine, name, checkpoint, machine.canary)
    checkpoint = checkpoint if checkpoint.canary else with_canary(machine.engine, name, checkpoint, machine.canary)
    digests = {"tokenizer_digest": machine.renderer.tokenizer_digest, "template_digest": machine.renderer.template_digest}
    version = Registry().put(name, checkpoint, {**facts, **digests, "imported_from": folder.name})
    emit({"adapter": f"{name}@{version}", "digest": checkpoint.adapter.digest}, as_json, lambda: print(f"{folder} -> {name}@{version}"))

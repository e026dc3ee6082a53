"""``veneer adapters``: the registry."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from veneer.cli.lazy import LazyGroup
from veneer.cli.output import emit, format_rate, json_option, print_table

if TYPE_CHECKING:
    from veneer.store.entry import Entry
    from veneer.store.registry import Registry
    from veneer.types import Checkpoint

ADAPTER = "ADAPTER is NAME (what its label live points to, else its newest version), NAME@3, NAME@LABEL, sha256:DIGEST or a folder."
label_option = click.option("--label", default="live", show_default=True, help="A name for a place that moves.")


class Verbs(LazyGroup):
    elsewhere = ("merge", "equivalence", "interfere", "overlap")


@click.group("adapters", cls=Verbs, short_help="Versions, labels, lineage and signatures of adapters; in from PEFT and out to it.")
def command() -> None:
    """Adapters in $VENEER_HOME/adapters: PEFT folders with a manifest and a signature, and an index over them."""


def _registry() -> Registry:
    from veneer.store.registry import Registry

    return Registry()


# ---------------------------------------------------------------- looking


@command.command("list")
@json_option
def list_adapters(as_json: bool) -> None:
    """List every version of every adapter."""
    documents = [entry.document() for entry in _registry().entries()]

    def human() -> None:
        rows = [
            (
                d["reference"],
                ", ".join(d["labels"]) or "-",
                d["base_id"],
                "full" if d["rank"] is None else d["rank"],
                d["stage"],
                d["digest"][:12],
                _last_score(d),
            )
            for d in documents
        ]
        columns = ("adapter", "labels", "base", "rank", "made by", "digest", "last score")
        print_table(columns, rows, "no adapters yet; start with: veneer quickstart")

    emit(documents, as_json, human)


def _last_score(document: Mapping[str, Any]) -> str:
    score = document["scores"][-1] if document["scores"] else None
    return "-" if score is None else f"{score['env']} {format_rate(score)}"


@command.command("show", epilog=ADAPTER)
@click.argument("adapter")
@json_option
def show(adapter: str, as_json: bool) -> None:
    """Show all that is known of ADAPTER, after comparing its files with signature and digests."""
    from veneer.store.adapters import read_manifest

    registry = _registry()
    checkpoint, entry = registry.read(adapter)
    sizes = {"parameters": sum(a.size for a in checkpoint.weights.values()), "bytes": sum(a.nbytes for a in checkpoint.weights.values())}
    made_from = [ancestor.reference for ancestor in registry.lineage(adapter)]  # the base is the last
    known = {"steps": checkpoint.adapter.version, "lineage": made_from, **sizes}
    document = {**read_manifest(entry.folder), **known, **entry.document()}

    def human() -> None:
        for key, value in document.items():
            print(f"{key:<18} {value}")

    emit(document, as_json, human)


@command.command("lineage", epilog=ADAPTER)
@click.argument("adapter")
@json_option
def lineage(adapter: str, as_json: bool) -> None:
    """Show what ADAPTER was made from, back to the base."""
    import dataclasses

    chain = [dataclasses.asdict(ancestor) for ancestor in _registry().lineage(adapter)]

    def human() -> None:
        for a in chain:
            away = "" if a["state"] == "here" else f"  ({a['state']})"
            print(f"{'  ' * a['depth']}{a['reference']}  {a['stage'] or ''}  {a['digest'][:12]}{away}")

    emit(chain, as_json, human)


@command.command("verify", epilog=ADAPTER)
@click.argument("adapter", required=False)
@json_option
def verify(adapter: str | None, as_json: bool) -> None:
    """Compare every file of ADAPTER, or of all adapters, with signature and digests."""
    from veneer.types import AdapterError

    registry = _registry()
    documents: list[dict[str, Any]] = []
    for entry in registry.entries() if adapter is None else [registry.resolve(adapter)]:
        try:
            registry.read(entry)
            problem = None
        except AdapterError as error:
            problem = str(error)
        signed = {"signed_by": entry.signed_by, "trusted": entry.trusted}
        documents.append({"reference": entry.reference, "intact": problem is None, **signed, "problem": problem})

    def human() -> None:
        rows = [(d["reference"], "intact" if d["intact"] else "DAMAGED", _signer(d), d["problem"] or "") for d in documents]
        print_table(("adapter", "files", "signature", ""), rows, "no adapters yet; start with: veneer quickstart")

    emit(documents, as_json, human)
    if not all(d["intact"] for d in documents):
        raise click.exceptions.Exit(1)


def _signer(document: Mapping[str, Any]) -> str:
    if document["signed_by"] is None:
        return "unsigned"
    return f"{document['signed_by'][:16]} {'trusted' if document['trusted'] else 'UNKNOWN KEY'}"


# ---------------------------------------------------------------- in and out


@command.command("export", epilog=ADAPTER)
@click.argument("adapter")
@click.argument("folder", type=click.Path(path_type=Path))
@json_option
def export(adapter: str, folder: Path, as_json: bool) -> None:
    """Copy ADAPTER with its signature to FOLDER, which stock PEFT loads."""
    entry = _registry().export(adapter, folder)
    document = {"adapter": entry.reference, "digest": entry.digest, "folder": str(folder)}
    emit(document, as_json, lambda: print(f"{entry.reference} -> {folder}"))


@command.command("import")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--name", required=True, help="Its name in the registry.")
@click.option("--base", help="The base that it was made for; without it, nano, and only if the folder names no other.")
@click.option("--sign", is_flag=True, help="Vouch for it, though it is not signed by a key that this home trusts.")
@json_option
def import_(folder: Path, name: str, base: str | None, sign: bool, as_json: bool) -> None:
    """Import a PEFT LoRA FOLDER. What cannot be represented exactly is refused by name.

    It stays unsigned unless a key that this home trusts has signed it, or --sign is given.
    """
    from veneer.assets import NANO
    from veneer.cli.assemble import start
    from veneer.measure.canary import check_loaded, with_canary
    from veneer.store.adapters import MANIFEST, recorded_base
    from veneer.store.foreign import read_peft
    from veneer.store.registry import check_name
    from veneer.types import AdapterError

    check_name(name)
    recorded = recorded_base(folder)
    if base is None and Path(recorded or NANO).name != NANO:
        raise AdapterError(f"{folder} was made for base {recorded!r}; say which base it is to run on, such as --base {recorded}")
    machine = start(base or NANO, threads=1)
    registry = _registry()
    if (folder / MANIFEST).is_file():
        checkpoint, facts, entry = _from_veneer(registry, folder)
        machine.check(entry, f"adapter {str(folder)!r}")
        signed = sign or entry.trusted
    else:
        engine = machine.engine
        checkpoint, facts = read_peft(folder, name, engine.base_id, engine.base_digest, machine.has_weight)
        facts |= {"imported_from": {"folder": folder.name}}
        signed = sign
    machine.engine.load_state(name, checkpoint).result()
    check_loaded(machine.engine, name, checkpoint, machine.canary)
    checkpoint = checkpoint if checkpoint.canary else with_canary(machine.engine, name, checkpoint, machine.canary)
    digests = {"tokenizer_digest": machine.renderer.tokenizer_digest, "template_digest": machine.renderer.template_digest}
    version = registry.put(name, checkpoint, {**facts, **digests, "stage": "import"}, signed=signed)
    put = registry.resolve(f"{name}@{version}")
    document = {"adapter": put.reference, "digest": put.digest, "signed_by": put.signed_by, "trusted": put.trusted}
    emit(document, as_json, lambda: print(f"{folder} -> {put.reference} ({_signer(document)})"))


def _from_veneer(registry: Registry, folder: Path) -> tuple[Checkpoint, dict[str, Any], Entry]:
    """What an export of another home says of itself; its parent is what it was there."""
    from veneer.store.adapters import facts_of, read_manifest

    checkpoint, entry = registry.read(str(folder.resolve()))
    manifest = read_manifest(folder)
    place = manifest.get("registry")
    origin = f"{entry.name}@{place['version']}" if place else entry.name
    facts = facts_of(manifest)
    told = {"folder": folder.name, "signed_by": entry.signed_by, "stage": entry.stage, "parents": facts.get("parents") or []}
    parents = [{"reference": origin, "digest": entry.digest}]
    return checkpoint, {**facts, "parents": parents, "imported_from": told}, entry


@command.command("fork", epilog=ADAPTER)
@click.argument("adapter")
@click.argument("name")
@json_option
def fork(adapter: str, name: str, as_json: bool) -> None:
    """Begin a line of its own: ADAPTER as version 1 of NAME, with ADAPTER as its parent."""
    entry = _registry().fork(adapter, name)
    emit(entry.document(), as_json, lambda: print(f"{entry.parents[0].reference} -> {entry.reference}"))


@command.command("stack")
@click.argument("name")
@click.argument("adapters", nargs=-1, required=True)
@json_option
def stack(name: str, adapters: tuple[str, ...], as_json: bool) -> None:
    """Add ADAPTERS up to one adapter NAME; each is an adapter, or ADAPTER:SCALE, such as terse@2:0.5."""
    import dataclasses

    from veneer.store.adapters import ALORA, read_manifest
    from veneer.store.entry import check_compatible
    from veneer.store.registry import as_parent
    from veneer.store.stack import stack_adapters
    from veneer.types import AdapterError

    registry = _registry()
    read = [(*registry.read(reference), scale) for reference, scale in map(with_scale, adapters)]
    first = read[0][1]
    for _, entry, _ in read:
        check_compatible(entry, first.base_digest, first.tokenizer_digest, first.template_digest)
        if read_manifest(entry.folder).get(ALORA):
            raise AdapterError(f"{entry.reference} acts from its invocation tokens on ({ALORA}); in a stack it would act everywhere")
    checkpoint = stack_adapters([(checkpoint, scale) for checkpoint, _, scale in read], name)
    facts = {
        "tokenizer_digest": first.tokenizer_digest,
        "template_digest": first.template_digest,
        "stage": "stack",
        "parents": [dataclasses.asdict(as_parent(entry, scale)) for _, entry, scale in read],
    }
    version = registry.put(name, checkpoint, facts, signed=all(entry.trusted for _, entry, _ in read))
    put = registry.resolve(f"{name}@{version}")
    emit(put.document(), as_json, lambda: print(f"{put.reference}, rank {put.rank}: {' + '.join(adapters)}"))


def with_scale(text: str) -> tuple[str, float]:
    """ADAPTER or ADAPTER:SCALE."""
    reference, colon, scale = text.rpartition(":")
    if not colon or (text.startswith("sha256:") and text.count(":") == 1):
        return text, 1.0
    try:
        return reference, float(scale)
    except ValueError:
        raise click.UsageError(f"{text!r}: {scale!r} is no scale; write ADAPTER:SCALE, such as terse@2:0.5") from None


# ---------------------------------------------------------------- labels


@command.command("promote")
@click.argument("adapter", metavar="NAME@VERSION")
@label_option
@json_option
def promote(adapter: str, label: str, as_json: bool) -> None:
    """Point a label to NAME@VERSION, after checking its files. NAME alone then means that version."""
    registry = _registry()
    name, _, version = adapter.partition("@")
    if not version:
        raise click.UsageError(f"say which version of {name!r} to promote, such as {name}@3")
    entry = registry.resolve(adapter)
    _show_labels(registry.promote(entry.name, entry.version, label), label, as_json)


@command.command("rollback")
@click.argument("name")
@label_option
@json_option
def rollback(name: str, label: str, as_json: bool) -> None:
    """Point a label of NAME to where it pointed before."""
    _show_labels(_registry().rollback(name, label), label, as_json)


def _show_labels(entry: Entry, label: str, as_json: bool) -> None:
    registry = _registry()
    history = [{"at": at, "version": version} for at, version in registry.history(entry.name, label)]
    document = {"adapter": entry.reference, "label": label, "labels": registry.labels(entry.name), "history": history}
    emit(document, as_json, lambda: print(f"{entry.name}@{label} -> {entry.reference}"))


# ---------------------------------------------------------------- forgetting and upkeep


@command.command("forget", epilog=ADAPTER)
@click.argument("adapter")
@click.option("--reason", default="", help="Kept in the receipt.")
@click.option("--with-children", "children", flag_value="forget", help="Forget also what was made from it.")
@click.option("--keep-children", "children", flag_value="keep", help="Leave what was made from it.")
@click.option("--with-runs", is_flag=True, help="Delete the run folders of this home that hold the same weights, with their rollouts.")
@json_option
def forget(adapter: str, reason: str, children: Any, with_runs: bool, as_json: bool) -> None:
    """Delete a version, or all versions of a NAME, for good: files, index, labels. Leaves a signed receipt."""
    registry = _registry()
    receipt = registry.forget(adapter, reason, children or "refuse", with_runs=with_runs)

    def human() -> None:
        for record in receipt.statement["forgotten"]:
            labels = f", which {', '.join(record['labels'])} pointed to" if record["labels"] else ""
            print(f"forgotten: {record['reference']}{labels} ({sum(f['bytes'] for f in record['files']):,} bytes)")
        for run in receipt.statement["runs"]:
            print(f"deleted: {run}")
        for copy in receipt.statement["left"]:
            print(f"still there: {copy['what']}: {copy['why']}")
        print(f"receipt: {receipt.path}")

    emit(receipt.document(), as_json, human)


@command.command("reindex")
@json_option
def reindex(as_json: bool) -> None:
    """Build a lost or damaged index again from the folders."""
    import dataclasses

    from veneer.store.reindex import reindex as build

    found = build(_registry())

    def human() -> None:
        print(f"{len(found.added)} versions added to the index" + (f": {', '.join(found.added)}" if found.added else ""))
        for reference in found.missing:
            print(f"{reference}: its files are missing")
        for what, why in found.left_out:
            print(f"left out: {what}: {why}")
        if found.set_aside:
            print(f"the damaged index is now {found.set_aside}; labels and later scores were in it alone")

    emit(dataclasses.asdict(found), as_json, human)


@command.command("trust")
@click.argument("key", required=False)
@click.option("--note", default="", help="Whose it is.")
@click.option("--remove", is_flag=True, help="Trust it no longer.")
@json_option
def trust(key: str | None, note: str, remove: bool, as_json: bool) -> None:
    """Trust a signer's KEY: ed25519:HEX, or a PEM file of the public key. Without one, list the home's own key and the trusted ones."""
    keys = _registry().keys
    if key is not None and remove:
        keys.distrust(key)
    elif key is not None:
        keys.trust(key, note)
    elif remove or note:
        raise click.UsageError("--remove and --note need a KEY")
    document = {"own": keys.own(), "trusted": keys.trusted()}

    def human() -> None:
        print(f"{document['own'] or 'none yet; it is made with the first adapter'}  (this home's)")
        for name, about in keys.trusted().items():
            print(f"{name}  {about}")

    emit(document, as_json, human)

"""``veneer adapters overlap``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from veneer.cli.output import emit, json_option, print_table


@click.command("overlap", short_help="Which directions two adapters share: do their updates go the same way?")
@click.argument("one")
@click.argument("other")
@json_option
def command(one: str, other: str, as_json: bool) -> None:
    """Compare the subspaces that the updates of two adapters write to and read from, beside what two random ones would share.

    ONE and OTHER are NAME, NAME@3, NAME@LABEL, sha256:DIGEST or a folder, made for one base. Matrices that both adapt are compared,
    the 64 strongest directions of each at most. No weights of the base are read.
    """
    from veneer.measure.anatomy import thin_updates
    from veneer.measure.subspaces import compare_directions, directions_of, in_short
    from veneer.store.entry import check_compatible
    from veneer.store.registry import Registry
    from veneer.types import AdapterError

    registry = Registry()
    (first, entry), (second, beside) = registry.read(one), registry.read(other)
    check_compatible(beside, entry.base_digest, None, None, what=f"adapter {other!r}, beside {one!r},")
    updates = []
    for reference, checkpoint in ((one, first), (other, second)):
        if checkpoint.config is None:
            raise AdapterError(f"adapter {reference!r} is a fully fine-tuned copy; directions are those of low-rank adapters")
        updates.append(thin_updates(checkpoint.weights, checkpoint.config))
        if not any(update.left.any() for update in updates[-1].values()):
            raise AdapterError(f"adapter {reference!r} changes nothing, so it has no directions")
    directions = [directions_of(found) for found in updates]
    if not set(directions[0]) & set(directions[1]):
        adapted = " and ".join(f"{reference!r} {_places(found)}" for reference, found in zip((one, other), updates, strict=True))
        raise AdapterError(f"no matrix is adapted by both: {adapted}")
    left_out = sorted(set(directions[0]) ^ set(directions[1]))
    common = in_short(compare_directions(*directions))
    document = {"one": entry.reference, "other": beside.reference, "common": common, "left_out": left_out}
    emit(document, as_json, lambda: _show(document))


def _places(updates: Mapping[str, object]) -> str:
    """The ends of the names, a layer's matrices together: q_proj, up_proj."""
    return ", ".join(dict.fromkeys(name.removesuffix(".weight").rpartition(".")[2] for name in updates))


def _show(document: Mapping[str, Any]) -> None:
    rows = [
        (kind, one["matrices"], f"{one['directions']:.3g}", *(cell for side in ("written", "read") for cell in _cells(one[side])))
        for kind, one in document["common"].items()
    ]
    print(f"directions of its update that {document['one']} shares with {document['other']}")
    print_table(("matrices", "", "of", "written to", "by chance", "read from", "by chance"), rows, "")
    if document["left_out"]:
        print(f"left out, as only one of the two changes them: {_places(dict.fromkeys(document['left_out']))}")


def _cells(share: Mapping[str, float]) -> tuple[str, str]:
    return f"{share['measured']:.1%}", f"{share['null']:.1%} +- {2 * share['null_sd']:.1%}"

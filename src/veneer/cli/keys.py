"""``veneer keys``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from veneer.cli.output import emit, json_option, print_table

if TYPE_CHECKING:
    from veneer.server.keys import Key, Keys


@click.group("keys", short_help="Make, list and revoke the keys of the server.")
def command() -> None:
    """Keys of the server in $VENEER_HOME/server/keys.sqlite. A running server sees every change at once."""


def _keys() -> Keys:
    from veneer.server.keys import Keys
    from veneer.store.files import veneer_home

    return Keys(veneer_home() / "server")


def _document(key: Key) -> dict[str, Any]:
    return {"name": key.name, "id": key.id, "adapters": list(key.adapters), "created": _time(key.created), "used": _time(key.used)}


def _time(seconds: float | None) -> str | None:
    from datetime import UTC, datetime

    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


@command.command("create")
@click.option("--name", required=True, help="Whose it is. What is made with a key belongs to its name.")
@click.option(
    "--adapters", multiple=True, default=("*",), show_default=True, metavar="PATTERN", help="It may see and change these. Repeatable."
)
@json_option
def create(name: str, adapters: tuple[str, ...], as_json: bool) -> None:
    """Make a key, and print it this once: only a hash of it is kept."""
    key, known = _keys().create(name, adapters)

    def human() -> None:
        click.echo(f"the key of {name}, which is not shown again:", err=True)
        click.echo(key)

    emit({"key": key, **_document(known)}, as_json, human)


@command.command("list")
@json_option
def list_keys(as_json: bool) -> None:
    """List the keys: whose they are, what they may see, when they were used."""
    documents = [_document(key) for key in _keys().all()]

    def human() -> None:
        rows = [(d["name"], f"tml-{d['id']}-...", " ".join(d["adapters"]), d["created"], d["used"] or "never") for d in documents]
        print_table(("name", "key", "adapters", "created", "used"), rows, "no keys; make one: veneer keys create --name NAME")

    emit(documents, as_json, human)


@command.command("revoke")
@click.argument("name")
@json_option
def revoke(name: str, as_json: bool) -> None:
    """Revoke the key of NAME: its next request is refused. What was made with it stays, for the next key of that name."""
    keys = _keys()
    revoked = keys.revoke(name)
    last = not keys.any()

    def human() -> None:
        print(f"revoked the key of {name}")
        if last:
            print("no key is left: a server that is started now answers everyone on this machine")

    emit({**_document(revoked), "last": last}, as_json, human)

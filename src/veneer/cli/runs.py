"""``veneer runs``."""

from __future__ import annotations

import click

from veneer.cli.output import emit, format_rate, json_option, print_table


@click.command("runs", short_help="List the runs in $VENEER_HOME.")
@json_option
def command(as_json: bool) -> None:
    """List the runs in $VENEER_HOME/runs with their scores before and after."""
    import json
    import tomllib

    from veneer.store.files import veneer_home
    from veneer.store.run import CONFIG, METRICS, SUMMARY

    documents = []
    for folder in sorted((veneer_home() / "runs").glob("*")):
        if not (folder / CONFIG).is_file():
            continue
        config = tomllib.loads((folder / CONFIG).read_text())
        done = (folder / SUMMARY).is_file()
        summary = json.loads((folder / SUMMARY).read_text()) if done else {}
        kind, loop = config["kind"], config[config["kind"]]
        plays = kind in ("rl", "rejection") or (kind == "distill" and not loop["data"])
        lines = (folder / METRICS).read_text().count("\n") if (folder / METRICS).is_file() else 0
        documents.append(
            {
                "name": folder.name,
                "folder": str(folder),
                "kind": kind,
                "env": config["env"]["name"] if plays else None,
                "steps": max(0, lines - 1),
                "of": loop["steps"] * loop.get("rounds", 1),
                "done": done,
                "reward_before": summary.get("reward_before"),
                "reward_after": summary.get("reward_after"),
                "adapter": summary.get("adapter"),
            }
        )

    def human() -> None:
        rows = [
            (
                d["name"],
                d["kind"],
                d["env"] or "-",
                f"{d['steps']}/{d['of']}" + ("" if d["done"] else " unfinished"),
                format_rate(d["reward_before"]) if d["reward_before"] else "-",
                format_rate(d["reward_after"]) if d["reward_after"] else "-",
                d["adapter"] or "-",
            )
            for d in documents
        ]
        print_table(("run", "kind", "env", "steps", "before", "after", "adapter"), rows, "no runs yet; start with: veneer quickstart")

    emit(documents, as_json, human)

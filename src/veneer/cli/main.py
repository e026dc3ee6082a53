"""``veneer VERB``: finds the verb, runs it, and turns errors into one line and an exit code."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import click

from veneer.cli.lazy import LazyGroup

VERBS = ("quickstart", "train", "eval", "scorecard", "env", "plan", "study", "sample", "serve", "keys", "runs", "adapters")


class Veneer(LazyGroup):
    elsewhere = VERBS


@click.command(cls=Veneer, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="veneer")
def veneer() -> None:
    """Reinforcement learning with thin adapters on one frozen base."""


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 failed on the way, 2 the request was wrong, 130 interrupted."""
    arguments = sys.argv[1:] if args is None else args
    from veneer.cli.interrupts import remember_interrupts

    remember_interrupts()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its warnings would stand between the user and ours
    try:
        result = veneer.main(arguments, standalone_mode=False)
        sys.exit(result if isinstance(result, int) else 0)
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message(), file=sys.stderr)
        sys.exit(2)
    except click.ClickException as error:
        _fail(error.format_message(), 2, arguments)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted", 130, arguments)
    except MemoryError:
        _fail("out of memory; lower rl.groups_per_batch or rl.group_size", 1, arguments)
    except Exception as error:
        from veneer.types import VeneerError  # here: it brings numpy

        if not isinstance(error, VeneerError):
            raise
        _fail(str(error), error.exit_code, arguments)


def _fail(message: str, code: int, arguments: list[str]) -> Any:
    line = " ".join(message.split())
    print(f"veneer: {line}", file=sys.stderr)
    if "--json" in arguments:
        print(json.dumps({"error": line, "exit_code": code}))
    sys.exit(code)

"""What verbs print: one JSON document on stdout with --json, tables without; progress and logs on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import click

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")


def emit(document: Any, as_json: bool, human: Callable[[], None]) -> None:
    """Print the document, or let ``human`` print it."""
    if as_json:
        print(json.dumps(document, indent=1))
    else:
        human()


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]], empty: str) -> None:
    from rich.console import Console
    from rich.table import Table

    if not rows:
        print(empty)
        return
    table = Table(*columns, box=None, header_style="bold", pad_edge=False)
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    Console().print(table)


def format_rate(rate: Mapping[str, float]) -> str:
    return f"{rate['value']:.3f} [{rate['low']:.3f}, {rate['high']:.3f}]"


@contextmanager
def progress(total: int) -> Generator[Callable[[Mapping[str, Any]], None], None, None]:
    """A callback for lines of metrics.jsonl: a live bar on a terminal, else a line every tenth step, on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda metrics: print(_line(metrics), file=sys.stderr, flush=True) if metrics["step"] % 10 == 0 else None
    else:
        columns = (MofNCompleteColumn(), BarColumn(24), TimeElapsedColumn(), TextColumn("{task.fields[text]}"))
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("", total=total, text="evaluating the base")

            def show(metrics: Mapping[str, Any]) -> None:
                bar.update(task, completed=metrics["step"], text=_line(metrics))
                if "eval/solved" in metrics:
                    bar.console.print(f"step {metrics['step']:>4}  held out {_held_out(metrics)}")

            yield show


def _held_out(metrics: Mapping[str, Any]) -> str:
    return f"{metrics['eval/solved']:.3f} [{metrics['eval/solved_low']:.3f}, {metrics['eval/solved_high']:.3f}]"


def _line(metrics: Mapping[str, Any]) -> str:
    parts = [f"step {metrics['step']}"]
    if "reward/total" in metrics:
        parts.append(f"reward {metrics['reward/total']:.2f}  useful groups {metrics['by_group/frac_mixed']:.2f}")
        parts.append(f"entropy {metrics['optim/entropy']:.2f}  tokens {metrics['tokens/mean']:.0f}")
    if "train_mean_nll" in metrics:
        parts.append(f"nll {metrics['train_mean_nll']:.3f}")
    if "eval/mean_nll" in metrics:
        parts.append(f"held-out nll {metrics['eval/mean_nll']:.3f}")
    if "eval/solved" in metrics:
        parts.append(f"held out {_held_out(metrics)}")
    return "  ".join(parts)

"""What verbs print: one JSON document on stdout with --json, tables without; progress and logs on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import click

SHOWN = (
    ("reward/total", "reward", ".2f"),
    ("by_group/frac_mixed", "useful groups", ".2f"),
    ("optim/entropy", "entropy", ".2f"),
    ("tokens/mean", "tokens", ".0f"),
    ("kept", "kept", "d"),
    ("train_mean_nll", "nll", ".3f"),
    ("eval/mean_nll", "held-out nll", ".3f"),
    ("rewards/margins", "margin", ".3f"),
    ("eval/rewards/margins", "held-out margin", ".3f"),
    ("eval/rewards/accuracies", "preferred", ".3f"),
    ("kl/student_teacher", "kl to the teacher", ".3f"),
    ("kl/teacher_student", "kl from the teacher", ".3f"),
    ("eval/kl/student_teacher", "held-out kl", ".3f"),
)
"""(metric, what it is called while it runs, how it is written)"""
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
                if "eval/reward" in metrics:
                    bar.console.print(f"step {metrics['step']:>4}  held out {_held_out(metrics)}")

            yield show


def _held_out(metrics: Mapping[str, Any]) -> str:
    return f"{metrics['eval/reward']:.3f} [{metrics['eval/reward_low']:.3f}, {metrics['eval/reward_high']:.3f}]"


def _line(metrics: Mapping[str, Any]) -> str:
    parts = [f"step {metrics['step']}"]
    parts += [f"{text} {metrics[key]:{form}}" for key, text, form in SHOWN if key in metrics]
    if "eval/reward" in metrics:
        parts.append(f"held out {_held_out(metrics)}")
    return "  ".join(parts)

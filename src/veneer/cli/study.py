"""``veneer study``: questions about low rank and reinforcement learning, answered by runs."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from veneer.cli.output import emit, json_option, print_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from veneer.studies.catalogue import Study
    from veneer.studies.contest import Terms
    from veneer.studies.lab import Lab, Outcome


MOST_PROCESSES = 4
"""Unless somebody asks for more: with full copies of the base a process may take a gigabyte."""


@click.group("study", short_help="Test a claim about low rank and reinforcement learning.")
def command() -> None:
    """Each study asks one question: arms with swept learning rates, seeds, a noise floor, and a verdict with its interval. What is made is
    kept in $VENEER_HOME/studies, each run once."""


def _home() -> Path:
    from veneer.store.files import veneer_home

    return veneer_home() / "studies"


@command.command("list")
@json_option
def list_studies(as_json: bool) -> None:
    """List the questions, and which of them have been answered here."""
    from veneer.studies.catalogue import STUDIES, find_study, kept

    answered = {document["study"] for document, _ in kept(_home())}
    documents = [
        {"name": study.name, "question": study.question, "claims": list(study.claims), "answered": study.name in answered}
        for study in map(find_study, STUDIES)
    ]
    rows = [(d["name"], d["question"], ", ".join(map(str, d["claims"])), "yes" if d["answered"] else "-") for d in documents]
    emit(documents, as_json, lambda: print_table(("study", "question", "claims", "answered"), rows, ""))


@command.command("run")
@click.argument("name")
@click.option("--seeds", type=click.IntRange(2), default=5, show_default=True, help="On which arms are compared, a run of each arm each.")
@click.option("--choice-seeds", type=click.IntRange(1), default=2, show_default=True, help="On which every learning rate is tried.")
@click.option("--coarse", is_flag=True, help="Try every second learning rate only, and of several batch sizes the outermost.")
@click.option("--budget", metavar="TIME", help="Such as 2h or 90m: small forms of all first, then larger ones until it is over.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Of what all runs share. Repeatable.")
@click.option("--side-by-side", type=click.IntRange(1), default=8, show_default=True, help="Runs at a time, over all processes.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads; as many as there are cores, unless given.")
@click.option(
    "--processes",
    type=click.IntRange(1),
    help="That runs are spread over, each with its part of the threads, and the base and the environment in memory. On the CPU one for "
    "each thread up to 4, 1 if another base is set, unless given.",
)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda or auto.")
@json_option
def run(
    name: str,
    seeds: int,
    choice_seeds: int,
    coarse: bool,
    budget: str | None,
    overrides: tuple[str, ...],
    side_by_side: int,
    threads: int | None,
    processes: int | None,
    device: str,
    as_json: bool,
) -> None:
    """Make all runs of the study NAME that are not there yet, and judge; of every study if NAME is all.

    Interrupted, the same command goes on from there. Runs that another study, or the same with fewer seeds, has made are taken over.
    """
    import asyncio
    import os
    import sys

    from veneer.engine import default_device
    from veneer.engine.counting import Bench
    from veneer.engine.merge import write_merged
    from veneer.engine.random_base import write_random
    from veneer.studies.budget import seconds_of
    from veneer.studies.catalogue import STUDIES, find_study, keep
    from veneer.studies.contest import Terms
    from veneer.studies.hands import Hands
    from veneer.train.session import stop_signals

    studies = [find_study(one) for one in (STUDIES if name == "all" else [name])]
    terms, folder = Terms(seeds, choice_seeds, overrides, coarse), _home()
    seconds = None if budget is None else seconds_of(budget)
    device = default_device() if device == "auto" else device
    threads = threads or os.cpu_count() or 1
    if processes is None:
        large = device != "cpu" or any(override.partition("=")[0].strip() == "base" for override in overrides)
        processes = 1 if large else min(threads, side_by_side, MOST_PROCESSES)

    def told(outcome: Outcome, done: int, of: int) -> None:
        print(f"{done:>4} of {of}  {outcome}", file=sys.stderr, flush=True)

    runs = folder / "runs"
    engines = {"bench": Bench(device), "merge": write_merged, "random_base": write_random}
    lab = replace(_lab(runs, threads, device), side_by_side=side_by_side, told=told, **engines)
    with ExitStack() as ends:
        if processes > 1:
            command = [sys.executable, "-P", "-m", "veneer", "study", "make", str(runs), str(max(1, threads // processes)), device]
            lab.hands = ends.enter_context(Hands(command, processes))
        if name == "all" or seconds is not None:
            _run_within(lab, studies, terms, seconds, folder, as_json)
            return
        (study,) = studies
        with stop_signals(lab.stop):
            result = asyncio.run(study.conduct(lab, terms))
    document = keep(study, terms, result, folder / name)

    def human() -> None:
        rows = [(finding.question, finding.verdict, finding.numbers) for finding in result.findings]
        print_table(("asked", "verdict", ""), rows, "")
        print(f"table, picture and numbers: {folder / name}")

    emit({"folder": str(folder / name), **document}, as_json, human)


def _run_within(lab: Lab, studies: Sequence[Study], full: Terms, seconds: float | None, folder: Path, as_json: bool) -> None:
    import asyncio
    import math
    import sys
    import threading

    from veneer.studies.budget import Reached, within
    from veneer.studies.catalogue import in_options, keep, larger
    from veneer.train.session import stop_signals
    from veneer.types import RunError

    def made(one: Reached) -> None:
        assert one.terms is not None
        assert one.result is not None
        there = larger(folder / one.study.name, one.terms)
        if there is None:
            keep(one.study, one.terms, one.result, folder / one.study.name)
        stays = "" if there is None else f"; its page stays that of: {in_options(there)}"
        print(f"{one.study.name}: {one.shrunk(full)}{stays}", file=sys.stderr, flush=True)

    asked = threading.Event()
    with stop_signals(asked, lab.stop):
        reached = asyncio.run(within(math.inf if seconds is None else seconds, lab, studies, full, made, asked))
    if all(one.terms is None for one in reached):
        first = next((one.failed for one in reached if one.failed), "the time was over before the smallest form of any study was done")
        raise RunError(f"no study was finished: {first}; what was begun is kept, and the same command goes on from there")
    documents = [
        {
            "study": one.study.name,
            "command": None if one.terms is None else f"veneer study run {one.study.name} {in_options(asdict(one.terms))}",
            "shrunk": one.shrunk(full),
            "findings": [] if one.result is None else [asdict(finding) for finding in one.result.findings],
        }
        for one in reached
    ]
    rows = [(d["study"], len(d["findings"]), d["shrunk"]) for d in documents]
    emit(documents, as_json, lambda: print_table(("study", "findings", "made with"), rows, ""))


def _lab(runs: Path, threads: int, device: str) -> Lab:
    """One that makes runs on engines of this process."""
    from veneer.cli.assemble import start
    from veneer.studies.lab import Lab, Place

    def open_place(config: Any) -> Place:
        machine = start(config.base, threads, config.weights, device)
        return Place(machine.engine, machine.renderer)

    return Lab(runs, open_place, device)


@command.command("make", hidden=True)
@click.argument("runs", type=click.Path(path_type=Path))
@click.argument("threads", type=click.IntRange(1))
@click.argument("device")
def make(runs: Path, threads: int, device: str) -> None:
    """Make in the folder RUNS what is asked for on the standard input, as ``studies/hands.py`` has it. ``veneer study run`` starts it."""
    import asyncio
    import os
    import signal

    from veneer.studies.hands import serve

    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # whoever asks for runs gets one too, and says that they are to stop
    asked, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "w")
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)  # whatever an environment reads or prints is no request and no answer
    os.dup2(2, 1)
    asyncio.run(serve(_lab(runs, threads, device), asked, answers))


@command.command("article")
@click.option("--out", type=click.Path(path_type=Path), help="The file; article.md beside the studies, unless given.")
@json_option
def article(out: Path | None, as_json: bool) -> None:
    """Write the argument for thin adapters, sentence by sentence beside what the studies that were made found."""
    import os

    from veneer.store.files import storage_errors, write_text
    from veneer.studies.article import ARTICLE
    from veneer.studies.article import article as written
    from veneer.studies.catalogue import PAGE, PICTURE, kept

    found = kept(_home())
    path = (out or _home() / ARTICLE).absolute()
    folders = {document["study"]: Path(os.path.relpath(folder.absolute(), path.parent)) for document, folder in found}
    text = written([document for document, _ in found], lambda name: (f"{folders[name] / PAGE}", f"{folders[name] / PICTURE}"))
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    made = sorted(folders)
    emit({"file": str(path), "studies": made}, as_json, lambda: print(f"{path}: from {', '.join(made) or 'no study yet'}"))


@command.command("report")
@json_option
def report(as_json: bool) -> None:
    """Print the verdicts of all studies that were made."""
    from veneer.studies.catalogue import in_options, kept

    documents = [document for document, _ in kept(_home())]

    def human() -> None:
        if not documents:
            print("no study was made yet; begin with: veneer study run rank")
        for document in documents:
            print(f"{document['study']} {in_options(document['terms'])}")
            rows = [(finding["question"], finding["verdict"], finding["numbers"]) for finding in document["findings"]]
            print_table(("asked", "verdict", ""), rows, "")

    emit(documents, as_json, human)

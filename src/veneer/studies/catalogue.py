"""The studies by name, and what is kept of one that was made."""

from __future__ import annotations

import difflib
import importlib
import json
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from veneer.store.files import new_folder
from veneer.studies.contest import Terms
from veneer.studies.lab import Lab, origin
from veneer.studies.result import Result
from veneer.types import ConfigError

STUDIES = (
    *("rank", "learning_rate", "width", "early", "horizon", "layers", "batch", "batch_rl", "capacity", "received", "bandit", "groups"),
    *("feedback", "visibility", "crossover", "exploration", "entropy", "forgetting", "habits", "cost", "toggle", "merging"),
)
"""Each a module of this package: its docstring says what is asked, QUESTION says it in one sentence, CLAIMS which of the 22 claims it
tests, ``conduct`` does it, ``arms`` are what it compares, if it compares runs, COARSE what a coarse grid leaves of it, if it is more than
a coarser grid of learning rates."""
UNCHOSEN = ("early", "groups", "visibility", "crossover", "entropy", "habits", "cost", "toggle", "merging")
"""Those that choose no learning rate, and have no use for choice seeds or a coarse grid."""
Conduct = Callable[[Lab, Terms], Coroutine[Any, Any, Result]]
DOCUMENT, PAGE, PICTURE = "study.json", "study.md", "study.svg"


@dataclass(frozen=True)
class Study:
    """One question."""

    name: str
    question: str
    claims: Sequence[int]
    """By their numbers in docs/studies.md."""
    about: str
    conduct: Conduct
    chooses: bool = True
    """A learning rate, for each of its arms."""
    coarse: str = "every second learning rate"
    """What is left of it on a coarse grid."""


def find_study(name: str) -> Study:
    """Raises:
    ConfigError: there is none; names the nearest.
    """
    if name not in STUDIES:
        near = difflib.get_close_matches(name, STUDIES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(STUDIES)}"
        raise ConfigError(f"no study {name!r}; {hint}")
    module = importlib.import_module(f"veneer.studies.{name}")
    conduct, about = naming_diverged(module.conduct), (module.__doc__ or "").strip()
    coarse = getattr(module, "COARSE", Study.coarse)
    return Study(name, module.QUESTION, module.CLAIMS, about, conduct, name not in UNCHOSEN, coarse)


def naming_diverged(conduct: Conduct) -> Conduct:
    """The same, with the runs that diverged named behind its tables, whatever a study makes of them."""

    async def conducted(lab: Lab, terms: Terms) -> Result:
        lab.diverged.clear()
        result = await conduct(lab, terms)
        told = sorted(f"{outcome}: {outcome.diverged}" for outcome in lab.diverged.values())
        if not told:
            return result
        lines = ["", "Runs that diverged, kept as they were then:", "", *(f"- {line}" for line in told)]
        return replace(result, tables="\n".join([result.tables.rstrip(), *lines]) + "\n", document={**result.document, "diverged": told})

    return conducted


def keep(study: Study, terms: Terms, result: Result, folder: Path) -> dict[str, Any]:
    """Write a study's document, page and picture, in place of those of an earlier time. Returns the document."""
    document = {
        "study": study.name,
        "question": study.question,
        "claims": list(study.claims),
        "terms": asdict(terms),
        "veneer": origin(),
        "findings": [asdict(finding) for finding in result.findings],
        **result.document,
    }
    with new_folder(folder) as aside:
        (aside / DOCUMENT).write_text(json.dumps(document, indent=1) + "\n")
        (aside / PAGE).write_text(page_of(study, terms, result))
        result.draw(aside / PICTURE)
    return document


def page_of(study: Study, terms: Terms, result: Result) -> str:
    """As Markdown."""
    lines = [f"# {study.question}", "", *study.about.splitlines()[2:], ""]
    lines += ["| asked | verdict | |", "|---|---|---|"]
    lines += [f"| {finding.question} | **{finding.verdict}** | {finding.numbers} |" for finding in result.findings]
    command = f"veneer study run {study.name} {in_options(asdict(terms))}"
    return "\n".join([*lines, "", result.tables.rstrip(), "", f"`{command}`", ""])


def in_options(terms: Mapping[str, Any]) -> str:
    """The terms of a kept document as they are typed."""
    sets = [f"--set {override}" for override in terms["overrides"]]
    coarse = ["--coarse"] if terms.get("coarse") else []  # not in documents of before there was a choice
    return " ".join([f"--seeds {terms['seeds']}", f"--choice-seeds {terms['choice_seeds']}", *coarse, *sets])


def larger(folder: Path, terms: Terms) -> Mapping[str, Any] | None:
    """The terms of what is kept of a study, if it was made with the same overrides, by the same Veneer, and with more."""
    path = folder / DOCUMENT
    document = json.loads(path.read_text()) if path.is_file() else {}
    if document.get("veneer") != origin():
        return None
    mine, theirs = asdict(terms), document["terms"]
    if list(mine["overrides"]) != list(theirs["overrides"]):
        return None

    def size(one: Mapping[str, Any]) -> tuple[int, ...]:
        return one["seeds"], one["choice_seeds"], int(not one["coarse"])

    more = size(theirs) != size(mine) and all(a >= b for a, b in zip(size(theirs), size(mine), strict=True))
    return theirs if more else None


def kept(folder: Path) -> list[tuple[dict[str, Any], Path]]:
    """The documents of all studies that were made, with their folders."""
    found = [folder / name / DOCUMENT for name in STUDIES]
    return [(json.loads(path.read_text()), path.parent) for path in found if path.is_file()]

"""The argument for reinforcement learning with thin adapters, sentence by sentence, each beside what the studies found that were made."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from veneer.studies.catalogue import in_options

ARTICLE = "article.md"


@dataclass(frozen=True)
class Sentence:
    says: str
    """What is argued, in a sentence."""
    studies: Mapping[str, str]
    """Studies that test it: which of their findings, as a regular expression of what was asked."""
    missing: str = ""
    """What would have to be measured, where no study does."""


@dataclass(frozen=True)
class Section:
    title: str
    sentences: Sequence[Sentence]


SECTIONS: Sequence[Section] = (
    Section(
        "The signal is sparse",
        (
            Sentence("An episode of reinforcement learning gives about one bit: right or wrong.", {"bandit": "", "groups": ""}),
            Sentence(
                "Supervision of every token is dense; a reward at the end throws most of that away.",
                {"feedback": ""},
            ),
        ),
    ),
    Section(
        "What it buys, and what it costs",
        (
            Sentence(
                "It sharpens the distribution that is sampled, and diversity is lost: surer in one try, poorer in many.",
                {"crossover": "^pass@|^from which k|bits of the answers|different ones among", "entropy": ""},
            ),
            Sentence("It makes better specialists and worse generalists.", {"crossover": "^reward in", "forgetting": ""}),
            Sentence(
                "Behaviour such as correcting oneself is there before, and reinforcement learning makes it reliable.",
                {"habits": ""},
            ),
        ),
    ),
    Section(
        "The update is small",
        (Sentence("It changes only a small part of the weights, as little as five in a hundred.", {"visibility": ""}),),
    ),
    Section(
        "So a thin adapter is enough",
        (
            Sentence("Even at rank one it learns what full fine-tuning learns.", {"rank": "beside full|noise floor"}),
            Sentence("For all that reward tells in a run, an adapter has room, however thin.", {"received": ""}),
            Sentence(
                "Where much must be memorised it falls behind.",
                {"capacity": ""},
            ),
        ),
    ),
    Section(
        "Three rules",
        (
            Sentence("An adapter must reach all layers: on attention alone it falls behind.", {"layers": ""}),
            Sentence(
                "The best learning rate is about ten times that of full fine-tuning, whatever the rank.",
                {"learning_rate": "", "early": "", "horizon": "", "rank": "^best learning rate"},
            ),
            Sentence("It bears large batches less well.", {"batch": "", "batch_rl": ""}),
        ),
    ),
    Section(
        "What it is good for",
        (
            Sentence("It saves a third of the arithmetic.", {"cost": ""}),
            Sentence("Behaviours are switched on and off on demand, and the core model remains untouched.", {"toggle": ""}),
            Sentence("Merged into the weights a behaviour is the same, and cannot be switched off.", {"merging": ""}),
        ),
    ),
)
HEAD = (
    "Reinforcement learning tells a model little, so a thin adapter can hold it, so experiments are cheap and behaviours can be",
    "switched. Each sentence of that argument stands here beside what came of testing it, also where it went against it. Written by",
    "`veneer study article` from the studies that were made. One thing is `equal` to another if the whole interval of their difference",
    "lies within the margin, otherwise `better` or `worse` if it excludes 0, otherwise `undecided`.",
)


def article(documents: Sequence[Mapping[str, Any]], place_of: Callable[[str], tuple[str, str]]) -> str:
    """As Markdown. ``documents``: of the studies that were made. ``place_of``: where the page and the picture of a study are, as links."""
    made = {document["study"]: document for document in documents}
    lines = [
        "# The argument, measured",
        "",
        *HEAD,
        "",
    ]
    shown = set[str]()
    for section in SECTIONS:
        lines += [f"## {section.title}", ""]
        for sentence in section.sentences:
            lines += [f"> {sentence.says}", "", *_measured(sentence, made, place_of, shown)]
    return "\n".join(lines).rstrip() + "\n"


def _measured(
    sentence: Sentence, made: Mapping[str, Mapping[str, Any]], place_of: Callable[[str], tuple[str, str]], shown: set[str]
) -> Iterator[str]:
    """``shown``: studies whose pictures stand above."""
    if sentence.missing:
        yield from (f"Not tested yet. It would take {sentence.missing}.", "")
    for name, pattern in sentence.studies.items():
        document = made.get(name)
        if document is None:
            yield from (f"Not made here: `veneer study run {name}`.", "")
            continue
        page, picture = place_of(name)
        findings = [finding for finding in document["findings"] if re.search(pattern, finding["question"])]
        yield from ("| asked | verdict | |", "|---|---|---|")
        yield from (f"| {finding['question']} | **{finding['verdict']}** | {finding['numbers']} |" for finding in findings)
        yield from ("", f"[All of it]({page}), by `veneer study run {name} {in_options(document['terms'])}`.", "")
        if name not in shown:
            shown.add(name)
            yield from (f"![{document['question']}]({picture})", "")

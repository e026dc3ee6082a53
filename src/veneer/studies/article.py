"""The argument for reinforcement learning with thin adapters, sentence by sentence, each beside what the studies found that were made."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from veneer.studies.catalogue import in_options

ARTICLE = "article.md"
OPEN = ("undecided", "untested")
"""Verdicts that say nothing for a sentence, and nothing against it."""


@dataclass(frozen=True)
class Prediction:
    """What a finding would be, were the sentence true."""

    study: str
    asked: str
    """Which finding: a regular expression of what was asked."""
    verdict: str


@dataclass(frozen=True)
class Sentence:
    says: str
    """What is argued, in a sentence."""
    studies: Mapping[str, str]
    """Studies that test it: which of their findings are shown, as a regular expression of what was asked."""
    predicts: Sequence[Prediction]


@dataclass(frozen=True)
class Section:
    title: str
    sentences: Sequence[Sentence]


SECTIONS: Sequence[Section] = (
    Section(
        "The signal is sparse",
        (
            Sentence(
                "An episode of reinforcement learning gives about one bit: right or wrong.",
                {"bandit": "", "groups": ""},
                (
                    Prediction("bandit", "^no episode tells more than", "holds"),
                    Prediction("bandit", "^the ideal learner takes", "equal"),
                    Prediction("bandit", "^REINFORCE is told no more than", "holds"),
                ),
            ),
            Sentence(
                "Supervision of every token is dense; a reward at the end throws most of that away.",
                {"feedback": ""},
                tuple(
                    Prediction("feedback", f"^episodes to .* over those by {signal}$", "more")
                    for signal in ("steps", "tokens", "demonstrations")
                ),
            ),
        ),
    ),
    Section(
        "What it buys, and what it costs",
        (
            Sentence(
                "It explores, and finds what imitating its own answers would not show it.",
                {"exploration": ""},
                (
                    Prediction("exploration", "^imitating in rounds beside imitating the base", "better"),
                    Prediction("exploration", "^reward beside imitating the base", "better"),
                    Prediction("exploration", "^right answers .* imitating in rounds beside", "more"),
                    Prediction("exploration", "^right answers .* reward beside", "more"),
                ),
            ),
            Sentence(
                "It sharpens the distribution that is sampled, and diversity is lost: surer in one try, poorer in many.",
                {"crossover": "^pass@|^from which k|bits of the answers|different ones among", "entropy": ""},
                (
                    Prediction("crossover", "^pass@1:", "better"),
                    Prediction("crossover", "^pass@256:", "worse"),
                    Prediction("crossover", "^bits of the answers", "worse"),
                    Prediction("crossover", "^different ones among", "worse"),
                ),
            ),
            Sentence(
                "It makes better specialists and worse generalists.",
                {"crossover": "^pass@1:|^reward in", "forgetting": "^reward elsewhere after .* by reward,"},
                (
                    Prediction("crossover", "^pass@1:", "better"),
                    Prediction("crossover", "^reward in sort", "worse"),
                    Prediction("crossover", "^reward in count", "worse"),
                    Prediction("forgetting", "^reward elsewhere after .* by reward,", "worse"),
                ),
            ),
            Sentence(
                "It forgets less than supervised training, as it stays nearer to where it began.",
                {"forgetting": ""},
                (
                    *(Prediction("forgetting", f"^KL from where it began .* in {manner}", "less") for manner in ("its manner", "another")),
                    *(Prediction("forgetting", f"^reward lost elsewhere .* in {manner}", "less") for manner in ("its manner", "another")),
                    *(Prediction("forgetting", f"^reward elsewhere after .* in {manner}", "worse") for manner in ("its manner", "another")),
                ),
            ),
            Sentence(
                "Behaviour such as correcting oneself is there before, and reinforcement learning makes it reliable.",
                {"habits": ""},
                (
                    Prediction("habits", "^share of episodes that work step by step", "more"),
                    Prediction("habits", "^share of episodes that take an equation back", "more"),
                    Prediction("habits", "^share of equations taken back that became right", "more"),
                ),
            ),
        ),
    ),
    Section(
        "The update is small",
        (
            Sentence(
                "It changes only a small part of the weights, as little as five in a hundred: targeted updates, not sweeping ones.",
                {"visibility": ""},
                (
                    *(
                        Prediction("visibility", f"^by reward, {rate}: visible .* sizes alone", "worse")
                        for rate in ("1e-06", "1e-05", "0.0001")
                    ),
                    *(Prediction("visibility", f"^visible at {rate}: by reward beside", "fewer") for rate in ("1e-06", "1e-05", "0.0001")),
                ),
            ),
        ),
    ),
    Section(
        "So a thin adapter is enough",
        (
            Sentence(
                "Even at rank one it learns what full fine-tuning learns.",
                {"rank": "beside full|noise floor"},
                (Prediction("rank", "^rank 1 beside full", "equal"),),
            ),
            Sentence(
                "For all that reward tells in a run, an adapter has room, however thin.",
                {"received": ""},
                (Prediction("received", "^rank 1 of one map, .* beside rank 16 of one map", "equal"),),
            ),
            Sentence(
                "Where much must be memorised it falls behind, and not where little must.",
                {"capacity": ""},
                (
                    Prediction("capacity", "^64 facts: rank 1 of down_proj beside full", "worse"),
                    Prediction("capacity", "^64 facts: rank 1 beside full", "worse"),
                    Prediction("capacity", "^16 facts: rank 1 of down_proj beside full", "equal"),
                    Prediction("capacity", "^16 facts: rank 1 beside full", "equal"),
                ),
            ),
        ),
    ),
    Section(
        "Three rules",
        (
            Sentence(
                "An adapter must reach all layers: on attention alone it falls behind.",
                {"layers": ""},
                (
                    Prediction("layers", "^by reward: attention beside all", "worse"),
                    Prediction("layers", "^by demonstrations: attention beside all", "worse"),
                ),
            ),
            Sentence(
                "The best learning rate is about ten times that of full fine-tuning, whatever the rank.",
                {"learning_rate": "", "width": "", "early": "", "horizon": "", "rank": "^best learning rate"},
                (
                    Prediction("learning_rate", "^alpha 32: the best rate is 10 times", "equal"),
                    Prediction("learning_rate", "^alpha 32: the best rate does not depend", "equal"),
                    Prediction("width", "does not depend on the width", "equal"),
                    Prediction("width", "^256 wide: it is 10 times", "equal"),
                ),
            ),
            Sentence(
                "It bears large batches less well.",
                {"batch": "", "batch_rl": ""},
                (
                    Prediction("batch", "^rank 8: what it lacks", "grows"),
                    Prediction("batch", "^rank 64: what it lacks", "grows"),
                    Prediction("batch_rl", "^rank 8: what it lacks", "grows"),
                ),
            ),
        ),
    ),
    Section(
        "What it is good for",
        (
            Sentence(
                "It saves a third of the arithmetic of training.",
                {"cost": ""},
                (
                    Prediction("cost", "^the formula over the maps", "equal"),
                    *(
                        Prediction("cost", f"^{model}, .* a training pass makes", "equal")
                        for model in ("nano as modules", "wide as modules", "deep")
                    ),
                ),
            ),
            Sentence(
                "Behaviours are switched on and off on demand, and the core model remains untouched.",
                {"toggle": ""},
                (
                    Prediction("toggle", "^with the adapter off", "equal"),
                    Prediction("toggle", "^adapters in one batch", "equal"),
                    Prediction("toggle", "^a request that switches", "equal"),
                    Prediction("toggle", "^a scaled adapter", "holds"),
                ),
            ),
            Sentence(
                "Merged into the weights a behaviour is the same.",
                {"merging": ""},
                (
                    Prediction("merging", "^merged in float32, every", "equal"),
                    Prediction("merging", "^held-out problems solved: merged in bfloat16", "equal"),
                ),
            ),
        ),
    ),
)
HEAD = (
    "Reinforcement learning tells a model little, so a thin adapter can hold it, so experiments are cheap and behaviours can be",
    "switched. Each sentence of that argument stands here beside what came of testing it, also where it went against it. Made of what",
    "the studies found, by `veneer study article` and, where you read this in Veneer's docs, by `make studies`.",
    "",
    "- A finding has a *verdict*. One thing is **equal** to another if the whole 95% interval of their difference lies within the margin",
    "  that was set before; otherwise it is **better** or **worse** (more or less, higher or lower) if the interval excludes 0, also",
    "  when it is widened by what another choice of learning rates might have changed, where such were chosen; otherwise **undecided**.",
    "  A law **holds** or is **broken**. What is **untested** could not be asked there. A number is a number.",
    "- What some findings would be, were a sentence true, stands beside them (*predicted*). A sentence **holds** if every one of those is",
    "  there and as predicted. It **does not hold** if one came out otherwise and none as predicted; it is **undecided** if none came",
    "  out. Anything between holds **in part**.",
)


@dataclass(frozen=True)
class Weighed:
    """A prediction beside its finding."""

    prediction: Prediction
    finding: Mapping[str, Any] | None
    """None: its study was not made, or did not ask."""

    @property
    def said(self) -> bool:
        return self.finding is not None and self.finding["verdict"] == self.prediction.verdict

    @property
    def against(self) -> bool:
        return self.finding is not None and not self.said and self.finding["verdict"] not in OPEN


Made = Mapping[str, Mapping[str, Any]]
"""By study, its document."""


def weigh(sentence: Sentence, made: Made) -> list[Weighed]:
    def found(prediction: Prediction) -> Mapping[str, Any] | None:
        findings = made[prediction.study]["findings"] if prediction.study in made else []
        return next((finding for finding in findings if re.search(prediction.asked, finding["question"])), None)

    return [Weighed(prediction, found(prediction)) for prediction in sentence.predicts]


def verdict_of(weighed: Sequence[Weighed]) -> str:
    """Of a sentence; empty: no study of it was made."""
    if all(one.finding is None for one in weighed):
        return ""
    said, against = sum(one.said for one in weighed), sum(one.against for one in weighed)
    if said:
        return "holds" if said == len(weighed) else "in part"
    return "does not hold" if against else "undecided"


def _counts(weighed: Sequence[Weighed]) -> str:
    """In words, how the predictions came out."""
    said, against = sum(one.said for one in weighed), sum(one.against for one in weighed)
    missing = sum(one.finding is None for one in weighed)
    parts = [f"{said} of {len(weighed)} as predicted"]
    parts += [f"{count} {word}" for count, word in ((against, "otherwise"), (len(weighed) - said - against - missing, "open")) if count]
    return ", ".join([*parts, *([f"{missing} not made"] if missing else [])])


def article(documents: Sequence[Mapping[str, Any]], place_of: Callable[[str], tuple[str, str]]) -> str:
    """As Markdown. ``documents``: of the studies that were made. ``place_of``: where the page and the picture of a study are, as links."""
    made = {document["study"]: document for document in documents}
    lines = ["# The argument, measured", "", *HEAD, "", *_at_a_glance(made), ""]
    shown = set[str]()
    for section in SECTIONS:
        lines += [f"## {section.title}", ""]
        for sentence in section.sentences:
            lines += [f"> {sentence.says}", "", *_measured(sentence, made, place_of, shown)]
    return "\n".join(lines).rstrip() + "\n"


def _at_a_glance(made: Made) -> Iterator[str]:
    yield from ("| | sentence | | what tells most |", "|---|---|---|---|")
    for section in SECTIONS:
        title = section.title
        for sentence in section.sentences:
            weighed = weigh(sentence, made)
            verdict = verdict_of(weighed)
            there = [one for one in weighed if one.finding is not None]
            # what went against a sentence says more than what is open, and that more than what went with it
            telling = min(there, key=lambda one: 0 if one.against else 2 if one.said else 1).finding if there else None
            told = "" if telling is None else f"{telling['question']}: {telling['verdict']}; {_without_verdict(telling)}"
            yield f"| {title} | {sentence.says} | {f'**{verdict}**' if verdict else 'not made here'} | {told} |"
            title = ""


def _without_verdict(finding: Mapping[str, Any]) -> str:
    """The numbers of a finding, where they repeat the verdict without it."""
    within = re.fullmatch(rf"{re.escape(finding['verdict'])} \((.*?)\)(.*)", finding["numbers"])
    return "".join(within.groups()) if within else finding["numbers"]


def _measured(sentence: Sentence, made: Made, place_of: Callable[[str], tuple[str, str]], shown: set[str]) -> Iterator[str]:
    """``shown``: studies whose pictures stand above."""
    weighed = weigh(sentence, made)
    if verdict := verdict_of(weighed):
        yield from (f"**{verdict[0].upper()}{verdict[1:]}**: {_counts(weighed)}.", "")
    predicted = {one.finding["question"]: one.prediction.verdict for one in weighed if one.finding is not None}
    for name, pattern in sentence.studies.items():
        document = made.get(name)
        if document is None:
            yield from (f"Not made here: `veneer study run {name}`.", "")
            continue
        page, picture = place_of(name)
        findings = [finding for finding in document["findings"] if re.search(pattern, finding["question"])]
        yield from ("| asked | predicted | verdict | |", "|---|---|---|---|")
        for finding in findings:
            question = finding["question"]
            yield f"| {question} | {predicted.get(question, '')} | **{finding['verdict']}** | {finding['numbers']} |"
        yield from ("", f"[All of it]({page}), by `veneer study run {name} {in_options(document['terms'])}`.", "")
        if name not in shown:
            shown.add(name)
            yield from (f"![{document['question']}]({picture})", "")

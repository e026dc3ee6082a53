"""The article says what the studies found, and nothing else: it is made anew and compared."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from veneer.studies.article import SECTIONS, Prediction, Sentence, article, verdict_of, weigh
from veneer.studies.catalogue import STUDIES

DOCS = Path(__file__).parents[2] / "docs"


def documents() -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted((DOCS / "studies").glob("*.json"))]


def test_the_article_in_the_docs_is_what_the_command_writes() -> None:
    assert (DOCS / "article.md").read_text() == article(documents(), lambda name: (f"studies/{name}.md", f"studies/{name}.svg"))


def test_every_study_has_a_sentence_and_every_sentence_a_study() -> None:
    sentences = [sentence for section in SECTIONS for sentence in section.sentences]
    assert {name for sentence in sentences for name in sentence.studies} == set(STUDIES)
    assert all(sentence.studies for sentence in sentences)


def test_every_finding_of_a_study_is_in_the_article() -> None:
    """Also those that went against it."""
    text = article(documents(), lambda name: ("page", "picture"))
    for document in documents():
        for finding in document["findings"]:
            question, verdict, numbers = (re.escape(finding[part]) for part in ("question", "verdict", "numbers"))
            assert re.search(rf"\| {question} \| \w* \| \*\*{verdict}\*\* \| {numbers} \|", text)


def test_every_prediction_is_of_one_finding_that_is_shown() -> None:
    made = {document["study"]: document["findings"] for document in documents()}
    for sentence in (sentence for section in SECTIONS for sentence in section.sentences):
        assert sentence.predicts
        for prediction in sentence.predicts:
            found = [f["question"] for f in made.get(prediction.study, []) if re.search(prediction.asked, f["question"])]
            assert len(found) == (prediction.study in made), prediction
            assert all(re.search(sentence.studies[prediction.study], question) for question in found)


@pytest.mark.parametrize(
    ("verdicts", "word"),
    [
        (("equal", "equal"), "holds"),
        (("equal", "worse"), "in part"),
        (("equal", "undecided"), "in part"),
        (("worse", "undecided"), "does not hold"),
        (("undecided", "untested"), "undecided"),
        (("equal", None), "in part"),
        (("worse", None), "does not hold"),
        (("undecided", None), "undecided"),
        ((None, None), ""),
    ],
)
def test_a_sentence_is_judged_by_what_it_predicts(verdicts: tuple[str | None, ...], word: str) -> None:
    """``None``: its study was not made."""
    made = {f"s{i}": {"findings": [{"question": "asked", "verdict": verdict}]} for i, verdict in enumerate(verdicts) if verdict}
    sentence = Sentence("", {}, [Prediction(f"s{i}", "asked", "equal") for i in range(len(verdicts))])
    assert verdict_of(weigh(sentence, made)) == word


def test_what_was_not_made_says_how_it_is() -> None:
    text = article([], lambda name: ("page", "picture"))
    for name in STUDIES:
        assert f"Not made here: `veneer study run {name}`." in text
    above, below = text.split("## ", 1)
    assert above.count("| not made here |") == sum(len(section.sentences) for section in SECTIONS)
    assert "**" not in below


@pytest.mark.parametrize("path", sorted((DOCS / "studies").glob("*.md")), ids=lambda path: path.stem)
def test_pages_and_numbers_belong_together(path: Path) -> None:
    """A page in the docs is of the same run of a study as its numbers."""
    document = json.loads(path.with_suffix(".json").read_text())
    for finding in document["findings"]:
        assert f"| {finding['question']} | **{finding['verdict']}** | {finding['numbers']} |" in path.read_text()
    assert path.with_suffix(".svg").is_file()


def test_links_of_the_article_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!http)([^)]+)\)", (DOCS / "article.md").read_text())
    assert links
    assert all((DOCS / link).is_file() for link in links)

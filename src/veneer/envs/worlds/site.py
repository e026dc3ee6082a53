"""A small website of made-up things, firms, people and towns, and a question that one page alone does not answer."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

COLOURS = ("red", "blue", "green", "black", "white", "pink", "gold", "brown")
THINGS = ("lamp", "cup", "chair", "clock", "coat", "drum", "boat", "kite")
RELATIONS = {
    "item": {"maker": "firm", "owner": "person"},
    "firm": {"city": "town", "boss": "person"},
    "person": {"home": "town", "job": "firm"},
    "town": {"mayor": "person"},
}
"""kind -> name of a fact -> kind of what it names. Each is one to one, so that the same facts followed from a wrong item lead elsewhere."""
NUMBERS = ("size", "age", "rank", "price", "score", "code", "year", "weight", "depth", "speed", "width", "floor")
"""Facts that lead nowhere."""
NAMES = range(10, 100)
"""A name is its kind and one of these: nobody guesses it."""
MAX_ENTITIES = 60
HITS = 5
"""Search shows no more titles."""


@dataclass(frozen=True)
class Fact:
    """A line of a page, such as "red lamp", or a name and the page that it links to."""

    text: str
    link: str | None = None


@dataclass(frozen=True)
class Page:
    title: str
    facts: tuple[Fact, ...]

    @cached_property
    def words(self) -> frozenset[str]:
        """What search knows of it."""
        texts = (self.title, *(fact.text for fact in self.facts), *(fact.link for fact in self.facts if fact.link))
        return frozenset(word for text in texts for word in text.split())


@dataclass(frozen=True)
class Site:
    pages: Mapping[str, Page]
    """By title, in the order in which search shows them."""
    start: str
    """What the question begins with, such as "red lamp": the text of one page whose title it is not."""
    relations: tuple[str, ...]
    """Facts to follow from there."""
    chain: tuple[str, ...]
    """Titles of the pages to be read, one for each relation."""
    answer: str

    @property
    def question(self) -> str:
        return " of the ".join((*reversed(self.relations), self.start)) + "?"

    @property
    def definition(self) -> str:
        texts = (f"{page.title}: {'; '.join(f'{fact.text} {fact.link}' for fact in page.facts)}" for page in self.pages.values())
        return "\n".join((self.question, *texts))

    def search(self, query: str) -> list[str]:
        """Titles of pages that have every word of the query."""
        words = frozenset(query.lower().split())
        return [title for title, page in self.pages.items() if words and words <= page.words][:HITS]


def generate(rng: random.Random, hops: int, entities: int, facts: int) -> Site:
    """``entities``: how many there are of each kind. ``facts``: numbers on every page that lead nowhere."""
    names = {kind: [f"{kind}{n}" for n in rng.sample(NAMES, entities)] for kind in RELATIONS}
    looks = _looks(rng, entities)
    pages: list[Page] = []
    for kind, relations in RELATIONS.items():
        targets = {name: rng.sample(names[target], entities) for name, target in relations.items()}
        for i, title in enumerate(names[kind]):
            lines = [Fact(looks[i])] if kind == "item" else []
            lines += [Fact(name, to[i]) for name, to in targets.items()]
            if facts:
                lines += [Fact(f"{name} {rng.choice(NAMES)}") for name in rng.sample(NUMBERS, facts)]
            pages.append(Page(title, tuple(lines)))
    rng.shuffle(pages)
    by_title = {page.title: page for page in pages}
    while True:
        at = rng.randrange(entities)
        relations, chain = _walk(rng, by_title, names["item"][at], hops)
        shown = {fact.link for title in chain[:-2] for fact in by_title[title].facts}
        if len(set(chain)) == len(chain) and chain[-1] not in shown and _shares_words(looks, at):
            return Site(by_title, looks[at], relations, chain[:-1], chain[-1])


def _looks(rng: random.Random, count: int) -> list[str]:
    """Colours and things in unique pairs out of few words: one word alone fits several, and a small site has a small vocabulary."""
    side = math.ceil(math.sqrt(count))
    pairs = [f"{colour} {thing}" for colour in COLOURS[:side] for thing in THINGS[:side]]
    while True:
        looks = rng.sample(pairs, count)
        if any(_shares_words(looks, i) for i in range(count)):
            return looks


def _shares_words(looks: list[str], at: int) -> bool:
    """Whether each of its words alone fits another item too."""
    others = {word for i, look in enumerate(looks) if i != at for word in look.split()}
    return set(looks[at].split()) <= others


def _walk(rng: random.Random, pages: Mapping[str, Page], start: str, hops: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the facts that were followed, and the titles that were met, ``start`` among them."""
    relations: list[str] = []
    chain = [start]
    for _ in range(hops):
        fact = rng.choice([fact for fact in pages[chain[-1]].facts if fact.link])
        assert fact.link is not None
        relations.append(fact.text)
        chain.append(fact.link)
    return tuple(relations), tuple(chain)

"""Rows that teach a small base to look up and to copy, which every world needs and none shows often: most of a world's text is fixed.

Three kinds: tokens in any order said again, the links of a page by the name of the fact, the needs of a plan's tasks by the letter. The
loss is on what is copied.
"""

from __future__ import annotations

import random

from transformers import PreTrainedTokenizerFast

from nano_worlds import FACTS, NAMES, WORDS
from veneer.envs.worlds.site import RELATIONS

Row = tuple[list[int], list[int]]
"""Tokens, and 1 where they are in the loss."""
MOST_REPEATED, MOST_FACTS, MOST_TASKS = 40, 8, 7
"""Of a row."""


class Drills:
    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.pool = [i for text in (*WORDS, *"0123456789") for i in self._ids(text)]

    def row(self, rng: random.Random) -> Row:
        return rng.choice((self.repeated, self.page, self.plan))(rng)

    def repeated(self, rng: random.Random) -> Row:
        """Tokens, and from some place on the same again."""
        first = [rng.choice(self.pool) for _ in range(rng.randint(6, MOST_REPEATED))]
        again = first[rng.randrange(len(first) // 2) :]
        ids = first + self._ids("\n") + again
        return ids, [0] * (len(ids) - len(again) + 1) + [1] * (len(again) - 1)  # where it begins again cannot be known

    def page(self, rng: random.Random) -> Row:
        """ "owner [person64]; maker [firm23]", then "owner person64" a line."""
        facts = rng.sample(FACTS, rng.randint(2, min(MOST_FACTS, len(FACTS))))
        links = {fact: f"{rng.choice(list(RELATIONS))}{rng.randint(10, 99)}" for fact in facts}
        asked = [(f"\n{fact}", f" {links[fact]}") for fact in rng.sample(facts, len(facts))]
        return self._asked("; ".join(f"{fact} [{title}]" for fact, title in links.items()), asked)

    def plan(self, rng: random.Random) -> Row:
        """ "- f 2 after b d", then " f b d," one behind the other."""
        names = rng.sample(NAMES, rng.randint(3, MOST_TASKS))
        needs = {name: rng.sample([other for other in names if other != name], rng.choice((0, 1, 1, 2, 2))) for name in names}
        lines = [f"- {name} {rng.randint(1, 5)}" + (f" after {' '.join(needs[name])}" if needs[name] else "") for name in names]
        asked = [(f" {name}", "".join(f" {need}" for need in needs[name]) + ",") for name in rng.choices(names, k=2 * len(names))]
        return self._asked("\n".join(lines) + "\ngoal", asked)

    def _asked(self, text: str, pairs: list[tuple[str, str]]) -> Row:
        ids = self._ids(text)
        mask = [0] * len(ids)
        for question, answer in pairs:
            given, wanted = self._ids(question), self._ids(answer)
            ids += given + wanted
            mask += [0] * len(given) + [1] * len(wanted)
        return ids, mask

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

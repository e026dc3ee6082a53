"""``browse``: questions about a website that take several pages to answer. The site is served over HTTP, and the tools fetch from it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from urllib.parse import quote, urlencode

from veneer.envs.dataset import final_answer
from veneer.envs.tools import Tool, ToolEnv, ToolError
from veneer.envs.worlds.pages import read_html
from veneer.envs.worlds.problems import check_whole, draw
from veneer.envs.worlds.server import SiteServer, fetch
from veneer.envs.worlds.site import MAX_ENTITIES, NUMBERS, Site, generate
from veneer.types import ConfigError, Message, Split, ToolCall

SYSTEM = "Look it up, then answer with a title alone."
NOTHING = "nothing found"
LONGEST = 200
"""Characters of a query or title; a longer one is refused."""


def _takes(name: str) -> dict[str, object]:
    return {"type": "object", "properties": {name: {"type": "string"}}, "required": [name]}


class BrowseTask:
    """One question on one site."""

    def __init__(self, site: Site, port: int, root: str) -> None:
        """``root``: the site's path on the server at ``port``. No tool leaves it."""
        self.site, self._port, self._root = site, port, root
        self.opened: list[str] = []
        """Titles, in order, with repetitions."""
        self.shown: set[str] = set()
        """Titles that were linked to."""
        self._lines: list[str] | None = None
        self.messages: Sequence[Message] = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": site.question}]
        self.tools: Sequence[Tool] = [
            Tool("search", "Titles of the pages that have all these words.", _takes("query"), self._search),
            Tool("open", "Read a page.", _takes("title"), self._open),
            Tool("find", "Lines with a text, on the page read last.", _takes("text"), self._find),
        ]

    async def _search(self, query: str) -> str:
        if not query.split() or len(query) > LONGEST:
            raise ToolError(f"search for a few words, up to {LONGEST} characters")
        _, html = await fetch(self._port, f"{self._root}/search?{urlencode({'q': query}, errors='replace')}")
        _, links = read_html(html)
        self.shown.update(links)
        return "; ".join(links) or NOTHING

    async def _open(self, title: str) -> str:
        status, html = 404, ""
        if 0 < len(title) <= LONGEST:
            status, html = await fetch(self._port, f"{self._root}/page/{quote(title, safe='', errors='replace')}")
        if status != 200:
            raise ToolError("no such page")
        self._lines, links = read_html(html)
        self.shown.update(links)
        self.opened.append(title)
        return "; ".join(self._lines)

    def _find(self, text: str) -> str:
        if self._lines is None:
            raise ToolError("open a page first")
        return "; ".join(line for line in self._lines if text.lower() in line.lower()) or NOTHING

    def over(self) -> bool:
        return False

    async def score(self, answer: Message | None) -> Mapping[str, float]:
        """``hops``: pages of the chain that were read. ``unread``: it answered before it had read them all."""
        correct = float(answer is not None and final_answer(answer) == self.site.answer)
        hops = len(set(self.site.chain) & set(self.opened))
        unread = float(answer is not None and hops < len(self.site.chain))
        return {"reward": correct, "correct": correct, "hops": float(hops), "pages": float(len(set(self.opened))), "unread": unread}

    def gold(self) -> Message:
        unread = [title for title in self.site.chain if title not in self.opened]
        if not unread:
            return {"role": "assistant", "content": self.site.answer}
        call: ToolCall = {"name": "open", "arguments": {"title": unread[0]}}
        if unread[0] not in self.shown:
            call = {"name": "search", "arguments": {"query": self.site.start}}
        return {"role": "assistant", "content": "", "tool_calls": [call]}


class Browse:
    """Sites by split and index. The server starts with the first episode and stops with ``close``."""

    name = "browse"

    def __init__(self, hops: int, entities: int, facts: int, latency: float, seed: int) -> None:
        build = partial(generate, hops=hops, entities=entities, facts=facts)
        self.site = lru_cache(1024)(partial(draw, build, salt=f"browse/{seed}"))
        self.max_turns = 2 * (hops + 2)
        self._latency = latency
        self._server: SiteServer | None = None
        self._starting = threading.Lock()

    def env(self, split: Split, index: int) -> ToolEnv:
        task = BrowseTask(self.site(split, index), self.serve(), f"/{split}/{index}")
        return ToolEnv(task, self.max_turns)

    def serve(self) -> int:
        """The port at which the sites are served; starts the server if it does not run."""
        with self._starting:
            if self._server is None:
                self._server = SiteServer(self.site, self._latency)
            return self._server.port

    async def close(self) -> None:
        with self._starting:
            server, self._server = self._server, None
        if server is not None:
            await asyncio.to_thread(server.stop)


def browse(hops: int = 2, entities: int = 6, facts: int = 0, latency: float = 0.0, seed: int = 0) -> Browse:
    """Questions that take ``hops`` pages, on sites with four kinds of pages, ``entities`` of each, ``facts`` numbers on every page that
    lead nowhere, and ``latency`` seconds to wait for every answer."""
    check_whole("hops", hops, 2, 4)
    check_whole("entities", entities, 4, MAX_ENTITIES)
    check_whole("facts", facts, 0, len(NUMBERS))
    if isinstance(latency, bool) or not isinstance(latency, int | float) or not 0 <= latency <= 60:
        raise ConfigError(f"env.args.latency: {latency!r} must be seconds from 0 to 60")
    return Browse(hops, entities, facts, latency, seed)

"""Pages as HTML, and HTML as the lines that a model reads."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from html.parser import HTMLParser
from urllib.parse import quote

from veneer.envs.worlds.site import Fact, Page


def page_html(page: Page) -> str:
    return _document(page.title, page.facts)


def results_html(titles: Sequence[str]) -> str:
    """Links lead to where the pages are, seen from the search."""
    return _document("search", [Fact("", title) for title in titles], folder="page/")


def _document(title: str, facts: Sequence[Fact], folder: str = "") -> str:
    lines = "".join(f"<li>{_line(fact, folder)}</li>\n" for fact in facts)
    head = f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title></head>\n'
    return f"{head}<body><h1>{escape(title)}</h1>\n<ul>\n{lines}</ul></body></html>\n"


def _line(fact: Fact, folder: str) -> str:
    if fact.link is None:
        return escape(fact.text)
    return f'{escape(fact.text)} <a href="{folder}{quote(fact.link, safe="")}">{escape(fact.link)}</a>'.lstrip()


class _Lines(HTMLParser):
    """The list items of a document; links in brackets."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.links: list[str] = []
        self._item = self._link = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "li":
            self._item = True
            self.lines.append("")
        elif tag == "a" and self._item:
            self._link = True
            self.links.append("")
            self.lines[-1] += "["

    def handle_endtag(self, tag: str) -> None:
        if tag == "li":
            self._item = False
        elif tag == "a" and self._link:
            self._link = False
            self.lines[-1] += "]"

    def handle_data(self, data: str) -> None:
        if self._item:
            self.lines[-1] += data
        if self._link:
            self.links[-1] += data


def read_html(html: str) -> tuple[list[str], list[str]]:
    """The lines of a page, and the titles that they link to."""
    parser = _Lines()
    parser.feed(html)
    parser.close()
    return parser.lines, parser.links

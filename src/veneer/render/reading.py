"""What a model writes, taken apart while it arrives: thinking, tool calls, and the rest."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from veneer.types import ToolCall

THINK, THOUGHT = "<think>", "</think>"
CALL, CALLED = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class Part:
    """The next bit of an answer; one of the three."""

    reasoning: str = ""
    content: str = ""
    call: ToolCall | None = None


class Reader:
    """Qwen3's and its kin's form: ``<think>`` thinking ``</think>``, then content with ``<tool_call>`` JSON ``</tool_call>`` in it.

    In whatever pieces a text arrives, its parts joined are the same. Newlines around thinking and calls belong to the form and are
    left out. A call that is not valid JSON, or is never closed, stays text. Thinking that is never closed leaves no content.
    """

    def __init__(self, *, thinking: bool, calls: bool) -> None:
        """``thinking``: the prompt has opened it already. ``calls``: look for tool calls."""
        self.thought = thinking
        """Whether there was thinking, be it empty."""
        self.broken: list[str] = []
        """What was marked as a call and is none; it was told as content too."""
        self._calls, self._called = calls, False
        self._text = ""
        """What has arrived and is not told."""
        self._newlines = ""
        """They are told if something comes behind them."""
        self._state: Callable[[bool], list[Part]] = self._begin

    def feed(self, text: str, last: bool = False) -> list[Part]:
        """``last``: nothing will follow."""
        self._text += text
        parts: list[Part] = []
        while True:
            state = self._state
            parts += state(last)
            if self._state == state:
                return parts

    def _begin(self, last: bool) -> list[Part]:
        if not last and THINK.startswith(self._text):
            return []
        if self._text.startswith(THINK):
            self.thought, self._text = True, self._text.removeprefix(THINK)
        self._state = self._think_first if self.thought else self._show
        return []

    def _think_first(self, last: bool) -> list[Part]:
        self._text = self._text.lstrip("\n")
        if self._text or last:
            self._state = self._think
        return []

    def _think(self, last: bool) -> list[Part]:
        at = self._text.find(THOUGHT)
        if at >= 0:
            thinking, self._text, self._state = self._text[:at].rstrip("\n"), self._text[at + len(THOUGHT) :], self._turn
        else:
            whole = self._text if last else _before(self._text, THOUGHT)
            thinking = whole.rstrip("\n")
            self._text = "" if last else self._text[len(thinking) :]
        return [Part(reasoning=thinking)] if thinking else []

    def _turn(self, last: bool) -> list[Part]:
        self._text = self._text.lstrip("\n")
        if self._text or last:
            self._state = self._show
        return []

    def _show(self, last: bool) -> list[Part]:
        at = self._text.find(CALL) if self._calls else -1
        if at >= 0:
            text, self._state = self._text[:at], self._call
        else:
            text = self._text if last or not self._calls else _before(self._text, CALL)
        self._text = self._text[len(text) :]
        parts = self._content(text)
        if last and at < 0 and self._newlines and not self._called:
            parts.append(Part(content=self._newlines))
            self._newlines = ""
        return parts

    def _content(self, text: str) -> list[Part]:
        text = self._newlines + text
        shown = text.rstrip("\n") if self._calls else text
        self._newlines = text[len(shown) :]
        return [Part(content=shown)] if shown else []

    def _call(self, last: bool) -> list[Part]:
        end = self._text.find(CALLED)
        if end < 0 and not last:
            return []
        block = self._text if end < 0 else self._text[: end + len(CALLED)]
        call = None if end < 0 else _parse_call(self._text[len(CALL) : end])
        self._text, self._state = self._text[len(block) :], self._show
        if call is None:
            self.broken.append(block)
            return self._content(block)
        self._called = True
        return [Part(call=call)]


def _parse_call(body: str) -> ToolCall | None:
    """What stands between the marks of a call; None if it is none."""
    try:
        call = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not (isinstance(call, dict) and isinstance(call.get("name"), str) and isinstance(call.get("arguments"), dict)):
        return None
    return {"name": call["name"], "arguments": call["arguments"]}


def _before(text: str, mark: str) -> str:
    """``text`` without an end that may be the beginning of ``mark``."""
    longest = next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)
    return text[: len(text) - longest]

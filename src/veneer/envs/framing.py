"""What stands around a problem: a system message before it, instructions behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from veneer.types import Message


@dataclass(frozen=True)
class Framing:
    system: str = ""
    """A system message in front, unless the conversation brings its own."""
    suffix: str = ""
    """Put behind the last message, on a line of its own."""

    def messages(self, prompt: str | Sequence[Message]) -> list[Message]:
        """A text becomes what the user says."""
        conversation: list[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if self.system and conversation[0]["role"] != "system":
            conversation.insert(0, {"role": "system", "content": self.system})
        if self.suffix:
            last = conversation[-1]
            conversation[-1] = {**last, "content": f"{last['content']}\n{self.suffix}"}
        return conversation

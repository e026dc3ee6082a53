"""One rollout between two who each believe that they lead: an environment that calls its model, and a policy that steps its
environment."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from veneer.envs.bridges.chat import ChatError, Json, Said, answer_of, completion, read_request
from veneer.envs.bridges.errors import BridgeError
from veneer.types import Message


@dataclass(frozen=True)
class Asked:
    """The environment waits for the model: what is new since its last answer, and the tools."""

    messages: Sequence[Message]
    tools: Sequence[Json]


@dataclass(frozen=True)
class Ended:
    reward: Any
    metrics: Mapping[str, Any]


class Talk:
    """Its requests must grow: each is the one before, the policy's own answer, and what is new. Only then is what the model saw, token
    by token, what is trained."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._turns: asyncio.Queue[Asked | Ended | BridgeError] = asyncio.Queue()
        self._waiting: asyncio.Future[Json] | None = None
        self._history: list[Said] = []
        self._tools: list[Json] = []
        self._calls = 0
        self._over: str | None = None
        """Why no request is answered any more."""

    # ------------------------------------------------------------ the environment's side

    def ask(self, body: Mapping[str, Any]) -> asyncio.Future[Json]:
        """A request of the environment; the future brings the completion.

        Raises:
            ChatError: it cannot be answered. That ends the rollout too.
        """
        if self._over is not None:
            raise ChatError(self._over)
        try:
            if self._waiting is not None:
                raise ChatError("the environment asks its model again before it has an answer; several agents in one rollout have no order")
            said, tools = read_request(body)
            new = self._what_is_new(said, tools)
        except ChatError as error:
            self.fail(str(error))
            raise
        self._history, self._tools = said, tools
        self._waiting = asyncio.get_running_loop().create_future()
        self._turns.put_nowait(Asked([s.message() for s in new], tools))
        return self._waiting

    def _what_is_new(self, said: list[Said], tools: list[Json]) -> list[Said]:
        if not self._history:
            return said
        if tools != self._tools:
            raise ChatError("the environment shows other tools than before; they stand at the beginning of the tokens that the model saw")
        pairs = zip(self._history, said, strict=False)
        at = next((i for i, (then, now) in enumerate(pairs) if then != now), min(len(self._history), len(said)))
        if at < len(self._history):
            whose = "the policy's own answer" if self._history[at].role == "assistant" else "what it showed"
            raise ChatError(
                f"the environment's request does not go on from the one before it: message {at + 1} of {len(self._history)}, {whose}, "
                "is another or missing; a history that is rewritten, or a second agent's, cannot be trained as one row"
            )
        return said[at:]

    def end(self, reward: Any, metrics: Mapping[str, Any]) -> None:
        self._close("the rollout has ended", Ended(reward, metrics))

    def fail(self, words: str) -> None:
        self._close(f"the rollout has failed: {words}", BridgeError(words))

    def _close(self, why: str, last: Ended | BridgeError) -> None:
        if self._over is None:
            self._over = why
            self._turns.put_nowait(last)
        if self._waiting is not None:
            self._waiting.cancel()

    # ------------------------------------------------------------ the policy's side

    async def next(self) -> Asked | Ended:
        """Raises:
        BridgeError: the rollout has failed.
        """
        turn = await self._turns.get()
        if isinstance(turn, BridgeError):
            raise turn
        return turn

    def reply(self, action: Message) -> None:
        waiting, self._waiting = self._waiting, None
        if waiting is None or waiting.done():
            return  # it has ended meanwhile, which ``next`` tells
        answer = answer_of(action, self._calls)
        self._calls += len(answer.calls)
        self._history = [*self._history, answer]
        waiting.set_result(completion(self.name, answer, action.get("reasoning_content")))

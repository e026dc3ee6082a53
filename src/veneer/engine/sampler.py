"""Sampling: many requests, many adapters, continuous batching: what waits, what is let in, and what happens when a pass fails."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from veneer.engine.base import Base
from veneer.engine.crew import Crew, Weights
from veneer.engine.draws import sequence_key
from veneer.engine.lanes import Lanes
from veneer.engine.memory import out_of_memory
from veneer.engine.prefixes import Prefixes
from veneer.engine.request import Completion, SampleRequest

ROWS = {"cpu": 512, "cuda": 1024}
"""Completions that decode together."""
PROMPT_TOKENS = {"cpu": 1024, "cuda": 16384}
"""Prompt tokens that join one step; a single longer prompt is still read whole."""
ENOUGH = 64
"""Rows for a thread of its own: with fewer, two threads wait for the interpreter as long as they save, so they share the products."""

Outcome = list[SampleRequest] | Exception


class Sampler:
    """Requests in, completions out, a token per row and step."""

    def __init__(self, base: Base, weights: Weights, lanes: Lanes[Any]) -> None:
        self.base, self.weights = base, weights
        self._lanes: Lanes[Outcome] = lanes
        self.waiting: deque[SampleRequest] = deque()
        self.most_rows = self.limit = ROWS[base.device.type]
        self.failed: list[tuple[SampleRequest, Exception]] = []
        """Requests that cannot be answered, for the engine to take away."""
        self._starting: dict[tuple[object, ...], list[Completion]] = {}
        """Rows that the step at hand lets in, by the key of their prompt."""
        self.prefixes = Prefixes(base)
        self._muster()

    def _muster(self) -> None:
        """Fresh crews, one for each thread if that pays."""
        self.crews = [Crew(self.base, self.weights, self.prefixes) for _ in range(self._side_by_side)]

    @property
    def _side_by_side(self) -> int:
        return self._lanes.threads if self.weights.steps_alone else 1

    @property
    def rows(self) -> int:
        """That run or start."""
        return sum(len(crew.rows) for crew in self.crews)

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.rows

    def add(self, request: SampleRequest) -> None:
        request.waiting = request.n
        self.waiting.append(request)

    def cancel(self, request: SampleRequest) -> None:
        """Free its places before the next pass."""
        request.cancelled = True
        for crew in self.crews:
            crew.stale = True

    # ------------------------------------------------ a step

    def step(self) -> list[SampleRequest]:
        """Let in what fits and draw some tokens for all running rows; returns the requests that are done."""
        if self.idle:
            self.limit = self.most_rows
            return []
        if not self.rows and len(self.crews) != self._side_by_side:
            self._muster()
        self._starting = {}
        try:
            for crew in self.crews:
                crew.rearrange(bool(self.waiting))
            if self.waiting:
                self._admit()
                self._distribute()
            outcomes = self._run([crew for crew in self.crews if crew.rows])
        except Exception as error:
            outcomes = list[Outcome]([error])
        self._take_failures()
        done = [request for outcome in outcomes if not isinstance(outcome, Exception) for request in outcome]
        for request in done:
            request.answered = True
        errors = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
        if errors:
            self._retreat(errors[0])
        return list(dict.fromkeys(done))

    def _run(self, crews: Sequence[Crew]) -> list[Outcome]:
        if len(crews) == 1:
            return [self._lanes.run_one(crews[0].burst)]
        return list(self._lanes.run([_guarded(crew.burst) for crew in crews], len(crews), 1))

    def _admit(self) -> None:
        """Make rows of what waits while there is room. A request whose rows do not all fit waits, unless it never would."""
        starting = self._starting
        room, prompt_tokens = self.limit - self.rows, PROMPT_TOKENS[self.base.device.type]
        running = {row.acting.slot for crew in self.crews for row in crew.rows}
        while self.waiting:
            request = self.waiting[0]
            if request.cancelled:
                self.waiting.popleft()
                continue
            slot = request.acting[0].slot
            cost = 0 if request.key in starting else len(request.prompt)
            count = min(request.waiting, self.limit)
            others_fit = count <= room and cost <= prompt_tokens and (self.weights.mixes_slots or running == {slot})
            if running and not others_fit:
                break
            group = self._completions(request, request.n - request.waiting, count)
            starting.setdefault(request.key, []).extend(group)
            running.add(slot)
            room, prompt_tokens = room - count, prompt_tokens - cost
            request.waiting -= count
            request.rows += group
            if request.waiting == 0:
                self.waiting.popleft()

    def _completions(self, request: SampleRequest, first: int, count: int) -> list[Completion]:
        """Number ``first`` and on."""
        params = request.params
        budget = min(params.max_tokens, self.base.context_length - len(request.prompt))
        stop_tokens = frozenset(self.base.eos_token_ids if params.stop_token_ids is None else params.stop_token_ids)
        indices = range(first, first + count)
        rows = [Completion(request, i, budget, sequence_key(params.seed, i), stop_tokens) for i in indices]
        if budget == 0:
            for row in rows:
                row.stop_reason = "length"
        return rows

    def _distribute(self) -> None:
        """Starting rows go to the crew with the fewest, prompt by prompt; few rows stay together."""
        total = self.rows + sum(len(rows) for rows in self._starting.values())
        crews = self.crews if total >= ENOUGH * len(self.crews) else [max(self.crews, key=lambda crew: len(crew.rows))]
        pieces: list[list[Completion]] = []
        for rows in self._starting.values():
            size = -(-len(rows) // len(crews)) if len(rows) >= ENOUGH * len(crews) else len(rows)
            pieces += [rows[at : at + size] for at in range(0, len(rows), size)]
        for piece in sorted(pieces, key=len, reverse=True):
            min(crews, key=lambda crew: len(crew.rows)).start(piece)

    # ------------------------------------------------ trouble

    def _take_failures(self) -> None:
        """Requests that their crews gave up: their rows leave all crews."""
        for request in [request for crew in self.crews for request in crew.failed]:
            assert request.failure is not None
            self.failed.append((request, request.failure))
            self.cancel(request)
        for crew in self.crews:
            crew.failed.clear()

    def _retreat(self, error: Exception) -> None:
        """A pass failed: start its rows anew, half as many at a time; draws do not depend on the company, so nothing is lost but
        time. The request that fails alone is the one at fault; the others may then come back all at once."""
        fresh = [row for group in self._starting.values() for row in group]
        rows = dict.fromkeys([row for crew in self.crews for row in crew.rows] + fresh)
        rows = [row for row in rows if not (row.request.cancelled or row.request.answered)]
        if not rows and not self.waiting:
            raise error
        requests = list({row.request: None for row in rows}) or [self.waiting[0]]  # no row: the first could not be let in
        for crew in self.crews:
            crew.given_up = True
        self._muster()
        for request in reversed(requests):
            if request in self.waiting:
                self.waiting.remove(request)
            request.waiting, request.rows = request.n, []
            self.waiting.appendleft(request)
        if len(rows) <= 1:
            self.waiting.popleft()
            self.failed.append((requests[0], error))
            self.limit = self.most_rows
            return
        self.limit = max(1, min(self.limit, len(rows)) // 2)
        if out_of_memory(error):
            warnings.warn(
                f"out of memory while sampling {len(rows)} rows at once; going on with {self.limit}", RuntimeWarning, stacklevel=2
            )


def _guarded(burst: Callable[[], list[SampleRequest]]) -> Callable[[], Outcome]:
    """The same, with an error as a result: the other crews must have come to an end before their rows are touched."""

    def run() -> Outcome:
        try:
            return burst()
        except Exception as error:
            return error

    return run

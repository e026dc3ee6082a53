"""Sampling: many requests, many adapters, continuous batching.

Every step is one pass over the newest token of each running row and the whole prompts of rows that start. Each distinct
(adapter, prompt) that starts in a step is read once and shared by its completions; a row that ends makes room at once.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from veneer.engine.attention import Ragged, Row
from veneer.engine.base import Base, Head
from veneer.engine.batch import Batch, Completion, SampleRequest
from veneer.engine.cache import AHEAD, Bank, Fill, StepLayout, capacity_for
from veneer.engine.draws import Chooser, sequence_key, uniforms
from veneer.engine.flat import Flat, Segment, filled, runs
from veneer.engine.lanes import Lanes
from veneer.engine.logprobs import target_logprobs
from veneer.engine.memory import out_of_memory
from veneer.types import RunError

T = TypeVar("T")

ROWS = {"cpu": 512, "cuda": 1024}
"""Completions that decode together."""
PROMPT_TOKENS = {"cpu": 1024, "cuda": 16384}
"""Prompt tokens that join one step; a single longer prompt is still read whole."""
IDLE = 8
"""Ended rows stay in the batch until they are one in this many, or until others wait for their place."""

KEPT = 2**28
"""Bytes of cache that are kept while nothing runs."""
BURST = 8
"""Tokens a row may draw before the engine looks at its queue again."""


class Weights(Protocol):
    """What runs the model: ``LoraStack`` or ``FullStack``."""

    mixes_slots: bool
    gradient_checkpointing: bool

    def stackable(self, slots: Sequence[int | None]) -> bool: ...

    def infer(self, flat: Flat, finish: Callable[[Tensor, Head], T], *, published: bool) -> T: ...

    def train(self, flat: Flat, finish: Callable[[Tensor, Head], Tensor]) -> list[Tensor]: ...


class Sampler:
    """Requests in, completions out, a token per row and step."""

    def __init__(self, base: Base, weights: Weights, lanes: Lanes[Any]) -> None:
        self.base, self.weights = base, weights
        self._lanes: Lanes[list[SampleRequest]] = lanes
        self.waiting: deque[SampleRequest] = deque()
        self.most_rows = self.limit = ROWS[base.device.type]
        self.banks: dict[int, Bank] = {}
        self.batch = self._gather([])
        self.failed: list[tuple[SampleRequest, Exception]] = []
        """Requests that cannot be answered, for the engine to take away."""
        self._starting: dict[tuple[int | None, bytes], list[Completion]] = {}
        """Rows that the step at hand lets in, by adapter and prompt."""
        self._retreats = 0
        self._stale = False

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.batch.rows

    def _gather(self, rows: list[Completion]) -> Batch:
        return Batch.of(rows, self.base.device, self.weights.stackable)

    def add(self, request: SampleRequest) -> None:
        request.waiting = request.n
        self.waiting.append(request)

    def cancel(self, request: SampleRequest) -> None:
        """Free its places before the next pass."""
        request.cancelled = self._stale = True

    # ------------------------------------------------ a step

    def step(self) -> list[SampleRequest]:
        """Let in what fits and draw tokens for all running rows, until a request is done or ``BURST`` tokens a row; returns the
        requests that are done."""
        if self.idle:
            self.limit = self.most_rows
            return []
        self._starting = {}
        try:
            started = self._rearrange()
            if not self.batch.rows and not started:
                return []
            return self._lanes.run_one(partial(self._burst, started, self._retreats))
        except Exception as error:
            self._retreat(error)
            return []

    def _burst(self, started: list[tuple[Completion, list[Completion]]], retreats: int) -> list[SampleRequest]:
        done = self._draw(started, retreats)
        for _ in range(BURST - 1):
            if done or self._stale or self.batch.steps_left <= 0:
                break
            done = self._draw([], retreats)
        return done

    def _draw(self, started: list[tuple[Completion, list[Completion]]], retreats: int) -> list[SampleRequest]:
        """One pass, and what it drew; returns the requests that are done by it."""
        rows = self.batch.rows
        tokens, logprobs = self._pass(started)
        if retreats != self._retreats:
            raise RunError("this pass was given up")  # its thread was left behind, and its rows have started anew
        fresh = [row for _, group in started for row in group]
        ending: dict[SampleRequest, None] = {row.request: None for row in fresh if not row.budget}
        for row, token, logprob in zip(rows + fresh, tokens.tolist(), logprobs.tolist(), strict=True):
            if not row.ended:
                self._append(row, token, logprob)
                if row.stop_reason is not None:
                    ending[row.request] = None
        if started:
            for row in fresh:
                if not row.budget:
                    self._leave(row)
            self.batch = self._sorted(rows + [row for row in fresh if row.budget])
        else:
            self.batch.advance(tokens)
        return [request for request in ending if request.done and not request.cancelled]

    def _rearrange(self) -> list[tuple[Completion, list[Completion]]]:
        """Drop ended rows, move rows that outgrow their bank, let others in. Returns per prompt its first row and all."""
        rows = self.batch.rows
        ended = sum(row.ended for row in rows)
        crowded = ended and (self._stale or self.waiting or ended * IDLE >= len(rows))
        self._stale = False
        if crowded or (rows and self.batch.steps_left <= 0):
            for row in rows:
                if row.ended:
                    self._leave(row)
            rows = [row for row in rows if not row.ended]
            self._compact(rows)
            self.batch = self._sorted(rows)
            if not rows and sum(bank.bytes for bank in self.banks.values()) > KEPT:
                self.banks.clear()
        return self._admit() if self.waiting else []

    def _sorted(self, rows: list[Completion]) -> Batch:
        outgrown = [row for row in rows if row.bank is not None and row.position >= row.bank.capacity]
        self._move(outgrown)
        order = sorted(rows, key=lambda row: (-1 if row.request.slot is None else row.request.slot, id(row.bank), row.place))
        return self._gather(order)

    def _admit(self) -> list[tuple[Completion, list[Completion]]]:
        """Start rows while there is room. A request whose rows do not all fit waits, unless it never would."""
        device = self.base.device.type
        starting = self._starting
        room, prompt_tokens = self.limit - len(self.batch.rows), PROMPT_TOKENS[device]
        running = {row.request.slot for row in self.batch.rows}
        while self.waiting:
            request = self.waiting[0]
            if request.cancelled:
                self.waiting.popleft()
                continue
            key = (request.slot, request.prompt.tobytes())
            cost = 0 if key in starting else len(request.prompt)
            count = min(request.waiting, self.limit)
            nothing_else = not starting and not self.batch.rows
            if not nothing_else and (count > room or cost > prompt_tokens or not (self.weights.mixes_slots or running == {request.slot})):
                break
            group = self._start(request, request.n - request.waiting, count)
            starting.setdefault(key, []).extend(group)
            running.add(request.slot)
            room, prompt_tokens = room - count, prompt_tokens - cost
            request.waiting -= count
            request.rows += group
            if request.waiting == 0:
                self.waiting.popleft()
        order = sorted(starting, key=lambda key: -1 if key[0] is None else key[0])
        return [(starting[key][0], starting[key]) for key in order]

    def _start(self, request: SampleRequest, first: int, count: int) -> list[Completion]:
        """Completions number ``first`` and on, with places in the cache."""
        params, length = request.params, len(request.prompt)
        budget = min(params.max_tokens, self.base.context_length - length)
        stop_tokens = frozenset(self.base.eos_token_ids if params.stop_token_ids is None else params.stop_token_ids)
        rows = [Completion(request, budget, sequence_key(params.seed, first + i), stop_tokens) for i in range(count)]
        if budget == 0:
            for row in rows:
                row.stop_reason = "length"
        self._settle(rows, capacity_for(length + min(max(budget, 1), AHEAD)))
        return rows

    def _pass(self, started: list[tuple[Completion, list[Completion]]]) -> tuple[Tensor, Tensor]:
        """Run the model. Tokens and log-probabilities [rows] of the running rows, then of the starting ones."""
        batch = self.batch
        for bank in batch.banks:
            bank.begin(batch.positions, batch.step)
        if started:
            return self._pass_with_prompts(started)
        layout = StepLayout(len(batch.newest), batch.banks, None, ())
        flat = Flat(batch.newest, batch.positions, layout, batch.segments, batch.places)
        return self.weights.infer(flat, lambda hidden, head: batch.choose(head(hidden, 0), batch.draws[batch.step]), published=True)

    def _pass_with_prompts(self, started: list[tuple[Completion, list[Completion]]]) -> tuple[Tensor, Tensor]:
        device, batch, n = self.base.device, self.batch, len(self.batch.newest)
        prompts = [group[0].request.prompt for _, group in started]
        lines, at = [], 0
        for prompt in prompts:
            lines.append(Row(at, len(prompt)))
            at += len(prompt)
        scored = [any(row.request.prompt_logprobs for row in group) for _, group in started]
        wanted = batch.places.tolist()
        for line, all_of_it in zip(lines, scored, strict=True):
            stop = n + line.start + line.length
            wanted += range(n + line.start if all_of_it else stop - 1, stop)
        slots = [group[0].request.slot for _, group in started]
        counts = [line.length if all_of_it else 1 for line, all_of_it in zip(lines, scored, strict=True)]
        filling = Segment(None, n - sum(s.tokens for s in batch.segments), 0)
        reading = [Segment(slot, line.length, count) for slot, line, count in zip(slots, lines, counts, strict=True)]
        fills = [fill for (_, group), line in zip(started, lines, strict=True) for fill in self._fills(group, line)]
        flat = Flat(
            torch.cat([batch.newest, filled(np.concatenate(prompts).tolist(), device, n)]),
            torch.cat([batch.positions, filled([i for line in lines for i in range(line.length)], device, n)]),
            StepLayout(n, batch.banks, Ragged(lines, device, self.base.window), fills),
            runs([*batch.segments, filling, *reading]),
            torch.tensor(wanted, device=device),
        )
        return self.weights.infer(flat, lambda hidden, head: self._start_drawing(hidden, head, started, scored), published=True)

    def _fills(self, group: list[Completion], line: Row) -> list[Fill]:
        """Where a prompt's keys and values go."""
        homes: dict[int, tuple[Bank, list[int]]] = {}
        for row in group:
            assert row.bank is not None
            homes.setdefault(id(row.bank), (row.bank, []))[1].append(row.place)
        fills = [Fill(line.start, line.length, bank, torch.tensor(places, device=self.base.device)) for bank, places in homes.values()]
        for fill in fills:
            fill.bank.open(fill.slots, fill.length)
        return fills

    def _start_drawing(
        self, hidden: Tensor, head: Head, started: list[tuple[Completion, list[Completion]]], scored: list[bool]
    ) -> tuple[Tensor, Tensor]:
        """Score the prompts that are to be scored, and choose the next tokens of running and starting rows."""
        device, batch, n = self.base.device, self.batch, len(self.batch.rows)
        last, at = list(range(n)), n
        for (_, group), all_of_it in zip(started, scored, strict=True):
            prompt = group[0].request.prompt
            if all_of_it:
                targets = torch.from_numpy(prompt[1:]).to(device)
                scores = target_logprobs(hidden[at : at + len(targets)], targets, head, at) if len(targets) else hidden.new_empty(0)
                for row in group:
                    if row.request.prompt_logprobs:
                        row.request.scores = np.concatenate([[np.nan], scores.cpu().numpy()]).astype(np.float32)
                at += len(targets)
            last.append(at)
            at += 1
        logits = torch.cat([head(hidden[i : i + 1], i) for i in last]) if any(scored) else head(hidden, 0)
        source = list(range(n)) + [n + i for i, (_, group) in enumerate(started) for _ in group]
        fresh = [row for _, group in started for row in group]
        first = uniforms(torch.tensor([row.key for row in fresh], device=device), torch.zeros(len(fresh), dtype=torch.long, device=device))
        choose = Chooser([row.request.params for row in batch.rows + fresh], device)
        draws = torch.cat([batch.draws[batch.step], first]) if n else first
        return choose(logits[torch.tensor(source, device=device)], draws)

    def _append(self, row: Completion, token: int, logprob: float) -> None:
        row.tokens.append(token)
        row.logprobs.append(logprob)
        if token in row.stop_tokens or (row.request.params.stop and self._ends_with_stop(row)):
            row.stop_reason = "stop"
        elif len(row.tokens) >= row.budget:
            row.stop_reason = "length"

    def _ends_with_stop(self, row: Completion) -> bool:
        """Whether the newest token completed a stop text. A token is at least one byte, so a tail of that many tokens is enough."""
        longest = max(len(text.encode()) for text in row.request.params.stop)
        tail = self.base.decode(row.tokens[-longest:])
        before = self.base.decode(row.tokens[-longest:-1])
        return any(text in tail and text not in before for text in row.request.params.stop)

    # ------------------------------------------------ places in the cache

    def _settle(self, rows: Sequence[Completion], capacity: int) -> None:
        bank = self.banks.setdefault(capacity, Bank(capacity, self.base.device))
        for row, place in zip(rows, bank.claim(len(rows)), strict=True):
            row.bank, row.place = bank, place

    def _leave(self, row: Completion) -> None:
        if row.bank is not None:
            row.bank.release([row.place])
            row.bank = None

    def _move(self, rows: Sequence[Completion]) -> None:
        """Rows that are full go to the next larger bank."""
        device = self.base.device
        for bank in {id(row.bank): row.bank for row in rows}.values():
            assert bank is not None
            members = [row for row in rows if row.bank is bank]
            old = [row.place for row in members]
            self._settle(members, capacity_for(bank.capacity + 1))
            target = members[0].bank
            assert target is not None
            bank.move(torch.tensor(old, device=device), target, torch.tensor([row.place for row in members], device=device))
            bank.release(old)

    def _compact(self, rows: Sequence[Completion]) -> None:
        """Fill holes with the highest rows once a bank is less than three quarters full: attention reads all below the top."""
        for bank in {id(row.bank): row.bank for row in rows}.values():
            assert bank is not None
            if bank.top * 3 <= bank.used * 4:
                continue
            high = [row for row in rows if row.bank is bank and row.place >= bank.used]
            if not high:
                continue
            old = [row.place for row in high]
            new = bank.claim(len(high))
            at = torch.tensor(old, device=self.base.device)
            bank.move(at, bank, torch.tensor(new, device=self.base.device))
            bank.release(old)
            for row, place in zip(high, new, strict=True):
                row.place = place

    # ------------------------------------------------ trouble

    def _retreat(self, error: Exception) -> None:
        """A pass failed: start its rows anew, half as many at a time; draws do not depend on the company, so nothing is lost but
        time. The request that fails alone is the one at fault; the others may then come back all at once."""
        fresh = [row for group in self._starting.values() for row in group]
        rows = [row for row in self.batch.rows if not row.ended] + [row for row in fresh if not row.request.cancelled]
        if not rows and not self.waiting:
            raise error
        requests = list({row.request: None for row in rows}) or [self.waiting[0]]  # no row: the first could not be let in
        self._retreats += 1
        self.batch = self._gather([])
        self.banks.clear()
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

"""Rows that decode together: their places in the cache, and the passes over them.

Each distinct (adapter, prompt) that starts is read once and shared by its completions; from then on every pass is one token
of each row. A crew needs nothing of another, so two of them run on two threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from veneer.engine import compiled
from veneer.engine.attention import Ragged, Row
from veneer.engine.base import Base, Head
from veneer.engine.batch import Batch
from veneer.engine.cache import AHEAD, Bank, Fill, Known, PromptLayout, Shared, StepLayout, Whole, capacity_for
from veneer.engine.draws import Chooser, Drawn, uniforms
from veneer.engine.flat import Flat, Segment, filled, runs
from veneer.engine.prefixes import Prefixes
from veneer.engine.request import Acting, Completion, SampleRequest
from veneer.engine.scores import score_prompt
from veneer.types import RunError

T = TypeVar("T")

IDLE = 8
"""Ended rows stay in the batch until they are one in this many, or until others wait for their place."""
KEPT = 2**28
"""Bytes of cache that are kept while nothing runs."""
BURST = 8
"""Tokens a row may draw before the engine looks at its queue again."""


class Weights(Protocol):
    """What runs the model: ``LoraStack`` or ``FullStack``."""

    mixes_slots: bool
    passes_side_by_side: bool
    """Whether training on a CPU gives each thread a pass of its own."""
    gradient_checkpointing: bool

    @property
    def repeats_prompts(self) -> bool:
        """Whether reading the end of a prompt behind keys that are there gives the bits of reading all of it."""
        ...

    @property
    def steps_alone(self) -> bool:
        """Whether a decoding step leaves the interpreter to others most of the time, so that two of them side by side pay."""
        ...

    def stackable(self, slots: Sequence[int | None]) -> bool: ...

    def infer(self, flat: Flat, finish: Callable[[Tensor, Head], T], *, published: bool) -> T: ...

    def train(self, flat: Flat, finish: Callable[[Tensor, Head], Tensor]) -> list[Tensor]: ...


def _rank(acting: Acting) -> int:
    """Tokens of one adapter lie together."""
    return -1 if acting.slot is None else acting.slot


class Crew:
    def __init__(self, base: Base, weights: Weights, prefixes: Prefixes) -> None:
        self.base, self.weights, self.prefixes = base, weights, prefixes
        self.shares = compiled.runs_on(next(base.model.parameters()))
        """Completions read their prompt's keys where they are."""
        self.banks: dict[int, Bank] = {}
        self.batch = self._gather([])
        self.starting: list[list[Completion]] = []
        """Rows that the next pass lets in, by adapter and prompt."""
        self.stale = False
        """Some rows must leave before the next pass."""
        self.switched = False
        """For some row another adapter acts from the next step on."""
        self.failed: list[SampleRequest] = []
        """For the sampler to take away."""
        self.given_up = False

    @property
    def rows(self) -> list[Completion]:
        return self.batch.rows + [row for group in self.starting for row in group]

    def _gather(self, rows: list[Completion]) -> Batch:
        return Batch.of(rows, self.base, self.weights.stackable)

    def rearrange(self, awaited: bool) -> None:
        """Drop ended rows once there are many or their places are ``awaited``, and move rows that outgrow their bank."""
        rows = self.batch.rows
        ended = sum(row.ended for row in rows)
        crowded = ended and (self.stale or awaited or ended * IDLE >= len(rows))
        self.stale = False
        if crowded or (rows and self.batch.steps_left <= 0):
            for row in rows:
                if row.ended:
                    self._leave(row)
            rows = [row for row in rows if not row.ended]
            if not self.shares:
                self._compact(rows)
            self.batch = self._sorted(rows)
            if not rows and sum(bank.bytes for bank in self.banks.values()) > KEPT:
                self.banks.clear()

    def _sorted(self, rows: list[Completion]) -> Batch:
        outgrown = [row for row in rows if row.left <= 0]
        self._move(outgrown)
        order = sorted(rows, key=lambda row: (_rank(row.acting), id(row.bank), row.place))
        return self._gather(order)

    def start(self, rows: list[Completion]) -> None:
        """Let rows of one adapter and prompt in with the next pass."""
        self.starting.append(rows)
        length, ahead = len(rows[0].request.prompt), min(max(1, *(row.budget for row in rows)), AHEAD)
        if self.shares:
            bank = self._bank(capacity_for(length))
            (slot,) = bank.claim(1)
            shared, length = Shared(bank, slot, length, len(rows)), 0
            if self.weights.repeats_prompts and not any(row.request.wish for row in rows):
                shared.known = self.prefixes.recall(rows[0].request, bank, slot)
            for row in rows:
                row.shared, row.known = shared, shared.known
        self._settle(rows, capacity_for(length + ahead))

    # ------------------------------------------------ passes

    def burst(self) -> list[SampleRequest]:
        """Draw tokens until a request is done, at most ``BURST`` a row; returns the requests that are done."""
        done: list[SampleRequest] = []
        for _ in range(BURST):
            done = self._draw()
            if done or self.stale or self.batch.steps_left <= 0:
                break
        return done

    def _draw(self) -> list[SampleRequest]:
        """Read the prompts of the rows that start, and draw a token for every row; returns the requests that are done by it."""
        ending: dict[SampleRequest, None] = {}
        if self.starting:
            self.starting.sort(key=lambda group: _rank(group[0].request.spans[0].acting))
            fresh = [row for group in self.starting for row in group]
            self._take(fresh, self._read(self.starting), ending)
            for row in {row.request: row for row in fresh}.values():
                if row.request.scores is not None and not row.request.scores.finite(row.request.wish):
                    self._fail(row)
            self._keep(self.starting)
            self.starting = []
            ending |= {row.request: None for row in fresh if not row.budget}
            for row in fresh:
                if row.ended:
                    self._leave(row)
            self.batch, self.switched = self._sorted(self.batch.rows + [row for row in fresh if not row.ended]), False
        if self.batch.rows:
            drawn = self._step()
            self._take(self.batch.rows, drawn, ending)
            self.batch.advance(drawn.tokens)
            if self.switched:
                self.batch, self.switched = self._sorted(self.batch.rows), False
        return [request for request in ending if request.done and not request.cancelled]

    def _take(self, rows: Sequence[Completion], drawn: Drawn, ending: dict[SampleRequest, None]) -> None:
        if self.given_up:
            raise RunError("this pass was given up")  # its thread was left behind, and its rows have started anew
        told = drawn.logprobs.tolist()
        if not math.isfinite(sum(told)):
            self._reject([row for row, logprob in zip(rows, told, strict=True) if not math.isfinite(logprob)])
        for found in drawn.likeliest:
            for i, tokens, logprobs in zip(found.rows, found.tokens, found.logprobs, strict=True):
                if not rows[i].ended:
                    rows[i].likeliest.append((tokens, logprobs))
        for row, token, logprob in zip(rows, drawn.tokens.tolist(), told, strict=True):
            if not row.ended:
                self._append(row, token, logprob)
                if row.stop_reason is not None:
                    ending[row.request] = None

    def _reject(self, rows: Sequence[Completion]) -> None:
        """These drew from what is no distribution. Some may have ended before, and are still in the batch."""
        self.stale = True
        for row in rows:
            row.spoilt = True
            if not row.ended:
                self._fail(row)

    def _fail(self, row: Completion) -> None:
        row.request.fail(row.turn)
        self.failed.append(row.request)
        self.stale = True

    def _step(self) -> Drawn:
        """Run the model on the newest token of every row."""
        batch = self.batch
        for bank in batch.banks:
            bank.begin(batch.positions, batch.step)
        flat = Flat(batch.newest, batch.positions, StepLayout(batch.banks), batch.segments, batch.places)
        return self.weights.infer(flat, lambda hidden, head: batch.choose.draw(head(hidden, 0), batch.draws[batch.step]), published=True)

    def _read(self, started: list[list[Completion]]) -> Drawn:
        """Run the model on the prompts of the rows that start, or on what is not known of them, and draw their first tokens."""
        device, at, line = self.base.device, 0, 0
        rows, fills, segments, wanted, read = list[Row](), list[Fill](), list[Segment](), list[int](), list[int]()
        scored = [any(row.request.wish for row in group) for group in started]
        for group, all_of_it in zip(started, scored, strict=True):
            request, known = group[0].request, 0 if group[0].shared is None else group[0].shared.known
            length = len(request.prompt)
            first = 0 if all_of_it else length - 1
            for span in request.spans:
                places = max(0, span.stop - max(first, span.start))
                segments.append(Segment(span.acting.slot, max(0, span.stop - max(known, span.start)), places))
            fills += self._fills(group, line, length - known, known)
            wanted += range(line + first - known, line + length - known)
            read += range(at + known, at + length)
            rows.append(Row(at, length))
            at, line = at + length, line + length - known
        tokens = np.concatenate([group[0].request.prompt for group in started])
        positions = np.concatenate([np.arange(row.length) for row in rows])
        flat = Flat(
            filled(tokens[read].tolist(), device),
            filled(positions[read].tolist(), device),
            PromptLayout(Ragged(rows, device, self.base.window), fills, None if line == at else self._whole(started, rows, read)),
            runs(segments),
            torch.tensor(wanted, device=device),
        )
        return self.weights.infer(flat, lambda hidden, head: self._start_drawing(hidden, head, started, scored), published=True)

    def _whole(self, started: list[list[Completion]], rows: Sequence[Row], read: Sequence[int]) -> Whole:
        """``rows``: the prompts in a line of whole ones; ``read``: the places in it that the pass reads."""
        by_bank: dict[int, tuple[Bank, list[tuple[int, int, int]]]] = {}
        for group, row in zip(started, rows, strict=True):
            shared = group[0].shared
            assert shared is not None
            places = by_bank.setdefault(id(shared.bank), (shared.bank, []))[1]
            places += [(shared.slot, position, row.start + position) for position in range(shared.known)]
        known = [Known(bank, *torch.tensor(places).T.contiguous()) for bank, places in by_bank.values() if places]
        return Whole(rows[-1].start + rows[-1].length, torch.tensor(read), known)

    def _fills(self, group: list[Completion], start: int, length: int, first: int) -> list[Fill]:
        """Where keys and values of a prompt go, from its position ``first`` on; they are at ``start`` in the pass's line."""
        shared = group[0].shared
        if shared is not None:
            return [Fill(start, length, shared.bank, torch.tensor([shared.slot]), first)]
        homes: dict[int, tuple[Bank, list[int]]] = {}
        for row in group:
            assert row.bank is not None
            homes.setdefault(id(row.bank), (row.bank, []))[1].append(row.place)
        return [Fill(start, length, bank, torch.tensor(places, device=self.base.device)) for bank, places in homes.values()]

    def _keep(self, started: list[list[Completion]]) -> None:
        """Let prompts that begin like these find them."""
        for group in started if self.weights.repeats_prompts else ():
            shared = group[0].shared
            assert shared is not None
            if not group[0].spoilt:
                self.prefixes.keep(group[0].request, shared.bank, shared.slot)

    def _start_drawing(self, hidden: Tensor, head: Head, started: list[list[Completion]], scored: list[bool]) -> Drawn:
        """Score the prompts that are to be scored, and choose the first tokens of the rows."""
        device, at, last = self.base.device, 0, list[int]()
        for group, all_of_it in zip(started, scored, strict=True):
            if all_of_it:
                prompt = group[0].request.prompt
                asking = list({row.request: None for row in group if row.request.wish})
                places = slice(at, at + len(prompt) - 1)
                scores = score_prompt(hidden[places], head, at, prompt, [request.wish for request in asking])
                for request, found in zip(asking, scores, strict=True):
                    request.scores = found
                at = places.stop
            last.append(at)
            at += 1
        logits = torch.cat([head(hidden[i : i + 1], i) for i in last]) if any(scored) else head(hidden, 0)
        fresh = [row for group in started for row in group]
        source = torch.tensor([i for i, group in enumerate(started) for _ in group], device=device)
        draws = uniforms(torch.tensor([row.key for row in fresh], device=device), torch.zeros(len(fresh), dtype=torch.long, device=device))
        choose = Chooser([row.request.params for row in fresh], device, [row.request.top_logprobs for row in fresh])
        return choose.draw(logits[source], draws)

    def _append(self, row: Completion, token: int, logprob: float) -> None:
        row.tokens.append(token)
        row.logprobs.append(logprob)
        if token in row.stop_tokens or (row.request.params.stop and self._ends_with_stop(row)):
            row.stop_reason = "stop"
        elif len(row.tokens) >= row.budget:
            row.stop_reason = "length"
        elif row.request.switches and row.switch():
            self.switched = True

    def _ends_with_stop(self, row: Completion) -> bool:
        """Whether the newest token completed a stop text. A token is at least one byte, so a tail of that many tokens is enough."""
        longest = max(len(text.encode()) for text in row.request.params.stop)
        tail = self.base.decode(row.tokens[-longest:])
        before = self.base.decode(row.tokens[-longest:-1])
        return any(text in tail and text not in before for text in row.request.params.stop)

    # ------------------------------------------------ places in the cache

    def _bank(self, capacity: int) -> Bank:
        return self.banks.setdefault(capacity, Bank(capacity, self.base.device))

    def _settle(self, rows: Sequence[Completion], capacity: int) -> None:
        bank = self._bank(capacity)
        for row, place in zip(rows, bank.claim(len(rows)), strict=True):
            row.bank, row.place = bank, place

    def _leave(self, row: Completion) -> None:
        if row.bank is not None:
            if row.spoilt:
                row.bank.wipe(row.place)
            row.bank.release([row.place])
            row.bank = None
        if row.shared is not None:
            row.shared.readers -= 1
            if row.shared.readers == 0:
                row.shared.bank.release([row.shared.slot])
            row.shared = None

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

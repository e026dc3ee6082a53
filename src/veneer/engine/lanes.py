"""Threads for passes: several side by side, and each can be left behind if its pass never returns."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

import torch

from veneer.types import RunError

T = TypeVar("T")


class Stuck(RunError):
    """A pass that did not return in time. Its thread is left to itself; what it may still write to is no longer read."""


Jobs = SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None]


class Lane:
    """One thread that runs a job at a time, with ``threads`` threads for each matrix product. It ends when nobody has the lane any more."""

    def __init__(self, threads: int) -> None:
        self._jobs: Jobs = SimpleQueue()
        before, ready = torch.get_num_threads(), threading.Event()
        threading.Thread(target=_work, args=(self._jobs, threads, ready), daemon=True, name="veneer-lane").start()
        ready.wait()
        torch.set_num_threads(before)  # a thread that computes for the first time takes what was set last, by whichever thread
        weakref.finalize(self, self._jobs.put, None).atexit = False

    def submit(self, job: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        self._jobs.put((job, future))
        return future


def _work(jobs: Jobs, threads: int, ready: threading.Event) -> None:
    torch.get_num_threads()  # so that this is not the first time
    torch.set_num_threads(threads)
    ready.set()
    while (asked := jobs.get()) is not None:
        job, future = asked
        try:
            future.set_result(job())
        except BaseException as error:
            future.set_exception(error)
        del asked, job, future  # what the job held must not outlive it


class Lanes(Generic[T]):
    """As many lanes as are asked for.

    Without ``patience`` a single job runs on the calling thread. With it every job has a thread of its own, and one that has not
    returned after so many seconds is stuck; the calling thread then keeps one thread for its products, because two pools of
    threads on the same cores wait for each other.
    """

    def __init__(self, patience: float | None, threads: int | None = None) -> None:
        """``threads`` that may be used; None: as many as the calling thread has."""
        self.patience = patience
        self._lanes: dict[int, list[Lane]] = {}
        """By their number of threads; kept, as a thread that waits costs nothing and a new one does."""
        self._threads = torch.get_num_threads() if threads is None and patience is not None else threads
        if patience is not None:
            torch.set_num_threads(1)

    @property
    def threads(self) -> int:
        """That may be used."""
        return self._threads or torch.get_num_threads()

    def _lanes_of(self, count: int, threads: int) -> list[Lane]:
        lanes = self._lanes.setdefault(threads, [])
        lanes += [Lane(threads) for _ in range(count - len(lanes))]
        return lanes

    def run_one(self, job: Callable[[], T]) -> T:
        """The result of one job, which may use all threads.

        Raises:
            Stuck: it did not return in time.
        """
        if self.patience is None:
            return job()
        lanes = self._lanes_of(1, self.threads)
        future = lanes[0].submit(job)
        try:
            return future.result(self.patience)
        except TimeoutError:
            if future.done():
                raise
            lanes[0] = Lane(self.threads)
            raise self._stuck() from None

    def _stuck(self) -> Stuck:
        return Stuck(f"a pass did not return within {self.patience:g} seconds; its thread was left behind")

    def run(self, jobs: Sequence[Callable[[], T]], lanes: int, threads: int) -> Iterator[T | Stuck]:
        """Results in the order of the jobs, ``lanes`` of which run side by side with so many threads each."""
        if self.patience is None and lanes == 1 and threads == self.threads:
            yield from (job() for job in jobs)
            return
        mine = self._lanes_of(lanes, threads)
        idle, running = mine[:lanes], dict[Future[T], tuple[int, Lane]]()
        waiting, done, shown = list(enumerate(jobs)), dict[int, Future[T] | Stuck](), 0
        while shown < len(jobs):
            while waiting and idle:
                number, job = waiting.pop(0)
                lane = idle.pop()
                running[lane.submit(job)] = (number, lane)
            finished, late = wait(running, self.patience, FIRST_COMPLETED)
            for future in finished or late:
                number, lane = running.pop(future)
                if finished:
                    done[number] = future
                    idle.append(lane)
                else:  # one job a lane, so each of them has been at it for that long
                    done[number] = self._stuck()
                    mine[mine.index(lane)] = fresh = Lane(threads)
                    idle.append(fresh)
            while shown in done:
                result = done.pop(shown)
                shown += 1
                yield result if isinstance(result, Stuck) else result.result()

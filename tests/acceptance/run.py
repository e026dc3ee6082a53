"""``make acceptance``: public clients, unmodified, against a real server, with the numbers that a real engine must show.

Each client runs in a process of its own, in an environment that has none of Veneer; the server is ``veneer serve`` on a free
port. One line a point on the terminal, everything else in .bench/acceptance/logs. Exit code 1 if a point failed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import failures
import recipes
import serving
from client import CLIENTS, Stage
from workplace import ROOT, ensure_clients, make_folder

from server import Server

PLACE = ROOT / ".bench/acceptance"
Figures = dict[str, Any]
Point = Callable[[Stage], Figures]


def first_step(stage: Stage) -> Figures:
    """Seconds from starting the server to a user's first finished training step, on a server of its own that has done nothing."""
    report = stage.logs / "first_step.json"
    server = Server(stage.logs.parent / "home-first-step", stage.logs / "server-first-step.log")
    try:
        ready = server.start()
        stage.run("first_step", CLIENTS / "first_step.py", "--report", report, url=server.url)
        times = json.loads(report.read_text())
        interrupted = server.stop()
    finally:
        server.stop()
    assert interrupted in (0, 130), f"the server ended with code {interrupted} after an interrupt"
    return {
        "seconds_until_healthy": ready,
        "seconds_from_client_to_first_step": times["done"] - times["imported"],
        "seconds_to_first_step": ready + times["done"] - times["imported"],
    }


def checks(name: str) -> Point:
    return lambda stage: stage.checks(name)


POINTS: dict[str, Point] = {
    "first_step": first_step,
    "cli": checks("cli"),
    "training": checks("training"),
    "losses": checks("losses"),
    "optimizer": checks("optimizer"),
    "sampling": checks("sampling"),
    "checkpoints": checks("checkpoints"),
    "sessions": checks("sessions"),
    "chat_sl": recipes.chat_sl,
    "sl_loop": recipes.sl_loop,
    "math_rl": recipes.math_rl,
    "rl_loop": recipes.rl_loop,
    "openai": serving.openai_api,
    "tenants": failures.tenants,
    "restart": failures.restart,
    "full_disk": failures.full_disk,
}
MORE: dict[str, Point] = recipes.MORE


@dataclass(frozen=True)
class Outcome:
    name: str
    ok: bool
    seconds: float
    figures: Figures
    failure: str | None = None

    def __str__(self) -> str:
        said = ", ".join(f"{key} {shown(value)}" for key, value in self.figures.items()) if self.ok else str(self.failure)
        return f"{self.name:<22} {self.seconds:7.1f} s  {'ok    ' if self.ok else 'FAILED'}  {said}"


def shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def play(name: str, point: Point, stage: Stage) -> Outcome:
    clock = time.monotonic()
    try:
        figures = point(stage)
    except (AssertionError, OSError, KeyError, ValueError) as error:
        why = " ".join(str(error).split()) or repr(error)
        return Outcome(name, False, time.monotonic() - clock, {}, why[:600])
    return Outcome(name, True, time.monotonic() - clock, figures)


def revive(stage: Stage, behind: str) -> Figures:
    """Another server for the points that follow; that the last one went away is a failure whatever comes of it."""
    assert stage.server.process is not None
    code = stage.server.process.poll()
    if code is None:
        stage.server.kill()
    stage.server.start()
    raise AssertionError(f"the server was gone behind {behind} (exit code {code}); another was started")


def arguments_of(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="NAME", help="one point; repeatable")
    parser.add_argument("--more", action="store_true", help="also the cookbook's other recipes that run offline")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the document")
    parser.add_argument("--list", action="store_true", help="name the points and end")
    arguments = parser.parse_args(argv)
    unknown = sorted(set(arguments.only or ()) - POINTS.keys() - MORE.keys())
    if unknown:
        parser.error(f"there is no point {unknown[0]!r}; there are {', '.join((*POINTS, *MORE))}")
    return arguments


def main(argv: Sequence[str]) -> int:
    arguments = arguments_of(argv)
    if arguments.list:
        print(*POINTS, *(f"{name} (--more)" for name in MORE), sep="\n")
        return 0
    logs = PLACE / "logs"
    shutil.rmtree(PLACE, ignore_errors=True)
    logs.mkdir(parents=True)
    python = ensure_clients(logs / "pip.log")
    make_folder(PLACE / "work")
    points = {**POINTS, **MORE} if arguments.more or arguments.only else POINTS
    chosen = {name: point for name, point in points.items() if name in (arguments.only or points)}
    stage = Stage(python, PLACE / "work", logs, Server(PLACE / "home", logs / "server.log"))
    outcomes: list[Outcome] = []
    try:
        stage.server.start()
        for name, point in chosen.items():
            outcomes.append(play(name, point, stage))
            print(outcomes[-1], flush=True)
            if not stage.server.answers():
                outcomes.append(play("server", partial(revive, behind=name), stage))
                print(outcomes[-1], flush=True)
    finally:
        stage.server.stop()
    failed = [outcome.name for outcome in outcomes if not outcome.ok]
    document = {"passed": len(outcomes) - len(failed), "failed": failed, "points": [asdict(outcome) for outcome in outcomes]}
    if arguments.json:
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    print(f"{document['passed']} of {len(outcomes)} points passed; logs in {logs.relative_to(ROOT)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

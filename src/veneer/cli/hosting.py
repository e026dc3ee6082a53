"""From names of bases to a running server."""

from __future__ import annotations

import gc
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import uvicorn

from veneer.cli.assemble import PATIENCE
from veneer.engine import LocalEngine, LoraEngine, load_base, set_threads
from veneer.render import Renderer
from veneer.server.access import is_loopback
from veneer.server.app import make_app
from veneer.server.bases import Bases, Served
from veneer.server.connections import settings
from veneer.server.keys import Keys
from veneer.server.limits import Limits
from veneer.server.log import AccessLog
from veneer.server.shelf import Shelf
from veneer.server.worker import Worker
from veneer.store.files import veneer_home
from veneer.types import ConfigError, RunError, SamplingParams

SWITCH = 2e-4
"""Seconds after which a thread lets others have the interpreter; Python's own 5 ms keep the engines' threads, which want it for
microseconds between two products, waiting for the event loop."""


def serve(
    bases: Sequence[str],
    aliases: Sequence[str],
    host: str,
    port: int,
    threads: int | None,
    device: str,
    limits: Limits,
    log: Path | None,
    lora_dir: Path | None,
    room: int,
) -> None:
    """Run until SIGINT or SIGTERM. ``log``: the access log; None: stderr. ``lora_dir``: from inside of it clients may load adapters.
    ``room``: bytes for adapters that serve, on each base, and as many for all runs in training."""
    names = _names(bases, aliases)
    listening = _listen(host, port)
    home = veneer_home() / "server"
    _check_exposure(listening, home)
    lines = AccessLog(log)
    _allow_connections()
    set_threads(1)
    threads = threads or os.cpu_count() or 1
    engines: dict[str, LocalEngine] = {}
    for base in names:
        first = next(iter(engines.values()), None)
        engines[base] = LoraEngine(load_base(base, device), patience=PATIENCE, threads=threads, beside=first)
    for engine in engines.values():
        _warm_up(engine)
    worker = Worker(list(engines.values()))
    served = []
    for base, engine in engines.items():
        assert engine.base.tokenizer is not None
        served.append(Served(tuple(names[base]), engine, Renderer(engine.base.tokenizer), Shelf(worker, engine, room=room)))
    sys.setswitchinterval(SWITCH)
    app = make_app(Bases(served), worker, home, limits, lines, lora_dir=lora_dir, room=room)
    gc.freeze()
    where = f"http://{host}:{listening.getsockname()[1]}"
    print(f"veneer: serving {', '.join(name for base in names for name in names[base])} on {where}", file=sys.stderr, flush=True)
    uvicorn.Server(settings(app)).run(sockets=[listening])


def _names(bases: Sequence[str], aliases: Sequence[str]) -> dict[str, list[str]]:
    """Each base with all its names."""
    names = {base: [base] for base in bases}
    for alias in aliases:
        name, equals, base = alias.partition("=")
        if not (name and equals and base in names):
            raise ConfigError(f"--alias {alias}: write NAME=BASE, with one of the bases {', '.join(names)}")
        if any(name in others for others in names.values()):
            raise ConfigError(f"--alias {alias}: {name!r} is a name already")
        names[base].append(name)
    return names


def _listen(host: str, port: int) -> socket.socket:
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(2048)
    except OSError as error:
        raise RunError(f"cannot listen on {host} port {port}: {error.strerror}; give another --port") from error
    return listening


def _check_exposure(listening: socket.socket, home: Path) -> None:
    """
    Raises:
        ConfigError: other machines could call a server that has no keys.
    """
    address = listening.getsockname()[0]
    if is_loopback(address):
        return
    keys = Keys(home)
    if not keys.any():
        raise ConfigError(f"{address} can be reached from outside, and there are no keys; make one first: veneer keys create --name NAME")
    keys.close()


def _allow_connections() -> None:
    """As many as the system lets this process have, as each idle one holds a file descriptor."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _warm_up(engine: LocalEngine) -> None:
    """Answer once, so that the first client does not wait for loops to be compiled."""
    engine.sample(np.zeros(1, np.int64), None, SamplingParams(max_tokens=2)).result()

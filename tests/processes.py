"""Real processes that answer fast: one interpreter imports torch once and forks a child for every command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.store.registry import Registry

PARENT = """
import gc, json, os, resource, sys, traceback
import matplotlib.pyplot
import veneer.cli.assemble
from veneer.cli.main import main

gc.collect()
gc.freeze()
for line in iter(sys.stdin.readline, ""):
    job = json.loads(line)
    if "wait" in job:
        answer = os.waitstatus_to_exitcode(os.waitpid(job["wait"], 0)[1])
    else:
        answer = os.fork()
        if answer == 0:
            break
    print(answer, flush=True)
else:
    sys.exit()
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
for stream, path, flags in ((0, os.devnull, os.O_RDONLY), (1, job["out"], os.O_WRONLY), (2, job["err"], os.O_WRONLY)):
    os.dup2(os.open(path, flags), stream)
os.chdir(job["cwd"])
os.environ["VENEER_HOME"] = job["home"]
code = 1
try:
    main(job["args"])
except SystemExit as error:
    code = error.code
except BaseException:
    traceback.print_exc()
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)  # at once: taking torch down costs a second
"""


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """The one JSON document on stdout."""
        return json.loads(self.out)


class Running:
    """A command on its way."""

    def __init__(self, veneer: Veneer, pid: int, out: Path, err: Path) -> None:
        self.veneer, self.pid, self.out, self.err = veneer, pid, out, err

    def kill(self, signum: signal.Signals) -> None:
        os.kill(self.pid, signum)

    def wait(self) -> Result:
        code = self.veneer.ask({"wait": self.pid})
        return Result(code, self.out.read_text(), self.err.read_text())


class Veneer:
    """Runs ``veneer ARGS`` with a VENEER_HOME, from a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        self.parent = subprocess.Popen(
            [sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, job: dict[str, Any]) -> int:
        assert self.parent.stdin is not None
        assert self.parent.stdout is not None
        self.parent.stdin.write(json.dumps(job) + "\n")
        self.parent.stdin.flush()
        return int(self.parent.stdout.readline())

    def start(self, home: Path, *args: object, cwd: Path | None = None) -> Running:
        self.count += 1
        out, err = self.folder / f"{self.count}.out", self.folder / f"{self.count}.err"
        out.touch()
        err.touch()
        job = {"args": [str(a) for a in args], "home": str(home), "cwd": str(cwd or self.folder), "out": str(out), "err": str(err)}
        return Running(self, self.ask(job), out, err)

    def __call__(self, home: Path, *args: object, cwd: Path | None = None) -> Result:
        return self.start(home, *args, cwd=cwd).wait()


@contextmanager
def forking_veneer(folder: Path) -> Generator[Veneer, None, None]:
    veneer = Veneer(folder)
    try:
        yield veneer
    finally:
        assert veneer.parent.stdin is not None
        veneer.parent.stdin.close()
        veneer.parent.wait(10)


def plain(home: Path, *args: object) -> subprocess.Popen[str]:
    """``python -m veneer ARGS``, from nothing."""
    environment = {**os.environ, "VENEER_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "veneer", *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.005)


SLOW_ENV = """
import asyncio
from veneer.envs.digits import sort
from veneer.envs.dataset import QuestionEnv


class Slow(QuestionEnv):
    async def step(self, action):
        await asyncio.sleep(SECONDS)
        text = action["content"]
        return type(await super().step(action))(sum(c in "13579" for c in text) / max(len(text), 1), True)


class Dataset:
    name = "slow"

    def env(self, split, index):
        plain = sort().env(split, index)
        return Slow(plain.problem, plain.grade)


def make():
    return Dataset()
"""

SMALL = """
checkpoint_every = 2
[lora]
rank = 1
[env]
name = "ENV:make"
[rl]
steps = 6
groups_per_batch = 2
group_size = 4
max_tokens = 16
[eval]
problems = 8
every = 3
"""


def small_run(folder: Path, seconds: float = 0.0, name: str = "small") -> Path:
    """A TOML file of a run of a second or so; each turn waits ``seconds``."""
    folder.mkdir(exist_ok=True)
    (folder / "slow_env.py").write_text(SLOW_ENV.replace("SECONDS", str(seconds)))
    (folder / f"{name}.toml").write_text(SMALL.replace("ENV", str(folder / "slow_env.py")))
    return folder / f"{name}.toml"


def evidence(home: Path, name: str = "small") -> dict[str, bytes]:
    """Everything of a finished run that must not depend on interruptions."""
    run = home / "runs" / name
    paths = [run / "metrics.jsonl", run / "config.toml", *run.glob("rollouts/*"), *run.glob("checkpoints/step-000006/*.safetensors")]
    found = {str(p.relative_to(home)): p.read_bytes() for p in paths}
    for entry in Registry(home).entries(name):
        files = ("adapter_model.safetensors", "adapter_config.json")
        found |= {f"{entry.reference}/{file}": (entry.folder / file).read_bytes() for file in files}
    return found


def differences(found: dict[str, bytes], expected: dict[str, bytes]) -> list[str]:
    """A line for each file that is not the same in both, with the place of the first difference."""
    told = [f"{name} is missing on one side" for name in sorted(found.keys() ^ expected.keys())]
    for name in sorted(found.keys() & expected.keys()):
        one, other = found[name], expected[name]
        if one != other:
            at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
            here = slice(max(0, at - 60), at + 40)
            told.append(f"{name} at byte {at} of {len(one)}: {one[here]!r} is not {other[here]!r}")
    return told


def leftovers(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob(".*") if p.name not in (".lock",))

"""Plays rollouts of a ``verifiers`` environment on command. Standard library and verifiers only.

A line of JSON each way. In, on stdin: first the settings, then ``{"play": NAME, "split": S, "index": I}`` and ``{"drop": NAME}``.
Out, on what was stdout: ``{"ready": FACTS}`` or ``{"refused": WORDS}``, then per rollout one line with its ``reward`` and
``metrics``, its ``error``, or ``dropped``. Whatever the environment prints goes to stderr. The end of stdin ends the program, also
when its parent was killed.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import json
import os
import queue
import sys
import threading
import time
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from veneer_loading import Refused, module_of
from veneer_marks import MARK, kill_marked
from veneer_v0 import Classic
from veneer_v1 import Tasks

GRACE = 5.0
"""Seconds from the end of stdin to the end of this process, whatever the environment is doing."""
KEY = "VENEER_BRIDGE_API_KEY"
"""Of this process's environment. Runtimes of verifiers hide names with API_KEY from the programs of a model."""


class Lines:
    """Commands as they come, read by a thread, so that the end of stdin is noticed while the environment computes."""

    def __init__(self) -> None:
        self.queue: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self.settings: dict[str, Any] = json.loads(sys.stdin.readline())
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in sys.stdin:
            self.queue.put(json.loads(line))
        self.queue.put(None)
        time.sleep(GRACE)
        kill_marked(os.environ[MARK])
        os._exit(1)


class Voice:
    def __init__(self, out: TextIO) -> None:
        self.out, self.lock = out, threading.Lock()

    def say(self, **message: Any) -> None:
        line = json.dumps(message, default=float)
        with self.lock:
            self.out.write(line + "\n")
            self.out.flush()


async def run(game: Any, lines: Lines, voice: Voice) -> None:
    playing: dict[str, asyncio.Task[Any]] = {}

    def tell(name: str, task: asyncio.Task[Any]) -> None:
        del playing[name]
        if task.cancelled():
            voice.say(rollout=name, dropped=True)
        elif (error := task.exception()) is not None:
            voice.say(rollout=name, error=one_line(error))
        else:
            reward, metrics = task.result()
            try:
                voice.say(rollout=name, reward=reward, metrics=metrics)
            except (TypeError, ValueError) as unwritable:
                voice.say(rollout=name, error=f"its reward or a metric is no number ({one_line(unwritable)})")

    loop = asyncio.get_running_loop()
    async with game.serving():
        voice.say(ready=game.facts())
        while (command := await loop.run_in_executor(None, lines.queue.get)) is not None:
            name = command.get("play") or command["drop"]
            if "play" in command:
                playing[name] = asyncio.create_task(game.play(name, command["split"], command["index"]))
                playing[name].add_done_callback(functools.partial(tell, name))
            elif name in playing:
                playing[name].cancel()
            else:
                voice.say(rollout=name, dropped=True)
        left = list(playing.values())
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)


def one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def hint(error: Exception) -> str:
    """What helps against an error that only a package of another version makes."""
    if "module 'verifiers' has no attribute" in str(error):
        here = metadata.version("verifiers")
        return f"; it is made for another verifiers than {here}: load_environment needs pip install 'verifiers<0.4'"
    return ""


def main() -> None:
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    atexit.register(kill_marked, os.environ[MARK])  # the first to register is the last to run
    lines, voice = Lines(), Voice(out)
    settings = lines.settings
    os.environ[KEY] = settings.pop("key")
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = ",".join(filter(None, [os.environ.get("NO_PROXY"), "127.0.0.1", "localhost"]))
    sys.path.remove(str(Path(__file__).resolve().parent))  # nothing of ours is in the way of the environment's imports
    if settings["folder"]:
        folder = str(Path(settings["folder"]).resolve())
        sys.path.insert(0, folder)
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))  # for tool servers that it starts
    try:
        module = module_of(settings["id"], settings["folder"])
        game = (Classic if hasattr(module, "load_environment") else Tasks)(settings, KEY)
    except Refused as refused:
        voice.say(refused=str(refused))
        return
    except Exception as error:  # the environment's own code may raise anything
        voice.say(refused=f"loading {settings['id']} raised {one_line(error)}{hint(error)}")
        return
    asyncio.run(run(game, lines, voice))


if __name__ == "__main__":
    main()

"""What stands between the sandbox and the program: a program of its own, with the standard library alone.

It reads an order (JSON) from its standard input, gives up what it may do, and then becomes the program. What it knows, the program can
read; so it is told nothing that is a secret.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
import traceback
from types import CodeType, ModuleType
from typing import Any

STOPPED = 128
"""Added to the number of the signal that ended the program, as shells do."""
OPEN_FILES = 64


def main() -> None:
    with open(0, "rb", closefd=False) as stream:
        order: dict[str, Any] = json.loads(stream.read())
    if order["watched"]:
        _stay_behind()
    if order["uid"] is not None:
        _give_up_root(order["uid"])
    os.makedirs(order["folder"], exist_ok=True)
    os.chdir(order["folder"])
    for name, content in order["files"].items():
        with open(name, "w", encoding="utf-8") as file:
            file.write(content)
    _set_stdin(order["stdin"])
    _limit(order["limits"])
    _become(order["main"])


def _give_up_root(uid: int) -> None:
    """For a uid that nobody else has: the limit on processes counts those of a uid, and does not bind root."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def _limit(limits: dict[str, int]) -> None:
    """For good: the hard limits are set too."""
    kinds = {"cpu": resource.RLIMIT_CPU, "memory": resource.RLIMIT_AS, "file": resource.RLIMIT_FSIZE, "processes": resource.RLIMIT_NPROC}
    for name, kind in kinds.items():
        resource.setrlimit(kind, (limits[name], limits[name] + (name == "cpu")))  # a second between the signal and the end
    resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, OPEN_FILES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _set_stdin(text: str) -> None:
    with open(".stdin", "w+", encoding="utf-8") as file:
        os.unlink(".stdin")
        file.write(text)
        file.flush()
        os.lseek(file.fileno(), 0, os.SEEK_SET)
        os.dup2(file.fileno(), 0)


def _become(name: str) -> None:
    """Run the file as ``__main__`` in this interpreter: starting a second one would take as long again."""
    with open(name, encoding="utf-8") as file:
        source = file.read()
    module = ModuleType("__main__")
    module.__dict__["__file__"] = name
    sys.modules["__main__"], sys.argv = module, [name]
    sys.path.insert(0, os.getcwd())
    try:
        code: CodeType = compile(source, name, "exec")
        exec(code, module.__dict__)
    except Exception as error:
        frames = error.__traceback__.tb_next if error.__traceback__ else None  # this file's frame is none of the program's
        traceback.print_exception(error.with_traceback(frames))
        sys.exit(1)


# ---------------------------------------------------------------- where no namespace keeps a program's processes together


def _stay_behind() -> None:
    """Fork: the child goes on to the program; this process inherits its orphans, ends them when it ends, and tells how it ended."""
    import ctypes

    prctl = ctypes.CDLL(None).prctl
    prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    prctl(1, signal.SIGTERM, 0, 0, 0)  # PR_SET_PDEATHSIG: whoever asked for the program is gone
    signal.signal(signal.SIGTERM, lambda *_: os._exit(_sweep_all(STOPPED + signal.SIGTERM)))
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        return
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):  # the pipes are the program's
        os.dup2(nothing, fd)
    os.closerange(3, max(map(int, os.listdir("/proc/self/fd"))) + 1)
    while True:
        pid, status = os.wait()
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            os._exit(_sweep_all(code if code >= 0 else STOPPED - code))


def _sweep_all(code: int) -> int:
    while True:
        sweep(os.getpid())
        try:
            while True:
                os.wait()
        except ChildProcessError:
            return code


def descendants(pid: int) -> list[int]:
    """Processes that come from ``pid``, itself left out. Empty if it is gone."""
    found: list[int] = []
    waiting = [pid]
    while waiting:
        at = waiting.pop()
        try:
            for thread in os.listdir(f"/proc/{at}/task"):
                with open(f"/proc/{at}/task/{thread}/children") as file:
                    children = [int(child) for child in file.read().split()]
                found += children
                waiting += children
        except OSError:  # it ended while we looked
            continue
    return found


def sweep(pid: int) -> None:
    """End everything that comes from ``pid``. Stopped first, so that nothing forks between being seen and being killed."""
    known: set[int] = set()
    while fresh := set(descendants(pid)) - known:
        for each in fresh:
            _signal(each, signal.SIGSTOP)
        known |= fresh
    for each in known:
        _signal(each, signal.SIGKILL)


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


if __name__ == "__main__":
    main()

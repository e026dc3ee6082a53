"""The sandbox against programs that mean harm: each is contained, told of, and leaves nothing behind.

Every program gets the writing end of a pipe that all its children inherit: as long as one of them lives, the reading end does not end.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from sandboxes import BOTH, LINUX, WALLED, children, command_of

from veneer.envs.tools.sandbox import Limits, Outcome, Sandbox
from veneer.envs.tools.sandbox.bubblewrap import LAUNCH
from veneer.envs.tools.sandbox.process import TICK
from veneer.types import ConfigError


@pytest.fixture(autouse=True)
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder for temporary ones that no other test works in at the same time, and that a program's own user may enter."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="veneer-test-") as folder:
        Path(folder).chmod(0o711)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield


LIMITS = Limits(cpu=2, wall=4.0, memory=128 * 2**20, disk=8 * 2**20, file=2 * 2**20, files=200, processes=8, output=2000)
pytestmark = LINUX


def run(program: str, bare: bool = False, stdin: str = "", **limits: float) -> Outcome:
    """Run it, and see that nothing lives on and no folder is left."""
    sandbox = Sandbox(replace(LIMITS, **limits), unsafe_no_sandbox=bare)
    folders = set(Path(tempfile.gettempdir()).glob("veneer-sandbox-*"))
    reading, writing = os.pipe()
    try:
        outcome = asyncio.run(sandbox.run({"main.py": program}, stdin, [writing]))
        os.set_blocking(reading, False)
        try:
            assert os.read(reading, 1) == b""
        except BlockingIOError:
            pytest.fail("something of it lives on")
    finally:
        os.close(reading)
    left = set(Path(tempfile.gettempdir()).glob("veneer-sandbox-*"))
    assert left <= folders
    return outcome


# ---------------------------------------------------------------- what programs may do


@pytest.mark.parametrize("bare", BOTH)
def test_a_program_runs(bare: bool) -> None:
    """Input, output, its own files, children and threads: what an honest program needs."""
    program = """
import json, os, subprocess, sys, threading
print(input().upper())
open("note", "w").write("kept")
print(open("note").read(), os.listdir("."))
threading.Thread(target=lambda: print("thread")).start()
print(subprocess.run([sys.executable, "-c", "print(6 * 7)"], capture_output=True, text=True).stdout.strip())
print("grüße", file=sys.stderr)
sys.exit(3)
"""
    outcome = run(program, bare, "hello\n", memory=512 * 2**20)
    assert outcome.stdout.splitlines() == ["HELLO", "kept ['main.py', 'note']", "thread", "42"] or "thread" in outcome.stdout
    assert (outcome.stderr, outcome.complaint, outcome.status, outcome.limit) == ("grüße\n", "grüße", 3, None)


@pytest.mark.parametrize("bare", BOTH)
def test_how_it_ended_is_told(bare: bool) -> None:
    """A crash, an exception and an exit are different things to learn from."""
    assert run("import os; os.abort()", bare).status == -6
    outcome = run("def f():\n    return 1 / 0\nf()", bare)
    assert (outcome.status, outcome.complaint) == (1, "ZeroDivisionError: division by zero")
    assert "launch" not in outcome.stderr
    assert run("syntax error", bare).complaint == "SyntaxError: invalid syntax"
    assert run("import sys; sys.exit('sorry')", bare).complaint == "sorry"
    assert run("import sys; sys.exit(255)", bare).status == 255


@pytest.mark.parametrize("bare", BOTH)
def test_nothing_of_the_environment_is_seen(bare: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys lie in environment variables."""
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    seen = run("import os; print(dict(os.environ))", bare).stdout
    assert "secret" not in seen
    assert "HOME" not in seen


# ---------------------------------------------------------------- too much


@pytest.mark.parametrize("bare", BOTH)
def test_endless_loop(bare: bool) -> None:
    outcome = run("while True: pass", bare, cpu=1, wall=60.0)
    assert (outcome.limit, outcome.status) == ("cpu", -24)


@pytest.mark.parametrize("bare", BOTH)
def test_endless_sleep_and_signals_ignored(bare: bool) -> None:
    outcome = run(
        "import signal, time\nfor n in range(1, 32):\n    try: signal.signal(n, signal.SIG_IGN)\n    except OSError: pass\n"
        "print('in', flush=True)\nwhile True: time.sleep(9)",
        bare,
        wall=1.0,
    )
    assert (outcome.limit, outcome.stdout) == ("wall", "in\n")
    assert outcome.seconds < 3


@pytest.mark.parametrize("bare", BOTH)
def test_endless_output(bare: bool) -> None:
    """It neither fills memory nor the model's context."""
    outcome = run("while True: print('x' * 99)", bare)
    assert outcome.limit == "output"
    assert outcome.stdout.endswith("\n[cut at 2000 bytes]")
    assert len(outcome.stdout) < 2100
    assert run("import sys\nwhile True: sys.stderr.write('x' * 99)", bare).limit == "output"


@pytest.mark.parametrize("bare", BOTH)
def test_output_that_just_fits_is_whole(bare: bool) -> None:
    outcome = run("print('x' * 1999)", bare)
    assert (outcome.stdout, outcome.limit, outcome.status) == ("x" * 1999 + "\n", None, 0)


@pytest.mark.parametrize("bare", BOTH)
def test_memory_bomb(bare: bool) -> None:
    outcome = run("x = bytearray(10**9)", bare)
    assert (outcome.status, outcome.complaint) == (1, "MemoryError")


@pytest.mark.parametrize("bare", BOTH)
def test_memory_bomb_of_many_processes(bare: bool) -> None:
    """Each stays below the limit of one."""
    bomb = "import os, time\nfor _ in range(5): os.fork() or (bytearray(b'x') * (60 * 2**20), time.sleep(3), os._exit(0))\ntime.sleep(3)"
    hold = bomb.replace("bytearray(b'x') * (60 * 2**20)", "globals().update(x=bytearray(b'x') * (60 * 2**20))")
    assert run(hold, bare).limit == "memory"


FORK_BOMB = """
import os, time
refused = made = 0
end = time.monotonic() + 0.7
while time.monotonic() < end:
    try:
        if os.fork() == 0:
            made, refused = 0, 0
        else:
            made += 1
    except OSError:
        refused += 1
        time.sleep(0.01)
open("told", "a").write(f"{made} ")
time.sleep(0.3)
print(sum(map(int, open("told").read().split())), refused > 0, flush=True)
time.sleep(9)
"""


@WALLED
def test_fork_bomb_is_refused_by_the_kernel() -> None:
    """Every process of it forks for ever; as root too, for whom the limit would not count."""
    outcome = run(FORK_BOMB, wall=2.0)
    made, refused = zip(*(line.split() for line in outcome.stdout.splitlines()), strict=True)
    assert outcome.limit in ("wall", "processes")
    assert set(refused) == {"True"}
    assert max(map(int, made)) < LIMITS.processes


def test_fork_bomb_without_walls_is_ended() -> None:
    """Root's forks are not limited; they are counted and ended, here before there are many."""
    slow = "import os, time\nfor _ in range(100):\n    os.fork() or (time.sleep(9), os._exit(0))\n    time.sleep(0.01)\ntime.sleep(9)"
    outcome = run(slow, bare=True)
    assert outcome.limit == "processes" or outcome.complaint.startswith("BlockingIOError")


@WALLED
def test_threads_count() -> None:
    outcome = run("import threading, time\nfor _ in range(99): threading.Thread(target=time.sleep, args=(9,), daemon=True).start()")
    assert "can't start new thread" in outcome.stderr


@pytest.mark.parametrize("bare", BOTH)
def test_huge_file(bare: bool) -> None:
    outcome = run("open('big', 'wb').write(bytes(5 * 2**20))", bare)
    assert outcome.complaint == "OSError: [Errno 27] File too large"


@WALLED
def test_many_files_that_are_huge_together() -> None:
    assert run("for n in range(9): open(str(n), 'wb').write(bytes(2**20))").complaint == "OSError: [Errno 28] No space left on device"
    assert run("import time\nfor n in range(3000):\n    open(str(n), 'wb')\n    time.sleep(0.001)").limit == "files"


@WALLED
@pytest.mark.skipif(os.uname().machine not in ("x86_64", "aarch64"), reason="system calls are filtered on x86_64 and aarch64")
def test_memory_that_no_limit_counts_is_refused() -> None:
    """Files in memory and System V segments belong to no process's address space."""
    assert run("import os; os.memfd_create('x')").complaint == "PermissionError: [Errno 1] Operation not permitted"
    assert run("import ctypes; print(ctypes.CDLL(None).shmget(1, 4096, 0o1600))").stdout == "-1\n"


# ---------------------------------------------------------------- out


@WALLED
def test_files_outside_are_not_there(home: Path, tmp_path: Path) -> None:
    """Secrets of the home, of the user and of the system; by their names, and through links."""
    home.mkdir()
    secret, user = home / "secret", Path.home() / f".veneer-test-{os.getpid()}"
    for path in (secret, user):
        path.write_text("hidden words")
    places = [secret, user, "/etc/shadow", "/etc/passwd", "/proc/1/environ", "/proc/self/environ", "/sys", tmp_path, Path(__file__), "/var"]
    reading = f"""
import os
for place in {[str(p) for p in places]}:
    for how in ("plain", "link"):
        try:
            if how == "link":
                os.symlink(place, "link")
            print(how, place, open("link" if how == "link" else place).read())
        except OSError as error:
            print(how, error.strerror)
        if how == "link":
            os.unlink("link")
print(os.path.exists({str(Path.home())!r}) and os.listdir({str(Path.home())!r}))
"""
    try:
        said = run(reading, output=9999).stdout.splitlines()
    finally:
        user.unlink()
    assert said[:-1] == [f"{how} No such file or directory" for _ in places for how in ("plain", "link")]
    assert user.name not in said[-1]


@WALLED
def test_nothing_outside_is_written(home: Path) -> None:
    """Neither files nor the interpreter that all programs share."""
    home.mkdir()
    places = [str(home / "x"), "/x", "/tmp/../x", "/etc/x", "/dev/x", os.path.dirname(os.__file__) + "/x.py", os.__file__, "/launch.py"]
    writing = f"""
for place in {places}:
    try:
        open(place, "a").write("x")
        print("wrote", place)
    except OSError as error:
        print(error.strerror)
"""
    said = set(run(writing).stdout.splitlines())
    assert said <= {"No such file or directory", "Read-only file system", "Permission denied"}
    assert not list(home.iterdir())


@WALLED
def test_there_is_no_network() -> None:
    """Neither a server on this machine, nor a name, nor a socket of the system."""
    with socket.create_server(("127.0.0.1", 0)) as server, tempfile.TemporaryDirectory() as folder:
        server.setblocking(False)
        local = socket.socket(socket.AF_UNIX)
        local.bind(f"{folder}/socket")
        abstract = socket.socket(socket.AF_UNIX)
        abstract.bind(f"\0veneer-{os.getpid()}")
        for listening in (local, abstract):
            listening.listen()
        reaching = f"""
import socket
def reach(what):
    try:
        print("reached", what())
    except OSError as error:
        print("no")
reach(lambda: socket.create_connection(("127.0.0.1", {server.getsockname()[1]}), 1))
reach(lambda: socket.socket(socket.AF_UNIX).connect({folder + "/socket"!r}))
reach(lambda: socket.socket(socket.AF_UNIX).connect({f"{chr(0)}veneer-{os.getpid()}"!r}))
reach(lambda: socket.create_connection(("1.1.1.1", 53), 1))
reach(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("8.8.8.8", 53)))
reach(lambda: socket.getaddrinfo("example.com", 80))
"""
        assert run(reaching).stdout == "no\n" * 6
        with pytest.raises(BlockingIOError):
            server.accept()
        local.close()
        abstract.close()


@WALLED
def test_signals_reach_nobody() -> None:
    """Its parent, its init and everybody: what it may signal is itself."""
    before = os.getppid()
    outcome = run(
        """
import os, signal
for pid in (os.getppid(), 1, 2):
    if pid != os.getpid():
        try:
            os.kill(pid, signal.SIGKILL)
        except OSError as error:
            print(error.strerror)
print("still here", flush=True)
signal.signal(signal.SIGTERM, lambda *_: print("only me"))
os.kill(-1, signal.SIGTERM)
os.kill(os.getpid(), signal.SIGTERM)
"""
    )
    assert "still here" in outcome.stdout
    assert os.getppid() == before


@WALLED
@pytest.mark.parametrize("number_of", [os.getpid, os.getppid])
def test_processes_outside_have_no_number(number_of: Callable[[], int]) -> None:
    pid = number_of()
    assert run(f"import os; os.kill({pid + 10**6}, 0) if {pid} < 9 else os.kill({pid}, 0)").complaint == (
        "ProcessLookupError: [Errno 3] No such process"
    )


@WALLED
def test_nothing_of_ours_is_left_open() -> None:
    """A file descriptor of the trainer's, or of bubblewrap's, would be a way out; ``run`` gives it one."""
    program = "import os\nfor fd in range(256):\n    try: print(fd, os.fstat(fd).st_mode >> 12)\n    except OSError: pass"
    kinds = [line.split()[1] for line in run(program).stdout.splitlines()]
    assert kinds == ["8", "1", "1", "1"]  # its stdin, a file; stdout, stderr and run's pipe


@WALLED
def test_rights_cannot_be_won_back() -> None:
    """Neither as root again, nor as root of a namespace of its own."""
    program = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
print(os.getuid() != 0, os.geteuid() != 0, os.getgroups() in ([], [65534]))
for what in (lambda: os.setuid(0), lambda: os.setgid(0)):
    try:
        what()
        print("root")
    except OSError:
        print("no")
print(libc.unshare(0x10000000), libc.mount(b"none", b"/tmp", b"tmpfs", 0, None), libc.chroot(b"/tmp"), libc.ptrace(0, 0, 0, 0))
"""
    assert run(program).stdout.splitlines() == ["True True True", "no", "no", "-1 -1 -1 -1"]


# ---------------------------------------------------------------- behind

DAEMON = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        {more}
        time.sleep(60)
    os._exit(0)
time.sleep(0.1)
print("gone")
"""


@pytest.mark.parametrize("bare", BOTH)
@pytest.mark.parametrize(
    "more",
    [
        pytest.param("pass", id="holding stdout"),
        pytest.param("sys.stdout.close(); os.close(1); os.close(2); os.close(0)", id="closed"),
        pytest.param("__import__('signal').signal(15, __import__('signal').SIG_IGN)", id="ignoring signals"),
        pytest.param("[os.fork() for _ in range(2)]", id="forking on"),
    ],
)
def test_nothing_stays_behind(bare: bool, more: str) -> None:
    """Grandchildren in a session of their own, with our pipes in their hands, end with the program."""
    outcome = run(DAEMON.format(more=more), bare)
    assert (outcome.stdout, outcome.limit, outcome.status) == ("gone\n", None, 0)
    assert outcome.seconds < 3


@pytest.mark.parametrize("bare", BOTH)
def test_zombies(bare: bool) -> None:
    assert run("import os, time\nfor _ in range(5): os.fork() or os._exit(0)\ntime.sleep(0.2)\nprint('z')", bare).stdout == "z\n"


@pytest.mark.parametrize("deed", ["kill(os.getppid(), 9)", "kill(os.getppid(), 19)", "killpg(os.getppid(), 9)"])
def test_who_kills_its_keeper_is_found(deed: str) -> None:
    """Without walls a program can end the process that is to end it."""
    outcome = run(f"import os, time\nif os.fork() == 0:\n    os.setsid(); time.sleep(60)\nos.{deed}\ntime.sleep(60)", bare=True, wall=1.5)
    assert outcome.seconds < 9


@pytest.mark.parametrize("bare", BOTH)
def test_who_is_waited_for_no_more_is_ended(bare: bool) -> None:
    """An episode's time is over while its program runs."""
    sandbox = Sandbox(LIMITS, unsafe_no_sandbox=bare)
    reading, writing = os.pipe()

    async def impatient() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(sandbox.run({"main.py": "import time; time.sleep(60)"}, "", [writing]), 0.5)

    began = time.monotonic()
    asyncio.run(impatient())
    assert os.read(reading, 1) == b""  # waits until the last of it is gone
    assert time.monotonic() - began < LIMITS.wall + 10 * TICK
    os.close(reading)


@pytest.mark.parametrize("bare", BOTH)
def test_who_is_waited_for_no_more_before_it_began_is_ended_too(bare: bool) -> None:
    """At any moment of the start: bubblewrap that is killed too early leaves its first process behind."""
    sandbox = Sandbox(LIMITS, unsafe_no_sandbox=bare)
    known = _orphans()

    async def impatient(seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(sandbox.run({"main.py": "import time; time.sleep(60)"}), seconds)

    for step in range(25):
        asyncio.run(impatient(step / 1000))
    end = time.monotonic() + 10
    while left := (children(str(LAUNCH)) | _orphans()) - known:
        assert time.monotonic() < end, f"left behind: {left}"
        time.sleep(0.05)


def _orphans() -> set[int]:
    """Processes of sandboxes that nobody has started any more."""
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    return {pid for pid in pids if str(LAUNCH) in command_of(pid) and "\nPPid:\t1\n" in Path(f"/proc/{pid}/status").read_text()}


@pytest.mark.parametrize("bare", BOTH)
def test_a_killed_trainer_leaves_nothing(bare: bool, tmp_path: Path) -> None:
    """kill -9 of the process that runs them, in the middle."""
    import subprocess
    import sys

    reading, writing = os.pipe()
    script = (
        "import asyncio, os, sys\nfrom veneer.envs.tools.sandbox import Sandbox\n"
        f"s = Sandbox(unsafe_no_sandbox={bare})\n"
        f"asyncio.run(s.run({{'main.py': 'import os, time; os.write({writing}, b\"x\"); time.sleep(60)'}}, '', [{writing}]))"
    )
    trainer = subprocess.Popen([sys.executable, "-c", script], pass_fds=[writing], env={**os.environ, "TMPDIR": str(tmp_path)})
    os.close(writing)
    assert os.read(reading, 1) == b"x"
    trainer.kill()
    trainer.wait()
    assert os.read(reading, 1) == b""
    os.close(reading)


def test_no_bubblewrap_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A model's programs never run unconfined because a package is missing."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="unsafe_no_sandbox = true") as caught:
        Sandbox()
    assert "\n" not in str(caught.value)
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'bwrap: No permissions to create a new namespace' >&2\nexit 1\n")
    broken.chmod(0o755)
    with pytest.raises(ConfigError, match=r"No permissions to create a new namespace.*unsafe_no_sandbox"):
        Sandbox()
    Sandbox(unsafe_no_sandbox=True)

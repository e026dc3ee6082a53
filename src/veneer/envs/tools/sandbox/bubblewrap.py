"""How bubblewrap (https://github.com/containers/bubblewrap) is asked for a sandbox in which Python runs and nothing else is there."""

from __future__ import annotations

import os
import random
import shutil
import sys
import sysconfig
from functools import cache
from pathlib import Path

LAUNCH = Path(__file__).with_name("launch.py")
INSIDE, FOLDER = "/launch.py", "/tmp/work"
DEVICES = ("null", "zero", "full", "random", "urandom")


def installed() -> str | None:
    """Its path."""
    return shutil.which("bwrap")


def command(bwrap: str, disk: int, status_fd: int, filter_fd: int | None = None) -> list[str]:
    """``disk``: bytes that files may take, all together; they lie in memory. ``status_fd``: where it writes how the program ended.
    ``filter_fd``: to read the filter of system calls from."""
    arguments = [bwrap, "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    arguments += ["--hostname", "sandbox", "--die-with-parent", "--new-session", "--clearenv", "--cap-drop", "ALL"]
    if os.getuid() == 0:
        arguments += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]  # launch.py takes a uid of its own, and loses them
    else:
        arguments += ["--unshare-user", "--uid", "65534", "--gid", "65534"]
    arguments += _root()
    arguments += ["--perms", "1777", "--size", str(disk), "--tmpfs", "/tmp", "--symlink", "/tmp", "/dev/shm"]
    arguments += ["--remount-ro", "/", "--json-status-fd", str(status_fd)]
    if filter_fd is not None:
        arguments += ["--seccomp", str(filter_fd)]
    elif os.getuid() != 0:
        arguments.append("--disable-userns")  # from version 0.8 on
    return [*arguments, os.path.realpath(sys.executable), *FLAGS, INSIDE]


FLAGS = ("-I", "-S", "-B")
"""No user's folders, no installed packages, no compiled files written."""


@cache
def _root() -> tuple[str, ...]:
    """The file system: the C library and the like, the interpreter and its standard library, some devices; each read-only."""
    arguments: list[str] = []
    for path in ("/lib", "/lib64"):
        if os.path.islink(path):
            arguments += ["--symlink", os.readlink(path), path]
    wanted = {"/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache"}
    wanted |= {os.path.realpath(sys.executable), sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}
    wanted |= {f"{sys.base_prefix}/lib"}
    there = sorted(path for path in wanted if os.path.exists(path) and not os.path.islink(path))
    bound = [path for path in there if not any(path.startswith(f"{other}/") for other in there)]
    parents = {str(parent) for path in bound for parent in Path(path).parents if str(parent) != "/"}
    for parent in sorted(parents):  # else bubblewrap makes them, for their owner alone if they are so outside
        arguments += ["--perms", "0755", "--dir", parent]
    for path in bound:
        arguments += ["--ro-bind", path, path]
    for name in DEVICES:
        arguments += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
    return (*arguments, "--ro-bind", str(LAUNCH), INSIDE)


def fresh_uid() -> int | None:
    """For a program that root starts: a uid that, in all likelihood, nobody has. None: this process is not root's."""
    if os.getuid() != 0:
        return None
    mapped = [line.split() for line in Path("/proc/self/uid_map").read_text().splitlines()]
    end = min(max(int(first) + int(count) for first, _, count in mapped), 2**31)
    return random.SystemRandom().randrange(end // 2, end)

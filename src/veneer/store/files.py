"""Where things are kept, and writing that a crash cannot tear."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from veneer.types import StorageError, in_one_line

ASIDE = ".veneer-aside-"
"""What is being written has a name that starts so; nothing else has."""


def veneer_home() -> Path:
    """``$VENEER_HOME``, or ``~/.veneer``."""
    return Path(os.environ.get("VENEER_HOME") or Path.home() / ".veneer")


@contextmanager
def storage_errors(path: Path) -> Generator[None, None, None]:
    """Turn the operating system's refusals into one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = error.errno if isinstance(error, OSError) else None
        full = number in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(error)  # safetensors gives text alone
        advice = "free some space and do it again; what was saved before is still there" if full else "check the path and its permissions"
        reason = os.strerror(errno.ENOSPC) if full else os.strerror(number) if number else in_one_line(error)
        raise StorageError(f"cannot write {path}: {reason}; {advice}") from error


@contextmanager
def new_folder(target: Path, *, durable: bool = True) -> Generator[Path, None, None]:
    """Fill a folder beside ``target``; it takes the name when all is on the disk. An old ``target`` is replaced. Without ``durable``
    it outlives the process at any moment, but perhaps not a power cut."""
    with aside_folder(target.parent, target.name) as aside:
        yield aside
        settle(aside, target, durable=durable)


@contextmanager
def aside_folder(parent: Path, stem: str) -> Generator[Path, None, None]:
    """A folder to fill, whose place is not known yet: ``settle`` gives it one. What is not settled is gone afterwards."""
    with storage_errors(parent / stem):
        parent.mkdir(parents=True, exist_ok=True)
        aside, lock = _locked_folder(parent, f"{ASIDE}{stem}-")
        try:
            os.chmod(aside, 0o755)
            yield aside
        finally:
            shutil.rmtree(aside, ignore_errors=True)
            os.close(lock)


def _locked_folder(parent: Path, prefix: str) -> tuple[Path, int]:
    """A new folder, and the handle whose lock says that its process lives."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        with suppress(FileNotFoundError):  # taken for abandoned before it was locked
            handle = os.open(folder, os.O_RDONLY)
            with suppress(OSError):  # a file system without locks, where nothing is taken for abandoned either
                fcntl.flock(handle, fcntl.LOCK_EX)
            if folder.is_dir():
                return folder, handle
            os.close(handle)


def remove_abandoned(parent: Path) -> None:
    """Clear away what killed processes were writing in a folder that several share; what a living one writes is left alone."""
    for folder in parent.glob(ASIDE + "*"):
        with suppress(FileNotFoundError):  # its process has just finished
            handle = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            except OSError:  # its process lives, or the file system has no locks
                continue
            finally:
                os.close(handle)


def settle(aside: Path, target: Path, *, durable: bool = True) -> None:
    """Give a filled folder its name once all of it is on the disk. An old ``target`` is replaced."""
    for path in aside.iterdir() if durable else ():
        sync(path)
    if target.exists():
        old = aside.with_name(aside.name + ".old")
        target.rename(old)
        aside.rename(target)
        shutil.rmtree(old)
    else:
        aside.rename(target)
    if durable:
        sync(target.parent)


def settle_once(aside: Path, target: Path) -> None:
    """Give a filled folder a name that says what is in it, once all of it is on the disk. Whoever was first has put the very same files
    there, which stay as they are."""
    for path in aside.iterdir():
        sync(path)
    try:
        aside.rename(target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    sync(target.parent)


def write_text(path: Path, text: str) -> None:
    """Replace a file in one go."""
    with storage_errors(path):
        aside = path.with_name(f"{ASIDE}{path.name}-{os.getpid()}")
        try:
            aside.write_text(text)
            sync(aside)
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)


def remove_asides(folder: Path) -> None:
    """Clear away what a killed process was writing in a folder that this process alone holds."""
    for path in folder.glob(ASIDE + "*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

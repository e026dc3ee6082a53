"""Keys at rest, and the verb that makes them."""

from __future__ import annotations

import hashlib
import re
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from veneer.server.access import Caller, is_loopback
from veneer.server.keys import Keys
from veneer.types import ConfigError, StorageError


def files_of(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def veneer(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "veneer", *arguments], capture_output=True, text=True, timeout=120)


def test_what_lies_on_the_disk_is_no_key(tmp_path: Path) -> None:
    """Neither the key nor its secret half is in any file; its hash is. Nobody else may read the file."""
    keys = Keys(tmp_path)
    key, known = keys.create("alice", ["alice-*"])
    assert re.fullmatch(r"tml-[0-9a-f]{8}-[\w-]{43}", key)
    written = files_of(tmp_path)
    assert key.encode() not in written
    assert key.split("-", 2)[2].encode() not in written
    assert hashlib.sha256(key.encode()).hexdigest().encode() in written
    for path in tmp_path.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert keys.find(key) == known


def test_a_file_that_everybody_could_read_is_closed(tmp_path: Path) -> None:
    Keys(tmp_path).close()
    (tmp_path / "keys.sqlite").chmod(0o644)
    Keys(tmp_path)
    assert stat.S_IMODE((tmp_path / "keys.sqlite").stat().st_mode) == 0o600


def test_one_holder_sees_at_once_what_another_did(tmp_path: Path) -> None:
    """As a server and the command line do, though the server has looked a moment ago."""
    server, command_line = Keys(tmp_path), Keys(tmp_path)
    assert not server.any()
    key, _ = command_line.create("alice", ["*"])
    found = server.find(key)
    assert found is not None
    server.note_use(found)
    assert command_line.all()[0].used is not None
    looking = threading.Thread(target=lambda: [server.find(key) for _ in range(20) if time.sleep(0.01) is None])
    looking.start()
    command_line.revoke("alice")
    assert server.find(key) is None
    assert not server.any()
    looking.join()
    command_line.create("bob", ["*"])
    assert server.any()


def test_a_file_that_cannot_be_read_opens_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither at the first request that finds it so, nor at those behind it."""
    Keys(tmp_path).create("alice", ["*"])
    server = Keys(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(server, "_db", sqlite3.connect(tmp_path / "empty.sqlite"))
        patch.setattr(server, "_seen", None)
        for _ in range(3):
            with pytest.raises(StorageError, match="cannot use"):
                server.any()
    assert server.any()


@pytest.mark.parametrize("change", [lambda k: k[:-1], lambda k: k + "A", lambda k: k.upper(), lambda k: k[4:], lambda k: "tml-" + k[13:]])
def test_what_is_nearly_a_key_is_none(tmp_path: Path, change) -> None:
    keys = Keys(tmp_path)
    key, _ = keys.create("alice", ["*"])
    keys.create("bob", ["*"])
    assert keys.find(change(key)) is None


@pytest.mark.parametrize("nothing", ["", "tml-", "tml-dummy", "\x00", "é" * 50, "\udce9", "tml-" + "0" * 100_000])
def test_nothing_is_no_key(tmp_path: Path, nothing: str) -> None:
    keys = Keys(tmp_path)
    keys.create("alice", ["*"])
    assert keys.find(nothing) is None


def test_the_id_of_one_key_does_not_open_with_the_secret_of_another(tmp_path: Path) -> None:
    keys = Keys(tmp_path)
    (alice, _), (bob, _) = keys.create("alice", ["*"]), keys.create("bob", ["*"])
    assert keys.find(alice[:13] + bob[13:]) is None


@pytest.mark.parametrize("name", ["", "a b", "../x", "x" * 65, "a/b", "-a", "ä", "a\n"])
def test_names_that_cannot_be_used(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="no name for a key"):
        Keys(tmp_path).create(name, ["*"])


def test_patterns_say_what_a_key_may_see() -> None:
    caller = Caller("alice", ("alice-*", "shared"))
    assert [caller.sees(name) for name in ("alice-1", "shared", "bob-1", "Alice-1", "shared-2")] == [True, True, False, False, False]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1", "localhost", "a.localhost"])
def test_what_is_this_machine(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "localhost.evil.com", "", "127.0.0.1.nip.io", "::ffff:10.0.0.1"])
def test_what_is_not(host: str) -> None:
    assert not is_loopback(host)


def test_the_verb(home: Path) -> None:
    """Make two, list, revoke one: the key itself is printed once, alone on stdout."""
    made = veneer("keys", "create", "--name", "alice", "--adapters", "alice-*", "--adapters", "shared")
    assert made.returncode == 0, made.stderr
    key = made.stdout.strip()
    assert Keys(home / "server").find(key) is not None
    again = veneer("keys", "create", "--name", "alice")
    assert again.returncode == 2
    assert again.stderr == "veneer: 'alice' has a key; revoke it first: veneer keys revoke alice\n"
    listed = veneer("keys", "list")
    assert "alice-* shared" in listed.stdout
    assert "never" in listed.stdout
    assert key not in listed.stdout
    lost = veneer("keys", "revoke", "alicia")
    assert (lost.returncode, lost.stderr) == (2, "veneer: there is no key of name 'alicia'; did you mean 'alice'?\n")
    assert veneer("keys", "revoke", "alice", "--json").returncode == 0
    assert Keys(home / "server").find(key) is None


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_without_keys_nothing_is_served_to_other_machines(home: Path, host: str) -> None:
    """It is refused before the base is loaded, in a line that says what to do."""
    refused = veneer("serve", "--host", host, "--port", "0")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "veneer keys create --name NAME" in refused.stderr

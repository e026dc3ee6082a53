"""Who made a folder: an Ed25519 signature over the SHA-256 of every file in it, and the keys that a home trusts.

``veneer.sig`` lies beside the files it is about. What is signed is the table of names and digests as JSON with sorted keys
and no spaces, so one changed, missing or additional file is found and named. Ed25519: RFC 8032.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from veneer.store.files import ASIDE, storage_errors, write_text
from veneer.types import AdapterError, ConfigError, in_one_line

SIGNATURE = "veneer.sig"
_KEY = re.compile(r"ed25519:[0-9a-f]{64}")


# ---------------------------------------------------------------- statements


def hash_files(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file in a folder but its signature, by name.

    Raises:
        AdapterError: there is something other than plain files.
    """
    files: dict[str, str] = {}
    for path in sorted(folder.iterdir()):
        if path.is_symlink() or not path.is_file():
            raise AdapterError(f"{folder} holds {path.name!r}, which is no plain file; an adapter is a flat folder of files")
        if path.name != SIGNATURE:
            with path.open("rb") as file:
                files[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return files


def canonical(document: Any) -> bytes:
    """JSON with sorted keys and no spaces, in UTF-8."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def content_key(files: Mapping[str, str]) -> str:
    """The SHA-256 of a table of files: one name for all of their content."""
    return hashlib.sha256(canonical({"files": dict(files)})).hexdigest()


def write_signature(folder: Path, files: Mapping[str, str], key: Ed25519PrivateKey) -> None:
    """Sign the table of a folder's files into ``veneer.sig``."""
    document = {"format": 1, "files": dict(files), **sign({"files": dict(files)}, key)}
    (folder / SIGNATURE).write_text(json.dumps(document, indent=2) + "\n")


def check_signature(folder: Path) -> str | None:
    """Compare a folder with its signature and return whose it is; None if it has none.

    Raises:
        AdapterError: a file was changed, added or removed, or the signature is not that key's.
    """
    if not (folder / SIGNATURE).is_file():
        return None
    try:
        document = json.loads((folder / SIGNATURE).read_text())
        files, signer = dict(document["files"]), str(document["key"])
        check_sealed({"files": files}, document)
    except InvalidSignature as error:
        raise AdapterError(f"{folder / SIGNATURE} is no signature by the key that it names; do not use this folder") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"{folder / SIGNATURE} is damaged ({in_one_line(error)}); use another version or checkpoint") from error
    there = hash_files(folder)
    for name in sorted({*files, *there}):
        if files.get(name) != there.get(name):
            problem = "is missing" if name not in there else "was added" if name not in files else "was changed"
            raise AdapterError(f"{folder} is not what was signed: {name} {problem}; use another version or checkpoint")
    return signer


def read_table(folder: Path) -> tuple[dict[str, str], str | None]:
    """The table of files as ``check_signature`` has just found it to be true, and the signer; measured if there is no signature."""
    if not (folder / SIGNATURE).is_file():
        return hash_files(folder), None
    document = json.loads((folder / SIGNATURE).read_text())
    return dict(document["files"]), document["key"]


def sign(statement: Any, key: Ed25519PrivateKey) -> dict[str, str]:
    """Key and signature of a statement."""
    return {"key": name_of(key.public_key()), "signature": key.sign(canonical(statement)).hex()}


def check_sealed(statement: Any, seal: Mapping[str, Any]) -> None:
    """Raises:
    InvalidSignature: the seal's signature is not its key's under this statement.
    ValueError, KeyError, TypeError: the seal is no seal.
    """
    public_key(seal["key"]).verify(bytes.fromhex(seal["signature"]), canonical(statement))


# ---------------------------------------------------------------- keys


def name_of(key: Ed25519PublicKey) -> str:
    return "ed25519:" + key.public_bytes(Encoding.Raw, PublicFormat.Raw).hex()


def public_key(name: str) -> Ed25519PublicKey:
    if not _KEY.fullmatch(name):
        raise ValueError(f"{name!r} is no key; keys look like ed25519: and 64 hexadecimal digits")
    return Ed25519PublicKey.from_public_bytes(bytes.fromhex(name.removeprefix("ed25519:")))


class KeyRing:
    """The key that a home signs with, and the keys of others that it trusts: ``keys/signing.pem`` and ``keys/trusted``."""

    def __init__(self, home: Path) -> None:
        self.folder = home / "keys"
        self._private, self._others = self.folder / "signing.pem", self.folder / "trusted"

    def signing_key(self) -> Ed25519PrivateKey:
        """Made when it is first asked for, readable by its owner alone."""
        if not self._private.is_file():
            self._make()
        return self._read()

    def own(self) -> str | None:
        """The name of the home's key, once there is one."""
        return name_of(self._read().public_key()) if self._private.is_file() else None

    def trusted(self) -> dict[str, str]:
        """Keys of others with what was noted about them."""
        if not self._others.is_file():
            return {}
        lines = [line.split(maxsplit=1) for line in self._others.read_text().splitlines() if line.strip()]
        return {key: "".join(note) for key, *note in lines}

    def trusts(self, key: str | None) -> bool:
        return key is not None and (key == self.own() or key in self.trusted())

    def trust(self, key: str, note: str = "") -> str:
        """Trust a key, given by its name or as a PEM file, and return its name.

        Raises:
            ConfigError: it is no Ed25519 key.
        """
        name = self._named(key)
        self._write(self.trusted() | {name: " ".join(note.split())})
        return name

    def distrust(self, key: str) -> str:
        """Trust a key no longer.

        Raises:
            ConfigError: it was not trusted.
        """
        name, others = self._named(key), self.trusted()
        if name not in others:
            raise ConfigError(f"{name} is not among the trusted keys in {self._others}")
        self._write({other: note for other, note in others.items() if other != name})
        return name

    def _named(self, key: str) -> str:
        try:
            if not Path(key).is_file():
                return name_of(public_key(key))
            loaded = load_pem_public_key(Path(key).read_bytes())
        except (ValueError, OSError) as error:
            raise ConfigError(f"{key!r} is no Ed25519 public key ({in_one_line(error)}); give ed25519:HEX or a PEM file") from error
        if not isinstance(loaded, Ed25519PublicKey):
            raise ConfigError(f"{key!r} holds a key of another kind; only Ed25519 keys sign adapters")
        return name_of(loaded)

    def _write(self, others: Mapping[str, str]) -> None:
        with storage_errors(self.folder):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_text(self._others, "".join(f"{key} {note}".rstrip() + "\n" for key, note in sorted(others.items())))

    def _make(self) -> None:
        pem = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        with storage_errors(self._private):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle, aside = tempfile.mkstemp(prefix=ASIDE, dir=self.folder)  # mode 0600
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(pem)
                    os.fsync(handle)
                os.link(aside, self._private)
            except FileExistsError:
                pass  # another process was first: its key is the home's
            finally:
                os.unlink(aside)

    def _read(self) -> Ed25519PrivateKey:
        try:
            key = load_pem_private_key(self._private.read_bytes(), None)
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"cannot read the signing key {self._private} ({in_one_line(error)})") from error
        if not isinstance(key, Ed25519PrivateKey):
            raise ConfigError(f"{self._private} holds a key of another kind; only Ed25519 keys sign adapters")
        return key

"""Signatures: what was changed is named, whose it is is said, and a home decides whom it trusts."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from store_tools import make, same

from veneer.store.adapters import read_adapter, write_adapter
from veneer.store.registry import Registry
from veneer.store.signature import KeyRing, check_signature, hash_files, name_of, write_signature
from veneer.types import AdapterError, ConfigError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A signed adapter outside of the registry."""
    Registry().put("x", make(), {})
    Registry().export("x", tmp_path / "out")
    return tmp_path / "out"


def test_the_signature_is_what_the_format_says(folder: Path) -> None:
    """Ed25519 over a table of SHA-256, checked by OpenSSL: whoever has neither Veneer nor Python can check it."""
    document = json.loads((folder / "veneer.sig").read_text())
    files = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.name != "veneer.sig"}
    assert set(files) == {"adapter_config.json", "adapter_model.safetensors", "veneer.json", "README.md"}
    assert document["files"] == files
    statement, signature, pem = (folder.parent / name for name in ("statement", "signature", "key.pem"))
    statement.write_text('{"files":{' + ",".join(f'"{name}":"{digest}"' for name, digest in sorted(files.items())) + "}}")
    signature.write_bytes(bytes.fromhex(document["signature"]))
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command")
    pem.write_bytes(KeyRing(Registry().home).signing_key().public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", pem, "-rawin", "-in", statement, "-sigfile", signature]
    assert subprocess.run(command, capture_output=True).returncode == 0
    statement.write_text(statement.read_text().replace("veneer.json", "veneer.jsom"))
    assert subprocess.run(command, capture_output=True).returncode != 0


CHANGES: list[tuple[str, Callable[[Path], object], str]] = [
    ("a number", lambda f: flip(f / "adapter_model.safetensors"), r"adapter_model\.safetensors was changed"),
    ("the scale", lambda f: edit(f / "adapter_config.json", '"lora_alpha": 8.0', '"lora_alpha": 9.0'), r"adapter_config\.json was changed"),
    ("a fact", lambda f: edit(f / "veneer.json", '"version": 1', '"version": 2'), r"veneer\.json was changed"),
    ("the card", lambda f: edit(f / "README.md", "Rank 2", "Rank 3"), r"README\.md was changed"),
    ("one file more", lambda f: (f / "handler.py").write_text("import os"), r"handler\.py was added"),
    ("a pickle", lambda f: (f / "adapter_model.bin").write_bytes(b"\x80"), r"adapter_model\.bin was added"),
    ("one file less", lambda f: (f / "README.md").unlink(), r"README\.md is missing"),
    ("no weights", lambda f: (f / "adapter_model.safetensors").unlink(), r"adapter_model\.safetensors is missing"),
    ("a folder", lambda f: (f / "more").mkdir(), "no plain file"),
    ("a link", lambda f: (f / "more").symlink_to("/etc/passwd"), "no plain file"),
    ("the signature", lambda f: edit(f / "veneer.sig", '"signature": "', '"signature": "00'), r"veneer\.sig"),
    ("another's key", lambda f: edit(f / "veneer.sig", '"key": "ed25519:', f'"key": "ed25519:{"0" * 64}", "old": "'), r"veneer\.sig"),
    ("no key", lambda f: edit(f / "veneer.sig", '"key"', '"kee"'), r"veneer\.sig is damaged"),
    ("an empty signature", lambda f: (f / "veneer.sig").write_text(""), r"veneer\.sig is damaged"),
    ("the table", lambda f: change_table(f), "no signature by the key"),
]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def edit(path: Path, old: str, new: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def change_table(folder: Path) -> None:
    """Who can write the files can write the table too, but not sign it."""
    flip(folder / "adapter_model.safetensors")
    document = json.loads((folder / "veneer.sig").read_text())
    (folder / "veneer.sig").write_text(json.dumps(document | {"files": hash_files(folder)}))


@pytest.mark.parametrize(("change", "words"), [c[1:] for c in CHANGES], ids=[c[0] for c in CHANGES])
def test_what_was_changed_is_named(folder: Path, change: Callable[[Path], object], words: str) -> None:
    """Outside of the registry, and in it."""
    read_adapter(folder)
    change(folder)
    with pytest.raises(AdapterError, match=words) as caught:
        read_adapter(folder)
    assert "\n" not in str(caught.value)
    entry = Registry().resolve("x")
    change(entry.folder)
    with pytest.raises(AdapterError, match=words):
        Registry().read("x")


def test_a_signature_does_not_move(tmp_path: Path) -> None:
    """One version's folder in another's place, with its own true signature; or with none."""
    registry = Registry()
    for value in (0.1, 0.2):
        registry.put("x", make(value), {})
    one, two = (registry.resolve(f"x@{v}").folder for v in (1, 2))
    shutil.copytree(one, tmp_path / "kept")
    shutil.rmtree(one)
    shutil.copytree(two, one)
    with pytest.raises(AdapterError, match="is not what was put there as x@1"):
        registry.read("x@1")
    shutil.rmtree(one)
    shutil.copytree(tmp_path / "kept", one)
    registry.read("x@1")
    (one / "veneer.sig").unlink()
    with pytest.raises(AdapterError, match="is not what was put there as x@1"):
        registry.read("x@1")
    write_signature(one, hash_files(one), Ed25519PrivateKey.generate())
    with pytest.raises(AdapterError, match="is not what was put there as x@1"):
        registry.read("x@1")


def test_whose_it_is(folder: Path, tmp_path: Path) -> None:
    """Another home reads it, says who signed it, and trusts whom it is told to."""
    here, there = Registry(), Registry(tmp_path / "there")
    own = here.keys.own()
    assert own is not None
    entry = there.resolve(str(folder))
    assert (entry.signed_by, entry.trusted) == (own, False)
    assert same(there.read(str(folder))[0].weights, make().weights)
    strict = Registry(tmp_path / "there", require_signed=True)
    with pytest.raises(AdapterError, match=f"not signed by a key that this home trusts: it is signed by {own}"):
        strict.read(str(folder))
    assert there.keys.trust(own, "the  other\nteam") == own
    assert there.keys.trusted() == {own: "the other team"}
    assert strict.resolve(str(folder)).trusted
    strict.read(str(folder))
    assert there.keys.distrust(own) == own
    assert there.keys.trusted() == {}
    with pytest.raises(ConfigError, match="not among the trusted keys"):
        there.keys.distrust(own)
    (folder / "veneer.sig").unlink()
    assert there.read(str(folder))[1].signed_by is None
    with pytest.raises(AdapterError, match="it is unsigned"):
        strict.read(str(folder))


def test_unsigned_versions_stay_whole() -> None:
    """What nobody vouched for is still what was put there."""
    registry = Registry()
    registry.put("x", make(), {}, signed=False)
    entry = registry.read("x")[1]
    assert (entry.signed_by, entry.trusted) == (None, False)
    assert not registry.keys.folder.exists()
    (entry.folder / "README.md").write_text("another card")
    with pytest.raises(AdapterError, match="is not what was put there"):
        registry.read("x")


def test_the_key_is_its_owners_alone() -> None:
    """And made once, at the first put."""
    registry = Registry()
    assert registry.keys.own() is None
    assert not registry.keys.trusts(None)
    registry.put("x", make(0.1), {})
    path = registry.keys.folder / "signing.pem"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    before = path.read_bytes()
    registry.put("x", make(0.2), {})
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["signing.pem"]
    path.write_text("no key")
    with pytest.raises(ConfigError, match=r"signing\.pem"):
        registry.put("x", make(0.3), {})


def test_two_processes_make_one_key(tmp_path: Path) -> None:
    """The second finds the first one's."""
    code = (
        "import sys; from pathlib import Path; from veneer.store.signature import KeyRing, name_of; sys.stdin.readline();"
        "print(name_of(KeyRing(Path(sys.argv[1])).signing_key().public_key()))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "new")]
    started = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    names = {process.communicate("go\n", timeout=60)[0].strip() for process in started}
    assert names == {KeyRing(tmp_path / "new").own()}


@pytest.mark.parametrize("key", ["", "ed25519:12", "rsa:" + "0" * 64, "ed25519:" + "G" * 64, "nowhere.pem"])
def test_what_is_no_key(key: str) -> None:
    """In one line."""
    with pytest.raises(ConfigError, match="no Ed25519 public key") as caught:
        Registry().keys.trust(key)
    assert "\n" not in str(caught.value)


def test_keys_from_files(tmp_path: Path) -> None:
    """As OpenSSL writes them; a key of another kind cannot have signed."""
    key = Ed25519PrivateKey.generate().public_key()
    (tmp_path / "key.pem").write_bytes(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    assert Registry().keys.trust(str(tmp_path / "key.pem")) == name_of(key)
    other = generate_private_key(SECP256R1()).public_key()
    (tmp_path / "other.pem").write_bytes(other.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    with pytest.raises(ConfigError, match="another kind"):
        Registry().keys.trust(str(tmp_path / "other.pem"))


def test_a_run_checkpoint_needs_no_signature(tmp_path: Path) -> None:
    """Runs write many, and read their own."""
    write_adapter(tmp_path / "step", make(kind="training"), {})
    assert check_signature(tmp_path / "step") is None
    assert read_adapter(tmp_path / "step")[0].kind == "training"
    assert not os.path.exists(tmp_path / "step/veneer.sig")

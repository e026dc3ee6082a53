"""Forgetting leaves nothing but a tombstone and a receipt; the index can be built again from the folders."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import filelock
import pytest
from store_tools import make, same

from veneer.store.adapters import write_adapter
from veneer.store.entry import Score, Tombstone
from veneer.store.forget import FORGOTTEN, read_receipt
from veneer.store.registry import Registry, as_parent
from veneer.store.reindex import Reindexed, reindex
from veneer.types import AdapterError, RunError, StorageError


def holding(folder: Path, needle: bytes) -> list[str]:
    """Files below a folder in which some bytes occur."""
    return [str(p.relative_to(folder)) for p in sorted(folder.rglob("*")) if p.is_file() and needle in p.read_bytes()]


def family(home: Path | None = None) -> Registry:
    """x@1 and x@2; y@1, made from x@2; z@1, a fork of y@1."""
    registry = Registry(home)
    registry.put("x", make(0.1), {})
    registry.put("x", make(0.2), {})
    registry.put("y", make(0.3), {"stage": "rl", "parents": [dataclasses.asdict(as_parent(registry.resolve("x@2")))]})
    registry.fork("y", "z")
    return registry


def test_nothing_is_left(tmp_path: Path) -> None:
    """Weights, manifest, scores and facts of one customer; the others stay as they were."""
    registry = Registry()
    secret = {"env": "a-secret-environment"}
    registry.put("x", make(0.1), {})
    registry.put("x", make(0.2), secret)
    registry.add_score("x@2", Score("another-secret", 0.5, 0.4, 0.6, 9, 3, "2026-01-01T00:00:00Z"))
    registry.promote("x", 1)
    registry.promote("x", 2)
    weights = make(0.2).weights["layers.0.q_proj.lora_A.weight"].tobytes()
    assert holding(registry.home, weights)
    receipt = registry.forget("x@2", "asked by mail")
    assert holding(registry.home, weights) == holding(registry.home, b"a-secret-environment") == []
    assert holding(registry.home, b"another-secret") == [], "SQLite must overwrite deleted rows"
    assert registry.versions("x") == [1]
    assert (registry.labels("x"), registry.resolve("x").version) == ({}, 1)
    assert same(registry.read("x@1")[0].weights, make(0.1).weights)
    with pytest.raises(AdapterError, match=r"x@2 was forgotten 20.*: asked by mail"):
        registry.resolve("x@2")
    (record,) = receipt.statement["forgotten"]
    assert (record["reference"], record["digest"], record["labels"]) == ("x@2", make(0.2).adapter.digest, ["live"])
    assert {f["file"] for f in record["files"]} >= {"adapter_model.safetensors", "veneer.json", "veneer.sig"}
    assert (receipt.statement["reason"], receipt.statement["left"], receipt.statement["runs"]) == ("asked by mail", [], [])
    assert registry.put("x", make(0.2), {}) == 3, "a number never comes back"


def test_the_receipt_is_signed() -> None:
    """It is evidence: a changed word shows."""
    registry = Registry()
    registry.put("x", make(), {})
    receipt = registry.forget("x", "moved away")
    assert receipt.path.parent == registry.folder / "receipts"
    assert read_receipt(receipt.path) == receipt
    assert receipt.key == registry.keys.own()
    receipt.path.write_text(receipt.path.read_text().replace("moved away", "stayed"))
    with pytest.raises(AdapterError, match="was changed after it was signed"):
        read_receipt(receipt.path)
    receipt.path.write_text("{}")
    with pytest.raises(AdapterError, match="is no receipt"):
        read_receipt(receipt.path)


def test_children(tmp_path: Path) -> None:
    """They may know what it knew, so they are not overlooked."""
    registry = family()
    with pytest.raises(AdapterError, match=r"y@1 was made from x@2 .*--with-children.*--keep-children"):
        registry.forget("x@2")
    with pytest.raises(AdapterError, match=r"made from x@1"):
        registry.forget("x")
    assert registry.versions("x") == [1, 2]
    kept = registry.forget("x@2", children="keep")
    assert kept.statement["left"] == [{"what": "y@1", "why": "it was made from what was forgotten"}]
    assert registry.names() == ["x", "y", "z"]
    registry = family(tmp_path / "second")
    gone = registry.forget("x", children="forget")
    assert [r["reference"] for r in gone.statement["forgotten"]] == ["x@1", "x@2", "y@1", "z@1"]
    assert (registry.names(), list(registry.objects.iterdir())) == ([], [])
    with pytest.raises(AdapterError, match="forgotten 20"):
        registry.resolve("x")


def test_a_name_with_its_own_children() -> None:
    """A line that was trained on and on goes as a whole."""
    registry = Registry()
    for i in range(3):
        parents = [dataclasses.asdict(as_parent(registry.resolve("x")))] if i else []
        registry.put("x", make(0.1 * (i + 1)), {"parents": parents})
    assert len(registry.forget("x").statement["forgotten"]) == 3
    assert registry.names() == []


def test_shared_weights_go_with_their_last_user() -> None:
    """The receipt says who else has them."""
    registry = family()
    receipt = registry.forget("z")
    assert receipt.statement["left"] == [{"what": "y@1", "why": "it has the same weights"}]
    assert same(registry.read("y")[0].weights, make(0.3).weights)
    weights = make(0.3).weights["layers.0.q_proj.lora_A.weight"].tobytes()
    assert len(holding(registry.home, weights)) == 1
    registry.forget("y")
    assert holding(registry.home, weights) == []


def test_runs_that_hold_the_weights(home: Path) -> None:
    """A run's checkpoints are copies: the receipt names them, or they go too; but not while somebody works on them."""
    registry = Registry()
    registry.put("x", make(0.1), {})
    for run, value in (("made-it", 0.1), ("other", 0.2)):
        for step, at in (("step-000000", 0.9), ("step-000002", value)):
            write_adapter(home / "runs" / run / "checkpoints" / step, make(at, kind="training"), {})
    with filelock.FileLock(home / "runs/made-it/.lock"), pytest.raises(RunError, match="nothing was forgotten"):
        registry.forget("x", with_runs=True)
    assert registry.versions("x") == [1]
    receipt = registry.forget("x")
    assert receipt.statement["left"] == [{"what": str(home / "runs/made-it"), "why": "the run's checkpoints hold the same weights"}]
    registry.put("x", make(0.1), {})
    receipt = registry.forget("x", with_runs=True)
    assert (receipt.statement["left"], receipt.statement["runs"]) == ([], [str(home / "runs/made-it")])
    assert [p.name for p in (home / "runs").iterdir()] == ["other"]


def test_whoever_holds_it_in_memory_is_told() -> None:
    """By the registry that forgets, at once; by another process's, when it next looks."""
    registry, other = family(), Registry()
    told: list[Tombstone] = []
    heard: list[Tombstone] = []
    Registry().forget("x@1")
    registry.on_forget(told.append)
    other.on_forget(heard.append)
    registry.forget("z", "why not")
    assert [(t.reference, t.digest, t.reason) for t in told] == [("z@1", make(0.3).adapter.digest, "why not")]
    assert heard == []
    assert other.notice_forgotten() == heard == told
    assert other.notice_forgotten() == registry.notice_forgotten() == []
    assert len(told) == len(heard) == 1


def test_an_interrupted_forget_is_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped between files and index: nothing can be read, and the same command again ends it."""
    registry = Registry()
    registry.put("x", make(0.1), {})

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(registry.index, "remove", stop)
        with pytest.raises(KeyboardInterrupt):
            registry.forget("x")
    with pytest.raises(AdapterError, match="not in this home"):
        registry.read("x")
    assert reindex(Registry()).missing == ("x@1",)
    assert registry.forget("x").statement["forgotten"][0]["files"] == []
    assert list(registry.objects.iterdir()) == []
    assert registry.names() == []


# ---------------------------------------------------------------- the index again


def test_a_lost_index_is_built_again() -> None:
    """Names, numbers, parents, scores of the run, signers, and what was forgotten; labels were in the index alone."""
    registry = family()
    score = Score("sort", 0.5, 0.4, 0.6, 9, 3, "2026-01-01T00:00:00Z")
    registry.put("u", make(0.5), {"scores": [dataclasses.asdict(score)]}, signed=False)
    registry.put("x", make(0.6), {})
    registry.forget("x@3", "a reason")
    registry.promote("x", 1)
    before = [dataclasses.replace(entry, labels=()) for entry in registry.entries()]
    registry.index.file.unlink()
    assert Registry().names() == []
    again = Registry()
    found = reindex(again)
    assert sorted(found.added) == ["u@1", "x@1", "x@2", "y@1", "z@1"]
    assert (found.missing, found.left_out, found.set_aside) == ((), (), None)
    assert again.entries() == before
    assert again.lineage("z")[2].reference == "x@2"
    with pytest.raises(AdapterError, match=r"forgotten .*: a reason"):
        again.resolve("x@3")
    assert again.put("x", make(0.7), {}) == 4
    assert reindex(again) == Reindexed((), (), (), None)


def test_a_damaged_index_is_set_aside() -> None:
    """It is kept for whoever wants to try more."""
    registry = family()
    registry.index.file.write_bytes(b"no database" * 1000)
    with pytest.raises(StorageError, match="reindex"):
        Registry().names()
    found = reindex(Registry())
    assert len(found.added) == 4
    assert found.set_aside is not None
    assert Path(found.set_aside).read_bytes().startswith(b"no database")
    assert Registry().names() == ["x", "y", "z"]


def test_what_the_index_knows_stays() -> None:
    """Only one row was lost: labels and scores of the others are not touched."""
    registry = family()
    registry.promote("x", 1)
    registry.add_score("x@1", Score("sort", 0.5, 0.4, 0.6, 9, 3, "2026-01-01T00:00:00Z"))
    with registry.index.engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM adapter_versions WHERE name = 'y'")
    assert reindex(registry).added == ("y@1",)
    entry = registry.resolve("x@1")
    assert (entry.labels, len(entry.scores)) == (("live",), 1)


def test_folders_that_are_not_taken(tmp_path: Path) -> None:
    """Damaged, forgotten, copied in from somewhere, or no adapter: each with its reason."""
    registry = family()
    keep = {reference: registry.resolve(reference).folder for reference in ("x@1", "x@2", "z@1")}
    shutil.copytree(keep["z@1"], tmp_path / "z")
    registry.forget("z")
    registry.index.file.unlink()
    (keep["x@1"] / "README.md").write_text("")
    shutil.copytree(tmp_path / "z", keep["z@1"])
    shutil.copytree(keep["x@2"], registry.objects / "copy")
    write_adapter(registry.objects / "stranger", make(0.8), {})
    (registry.objects / "empty").mkdir()
    (registry.objects / f"{FORGOTTEN}abc").mkdir()
    found = reindex(Registry())
    assert sorted(found.added) == ["x@2", "y@1"]
    reasons = {Path(folder).name: why for folder, why in found.left_out}
    assert set(reasons) == {keep["x@1"].name, keep["z@1"].name, "copy", "stranger", "empty"}
    words = {keep["x@1"].name: "README.md was changed", keep["z@1"].name: "z@1 was forgotten", "copy": "is not what was put there"}
    for name, part in {**words, "stranger": "not put there by a registry", "empty": "damaged"}.items():
        assert part in reasons[name]
    assert not (registry.objects / f"{FORGOTTEN}abc").exists()


def test_a_changed_receipt_buries_nothing() -> None:
    """Who could write receipts could make a registry leave out what it has."""
    registry = Registry()
    registry.put("x", make(0.1), {})
    registry.put("x", make(0.2), {})
    receipt = registry.forget("x@2")
    document = json.loads(receipt.path.read_text())
    document["receipt"]["forgotten"][0] |= {"reference": "x@1", "digest": make(0.1).adapter.digest}
    receipt.path.write_text(json.dumps(document))
    registry.index.file.unlink()
    found = reindex(Registry())
    assert found.added == ("x@1",)
    assert "was changed after it was signed" in found.left_out[0][1]

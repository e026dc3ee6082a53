"""Adapters on disk: what comes back is what was written, or it is refused."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
from store_tools import make, same

from veneer.digest import digest_adapter
from veneer.store.adapters import read_adapter, write_adapter
from veneer.store.entry import Score
from veneer.types import Adapter, AdapterError, Checkpoint

SRC = Path(__file__).resolve().parents[2] / "src"


# ---------------------------------------------------------------- round trips and damage


@pytest.mark.parametrize("kind", ["sampler", "training"])
def test_round_trip(tmp_path: Path, kind: str) -> None:
    """Every number, the digest and the facts."""
    checkpoint = make(kind=kind)
    score = Score("sort", 0.5, 0.4, 0.6, 9, 3, "2026-01-01T00:00:00Z")
    write_adapter(tmp_path / "a", checkpoint, {"env": "sort", "seed": 3, "scores": [dataclasses.asdict(score)]})
    again, manifest = read_adapter(tmp_path / "a")
    assert (again.kind, again.adapter, again.config) == (checkpoint.kind, checkpoint.adapter, checkpoint.config)
    assert same(again.weights, checkpoint.weights)
    assert same(again.optimizer, checkpoint.optimizer)
    assert (manifest["env"], manifest["seed"], manifest["digest"]) == ("sort", 3, checkpoint.adapter.digest)
    card = (tmp_path / "a/README.md").read_text()
    assert "base_model: nano" in card
    assert "sort: 0.500 (95% interval 0.400 to 0.600, 9 problems, seed 3)" in card


def test_transposed_arrays_round_trip(tmp_path: Path) -> None:
    """B is kept transposed in memory; a writer that takes its bytes as they lie writes another matrix."""
    checkpoint = make()
    turned = {k: np.asfortranarray(w) for k, w in checkpoint.weights.items()}
    assert any(not w.flags.c_contiguous for w in turned.values())
    write_adapter(tmp_path / "a", dataclasses.replace(checkpoint, weights=turned), {})
    assert same(read_adapter(tmp_path / "a")[0].weights, checkpoint.weights)


def test_full_copies_round_trip(tmp_path: Path) -> None:
    """Full fine-tuning keeps its weights under their own names."""
    weights = {"model.norm.weight": np.arange(4, dtype=np.float32)}
    checkpoint = Checkpoint("sampler", Adapter("f", 1, digest_adapter(weights, None), "nano", "b" * 64), None, weights)
    write_adapter(tmp_path / "f", checkpoint, {})
    assert same(read_adapter(tmp_path / "f")[0].weights, weights)
    assert not (tmp_path / "f/adapter_config.json").exists()


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("where", ["first", "last"])
def test_a_flipped_bit_is_refused(tmp_path: Path, name: str, where: str) -> None:
    """A damaged disk must not turn into a slightly different model, nor into a slightly different continuation."""
    write_adapter(tmp_path / "a", make(kind="training"), {})
    path = tmp_path / "a" / name
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")  # safetensors: header length, header, numbers
    data[start + 2 if where == "first" else -2] ^= 0x10
    path.write_bytes(data)
    with pytest.raises(AdapterError, match="digest"):
        read_adapter(tmp_path / "a")


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "veneer.json"])
def test_truncated_files_are_refused(tmp_path: Path, name: str, keep: int) -> None:
    """A copy that was cut off."""
    write_adapter(tmp_path / "a", make(), {})
    path = tmp_path / "a" / name
    path.write_bytes(path.read_bytes()[: keep if keep >= 0 else -3])
    with pytest.raises(AdapterError, match="damaged") as caught:
        read_adapter(tmp_path / "a")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "veneer.json"])
def test_missing_files_are_refused(tmp_path: Path, name: str) -> None:
    """And a PEFT folder without a manifest is told how to come in."""
    write_adapter(tmp_path / "a", make(), {})
    (tmp_path / "a" / name).unlink()
    with pytest.raises(AdapterError, match="veneer adapters import" if name == "veneer.json" else "damaged"):
        read_adapter(tmp_path / "a")
    with pytest.raises(AdapterError, match=r"no veneer\.json"):
        read_adapter(tmp_path)


@pytest.mark.parametrize(("name", "section", "key"), [("veneer.json", "lora", "alpha"), ("adapter_config.json", None, "lora_alpha")])
def test_another_scale_is_refused(tmp_path: Path, name: str, section: str | None, key: str) -> None:
    """The scale is half of an adapter: with another alpha the same tensors are another behaviour, here or in PEFT."""
    write_adapter(tmp_path / "a", make(), {})
    document = json.loads((tmp_path / "a" / name).read_text())
    (document[section] if section else document)[key] = 64.0
    (tmp_path / "a" / name).write_text(json.dumps(document))
    with pytest.raises(AdapterError):
        read_adapter(tmp_path / "a")


def test_nothing_is_unpickled() -> None:
    """A pickle from a stranger runs code."""
    bad = []
    for path in SRC.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            hits = [n for n in names if n.split(".")[0] in {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}]
            if isinstance(node, ast.Call):
                call = ast.unparse(node.func)
                hits += [call] if call in {"torch.load", "np.load", "numpy.load", "torch.hub.load"} else []
                hits += ["allow_pickle"] if any(k.arg == "allow_pickle" for k in node.keywords) else []
            bad += [f"{path.relative_to(SRC)}:{getattr(node, 'lineno', 0)} {hit}" for hit in hits]
    assert bad == []
    assert os.path.exists(SRC / "veneer/engine/base.py")

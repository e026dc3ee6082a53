"""What two runs that differ in the seed alone have in common: told by the second one's report, and by ``veneer adapters overlap``."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from processes import Veneer, forking_veneer, small_run
from veneer.digest import digest_adapter
from veneer.store.adapters import facts_of, read_manifest
from veneer.store.registry import Registry

pytestmark = pytest.mark.xdist_group("overlap")
SHORT = ("--set=rl.steps=2", "--set=eval.problems=2", "--set=lora.rank=2")


@pytest.fixture(scope="module")
def veneer(tmp_path_factory: pytest.TempPathFactory) -> Generator[Veneer, None, None]:
    with forking_veneer(tmp_path_factory.mktemp("veneer")) as veneer:
        yield veneer


def train(veneer: Veneer, home: Path, file: Path, name: str, *more: str) -> Any:
    done = veneer(home, "train", file, f"--set=name={name}", *SHORT, *more, "--json")
    assert done.code == 0, done.err
    return done.document


@pytest.fixture(scope="module")
def home(veneer: Veneer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a run on two seeds, its twin, and one of another configuration; and with what was made of the first one's weights."""
    folder = tmp_path_factory.mktemp("seeds")
    home, file = folder / "home", small_run(folder / "files")
    first = train(veneer, home, file, "first")
    assert first["anatomy"]["other_seeds"] == []
    train(veneer, home, file, "again")  # of the same seed: the same bytes
    train(veneer, home, file, "longer", "--set=seed=5", "--set=rl.max_tokens=17")
    train(veneer, home, file, "second", "--set=seed=1", f"--set=folder={home}/runs/elsewhere")
    weights = Registry(home).read("first")[0].weights
    put(home, "mlp", {key: array for key, array in weights.items() if "mlp" in key})
    put(home, "attention", {key: array for key, array in weights.items() if "attn" in key})
    put(home, "idle", {key: array * (not key.endswith("lora_B.weight")) for key, array in weights.items()})
    put(home, "full", {"model.norm.weight": np.ones(128, np.float32)}, full=True)
    put(home, "moved", weights, base_digest="abc" * 21 + "a")
    return home


def put(home: Path, name: str, weights: Mapping[str, NDArray[np.float32]], base_digest: str | None = None, *, full: bool = False) -> None:
    """Weights as if they had been trained as ``first`` was."""
    registry = Registry(home)
    checkpoint, entry = registry.read("first")
    config = None if full else checkpoint.config
    digests = {"digest": digest_adapter(weights, config), "base_digest": base_digest or checkpoint.adapter.base_digest}
    adapter = dataclasses.replace(checkpoint.adapter, **digests)
    changed = dataclasses.replace(checkpoint, adapter=adapter, config=config, weights=weights)
    registry.put(name, changed, facts_of(read_manifest(entry.folder)))


def page(home: Path, name: str) -> str:
    return (home / "runs" / name / "report.html").read_text()


def test_a_run_tells_what_other_seeds_came_to(veneer: Veneer, home: Path) -> None:
    """The newest of each other seed, and none of another configuration; a home without any says nothing of it."""
    third = train(veneer, home, home.parent / "files/small.toml", "third", "--set=seed=2")
    others = third["anatomy"]["other_seeds"]
    assert [(one["seed"], one["adapter"]) for one in others] == [(1, "second@1"), (0, "again@1")]
    for one in others:
        assert list(one["common"]) == ["all", "attention", "MLP"]
        assert [common["matrices"] for common in one["common"].values()] == [28, 16, 12]
        for share in (side for common in one["common"].values() for side in (common["written"], common["read"])):
            assert 0 < share["measured"] < 1
            assert share["null"] > 2 * share["null_sd"] > 0
    shown = page(home, "third")
    assert "<h2>Other seeds</h2>" in shown
    written = others[0]["common"]["all"]["written"]
    cell = f"{100 * written['measured']:.1f}%; {100 * written['null']:.1f}% ± {200 * written['null_sd']:.1f}% by chance"
    assert re.search(rf"seed 1 \(second@1\), of 2 in a matrix</td><td>{re.escape(cell)}</td>", shown)
    assert "Other seeds" not in page(home, "first")
    direct = veneer(home, "adapters", "overlap", "third", "second", "--json")
    assert direct.document == {"one": "third@1", "other": "second@1", "common": others[0]["common"], "left_out": []}


def test_the_same_weights_share_everything(veneer: Veneer, home: Path) -> None:
    done = veneer(home, "adapters", "overlap", "first", "again")
    assert done.code == 0, done.err
    assert max(map(len, done.out.splitlines())) <= 80
    assert done.out.count("100.0%") == 6


def test_other_targets_leave_out_what_only_one_has(veneer: Veneer, home: Path) -> None:
    done = veneer(home, "adapters", "overlap", "first", "mlp", "--json")
    assert list(done.document["common"]) == ["all", "MLP"]
    assert len(done.document["left_out"]) == 16
    told = veneer(home, "adapters", "overlap", "first", "mlp").out
    assert "left out, as only one of the two changes them: k_proj, o_proj, q_proj, v_proj" in told


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        ("first", "nobody", "there is no adapter 'nobody'"),
        ("first", "full", "'full' is a fully fine-tuned copy"),
        ("mlp", "attention", "no matrix is adapted by both: 'mlp' down_proj, gate_proj, up_proj and 'attention' k_proj, o_proj"),
        ("first", "moved", "adapter 'moved', beside 'first', was made for base 'nano' (abcabcabcabc)"),
        ("idle", "first", "'idle' changes nothing"),
    ],
)
def test_what_cannot_be_compared_costs_one_line(veneer: Veneer, home: Path, one: str, other: str, words: str) -> None:
    done = veneer(home, "adapters", "overlap", one, other)
    assert (done.code, done.out) == (2, "")
    assert words in done.err
    assert len(done.err.strip().splitlines()) == 1


def test_a_neighbour_that_is_gone_or_broken_takes_nothing_along(veneer: Veneer, home: Path) -> None:
    """A forgotten adapter and a damaged folder are no other seeds, and the run ends as well without them."""
    train(veneer, home, home.parent / "files/small.toml", "kept", "--set=seed=7")
    assert veneer(home, "adapters", "forget", "second").code == 0
    (home / "runs/again/config.toml").write_text("seed = ")
    assert veneer(home, "adapters", "forget", "first").code == 0
    found = train(veneer, home, home.parent / "files/small.toml", "fourth", "--set=seed=3")
    others = {one["adapter"] for one in found["anatomy"]["other_seeds"]}
    assert others - {"third@1"} == {"kept@1"}  # the third is there if its test ran here

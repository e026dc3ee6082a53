"""``veneer adapters merge``, ``equivalence`` and ``interfere``, in processes of their own, and against servers that run."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf

from processes import Veneer, forking_veneer, leftovers
from veneer.engine import LoraEngine, load_base
from veneer.measure.canary import ask_trained, canary_tokens, with_canary
from veneer.render import load_renderer
from veneer.store.registry import Registry
from veneer.store.stack import stack_adapters
from veneer.types import LoraConfig

pytestmark = pytest.mark.xdist_group("proof")


@pytest.fixture(scope="module")
def veneer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Veneer]:
    with forking_veneer(tmp_path_factory.mktemp("streams")) as runner:
        yield runner


def fill(home: Path, **sizes: float) -> None:
    """Random adapters, each with the size of its numbers, as if they had been trained on ``sort``; "free" on nothing."""
    engine, renderer = LoraEngine(load_base("nano", "cpu")), load_renderer("nano")
    digests = {"tokenizer_digest": renderer.tokenizer_digest, "template_digest": renderer.template_digest}
    for name, size in sizes.items():
        engine.create_adapter(name, LoraConfig(rank=2))
        rows = engine._stack.rows
        slot = engine._slot(name).slot
        for array in engine._stack.named(slot, rows.training(slot)).values():
            array.copy_(torch.from_numpy(np.random.default_rng(len(name)).normal(0, size, tuple(array.shape)).astype(np.float32)))
        saved = engine.save_state(name, "sampler").result()
        facts = {**digests, "stage": "rl", "env": None if name == "free" else "sort"}
        Registry(home).put(name, with_canary(engine, name, saved, canary_tokens(renderer.vocab_size)), facts)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("proof") / "home"
    fill(home, small=0.02, large=0.05, free=0.05, faint=1e-4)
    return home


@contextmanager
def a_server(home: Path) -> Generator[str, None, None]:
    command = [sys.executable, "-m", "veneer", "serve", "--port", "0", "--threads", "1", "--device", "cpu"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"VENEER_HOME": str(home)})
    try:
        assert process.stderr is not None
        yield next(found[1] for line in process.stderr if (found := re.search(r"on (http://\S+)", line)))
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


# ---------------------------------------------------------------- merge


def test_merge_writes_a_model(veneer: Veneer, home: Path, tmp_path: Path) -> None:
    """A folder for stock transformers, with a record of what is in it, for people and for programs."""
    result = veneer(home, "adapters", "merge", "large", tmp_path / "model", "--json")
    assert result.code == 0, result.err
    d = result.document
    assert (d["dtype"], d["untied"], d["adapters"][0]["adapter"], d["adapters"][0]["scale"]) == ("float32", False, "large@1", 1)
    assert d["gaps"]["adapter"] < 1e-3 < 0.1 < d["gaps"]["base"]
    record = json.loads((tmp_path / "model/veneer-merge.json").read_text())
    assert record == {key: value for key, value in d.items() if key != "folder"}
    assert d["adapters"][0]["digest"][:16] in (tmp_path / "model/README.md").read_text()
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert not torch.equal(
        model.get_parameter("model.layers.0.mlp.up_proj.weight"), load_base("nano").model.get_parameter("model.layers.0.mlp.up_proj.weight")
    )
    assert leftovers(tmp_path) == []


def test_merge_of_a_stack(veneer: Veneer, home: Path, tmp_path: Path) -> None:
    """Scales and all, and stored in another dtype: the numbers of the engine's own stack."""
    result = veneer(home, "adapters", "merge", "large:0.5", "free@1:-0.25", tmp_path / "model", "--dtype", "float16", "--json")
    assert result.code == 0, result.err
    assert [a["scale"] for a in result.document["adapters"]] == [0.5, -0.25]
    assert 0 < result.document["lost"] < 0.1
    engine = LoraEngine(load_base("nano", "cpu"))
    parts = [(Registry(home).read(name)[0], scale) for name, scale in (("large", 0.5), ("free", -0.25))]
    engine.load_state("stack", stack_adapters(parts, "stack")).result()
    row = canary_tokens(368)
    wanted = ask_trained(engine, "stack", row).result().logprobs_D[0]
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    with torch.no_grad():
        logprobs = torch.log_softmax(model(torch.from_numpy(row)[None]).logits[0, :-1], -1)
    found = logprobs.gather(1, torch.from_numpy(row)[1:, None])[:, 0].numpy()
    assert np.abs(found - wanted).max() < 0.1


def test_merge_leaves_nothing_of_what_it_cannot_prove(veneer: Veneer, home: Path, tmp_path: Path) -> None:
    """An adapter below the last bit of bfloat16: the model would be the base under another name."""
    result = veneer(home, "adapters", "merge", "faint", tmp_path / "model", "--dtype", "bfloat16", "--json")
    assert result.code == 1
    assert "merge with --dtype float32, or serve the adapter" in result.document["error"]
    assert list(tmp_path.iterdir()) == []
    assert veneer(home, "adapters", "merge", "faint", tmp_path / "model").code == 0


def test_merge_overwrites_nothing(veneer: Veneer, home: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("dear")
    for target in (tmp_path, tmp_path / "mine"):
        result = veneer(home, "adapters", "merge", "large", target)
        assert (result.code, result.err.strip()) == (2, f"veneer: {target} exists already; give another folder")
    assert (tmp_path / "mine").read_text() == "dear"


# ---------------------------------------------------------------- equivalence


def test_equivalence_of_all_sides(veneer: Veneer, home: Path) -> None:
    """Trainer, sampler, a server that is started for it, PEFT and merged weights, on problems with rewards."""
    result = veneer(home, "adapters", "equivalence", "small", "--prompts", 12, "--max-tokens", 24, "--json")
    assert result.code == 0, result.err
    d = result.document
    assert list(d["sides"]) == ["sampler", "server", "PEFT", "merged"]
    assert (d["env"], d["texts"], d["equal"], d["left_out"], d["merged_stored_in"]) == ("sort", 12, True, {}, "float32")
    for side in d["sides"].values():
        assert side["tokens"] == d["tokens"] > 50
        assert 0 < side["largest"] < 1e-3
        assert side["reward"]["low"] <= side["reward"]["value"] <= side["reward"]["high"]
        assert abs(side["reward"]["value"]) < 1e-3
        assert side["within"]


def test_equivalence_with_a_server_that_runs(veneer: Veneer, home: Path) -> None:
    """And of an adapter that was made for no environment: no rewards then."""
    with a_server(home) as url:
        result = veneer(home, "adapters", "equivalence", "free", "--prompts", 6, "--server", url, "--json")
    assert result.code == 0, result.err
    assert (result.document["env"], result.document["reward"]) == (None, None)
    assert all(side["reward"] is None and side["largest"] < 1e-3 for side in result.document["sides"].values())


def test_a_server_with_other_weights_under_the_name(veneer: Veneer, home: Path, tmp_path: Path) -> None:
    """The name and version are the same, the digest is not."""
    fill(tmp_path / "other", small=0.03)
    with a_server(tmp_path / "other") as url:
        result = veneer(home, "adapters", "equivalence", "small", "--prompts", 2, "--server", url)
        assert result.code == 1
        assert re.search(r"answered 'small@1' with the weights [0-9a-f]{12}; asked for was [0-9a-f]{12}", result.err)
        unknown = veneer(home, "adapters", "equivalence", "free", "--prompts", 2, "--server", url)
        assert unknown.code == 2
        assert "answered 404" in unknown.err


def test_no_server_is_one_line(veneer: Veneer, home: Path) -> None:
    result = veneer(home, "adapters", "equivalence", "free", "--prompts", 2, "--server", "http://127.0.0.1:9")
    assert result.code == 2
    assert len(result.err.strip().splitlines()) == 1
    assert "is a server running there?" in result.err


def test_a_gap_is_exit_code_1(veneer: Veneer, home: Path, tmp_path: Path) -> None:
    """PEFT that scales otherwise than we do: a real gap, reported in full."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import peft\n_load = peft.PeftModel.from_pretrained\n"
        "def scaled(model, folder, **more):\n"
        "    found = _load(model, folder, **more)\n"
        "    for module in found.modules():\n"
        "        if hasattr(module, 'lora_A'):\n"
        "            module.scaling = {name: value / 2 for name, value in module.scaling.items()}\n"
        "    return found\n"
        "peft.PeftModel.from_pretrained = scaled\n"
    )
    environment = os.environ | {"VENEER_HOME": str(home), "PYTHONPATH": os.pathsep.join([str(site), *sys.path])}
    with a_server(home) as url:
        command = [sys.executable, "-m", "veneer", "adapters", "equivalence", "large", "--prompts", "4", "--server", url, "--json"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1, done.stderr
    document = json.loads(done.stdout)
    assert "sides" in document, document
    sides = document["sides"]
    assert [name for name, side in sides.items() if not side["within"]] == ["PEFT"]
    assert sides["PEFT"]["largest"] > 0.1


# ---------------------------------------------------------------- interfere


def test_interfere_writes_table_picture_and_numbers(veneer: Veneer, home: Path) -> None:
    """Each adapter's task is its own unless one is given for it."""
    arguments = ("--problems", 12, "--max-tokens", 16, "--env", "sort", "--env", "count", "--json")
    result = veneer(home, "adapters", "interfere", "small", "large", *arguments)
    assert result.code == 0, result.err
    d = result.document
    assert d["arms"] == ["base", "small@1", "large@1", "small@1+large@1"]
    assert d["tasks"] == ["sort", "count"]
    assert len(d["solved"]) == 8
    folder = Path(d["folder"])
    assert folder == home / "studies/interference-small@1+large@1"
    assert json.loads((folder / "matrix.json").read_text()) == {key: value for key, value in d.items() if key != "folder"}
    assert "| small@1+large@1 |" in (folder / "matrix.md").read_text()
    assert (folder / "matrix.svg").read_text().startswith("<?xml")
    again = veneer(home, "adapters", "interfere", "small", "large", *arguments)
    assert again.document == d


def test_interfere_refuses_in_one_line(veneer: Veneer, home: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/diary").write_text("dear")
    cases = {
        ("small",): (2, "two adapters or more"),
        ("small", "large", "--env", "sort"): (2, "give one for each, or none"),
        ("small", "free"): (2, "adapter 'free@1' was trained in no environment"),
        ("small", "nobody"): (2, "nobody"),
        ("small", "large", "--out", str(tmp_path / "mine")): (1, "holds something else than a matrix"),
    }
    for arguments, (code, words) in cases.items():
        result = veneer(home, "adapters", "interfere", *arguments)
        assert (result.code, len(result.err.strip().splitlines())) == (code, 1), result.err
        assert words in result.err
    assert (tmp_path / "mine/diary").read_text() == "dear"

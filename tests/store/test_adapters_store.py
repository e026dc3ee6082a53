"""Adapters on disk: what comes back is what was written, or it is refused."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch
from transformers import AutoModelForCausalLM

from veneer.assets import NANO_FOLDER
from veneer.cli.main import main
from veneer.digest import digest_adapter
from veneer.engine import LocalEngine, LoraEngine, load_base
from veneer.render import load_renderer
from veneer.store.adapters import UNSUPPORTED, read_adapter, read_peft, write_adapter
from veneer.store.registry import Registry
from veneer.types import Adapter, AdapterError, Checkpoint, LoraConfig, SamplingParams

SRC = Path(__file__).resolve().parents[2] / "src"


def make(value: float = 0.5, kind: Any = "sampler", name: str = "x") -> Checkpoint:
    """A small adapter of no base in particular."""
    rng = np.random.default_rng(int(value * 100))
    weights = {}
    for module in ("layers.0.q_proj", "layers.1.q_proj"):
        weights[f"{module}.lora_A.weight"] = rng.normal(size=(2, 6)).astype(np.float32)
        weights[f"{module}.lora_B.weight"] = rng.normal(size=(4, 2)).astype(np.float32)
    optimizer = {f"{m}.{k}": np.abs(w) for m in "mv" for k, w in weights.items()} | {"step": np.array(7)} if kind == "training" else {}
    lora = LoraConfig(rank=2, alpha=8.0)
    return Checkpoint(kind, Adapter(name, 7, digest_adapter(weights, lora), "nano", "b" * 64), lora, weights, optimizer)


def nano_engine() -> LocalEngine:
    return LoraEngine(load_base("nano"))


def nano_adapter(rank: int = 2) -> Checkpoint:
    """A real adapter of the bundled base whose B is not zero."""
    engine = nano_engine()
    engine.create_adapter("made", LoraConfig(rank=rank, seed=3))
    fresh = engine.save_state("made", "sampler").result()
    rng = np.random.default_rng(0)
    weights = {k: w + (0.05 * rng.normal(size=w.shape).astype(np.float32) if "lora_B" in k else 0) for k, w in fresh.weights.items()}
    adapter = dataclasses.replace(fresh.adapter, digest=digest_adapter(weights, fresh.config))
    return dataclasses.replace(fresh, weights=weights, adapter=adapter)


def same(left: Any, right: Any) -> bool:
    return set(left) == set(right) and all(left[k].dtype == right[k].dtype and np.array_equal(left[k], right[k]) for k in left)


# ---------------------------------------------------------------- round trips and damage


@pytest.mark.parametrize("kind", ["sampler", "training"])
def test_round_trip(tmp_path: Path, kind: str) -> None:
    """Every number, the digest and the facts."""
    checkpoint = make(kind=kind)
    write_adapter(
        tmp_path / "a", checkpoint, {"env": "sort", "seed": 3, "scores": {"r": {"value": 0.5, "low": 0.4, "high": 0.6, "trials": 9}}}
    )
    again, manifest = read_adapter(tmp_path / "a")
    assert (again.kind, again.adapter, again.config) == (checkpoint.kind, checkpoint.adapter, checkpoint.config)
    assert same(again.weights, checkpoint.weights)
    assert same(again.optimizer, checkpoint.optimizer)
    assert (manifest["env"], manifest["seed"], manifest["digest"]) == ("sort", 3, checkpoint.adapter.digest)
    card = (tmp_path / "a/README.md").read_text()
    assert "base_model: nano" in card
    assert "0.500 (95% interval 0.400 to 0.600, 9 problems)" in card


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


# ---------------------------------------------------------------- PEFT


def peft_folder(folder: Path, **options: Any) -> Path:
    """What a stranger saves with stock PEFT, with B away from zero."""
    model = AutoModelForCausalLM.from_pretrained(NANO_FOLDER)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **options)
    wrapped = peft.get_peft_model(model, config)
    torch.manual_seed(0)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    wrapped.save_pretrained(folder)
    return folder


def peft_logits(folder: Path, tokens: list[int]) -> torch.Tensor:
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(NANO_FOLDER), folder).eval()
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].log_softmax(-1)


def check_engine_agrees(engine: LocalEngine, name: str, folder: Path) -> None:
    """The engine's log-probabilities of a prompt are those of stock PEFT."""
    tokens = load_renderer("nano").build_generation_prompt([{"role": "user", "content": "sort 31524"}])
    (sample,) = engine.sample(tokens, name, SamplingParams(max_tokens=1), prompt_logprobs=True).result()
    assert sample.prompt_logprobs is not None
    expected = peft_logits(folder, tokens.tolist())[:-1].gather(1, torch.from_numpy(tokens[1:, None]))[:, 0].numpy()
    np.testing.assert_allclose(sample.prompt_logprobs[1:], expected, atol=2e-5)


def run_cli(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, Any]:
    with pytest.raises(SystemExit) as caught:
        main([*arguments, "--json"])
    code = caught.value.code
    assert isinstance(code, int)
    return code, json.loads(capsys.readouterr().out)


def test_a_foreign_adapter_is_imported_and_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An adapter that was trained elsewhere answers here as it does there."""
    folder = peft_folder(tmp_path / "foreign")
    code, document = run_cli(["adapters", "import", str(folder), "--name", "theirs"], capsys)
    assert (code, document["adapter"]) == (0, "theirs@1")
    code, again = run_cli(["adapters", "import", str(folder), "--name", "theirs"], capsys)
    assert (code, again["adapter"]) == (0, "theirs@1")
    code, sampled = run_cli(["sample", "sort 31524", "--adapter", "theirs", "--max-tokens", "4"], capsys)
    assert code == 0
    assert sampled["adapter"]["digest"] == document["digest"]
    engine = nano_engine()
    checkpoint = read_adapter(Registry().find("theirs"))[0]
    engine.load_state("theirs", checkpoint).result()
    check_engine_agrees(engine, "theirs", folder)


def test_an_adapter_that_names_another_base_is_not_guessed_onto_nano(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Shapes may fit a sibling: whose adapter it is must be said."""
    folder = peft_folder(tmp_path / "foreign")
    config = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": "Qwen/Qwen3-0.6B"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    code, document = run_cli(["adapters", "import", str(folder), "--name", "theirs"], capsys)
    assert code == 2
    assert "made for base 'Qwen/Qwen3-0.6B'" in document["error"]
    code, document = run_cli(["adapters", "import", str(folder), "--name", "theirs", "--base", "nano"], capsys)
    assert (code, document["adapter"]) == (0, "theirs@1")


def test_a_bfloat16_adapter_is_imported(tmp_path: Path) -> None:
    """Most adapters on the hub are bfloat16, and each of its numbers is a float32."""
    folder = peft_folder(tmp_path / "foreign")
    weights = {k: torch.from_numpy(w).to(torch.bfloat16) for k, w in load_file(folder / "adapter_model.safetensors").items()}
    save_torch(weights, folder / "adapter_model.safetensors")
    checkpoint = read_peft(folder, "x", "nano", "b" * 64)
    assert same(checkpoint.weights, {k.removeprefix("base_model.model."): w.float().numpy() for k, w in weights.items()})


REFUSED = [
    ({"use_dora": True}, "use_dora"),
    ({"use_rslora": True}, "use_rslora"),
    ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
    ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"bias": "all"}, "bias"),
    ({"layers_to_transform": [0]}, "layers_to_transform"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights"),
]


@pytest.mark.parametrize(("options", "word"), REFUSED)
def test_what_cannot_be_represented_is_refused_by_name(tmp_path: Path, options: dict[str, Any], word: str) -> None:
    """Dropping such an option would load another model without a word. (PiSSA and its kin subtract from the base when they load.)"""
    folder = peft_folder(tmp_path / "foreign", **options)
    with pytest.raises(AdapterError, match=word) as caught:
        read_peft(folder, "x", "nano", "b" * 64)
    assert "\n" not in str(caught.value)


def test_unsupported_options_exist_in_peft() -> None:
    """A refusal of an option that PEFT spells otherwise refuses nothing."""
    known = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert {"use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save"} <= set(UNSUPPORTED) & known


@pytest.mark.parametrize(
    "config",
    [
        {},
        [],
        {"peft_type": "LORA"},
        {"peft_type": "LORA", "r": 4},
        {"peft_type": "LORA", "r": "x", "lora_alpha": None},
        {"peft_type": "IA3"},
    ],
)
def test_a_broken_peft_config_is_one_line(tmp_path: Path, config: Any) -> None:
    """A folder that somebody edited."""
    folder = peft_folder(tmp_path / "foreign")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="foreign"):
        read_peft(folder, "x", "nano", "b" * 64)


def test_odd_tensors_are_refused(tmp_path: Path) -> None:
    """Embeddings saved along would be lost."""
    folder = peft_folder(tmp_path / "foreign")
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({**weights, "base_model.model.lm_head.weight": np.zeros((2, 2), np.float32)}, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"lm_head\.weight"):
        read_peft(folder, "x", "nano", "b" * 64)


def test_an_export_opens_in_stock_peft(tmp_path: Path) -> None:
    """The way out: the same numbers with nothing of ours installed."""
    checkpoint = nano_adapter()
    Registry().put("mine", checkpoint, {})
    Registry().export("mine", tmp_path / "out")
    engine = nano_engine()
    engine.load_state("mine", checkpoint).result()
    check_engine_agrees(engine, "mine", tmp_path / "out")
    with pytest.raises(AdapterError, match="exists already"):
        Registry().export("mine", tmp_path / "out")
    assert same(read_adapter(tmp_path / "out")[0].weights, checkpoint.weights)


# ---------------------------------------------------------------- the registry


@pytest.mark.parametrize("name", ["../x", "a/b", "/abs", "..", ".", ".hidden", "", "a b", "x\n", "x" * 65, "ä", "a\0"])
def test_names_stay_inside(name: str) -> None:
    """A name from a request must not become a path out of the registry."""
    registry = Registry()
    for call in (lambda: registry.put(name, make(), {}), lambda: registry.versions(name), lambda: registry.path(name, 1)):
        with pytest.raises(AdapterError, match="no adapter name"):
            call()
    assert not registry.folder.exists() or not list(registry.folder.iterdir())


def test_versions() -> None:
    """name is the newest, name@2 the second, and the same weights are the same version."""
    registry = Registry()
    assert registry.names() == []
    assert [registry.put("x", make(v), {}) for v in (0.1, 0.2, 0.1, 0.3)] == [1, 2, 1, 3]
    assert registry.put("y", make(0.1), {}) == 1
    assert (registry.names(), registry.versions("x"), registry.versions("z")) == (["x", "y"], [1, 2, 3], [])
    for reference, value in (("x", 0.3), ("x@2", 0.2), ("x@1", 0.1)):
        assert same(read_adapter(registry.find(reference))[0].weights, make(value).weights)
    assert registry.find(str(registry.path("x", 2))) == registry.path("x", 2)
    shutil.rmtree(registry.path("x", 2))
    assert registry.put("x", make(0.4), {}) == 4


@pytest.mark.parametrize(
    ("reference", "words"),
    [("z", "there are: x"), ("x@9", "it has 1"), ("x@", "x"), ("x@one", "no version 'one'"), ("a/b", "no adapter folder a/b")],
)
def test_what_is_not_there(reference: str, words: str) -> None:
    """The answer says what there is."""
    registry = Registry()
    registry.put("x", make(), {})
    if reference == "x@":
        assert registry.find(reference) == registry.path("x", 1)
        return
    with pytest.raises(AdapterError, match=words):
        registry.find(reference)


def test_an_export_into_a_file_is_one_line(tmp_path: Path) -> None:
    """Paths of the user's that cannot be."""
    Registry().put("x", make(), {})
    (tmp_path / "file").write_text("")
    with pytest.raises((AdapterError, OSError)) as caught:
        Registry().export("x", tmp_path / "file")
    assert isinstance(caught.value, AdapterError)


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

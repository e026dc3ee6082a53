"""PEFT folders from elsewhere: represented to the last bit, or refused by name. (Their logits: tests/engine/test_foreign_adapters.py.)"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch
from store_tools import make, nano_adapter, nano_engine, same
from transformers import AutoModelForCausalLM

from veneer.assets import NANO_FOLDER
from veneer.cli.main import main
from veneer.engine import LocalEngine
from veneer.render import load_renderer
from veneer.store.adapters import PEFT_PREFIX, read_adapter, read_manifest, write_adapter
from veneer.store.foreign import HARMLESS, READ, SAYS_NOTHING, read_peft
from veneer.store.registry import Registry
from veneer.types import AdapterError, Checkpoint, SamplingParams


def peft_folder(folder: Path, **options: Any) -> Path:
    """What a stranger saves with stock PEFT, with B away from zero."""
    model = AutoModelForCausalLM.from_pretrained(NANO_FOLDER)
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], **options}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    torch.manual_seed(0)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    wrapped.save_pretrained(folder)
    return folder


def edit(folder: Path, **changes: Any) -> Path:
    """Somebody's hand in adapter_config.json."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def replace_weights(folder: Path, change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> Path:
    save_file(change(load_file(folder / "adapter_model.safetensors")), folder / "adapter_model.safetensors")
    return folder


def read(folder: Path, **options: Any) -> Checkpoint:
    return read_peft(folder, "x", "nano", "b" * 64, **options)[0]


def updates(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """(alpha / r) B A by module, in float64."""
    assert checkpoint.config is not None
    scale, w = checkpoint.config.alpha / checkpoint.config.rank, {k: v.astype(np.float64) for k, v in checkpoint.weights.items()}
    modules = {key.rsplit(".lora_", 1)[0] for key in w}
    return {m: scale * w[f"{m}.lora_B.weight"] @ w[f"{m}.lora_A.weight"] for m in modules}


def peft_updates(folder: Path) -> dict[str, np.ndarray]:
    """What stock PEFT adds to each weight, in float64."""
    wrapped = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(NANO_FOLDER), folder).double()
    layers = {n: m for n, m in wrapped.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    return {name.removeprefix(PEFT_PREFIX): layer.get_delta_weight("default").numpy() for name, layer in layers.items()}


def check_same_updates(checkpoint: Checkpoint, folder: Path) -> None:
    found, wanted = updates(checkpoint), peft_updates(folder)
    assert set(found) == set(wanted)
    assert len(wanted) > 1
    for module, update in wanted.items():
        assert np.abs(update).max() > 0
        np.testing.assert_allclose(found[module], update, rtol=1e-12, atol=1e-14)


# ---------------------------------------------------------------- what is represented

REPRESENTED: dict[str, dict[str, Any]] = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "rsLoRA of an odd rank": {"use_rslora": True, "r": 3},
    "ranks": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 8}},
    "ranks by a regular expression": {"rank_pattern": {r".*\.[02]\..*q_proj": 1, "^model.layers.3.mlp.down_proj": 2}},
    "alphas": {"alpha_pattern": {"q_proj": 2}},
    "alphas by a regular expression, the first counts": {"alpha_pattern": {r"layers\.[01]\..*": 32, "q_proj": 4}},
    "ranks and alphas": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 64, "q_proj": 1}},
    "rsLoRA with ranks and alphas": {"use_rslora": True, "rank_pattern": {"q_proj": 16}, "alpha_pattern": {"layers.0.mlp.down_proj": 2}},
    "rsLoRA whose ranks and alphas give one scale": {"use_rslora": True, "rank_pattern": {"q_proj": 1}, "alpha_pattern": {"q_proj": 4}},
    "ranks and alphas in step": {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"q_proj": 6}},
    "an alpha that is no short float": {"r": 3, "lora_alpha": 16 / 3, "rank_pattern": {"q_proj": 6}, "alpha_pattern": {"q_proj": 32 / 3}},
    "alphas that even out the scales, as EVA rounds them": {"r": 3, "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"q_proj": 40 / 3}},
    "some layers": {"layers_to_transform": [0, 2]},
    "one layer": {"layers_to_transform": 1, "layers_pattern": "layers"},
    "targets by a regular expression": {"target_modules": r".*layers\.[13]\..*(q|v)_proj"},
    "all linear maps": {"target_modules": "all-linear"},
    "all but some": {"target_modules": "all-linear", "exclude_modules": ["q_proj"]},
    "dropout": {"lora_dropout": 0.1},
    "another start": {"init_lora_weights": "gaussian"},
    "an orthogonal start": {"init_lora_weights": "orthogonal"},
}


@pytest.mark.parametrize("options", REPRESENTED.values(), ids=REPRESENTED)
def test_the_update_is_pefts(tmp_path: Path, options: dict[str, Any]) -> None:
    """Rank, scale and every number: the same matrix is added to the same weight."""
    folder = peft_folder(tmp_path / "foreign", **options)
    check_same_updates(read(folder), folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened(tmp_path: Path, dtype: torch.dtype) -> None:
    """Most adapters on the hub are bfloat16, and each of its numbers is a float32."""
    folder = peft_folder(tmp_path / "foreign")
    weights = {k: torch.from_numpy(w).to(dtype) for k, w in load_file(folder / "adapter_model.safetensors").items()}
    save_torch(weights, folder / "adapter_model.safetensors")
    assert same(read(folder).weights, {k.removeprefix(PEFT_PREFIX): w.float().numpy() for k, w in weights.items()})


def test_a_factor_of_three_needs_short_numbers(tmp_path: Path) -> None:
    """Three times a bfloat16 is a float32; three times most float32 is not."""
    folder = peft_folder(tmp_path / "foreign", alpha_pattern={"q_proj": 24})
    with pytest.raises(AdapterError, match=r"alpha_pattern scales model\.layers\.0\.self_attn\.q_proj by 3 times"):
        read(folder)
    weights = {k: torch.from_numpy(w).to(torch.bfloat16) for k, w in load_file(folder / "adapter_model.safetensors").items()}
    save_torch(weights, folder / "adapter_model.safetensors")
    check_same_updates(read(folder), folder)


KEYS = ["q", "q_proj", "proj", "0.q_proj", "^layers.0.q_proj", r".*", r"layers\.\d+\.[kq]_proj", "a|b"]


@settings(max_examples=60, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 9), min_size=2, max_size=4),
    alphas=st.lists(st.integers(1, 64), min_size=2, max_size=4),
    rslora=st.booleans(),
    mantissa=st.sampled_from([4, 8, 16, 24]),
)
def test_exact_or_refused(
    tmp_path_factory: pytest.TempPathFactory, ranks: list[int], alphas: list[int], rslora: bool, mantissa: int
) -> None:
    """Whatever the ranks and alphas: an adapter that is taken has PEFT's scales times PEFT's numbers, and no product was rounded."""
    folder, rng = tmp_path_factory.mktemp("pattern"), np.random.default_rng(sum(ranks) + 100 * sum(alphas))
    modules = [f"layers.{i}.p" for i in range(min(len(ranks), len(alphas)))]
    tensors = {}
    for module, rank in zip(modules, ranks, strict=False):
        for side, shape in (("A", (rank, 5)), ("B", (6, rank))):
            tensors[f"{PEFT_PREFIX}{module}.lora_{side}.weight"] = np.ldexp(
                rng.integers(-(2**mantissa) + 1, 2**mantissa, shape).astype(np.float32), -mantissa
            )
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "use_rslora": rslora}
    config |= {"rank_pattern": dict(zip(modules, ranks, strict=False)), "alpha_pattern": dict(zip(modules, alphas, strict=False))}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    try:
        checkpoint = read(folder)
    except AdapterError as error:
        assert "_pattern" in str(error)  # noqa: PT017
        return
    assert checkpoint.config is not None
    ours = checkpoint.config.alpha / checkpoint.config.rank
    for module, rank, alpha in zip(modules, ranks, alphas, strict=False):
        a, b = (checkpoint.weights[f"{module}.lora_{side}.weight"].astype(np.float64) for side in "AB")
        theirs = alpha / math.sqrt(rank) if rslora else alpha / rank
        original = tensors[f"{PEFT_PREFIX}{module}.lora_B.weight"].astype(np.float64)
        factor = round(theirs / ours)
        assert math.isclose(factor * ours, theirs, rel_tol=1e-15)
        np.testing.assert_array_equal(b[:, :rank], original * factor)
        np.testing.assert_array_equal(a[:rank], tensors[f"{PEFT_PREFIX}{module}.lora_A.weight"])
        assert not a[rank:].any()
        assert not b[:, rank:].any()


@settings(max_examples=100, deadline=None)
@given(
    keys=st.lists(st.sampled_from(KEYS), max_size=4),
    module=st.sampled_from(["layers.0.q_proj", "layers.11.k_proj", "q_proj", "layers.0.b", "xq_proj"]),
)
def test_patterns_are_matched_as_peft_matches_them(keys: list[str], module: str) -> None:
    """The rule is PEFT's, down to which of several keys counts."""
    from veneer.store.foreign import _by_pattern

    patterns = {key: number for number, key in enumerate(keys)}
    assert _by_pattern(patterns, module, "default") == patterns.get(get_pattern_key(patterns, module), "default")


def base_has(engine: LocalEngine) -> Callable[[str, np.ndarray], bool]:
    from veneer.cli.assemble import Machine

    return Machine(engine, load_renderer("nano")).has_weight


def test_an_adapted_unembedding(tmp_path: Path) -> None:
    """PEFT saves a copy of the base's unembedding beside its adapter. The copy is left out, if it is one."""
    folder = peft_folder(tmp_path / "foreign", target_modules=["q_proj", "lm_head"])
    assert any("base_layer" in key for key in load_file(folder / "adapter_model.safetensors"))
    with pytest.raises(AdapterError, match="base_layer"):
        read(folder)
    checkpoint = read(folder, is_base=base_has(nano_engine()))
    assert {key for key in checkpoint.weights if "lm_head" in key} == {"lm_head.lora_A.weight", "lm_head.lora_B.weight"}
    check_same_updates(checkpoint, folder)

    def retrained(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {key: w * 1.5 if "base_layer" in key else w for key, w in weights.items()}

    with pytest.raises(AdapterError, match=r"base_layer\.weight' is no LoRA weight"):
        read(replace_weights(folder, retrained), is_base=base_has(nano_engine()))


# ---------------------------------------------------------------- what is refused

REFUSED = [
    ({"use_dora": True}, "use_dora"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"bias": "all"}, "bias"),
    ({"bias": "lora_only"}, "bias"),
    ({"lora_bias": True, "init_lora_weights": True}, "lora_bias"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    ({"init_lora_weights": "olora"}, "init_lora_weights"),
    ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    ({"use_rslora": True, "rank_pattern": {"q_proj": 8}}, "rank_pattern with use_rslora gives .* an irrational multiple"),
    ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens"),
]


@pytest.mark.parametrize(("options", "words"), REFUSED, ids=[str(r[0]) for r in REFUSED])
def test_what_cannot_be_represented_is_refused_by_name(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    """Dropping such an option would load another model without a word. (PiSSA and its kin subtract from the base when they load.)"""
    folder = peft_folder(tmp_path / "foreign", **options)
    with pytest.raises(AdapterError, match=words) as caught:
        read(folder)
    assert "\n" not in str(caught.value)


def test_every_other_setting_of_peft_is_refused_by_name(tmp_path: Path) -> None:
    """What PEFT has that is not known to be harmless, and what it will have, changes the adapter until shown otherwise."""
    known = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert READ | {"target_modules", "lora_dropout", "bias", "init_lora_weights", "peft_type"} <= known
    folder = peft_folder(tmp_path / "foreign")
    others = sorted(known - READ - SAYS_NOTHING - set(HARMLESS))
    assert {"use_dora", "use_qalora", "target_parameters", "layer_replication", "kasa_config", "fan_in_fan_out"} <= set(others)
    original = (folder / "adapter_config.json").read_text()
    for setting in [*others, "invented_next_year"]:
        edit(folder, **{setting: {"some": 1}})
        with pytest.raises(AdapterError, match=setting):
            read(folder)
        (folder / "adapter_config.json").write_text(original)
    read(folder)


@pytest.mark.parametrize(("setting", "value"), [("task_type", "SEQ_CLS"), ("init_lora_weights", "mica"), ("peft_type", "IA3")])
def test_other_values_are_refused(tmp_path: Path, setting: str, value: str) -> None:
    """Settings of which one value is plain LoRA."""
    with pytest.raises(AdapterError, match=f"{setting}.*{value}"):
        read(edit(peft_folder(tmp_path / "foreign"), **{setting: value}))


BROKEN = [
    {"r": "x"},
    {"r": 0},
    {"r": None},
    {"lora_alpha": None},
    {"lora_alpha": 0},
    {"lora_alpha": -8},
    {"alpha_pattern": {"q_proj": -1}},
    {"alpha_pattern": {"q_proj": "much"}},
    {"alpha_pattern": {"(": 2}},
    {"alpha_pattern": ["q_proj"]},
    {"rank_pattern": {"q_proj": 2}},
    {"r": 8},
]


@pytest.mark.parametrize("changes", BROKEN, ids=str)
def test_a_broken_config_is_one_line(tmp_path: Path, changes: dict[str, Any]) -> None:
    """A folder that somebody edited, or whose ranks are not those of its tensors."""
    with pytest.raises(AdapterError, match="foreign") as caught:
        read(edit(peft_folder(tmp_path / "foreign"), **changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("config", [{}, [], {"peft_type": "LORA"}, {"peft_type": "LORA", "r": 4}])
def test_half_a_config_is_one_line(tmp_path: Path, config: Any) -> None:
    """Not even the keys are there."""
    folder = peft_folder(tmp_path / "foreign")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="foreign"):
        read(folder)


Q = f"{PEFT_PREFIX}model.layers.0.self_attn.q_proj"
ODD: list[tuple[str, Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]], str]] = [
    ("an embedding", lambda w: {**w, f"{PEFT_PREFIX}lm_head.weight": np.zeros((2, 2), np.float32)}, r"lm_head\.weight"),
    ("a magnitude", lambda w: {**w, f"{Q}.lora_magnitude_vector.weight": np.ones(4, np.float32)}, "lora_magnitude_vector"),
    ("a bias", lambda w: {**w, f"{Q}.lora_B.bias": np.ones(4, np.float32)}, r"lora_B\.bias"),
    ("no prefix, which PEFT leaves out", lambda w: {k.removeprefix(PEFT_PREFIX): v for k, v in w.items()}, "is no LoRA weight"),
    ("half a pair", lambda w: {k: v for k, v in w.items() if k != f"{Q}.lora_B.weight"}, "q_proj has A and B of shapes"),
    ("another rank", lambda w: {**w, f"{Q}.lora_A.weight": w[f"{Q}.lora_A.weight"][:2]}, "its rank is 4"),
    ("no matrix", lambda w: {**w, f"{Q}.lora_A.weight": w[f"{Q}.lora_A.weight"][..., None]}, "q_proj has A and B of shapes"),
    ("not a number", lambda w: {**w, f"{Q}.lora_A.weight": w[f"{Q}.lora_A.weight"] * np.float32("nan")}, "not finite"),
    ("float64", lambda w: {**w, f"{Q}.lora_A.weight": w[f"{Q}.lora_A.weight"].astype(np.float64)}, "is F64"),
    ("integers", lambda w: {**w, f"{Q}.lora_A.weight": w[f"{Q}.lora_A.weight"].astype(np.int8)}, "is I8"),
    ("nothing", lambda w: {}, "holds no LoRA weights"),
]


@pytest.mark.parametrize(("change", "words"), [o[1:] for o in ODD], ids=[o[0] for o in ODD])
def test_odd_tensors_are_refused(tmp_path: Path, change: Callable[[Any], Any], words: str) -> None:
    """What is saved beside the adapter would be lost; what is broken would answer nonsense."""
    with pytest.raises(AdapterError, match=words):
        read(replace_weights(peft_folder(tmp_path / "foreign"), change))


def test_a_pickle_is_refused_by_name(tmp_path: Path) -> None:
    """It would run code."""
    folder = peft_folder(tmp_path / "foreign")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"adapter_model\.bin is a pickle"):
        read(folder)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(AdapterError, match="no readable PEFT folder"):
        read(folder)


# ---------------------------------------------------------------- in by the command, and out again


def check_engine_agrees(engine: LocalEngine, name: str, folder: Path) -> None:
    """The engine's log-probabilities of a prompt are those of stock PEFT."""
    tokens = load_renderer("nano").build_generation_prompt([{"role": "user", "content": "sort 31524"}])
    (sample,) = engine.sample(tokens, name, SamplingParams(max_tokens=1), prompt_logprobs=True).result()
    assert sample.prompt_logprobs is not None
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(NANO_FOLDER), folder).eval()
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens)[None]).logits[0].log_softmax(-1)[:-1].gather(1, torch.from_numpy(tokens[1:, None]))[:, 0]
    np.testing.assert_allclose(sample.prompt_logprobs[1:], expected.numpy(), atol=2e-5)


def run_cli(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, Any]:
    with pytest.raises(SystemExit) as caught:
        main([*arguments, "--json"])
    code = caught.value.code
    assert isinstance(code, int)
    return code, json.loads(capsys.readouterr().out)


def test_a_foreign_adapter_is_imported_and_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An adapter that was trained elsewhere answers here as it does there."""
    folder = peft_folder(tmp_path / "foreign", use_rslora=True, rank_pattern={"q_proj": 1}, target_modules=["q_proj", "lm_head"])
    code, document = run_cli(["adapters", "import", str(folder), "--name", "theirs"], capsys)
    assert (code, document["adapter"], document["signed_by"], document["trusted"]) == (0, "theirs@1", None, False)
    code, again = run_cli(["adapters", "import", str(folder), "--name", "theirs"], capsys)
    assert (code, again["adapter"]) == (0, "theirs@1")
    code, sampled = run_cli(["sample", "sort 31524", "--adapter", "theirs", "--max-tokens", "4"], capsys)
    assert code == 0
    assert sampled["adapter"]["digest"] == document["digest"]
    engine = nano_engine()
    checkpoint, entry = Registry().read("theirs")
    assert entry.stage == "import"
    engine.load_state("theirs", checkpoint).result()
    check_engine_agrees(engine, "theirs", folder)


def test_an_adapter_that_names_another_base_is_not_guessed_onto_nano(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Shapes may fit a sibling: whose adapter it is must be said."""
    folder = edit(peft_folder(tmp_path / "foreign"), base_model_name_or_path="Qwen/Qwen3-0.6B")
    code, document = run_cli(["adapters", "import", str(folder), "--name", "theirs"], capsys)
    assert code == 2
    assert "made for base 'Qwen/Qwen3-0.6B'" in document["error"]
    code, document = run_cli(["adapters", "import", str(folder), "--name", "theirs", "--base", "nano"], capsys)
    assert (code, document["adapter"]) == (0, "theirs@1")


def test_an_activated_adapter_keeps_its_invocation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is plain LoRA from some tokens on: they are kept for whoever can switch there, and nothing puts it on a whole context."""
    folder = peft_folder(tmp_path / "foreign", alora_invocation_tokens=[5, 6, 7])
    check, facts = read_peft(folder, "x", "nano", "b" * 64)
    assert facts == {"alora_invocation_tokens": [5, 6, 7]}
    code, document = run_cli(["adapters", "import", str(folder), "--name", "late"], capsys)
    assert (code, document["digest"]) == (0, check.adapter.digest)
    assert read_manifest(Registry().resolve("late").folder)["alora_invocation_tokens"] == [5, 6, 7]
    code, document = run_cli(["sample", "hi", "--adapter", "late", "--max-tokens", "1"], capsys)
    assert code == 2
    assert "acts from its invocation tokens on" in document["error"]
    Registry().export("late", tmp_path / "out")
    assert peft.LoraConfig.from_pretrained(tmp_path / "out").alora_invocation_tokens == [5, 6, 7]
    run_cli(["adapters", "import", str(folder), "--name", "late"], capsys)
    plain = edit(folder, alora_invocation_tokens=None)
    assert run_cli(["adapters", "import", str(plain), "--name", "late"], capsys)[1]["adapter"] == "late@2"


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
    assert same(read(tmp_path / "out").weights, checkpoint.weights)


def test_a_training_checkpoint_is_exported_without_its_moments(tmp_path: Path) -> None:
    """From a run folder."""
    write_adapter(tmp_path / "step", make(kind="training"), {})
    Registry().export(str(tmp_path / "step"), tmp_path / "out")
    again, _ = read_adapter(tmp_path / "out")
    assert (again.kind, dict(again.optimizer)) == ("sampler", {})
    assert not (tmp_path / "out/optimizer.safetensors").exists()


def test_an_export_into_a_file_is_one_line(tmp_path: Path) -> None:
    """Paths of the user's that cannot be."""
    Registry().put("x", make(), {})
    (tmp_path / "file").write_text("")
    with pytest.raises((AdapterError, OSError)) as caught:
        Registry().export("x", tmp_path / "file")
    assert isinstance(caught.value, AdapterError)

"""Shapes from configurations alone: exact counts of known models, of the engine's own adapters, and of what real models hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny_models import CONFIGS, SMALL, random_model
from veneer.assets import known_configs
from veneer.engine import Base, LoraEngine, load_base
from veneer.engine.engine import LocalEngine
from veneer.engine.shapes import count_shape
from veneer.shapes import ModelShape, adapter_parameters, per_rank
from veneer.types import AdapterError, BaseError, LoraConfig

LLAMA = "meta-llama/Llama-3.1-8B"


@pytest.fixture(scope="module")
def nano() -> LocalEngine:
    return LoraEngine(load_base("nano"))


@pytest.fixture(scope="module")
def nano_shape() -> ModelShape:
    return count_shape("nano")


def test_rank_1_of_llama_8b() -> None:
    """The figures behind "LoRA Without Regret": its table's 0.25B for attention at rank 256 and 0.24B for MLP at 128 hold with the
    unembedding, and per unit of rank the MLP has 1,769,472, attention 851,968, the unembedding 132,352."""
    shape = count_shape(LLAMA)
    linear, unembed = LoraConfig(1), LoraConfig(1, train_unembed=True)
    assert adapter_parameters(shape.adapted(linear), 1) == 2_621_440
    assert adapter_parameters(shape.adapted(unembed), 1) == 2_753_792
    attention = shape.adapted(LoraConfig(256, train_mlp=False, train_unembed=True))
    mlp = shape.adapted(LoraConfig(128, train_attn=False, train_unembed=True))
    assert round(adapter_parameters(attention, 256) / 1e9, 3) == 0.252
    assert round(adapter_parameters(mlp, 128) / 1e9, 3) == 0.243
    assert per_rank(shape.adapted(LoraConfig(1, train_attn=False))) == 1_769_472
    assert per_rank(shape.adapted(LoraConfig(1, train_mlp=False))) == 851_968
    assert shape.parameters == 8_030_261_248
    assert not shape.tied


@pytest.mark.parametrize(
    ("name", "billions", "tied"),
    [
        ("meta-llama/Llama-3.2-1B", 1.24, True),
        ("meta-llama/Llama-3.2-3B", 3.21, True),
        ("meta-llama/Llama-3.3-70B-Instruct", 70.55, False),
        ("Qwen/Qwen3-0.6B", 0.60, True),
        ("Qwen/Qwen3-1.7B", 1.72, True),
        ("Qwen/Qwen3-4B-Base", 4.02, True),
        ("Qwen/Qwen3-8B", 8.19, False),
        ("Qwen/Qwen3-14B", 14.77, False),
        ("Qwen/Qwen3-32B", 32.76, False),
        ("Qwen/Qwen3-30B-A3B", 30.53, False),
        ("Qwen/Qwen3-235B-A22B", 235.09, False),
    ],
)
def test_models_have_the_size_in_their_names(name: str, billions: float, tied: bool) -> None:
    """A wrong number in the table of configurations would show here: each decides the size."""
    shape = count_shape(name)
    assert (round(shape.parameters / 1e9, 2), shape.tied) == (billions, tied)
    assert not shape.doubts
    assert all(rest.known for rest in shape.rest)


def test_every_known_configuration_is_counted() -> None:
    for name, config in known_configs().items():
        assert config["model_type"] in hf.CONFIG_MAPPING, name
        assert name.partition("/")[0] in ("meta-llama", "Qwen")


def test_experts_are_counted_one_by_one() -> None:
    """Qwen3-30B-A3B: 48 layers of 128 experts in fused tensors, 8 of which see a token: three billion of thirty are active."""
    shape = count_shape("Qwen/Qwen3-30B-A3B")
    experts = [m for m in shape.maps if m.kind == "expert"]
    assert [(m.name.rsplit(".", 1)[-1], m.d_in, m.d_out) for m in experts[:3]] == [
        ("gate_proj", 2048, 768),
        ("up_proj", 2048, 768),
        ("down_proj", 768, 2048),
    ]
    assert len(experts) == 3 * 48
    assert {(m.copies, m.active) for m in experts} == {(128, 8)}
    assert round(shape.products / 1e9, 1) == 3.0
    routers = [m for m in shape.maps if m.kind == "other"]
    assert {(m.d_in, m.d_out) for m in routers} == {(2048, 128)}
    maps = shape.adapted(LoraConfig(8))
    assert {m.kind for m in maps} == {"attention", "expert"}
    one = sum(m.copies * (m.d_in + m.d_out) for m in experts)
    assert adapter_parameters([m for m in maps if m.kind == "expert"], 8) == one  # rank 8 / 8 active


@pytest.mark.parametrize(
    "config",
    [
        hf.MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2),
        hf.GptOssConfig(**SMALL, head_dim=8, num_local_experts=4, num_experts_per_tok=2, layer_types=["full_attention"] * 2),
        hf.Qwen3MoeConfig(**SMALL, head_dim=8, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2),
    ],
    ids=lambda config: config.model_type,
)
def test_fused_experts_of_either_orientation(config: hf.PreTrainedConfig) -> None:
    """Gate and up read the model's width, down gives it back, however the tensor lies."""
    shape = count_shape(config.to_dict())
    experts = [m for m in shape.maps if m.kind == "expert"]
    inner = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    assert {(m.name.rsplit(".", 1)[-1].removesuffix("_proj"), m.d_in, m.d_out) for m in experts} == {
        ("gate", 32, inner),
        ("up", 32, inner),
        ("down", inner, 32),
    }
    assert {(m.copies, m.active) for m in experts} == {(4, 2)}
    assert sum(m.weights for m in shape.maps) + sum(rest.parameters for rest in shape.rest) <= shape.parameters


@pytest.mark.parametrize("architecture", CONFIGS)
def test_shapes_are_those_of_the_real_model(architecture: str) -> None:
    """Every linear map and every parameter of a model that exists, and the cache that its base says it needs."""
    model, shape = random_model(architecture), count_shape(CONFIGS[architecture]().to_dict())
    linears = {name: (m.in_features, m.out_features) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert {m.name: (m.d_in, m.d_out) for m in shape.maps} == linears
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.cache_numbers == Base(architecture, model, None).cache_numbers


@given(
    st.integers(1, 64),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sets(st.sampled_from(["q_proj", "down_proj", "self_attn.v_proj", "layers.3.mlp.up_proj", "lm_head"])),
)
@settings(max_examples=40, deadline=None)
def test_counts_are_the_engines(
    nano: LocalEngine, nano_shape: ModelShape, rank: int, attn: bool, mlp: bool, unembed: bool, targets: set[str]
) -> None:
    """A planned adapter is as large as the one that is made, whatever it is put on, and what cannot be made cannot be planned."""
    config = LoraConfig(rank, 32.0, attn, mlp, unembed, tuple(sorted(targets)))
    try:
        wanted: object = nano.create_adapter("x", config)
        nano.remove_adapter("x")
    except AdapterError as error:
        wanted = str(error).replace(f"; this base has {_endings(nano)}", "")
    try:
        found: object = adapter_parameters(nano_shape.adapted(config), rank)
    except AdapterError as error:
        found = str(error)
    assert found == wanted


def _endings(engine: LocalEngine) -> str:
    return ", ".join(sorted({m.name.rsplit(".", 1)[-1] for m in count_shape("nano").maps}))


@pytest.mark.parametrize("config", [LoraConfig(65), LoraConfig(0), LoraConfig(1, train_attn=False, train_mlp=False)])
def test_what_the_engine_refuses_is_not_planned(nano: LocalEngine, nano_shape: ModelShape, config: LoraConfig) -> None:
    """In the same words."""
    with pytest.raises(AdapterError) as planned:
        nano_shape.adapted(config)
    with pytest.raises(AdapterError) as made:
        nano.create_adapter("x", config)
    assert str(planned.value) == str(made.value)


def test_layers_may_differ() -> None:
    """Gemma 4's global layers have wider heads than its sliding ones, and only those have a window."""
    config = hf.CONFIG_MAPPING["gemma4_text"](num_hidden_layers=6, vocab_size=97, vocab_size_per_layer_input=97)
    sliding, full = count_shape(config.to_dict()).attention
    assert (sliding.layers, sliding.qk_dim, sliding.window) == (5, 256, 512)
    assert (full.layers, full.qk_dim, full.window) == (1, 512, None)


def test_latent_attention_and_linear_attention() -> None:
    """DeepSeek's queries and keys are wider than its values; of Qwen3-Next's layers one in four attends."""
    latent = hf.DeepseekV3Config(
        **SMALL, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, kv_lora_rank=8, q_lora_rank=8
    )
    (layers,) = count_shape(latent.to_dict()).attention
    assert (layers.kv_heads, layers.qk_dim, layers.v_dim) == (4, 192, 128)
    linear = hf.Qwen3NextConfig(**{**SMALL, "num_hidden_layers": 4}, head_dim=8, num_experts=4, num_experts_per_tok=2)
    shape = count_shape(linear.to_dict())
    assert [layers.layers for layers in shape.attention] == [1]
    assert {rest.module for rest in shape.rest if not rest.known} >= {"Conv1d"}


def test_what_is_no_linear_map_is_named() -> None:
    """State-space layers hold parameters that no adapter reaches."""
    config = hf.MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4).to_dict()
    mamba = count_shape(config)
    assert {rest.module for rest in mamba.rest if not rest.known} == {"MambaMixer", "Conv1d"}
    assert (mamba.attention, mamba.cache_numbers) == ([], 0)
    with pytest.raises(AdapterError, match="train_attn matches no linear map of MambaForCausalLM"):
        mamba.adapted(LoraConfig(1))
    small = {k: v for k, v in SMALL.items() if k not in ("pad_token_id", "bos_token_id", "eos_token_id")}
    hybrid = hf.JambaConfig(
        **small, pad_token_id=0, num_experts=2, num_experts_per_tok=1, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=4
    )
    shape = count_shape(hybrid.to_dict())
    unknown = {rest.module for rest in shape.rest if not rest.known}
    assert "JambaMambaMixer" in unknown
    assert any("conv" in rest.example for rest in shape.rest if not rest.known)


def test_an_unknown_architecture_is_counted_as_what_it_is_like(tmp_path: Path) -> None:
    """With the same numbers as a Llama it has its layers, and the plan says so; with experts nobody can tell."""
    numbers = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 80}
    config = {"model_type": "telepathic", "vocab_size": 50, "max_position_embeddings": 64, **numbers}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found, like = count_shape(str(tmp_path)), count_shape({**config, "model_type": "llama"})
    assert (found.name, found.architecture) == (tmp_path.name, "telepathic as LlamaForCausalLM")
    assert (found.maps, found.parameters, found.attention) == (like.maps, like.parameters, like.attention)
    assert "does not know model_type 'telepathic': its layers are counted as those of a Llama" in found.doubts[0]
    odd = {"layer_types": ["telepathy"] * 3, "kv_lora_rank": 4, "hidden_act": "mind", "num_experts": 0}
    assert count_shape({**config, **odd}).maps == like.maps, "what else it says is not taken for what a Llama would mean by it"
    for key, value in (("num_local_experts", 4), ("is_encoder_decoder", True)):
        with pytest.raises(BaseError, match=f"its configuration has {key}, so its layers cannot be counted"):
            count_shape({**config, key: value})
    with pytest.raises(BaseError, match="its configuration has no model_type, so"):
        count_shape({key: value for key, value in config.items() if key != "model_type"})


def test_unknown_architectures_say_so(tmp_path: Path) -> None:
    """One line: what, and what could be done."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "telepathic", "hidden_size": 8}))
    with pytest.raises(BaseError, match=r"'telepathic', and its configuration has no num_hidden_layers.*give a config\.json"):
        count_shape(str(tmp_path))
    with pytest.raises(BaseError, match=r"no such folder or config\.json.*Llama-3\.1-8B.*give a folder or a config\.json"):
        count_shape("nobody/nothing")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(BaseError, match="cannot be read"):
        count_shape(str(tmp_path / "config.json"))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(BaseError, match="no model's configuration"):
        count_shape(str(tmp_path))
    with pytest.raises(BaseError, match="cannot build a causal language model"):
        count_shape({"model_type": "qwen3", "hidden_size": "wide"})

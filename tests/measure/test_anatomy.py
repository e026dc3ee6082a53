"""What an update did to the weights: against torch, against closed forms, and beside the null model on updates that are and are not one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from veneer.engine import FullEngine, LoraEngine, load_base
from veneer.engine.merge import add_update
from veneer.measure.anatomy import (
    Update,
    anatomy,
    effective_rank,
    in_bfloat16,
    kind_of,
    layer_of,
    overlap_of,
    share_visible,
    stable_rank,
    updates_of,
    visible,
)
from veneer.types import AdamParams, Datum, LoraConfig

RNG = np.random.default_rng(0)


def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
    return (RNG.standard_normal(shape) * scale).astype(np.float32)


def test_rounding_is_torchs() -> None:
    values = np.concatenate([normal(10_000), normal(10_000, scale=1e-30), np.float32([0.0, -0.0, 1.00390625, 1.01171875, 3e38])])
    theirs = torch.from_numpy(values).bfloat16().float().numpy()
    assert np.array_equal(in_bfloat16(values).view(np.uint32), theirs.view(np.uint32))


def test_what_bfloat16_shows() -> None:
    """Of a weight that can be stored: never less than |w| / 512, always more than |w| / 256."""
    weights = in_bfloat16(normal(50_000))
    assert not visible(weights, np.abs(weights) / np.float32(513), "bfloat16").any()
    assert visible(weights, np.abs(weights) / np.float32(255), "bfloat16").all()
    assert visible(weights, np.abs(weights) * np.float32(1e-6)).all()
    assert not visible(weights, np.full_like(weights, 1e-6), tolerance=1e-5).any()
    with pytest.raises(ValueError, match="int8"):
        visible(weights, weights, "int8")


def test_the_null_model_explains_what_looks_at_no_weight() -> None:
    """Steps of one size on weights of all sizes: only small weights show them, and that is no circuit."""
    weights = {"a": normal(300, 300, scale=0.02), "b": normal(300, 200, scale=0.02)}
    blind = {name: Update(np.sign(normal(*w.shape)) * np.float32(2e-5)) for name, w in weights.items()}
    share = share_visible(weights, blind, "bfloat16")
    assert 0.05 < share.measured < 0.95
    assert share.null == pytest.approx(share.measured, abs=0.01)
    assert share_visible(weights, blind).measured > 0.99  # and in float32 nearly all of them moved
    picked = {name: np.abs(w) < np.quantile(np.abs(w), 0.3) for name, w in weights.items()}  # a rule of its own: small weights alone
    chosen = {name: Update(np.where(picked[name], np.float32(3e-5), np.float32(0))) for name in weights}
    share = share_visible(weights, chosen, "bfloat16")
    assert share.measured > 0.28
    assert share.null < share.measured - 0.1


def test_large_matrices_are_sampled_by_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {"a": normal(1000, 50, scale=0.02), "b": normal(10, 50, scale=0.02)}
    updates = {name: Update(np.sign(normal(*w.shape)) * np.float32(2e-5)) for name, w in weights.items()}
    whole = share_visible(weights, updates, "bfloat16").measured
    monkeypatch.setattr("veneer.measure.anatomy.SAMPLED", 10_000)
    assert share_visible(weights, updates, "bfloat16").measured == pytest.approx(whole, abs=0.02)
    b, a = normal(30, 2), normal(2, 7)
    assert np.array_equal(Update(b, a).rows(4), (b @ a)[::4])


def test_overlap_beside_its_two_nulls() -> None:
    weights = [normal(400, 200), normal(100, 100)]
    small = [np.abs(w) < 0.3 for w in weights]
    some = [[mask & (RNG.random(mask.shape) < 0.8) for mask in small] for _ in range(2)]
    found = overlap_of(weights, *some)
    assert found.measured == pytest.approx(0.8, abs=0.01)  # four fifths of the small ones each
    assert found.by_magnitude == pytest.approx(found.measured, abs=0.03)
    assert found.chance == pytest.approx(0.8 * np.mean(np.concatenate([m.ravel() for m in small])), abs=0.01)
    anywhere = [[RNG.random(w.shape) < 0.1 for w in weights] for _ in range(2)]
    found = overlap_of(weights, *anywhere)
    assert (found.measured, found.chance, found.by_magnitude) == pytest.approx((0.1, 0.1, 0.1), abs=0.015)
    same = overlap_of(weights, anywhere[0], anywhere[0])
    assert same.measured == pytest.approx(1.0)
    assert same.by_magnitude < 0.15
    with pytest.raises(ValueError, match="changed nothing"):
        overlap_of(weights, anywhere[0], [np.zeros_like(m) for m in anywhere[0]])


def test_what_a_first_step_shows_is_a_matter_of_magnitude_alone() -> None:
    """All weights move by one rate, either way: those become visible that are small enough, few as they are, and the same in every seed."""
    weights = [in_bfloat16(normal(64, 128, scale=0.1)), in_bfloat16(normal(128, 512, scale=0.05))]
    signs = [[RNG.choice(np.float32([-1, 1]), w.shape) for w in weights] for _ in range(2)]
    masks = [[visible(w, 1e-6 * sign, "bfloat16") for w, sign in zip(weights, some, strict=True)] for some in signs]
    found = overlap_of(weights, *masks)
    assert found.chance < 0.02
    assert found.measured > 0.95
    assert found.by_magnitude == pytest.approx(found.measured, abs=0.05)


def test_ranks() -> None:
    assert effective_rank(np.ones(7)) == pytest.approx(7.0)
    assert effective_rank(np.array([2.0, 0.0, 0.0])) == pytest.approx(1.0)
    assert stable_rank(np.array([1.0, 0.5, 0.5])) == pytest.approx(1.5)
    assert (effective_rank(np.zeros(3)), stable_rank(np.zeros(3))) == (0.0, 0.0)
    for rank in (1, 3, 8):
        b, a = normal(40, rank), normal(rank, 60)
        thin, thick = Update(b, a).singular_values(), Update(b @ a).singular_values()
        assert thin == pytest.approx(thick[:rank], rel=1e-4)
        assert effective_rank(thin) <= rank + 1e-9


def test_places() -> None:
    names = ["model.layers.3.self_attn.q_proj.weight", "model.layers.12.mlp.up_proj.weight", "model.embed_tokens.weight", "lm_head.weight"]
    names += ["model.layers.0.self_attn.q_norm.weight", "model.norm.weight", "transformer.h.2.mlp.c_fc.weight", "x.weight"]
    assert [layer_of(name) for name in names] == ["3", "12", "-", "-", "0", "-", "2", "-"]
    assert [kind_of(name) for name in names] == ["attention", "MLP", "embedding", "unembedding", "norm", "norm", "MLP", "other"]


@pytest.fixture(scope="module")
def base() -> dict[str, np.ndarray]:
    return {name: p.detach().float().numpy() for name, p in load_base("nano", "cpu").model.named_parameters()}


def test_an_adapters_update_is_what_merging_adds() -> None:
    engine, config = LoraEngine(load_base("nano", "cpu")), LoraConfig(rank=3, train_unembed=True)
    engine.create_adapter("a", config)
    tokens = np.arange(20, dtype=np.int64)
    zeros = np.zeros(19, np.float32)
    for _ in range(3):
        engine.forward_backward("a", [Datum(tokens[:-1], tokens[1:], zeros, zeros, zeros + 1)], "cross_entropy").result()
        engine.optim_step("a", AdamParams(1e-3)).result()
    saved = engine.save_state("a", "sampler").result()
    base = engine.base.weights()
    found = updates_of(base, saved.weights, saved.config)
    merged = load_base("nano", "cpu").model
    add_update(merged, saved)
    for name, update in found.items():
        assert np.abs(merged.get_parameter(name).detach().numpy() - base[name] - update.rows()).max() < 1e-6
        assert np.linalg.norm(update.rows()) == pytest.approx(np.linalg.norm(update.singular_values()), rel=1e-5)
    told = anatomy(base, found, saved.config)
    assert told is not None
    assert set(told.by_layer) == {"0", "1", "2", "3", "-"}
    assert set(told.by_kind) == {"attention", "MLP", "unembedding"}  # which is tied, and has a name of its own
    assert sum(told.by_layer.values()) == pytest.approx(1.0)
    assert sum(told.by_kind.values()) == pytest.approx(1.0)
    assert all(1 <= m.effective_rank <= 3 + 1e-6 and m.rank == 3 for m in told.matrices)
    engine.create_adapter("fresh", config)
    nothing = updates_of(base, engine.save_state("fresh", "sampler").result().weights, config)
    assert anatomy(base, nothing, config) is None
    assert told.in_short()["effective_rank"] == pytest.approx(np.mean([m.effective_rank for m in told.matrices]))


def test_a_full_update_is_a_difference(base: dict[str, np.ndarray]) -> None:
    engine = FullEngine(load_base("nano", "cpu"))
    engine.create_adapter("full", None)
    weights = engine.save_state("full", "sampler").result().weights
    assert all(not update.rows().any() for update in updates_of(base, weights, None).values())
    with pytest.raises(ValueError, match="the base has no x"):
        updates_of(base, {"x": np.zeros(3, np.float32)}, None)

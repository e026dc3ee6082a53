"""Which directions two updates share: by closed forms, by simulation, and on adapters that are and are not the same."""

from __future__ import annotations

import numpy as np
import pytest

from veneer.engine import LoraEngine, load_base
from veneer.measure.anatomy import Update, thin_updates
from veneer.measure.subspaces import LARGEST, WHOLE, compare_directions, directions_of, in_short, random_overlap, subspace_overlap
from veneer.types import AdamParams, Checkpoint, Datum, LoraConfig

RNG = np.random.default_rng(0)
SHAPES = {"layers.0.self_attn.q_proj.weight": (40, 60), "layers.0.mlp.up_proj.weight": (90, 60), "layers.1.mlp.up_proj.weight": (90, 60)}


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def thin(rank: int) -> dict[str, Update]:
    return {name: Update(normal(out, rank), normal(rank, into)) for name, (out, into) in SHAPES.items()}


def turned(update: Update) -> Update:
    """The same product from other factors: B R and R^-1 A."""
    assert update.right is not None
    rank = len(update.right)
    turn = np.linalg.qr(RNG.standard_normal((rank, rank)))[0] * np.geomspace(0.5, 20, rank)
    return Update((update.left @ turn).astype(np.float32), (np.linalg.inv(turn) @ update.right).astype(np.float32))


@pytest.mark.parametrize("rank", [1, 4, 32])
def test_the_same_update_shares_everything_whatever_its_factors(rank: int) -> None:
    one = thin(rank)
    for other in (one, {name: turned(update) for name, update in one.items()}):
        found = compare_directions(directions_of(one), directions_of(other))
        assert list(found) == [WHOLE, "attention", "MLP"]
        assert [common.matrices for common in found.values()] == [3, 1, 2]
        for common in found.values():
            assert common.directions == rank
            assert (common.written.measured, common.read.measured) == (pytest.approx(1.0), pytest.approx(1.0))


@pytest.mark.parametrize(("width", "one", "other"), [(60, 1, 1), (40, 4, 4), (90, 8, 2), (12, 7, 9)])
def test_random_subspaces_are_what_the_null_says(width: int, one: int, other: int) -> None:
    """Its mean within three standard errors, its deviation within 10%: of 4,000 pairs it has an error of 1 to 3%."""
    rng = np.random.default_rng(1)
    pairs = [[np.linalg.qr(rng.standard_normal((width, rank)))[0] for rank in (one, other)] for _ in range(4000)]
    found = np.array([subspace_overlap(*pair) for pair in pairs])
    mean, variance = random_overlap(width, one, other)
    assert found.mean() == pytest.approx(mean, abs=3 * np.sqrt(variance / len(found)))
    assert found.std() == pytest.approx(np.sqrt(variance), rel=0.1)


def test_random_updates_share_what_chance_has_them_share() -> None:
    """Of means over three matrices, 300 times: 95 in 100 lie within two standard deviations of the null."""
    within = []
    for _ in range(300):
        common = compare_directions(directions_of(thin(4)), directions_of(thin(4)))[WHOLE]
        within += [abs(share.measured - share.null) <= 2 * share.null_sd for share in (common.written, common.read)]
    assert common.written.null == pytest.approx(np.mean([4 / out for out, _ in SHAPES.values()]))
    assert common.read.null == pytest.approx(4 / 60)
    assert np.mean(within) == pytest.approx(0.95, abs=0.03)


def test_a_thin_update_within_a_wide_one() -> None:
    wide = thin(8)
    part = {name: Update(update.left[:, :3], update.right[:3]) for name, update in wide.items() if update.right is not None}
    common = compare_directions(directions_of(part), directions_of(wide))[WHOLE]
    assert (common.directions, common.written.measured, common.read.measured) == (3, pytest.approx(1.0), pytest.approx(1.0))


def test_sides_are_told_apart() -> None:
    """The same columns of B, other rows of A: what seeds do whose A begins elsewhere."""
    one = thin(4)
    other = {name: Update(update.left, normal(4, update.shape[1])) for name, update in one.items()}
    common = compare_directions(directions_of(one), directions_of(other))[WHOLE]
    assert common.written.measured == pytest.approx(1.0)
    assert common.read.measured == pytest.approx(common.read.null, abs=4 * common.read.null_sd)


def test_directions_are_those_that_are_there() -> None:
    """None of rounding, none of a matrix that was left alone, and of many the strongest; a thick update has those of its product."""
    b, a = normal(50, 3), normal(3, 30)
    folded = Update(np.concatenate([b, b], axis=1), np.concatenate([a, a]))  # rank 3 in factors of six
    updates = {"a.weight": folded, "b.weight": Update(np.zeros_like(b), a), "norm.weight": Update(normal(5))}
    found = directions_of(updates)
    assert list(found) == ["a.weight"]
    assert found["a.weight"].written.shape == (50, 3)
    thick = directions_of({"a.weight": Update(b @ a)})["a.weight"]
    assert subspace_overlap(thick.written, found["a.weight"].written) == pytest.approx(1.0)
    assert subspace_overlap(thick.read[:, :1], found["a.weight"].read[:, :1]) == pytest.approx(1.0)
    big = directions_of({"a.weight": Update(normal(200, 100), normal(100, 300))})["a.weight"]
    assert (big.written.shape, big.read.shape) == ((200, LARGEST), (300, LARGEST))


def test_what_cannot_be_compared_is_named() -> None:
    with pytest.raises(ValueError, match="no matrix in common"):
        compare_directions(directions_of(thin(2)), {})
    wrong = directions_of({"layers.0.mlp.up_proj.weight": Update(normal(91, 2), normal(2, 60))})
    with pytest.raises(ValueError, match=r"layers.0.mlp.up_proj.weight is \(90, 60\) in one and \(91, 60\)"):
        compare_directions(directions_of(thin(2)), wrong)


def adapter(seed: int, steps: int) -> Checkpoint:
    """Of nano, trained to count on."""
    engine = LoraEngine(load_base("nano", "cpu"))
    engine.create_adapter("a", LoraConfig(rank=3, seed=seed))
    tokens, nothing = np.arange(20, dtype=np.int64), np.zeros(19, np.float32)
    for _ in range(steps):
        engine.forward_backward("a", [Datum(tokens[:-1], tokens[1:], nothing, nothing, nothing + 1)], "cross_entropy").result()
        engine.optim_step("a", AdamParams(1e-3)).result()
    return engine.save_state("a", "sampler").result()


def test_adapters_of_two_seeds_that_learned_the_same() -> None:
    """They write to much the same places, and read from where their A began."""
    found = []
    for seed in (0, 1):
        saved = adapter(seed, 5)
        assert saved.config is not None
        found.append(directions_of(thin_updates(saved.weights, saved.config)))
    assert compare_directions(found[0], found[0])[WHOLE].written.measured == pytest.approx(1.0)
    common = compare_directions(*found)[WHOLE]
    assert common.written.measured > common.written.null + 10 * common.written.null_sd
    assert common.read.measured == pytest.approx(common.read.null, abs=10 * common.read.null_sd)
    assert in_short({WHOLE: common})[WHOLE]["written"]["null"] == common.written.null

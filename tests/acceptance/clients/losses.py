"""SDK: every loss beside its formula, values and gradients; custom losses; wrong ones."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import tinker
import torch
from checks import close, datum, logprobs_of, new_model, policy_rows, refused, rows, run_checks, train
from reference import base_model, export, gradients_of, loss_of, open_peft, trained_parameters, weights_of
from tinker import types

session = tinker.ServiceClient()

PLAIN_DESCENT = {"eps": 1e6, "beta1": 0.0, "beta2": 0.0}
"""With an eps far above every gradient, a step of Adam is lr / eps times the gradient: what moves is the gradient itself."""
STEP = 0.05
LOSSES: dict[str, dict[str, float]] = {
    "cross_entropy": {},
    "importance_sampling": {},
    "ppo": {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2},
    "cispo": {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0},
    "dro": {"beta": 0.05},
    "gspo": {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2},
}
TIGHT = {"clip_low_threshold": 0.97, "clip_high_threshold": 1.02}


def near(model: tinker.TrainingClient, data: Sequence[types.Datum], seed: int, spread: float = 0.2) -> list[types.Datum]:
    """The data with log-probabilities of a sampler that is a little off, so that every branch of a clip is taken."""
    rng = np.random.default_rng(seed)
    moved = []
    plain = [types.Datum(d.model_input, {"target_tokens": d.loss_fn_inputs["target_tokens"]}) for d in data]
    for d, lp in zip(data, logprobs_of(model, plain), strict=True):
        inputs = {**d.loss_fn_inputs, "logprobs": (lp + rng.normal(0, spread, lp.shape)).astype(np.float32)}
        moved.append(types.Datum(model_input=d.model_input, loss_fn_inputs=inputs))
    return moved


def compare(
    loss_fn: str, data: Sequence[types.Datum], config: dict[str, float], sent: dict[str, float] | None = None, seed: int = 20
) -> float:
    """Value and gradient of a loss beside PEFT with autograd, on an adapter whose B is not zero; the largest relative error."""
    model = new_model(session, rank=4, seed=seed)
    train(model, rows(2, seed=seed), 3, 1e-2)
    data = near(model, data, seed) if loss_fn != "cross_entropy" else list(data)
    reference = open_peft(export(model))
    before = {name: p.detach().clone() for name, p in trained_parameters(reference).items()}
    wanted = gradients_of(reference, data, loss_fn, config)
    value = loss_of(reference, data, loss_fn, config).item()
    passed = model.forward_backward(data, loss_fn, config if sent is None else sent).result()
    close(passed.metrics["loss:sum"], value, 2e-3 * max(1.0, abs(value)), f"{loss_fn}: loss:sum")
    scale = STEP / max(float(np.abs(g).max()) for g in wanted.values())
    model.optim_step(types.AdamParams(learning_rate=scale * PLAIN_DESCENT["eps"], **PLAIN_DESCENT)).result()
    worst = 0.0
    for name, tensor in weights_of(model).items():
        moved = (before[name] - tensor) / scale
        worst = max(worst, close(moved * scale / STEP, wanted[name] * scale / STEP, 1e-3, f"{loss_fn}: gradient of {name}"))
    return worst


def every_loss_and_its_gradient():
    """With the defaults of the documentation, sent and not sent."""
    worst = 0.0
    for loss_fn, config in LOSSES.items():
        data = rows(3, seed=21) if loss_fn == "cross_entropy" else policy_rows(3, seed=21)
        worst = max(worst, compare(loss_fn, data, config), 0.0 if loss_fn == "dro" else compare(loss_fn, data, config, sent={}))
    return {"losses": len(LOSSES), "worst_gradient_error": worst}


def settings_are_honoured():
    data = policy_rows(3, seed=22)
    for loss_fn in ("ppo", "cispo", "gspo"):
        compare(loss_fn, data, TIGHT, seed=22)
    compare("dro", data, {"beta": 1.5}, seed=22)


def thresholds_may_differ_from_token_to_token():
    rng = np.random.default_rng(23)
    data = []
    for d in policy_rows(3, seed=23):
        n = d.model_input.length
        inputs = {"clip_low_threshold": rng.uniform(0.7, 0.95, n), "clip_high_threshold": rng.uniform(1.05, 1.4, n)}
        arrays = {name: array.astype(np.float32) for name, array in inputs.items()}
        data.append(types.Datum(model_input=d.model_input, loss_fn_inputs={**d.loss_fn_inputs, **arrays}))
    for loss_fn in ("ppo", "cispo"):
        compare(loss_fn, data, {}, sent={}, seed=23)


def a_mask_says_what_a_sequence_ratio_is_a_mean_of():
    data = []
    for d in policy_rows(3, seed=24):
        mask = np.zeros(d.model_input.length, np.float32)
        mask[5:] = 1
        data.append(types.Datum(model_input=d.model_input, loss_fn_inputs={**d.loss_fn_inputs, "sequence_ratio_mask": mask}))
    compare("gspo", data, TIGHT, seed=24)


def weights_count_in_reinforcement_learning_too():
    data = []
    for i, d in enumerate(policy_rows(3, seed=25)):
        weights = (np.random.default_rng(i).random(d.model_input.length) > 0.4).astype(np.float32)
        data.append(types.Datum(model_input=d.model_input, loss_fn_inputs={**d.loss_fn_inputs, "weights": weights}))
    for loss_fn in ("importance_sampling", "ppo"):
        compare(loss_fn, data, LOSSES[loss_fn], seed=25)


def advantages_of_zero_are_no_error():
    """All zero: no gradient, and nothing moves."""
    model = new_model(session, seed=26)
    data = [
        types.Datum(d.model_input, {**d.loss_fn_inputs, "advantages": np.zeros(d.model_input.length, np.float32)})
        for d in policy_rows(2, seed=26)
    ]
    before = logprobs_of(model, data)
    passed = model.forward_backward(data, "importance_sampling").result()
    close(passed.metrics["loss:sum"], 0.0, 1e-6, "loss of zero advantages")
    model.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    for a, b in zip(before, logprobs_of(model, data), strict=True):
        close(a, b, 0.0, "after a step without a gradient")


def wrong_losses_are_refused():
    model, data = new_model(session), policy_rows(2)
    refused(lambda: model.forward_backward(data, "importance_samplin").result(), "importance_sampling")  # type: ignore[arg-type]
    refused(lambda: model.forward_backward(data, "stable_reinforce").result(), "stable_reinforce")
    refused(lambda: model.forward_backward(data, "ppo", {"clip_lo_threshold": 0.8}).result(), "clip_lo_threshold")
    refused(lambda: model.forward_backward(data, "ppo", {"clip_low_threshold": "low"}).result())
    refused(lambda: model.forward_backward(data, "cross_entropy", {"beta": 1.0}).result(), "beta")
    refused(lambda: model.forward_backward(rows(2), "ppo").result(), "logprobs")
    for name in ("advantages", "logprobs"):
        for value in (np.nan, np.inf):
            spoilt = policy_rows(1)[0]
            array = spoilt.loss_fn_inputs[name].to_numpy().copy()
            array[3] = value
            bad = types.Datum(spoilt.model_input, {**spoilt.loss_fn_inputs, name: array})
            refused(lambda bad=bad: model.forward_backward([*data, bad], "importance_sampling").result(), name)
    train(model, rows(2), 1)


# ---------------------------------------------------------------- custom losses


def custom_loss_of_cross_entropy_is_cross_entropy():
    """forward_backward_custom works through the server's log-probabilities; the step must be the built-in loss's."""
    data = rows(3, seed=27)

    def minus_weighted(data: list[types.Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        terms = [-(d.loss_fn_inputs["weights"].to_torch() * lp).sum() for d, lp in zip(data, logprobs, strict=True)]
        return torch.stack(terms).sum(), {"mine": 4.0}

    custom, builtin = new_model(session, seed=27), new_model(session, seed=27)
    for _ in range(3):
        passed = custom.forward_backward_custom(data, minus_weighted)
        custom.optim_step(types.AdamParams(learning_rate=1e-2))
        metrics = passed.result().metrics
        loss = train(builtin, data, 1, 1e-2)[0]
        close(metrics["loss:sum"], loss, 1e-3 * abs(loss), "custom loss")
        assert metrics["mine"] == 4.0
        assert "surrogate_loss:sum" in metrics
    apart = [close(a, b, 1e-3, "custom and built-in") for a, b in zip(logprobs_of(custom, data), logprobs_of(builtin, data), strict=True)]
    return {"custom_vs_builtin": max(apart)}


def custom_losses_of_pairs_and_of_distributions():
    """DPO couples two rows; a target distribution uses [N, K]."""
    model, data = new_model(session, seed=28), rows(2, seed=28)

    def prefer_first(data: list[types.Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        chosen, rejected = (lp.sum() for lp in logprobs)
        return -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)), {}

    falls(model, data, prefer_first)
    rng = np.random.default_rng(28)
    soft = datum(rng.integers(0, 256, 6), rng.integers(1, 256, (6, 3)), target_distribution=np.full((6, 3), 1 / 3, np.float32))

    def towards(data: list[types.Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        return -(data[0].loss_fn_inputs["target_distribution"].to_torch() * logprobs[0]).sum(), {}

    falls(new_model(session, seed=28), [soft], towards)


def falls(model: tinker.TrainingClient, data: list[types.Datum], loss: Any) -> None:
    """From step to step."""
    losses = []
    for _ in range(6):
        losses.append(model.forward_backward_custom(data, loss).result().metrics["loss:sum"])
        model.optim_step(types.AdamParams(learning_rate=2e-4)).result()
    assert all(later < earlier for earlier, later in pairwise(losses)), losses


def a_traced_loss_runs():
    """create_custom_loss, on the server or in the client as the server's configuration says."""

    def neg_ll(logprobs: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss = -(logprobs * weights).sum()
        return loss, {"custom/neg_ll:sum": loss}

    model, data = new_model(session, seed=29), rows(2, seed=29)
    handle = session.create_custom_loss(neg_ll, input_ranks={"logprobs": 1, "weights": 1}).result()
    metrics = model.forward_backward_custom(data, handle).result().metrics
    wanted = loss_of(base_model(), data, "cross_entropy", {}).item()
    close(metrics["loss:sum"], wanted, 1e-3 * abs(wanted), "traced loss")


if __name__ == "__main__":
    checks = [
        *(every_loss_and_its_gradient, settings_are_honoured, thresholds_may_differ_from_token_to_token),
        *(a_mask_says_what_a_sequence_ratio_is_a_mean_of, weights_count_in_reinforcement_learning_too, advantages_of_zero_are_no_error),
        *(
            wrong_losses_are_refused,
            custom_loss_of_cross_entropy_is_cross_entropy,
            custom_losses_of_pairs_and_of_distributions,
            a_traced_loss_runs,
        ),
    ]
    run_checks(checks, __doc__)

"""SDK: the six fields of Adam beside torch.optim.AdamW, on gradients by PEFT and autograd."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import tinker
import torch
from checks import close, logprobs_of, new_model, refused, rows, run_checks, train
from reference import export, loss_of, open_peft, trained_parameters, weights_of
from tinker import types

session = tinker.ServiceClient()


@dataclass(frozen=True)
class Step:
    params: types.AdamParams
    with_gradient: bool = True


def follow(steps: list[Step], seed: int) -> float:
    """The same steps on the server and in torch; the largest difference of a weight at the end, beside how far weights moved."""
    model, data = new_model(session, rank=4, seed=seed), rows(3, seed=seed)
    train(model, data, 2, 1e-2)  # B leaves zero, so that every tensor has a gradient
    checkpoint = model.save_state(f"before-{seed}").result().path
    model = session.create_training_client_from_state(checkpoint).result()  # fresh moments
    reference = open_peft(export(model))
    parameters = trained_parameters(reference)
    start = {name: p.detach().clone() for name, p in parameters.items()}
    adam = torch.optim.AdamW(parameters.values(), foreach=False)
    for step in steps:
        p = step.params
        adam.zero_grad(set_to_none=False)
        for parameter in parameters.values():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if step.with_gradient:
            loss_of(reference, data, "cross_entropy", {}).backward()
            model.forward_backward(data, "cross_entropy")
        if p.grad_clip_norm:
            torch.nn.utils.clip_grad_norm_(parameters.values(), p.grad_clip_norm)
        for group in adam.param_groups:
            group.update(lr=p.learning_rate, betas=(p.beta1, p.beta2), eps=p.eps, weight_decay=p.weight_decay)
        adam.step()
        model.optim_step(p).result()
    ours, moved = weights_of(model), 0.0
    for name, parameter in parameters.items():
        moved = max(moved, float((parameter - start[name]).abs().max()))
    worst = max(close(ours[name], parameters[name].detach(), 0.02 * moved, name) for name in ours)
    return worst / moved


def each_field_against_torch():
    defaults = types.AdamParams()
    fields = {
        "defaults": {"learning_rate": 1e-3, "eps": 1e-8},
        "beta1": {"learning_rate": 1e-3, "eps": 1e-8, "beta1": 0.5},
        "beta2": {"learning_rate": 1e-3, "eps": 1e-8, "beta2": 0.7},
        "eps": {"learning_rate": 1e-2, "eps": 1e-2},
        "weight_decay": {"learning_rate": 1e-2, "eps": 1e-4, "weight_decay": 0.3},
        "grad_clip_norm": {"learning_rate": 1e-3, "eps": 1e-4, "grad_clip_norm": 0.01},
    }
    assert (defaults.beta1, defaults.beta2, defaults.eps, defaults.weight_decay, defaults.grad_clip_norm) == (0.9, 0.95, 1e-12, 0.0, 0.0)
    worst = {name: follow([Step(types.AdamParams(**values))] * 3, 30) for name, values in fields.items()}
    return {"worst_of_a_move": max(worst.values())}


def fields_may_change_from_step_to_step():
    steps = [
        Step(types.AdamParams(learning_rate=1e-3, eps=1e-6)),
        Step(types.AdamParams(learning_rate=3e-3, eps=1e-6, weight_decay=0.1)),
        Step(types.AdamParams(learning_rate=5e-4, eps=1e-6, beta1=0.8, beta2=0.99)),
        Step(types.AdamParams(learning_rate=2e-3, eps=1e-5, grad_clip_norm=0.1)),
    ]
    return {"worst_of_changing_fields": follow(steps, 31)}


def a_step_without_a_gradient_is_momentum():
    """AdamW on a gradient of zero: the moments alone move the weights."""
    params = types.AdamParams(learning_rate=1e-3, eps=1e-6)
    return {"worst_without_gradient": follow([Step(params), Step(params, with_gradient=False), Step(params)], 32)}


def numbers_that_are_none_are_refused():
    """The SDK writes NaN and infinity as null; they must not become defaults. A refused step leaves no trace."""
    model, twin, data = new_model(session, seed=33), new_model(session, seed=33), rows(2, seed=33)
    bad = [{"learning_rate": value} for value in (float("nan"), float("inf"), -1.0)]
    bad += [{"beta1": 1.0}, {"beta2": -0.1}, {"eps": -1.0}, {"weight_decay": float("nan")}, {"grad_clip_norm": -1.0}]
    for fields in bad:
        refused(lambda fields=fields: model.optim_step(types.AdamParams(**fields)).result())
    assert train(model, data, 2) == train(twin, data, 2)


def a_step_that_would_blow_up_changes_nothing():
    model, data = new_model(session, seed=34), rows(2, seed=34)
    train(model, data, 2)
    before = logprobs_of(model, data)
    model.forward_backward(data, "cross_entropy").result()
    refused(lambda: model.optim_step(types.AdamParams(learning_rate=1e30)).result())
    for a, b in zip(before, logprobs_of(model, data), strict=True):
        close(a, b, 0.0, "after a refused step")
    losses = train(model, data, 4)
    assert np.isfinite(losses).all(), losses
    assert losses[-1] < losses[0], losses


def metrics_are_numbers():
    model = new_model(session)
    model.forward_backward(rows(2), "cross_entropy").result()
    metrics = model.optim_step(types.AdamParams()).result().metrics or {}
    assert all(np.isfinite(value) for value in metrics.values()), metrics


if __name__ == "__main__":
    checks = [
        *(each_field_against_torch, fields_may_change_from_step_to_step, a_step_without_a_gradient_is_momentum),
        *(numbers_that_are_none_are_refused, a_step_that_would_blow_up_changes_nothing, metrics_are_numbers),
    ]
    run_checks(checks, __doc__)

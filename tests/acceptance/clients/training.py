"""SDK: what a training client sends and gets back."""

from __future__ import annotations

import time

import numpy as np
import tinker
import torch
from checks import BASE, CONTEXT, END, VOCABULARY, close, datum, logprobs_of, new_model, refused, row, rows, run_checks, tokens_of, train
from reference import base_model, export, loss_of, open_peft, target_logprobs, weights_of
from tinker import types

session = tinker.ServiceClient(user_metadata={"purpose": "acceptance"})


def fresh_model_is_the_base():
    """B starts at zero: log-probabilities of training, of the base's sampler and of transformers are one."""
    model, base = new_model(session), base_model()
    sampler = session.create_sampling_client(base_model=BASE).result()
    tokens = [*tokens_of("27+94+38=?"), 159, END]
    ours = logprobs_of(model, [datum(tokens[:-1], tokens[1:])])[0]
    sampled = np.array(sampler.compute_logprobs(types.ModelInput.from_ints(tokens)).result()[1:])
    apart = close(ours, sampled, 1e-3, "training and compute_logprobs")
    close(ours, target_logprobs(base, datum(tokens[:-1], tokens[1:])).detach(), 1e-3, "training and transformers")
    for d, lp in zip(data := rows(4), logprobs_of(model, data), strict=True):
        close(lp, target_logprobs(base, d).detach(), 1e-3, "log-probabilities, those of weight 0 among them")
    return {"training_vs_compute_logprobs": apart}


def loss_falls():
    data = rows(2)
    losses = train(new_model(session), data, 12, 1e-2)
    assert losses[-1] < 0.7 * losses[0], losses
    return {"loss_first": losses[0], "loss_last": losses[-1]}


def loss_is_a_plain_sum():
    """-sum w lp, with negative and fractional weights; without weights every token counts once."""
    rng, model, base = np.random.default_rng(3), new_model(session), base_model()
    plain = [datum(rng.integers(0, 256, 9), rng.integers(0, 256, 9)) for _ in range(2)]
    odd = [datum(rng.integers(0, 256, 9), rng.integers(0, 256, 9), weights=rng.normal(0, 2, 9).astype(np.float32)) for _ in range(2)]
    for data in (plain, odd, plain + odd):
        ours = model.forward(data, "cross_entropy").result().metrics["loss:sum"]
        theirs = loss_of(base, data, "cross_entropy", {}).item()
        close(ours, theirs, 1e-3 * max(1.0, abs(theirs)), "loss:sum")


def targets_need_not_be_the_next_tokens():
    """Inputs and targets are unrelated here, and an input may come in several chunks."""
    rng, model = np.random.default_rng(4), new_model(session)
    tokens, targets = rng.integers(0, 256, 12).tolist(), rng.integers(0, VOCABULARY, 12)
    whole = datum(tokens, targets)
    pieces = types.Datum(
        model_input=types.ModelInput(chunks=[types.EncodedTextChunk(tokens=part) for part in (tokens[:1], tokens[1:7], tokens[7:])]),
        loss_fn_inputs={"target_tokens": targets},
    )
    first, second = logprobs_of(model, [whole, pieces])
    close(first, second, 0.0, "one chunk and three")
    close(first, target_logprobs(base_model(), whole).detach(), 1e-3, "arbitrary targets")


def more_datums_than_a_chunk():
    """1,100 datums: the SDK sends the second chunk before the first. Order, sums and the gradient are those of one request."""
    rng = np.random.default_rng(5)
    data = [row(rng, 4) for _ in range(1100)]
    model, twin = new_model(session, seed=5), new_model(session, seed=5)
    before = logprobs_of(model, data)
    some = [0, 1, 511, 1022, 1023, 1024, 1025, 1099]
    alone = logprobs_of(twin, [data[i] for i in some])
    for i, lp in zip(some, alone, strict=True):
        close(before[i], lp, 1e-4, f"datum {i}")
    passed = model.forward_backward(data, "cross_entropy").result()
    total = sum(float(-(d.loss_fn_inputs["weights"].to_numpy() * lp).sum()) for d, lp in zip(data, before, strict=True))
    close(passed.metrics["loss:sum"] / total, 1.0, 1e-3, "loss:sum over chunks")
    halves = [twin.forward_backward(part, "cross_entropy") for part in (data[:600], data[600:])]
    for half in halves:
        half.result()
    for client in (model, twin):
        client.optim_step(types.AdamParams(learning_rate=1e-3)).result()
    for one, other in zip(logprobs_of(model, data[:64]), logprobs_of(twin, data[:64]), strict=True):
        close(one, other, 1e-3, "after a step, chunks and halves")
    return {"datums": len(data)}


def soft_targets():
    """[N, K] targets, dense and as CSR, and beside [N] ones: the same numbers, in the targets' shape."""
    rng, k = np.random.default_rng(6), 8
    tokens = rng.integers(0, 256, 10)
    targets, weights = torch.zeros(10, k, dtype=torch.long), torch.zeros(10, k)
    targets[7:, :3], weights[7:, :3] = torch.tensor(rng.integers(1, 256, (3, 3))), torch.tensor(rng.random((3, 3)), dtype=torch.float32)
    chunks = types.ModelInput.from_ints(tokens.tolist())
    sparse = types.Datum(model_input=chunks, loss_fn_inputs={"target_tokens": targets, "weights": weights})
    dense = types.Datum(model_input=chunks, loss_fn_inputs={"target_tokens": targets.numpy(), "weights": weights.numpy()})
    assert sparse.loss_fn_inputs["target_tokens"].sparse_crow_indices is not None, "the SDK sent it dense"
    assert dense.loss_fn_inputs["target_tokens"].sparse_crow_indices is None
    mixed = types.Datum(model_input=chunks, loss_fn_inputs={"target_tokens": targets.numpy(), "weights": weights})
    model, twin, base = new_model(session, seed=6), new_model(session, seed=6), base_model()
    wanted = target_logprobs(base, dense).detach()
    plain = row(rng, 7)
    for lp in logprobs_of(model, [sparse, dense, mixed]):
        close(lp, wanted, 1e-3, "log-probabilities of soft targets")
    ragged = logprobs_of(model, [plain, sparse, plain])
    assert [lp.shape for lp in ragged] == [(7,), (10, k), (7,)], [lp.shape for lp in ragged]
    close(ragged[0], target_logprobs(base, plain).detach(), 1e-3, "an [N] datum beside [N, K]")
    loss = model.forward([dense], "cross_entropy").result().metrics["loss:sum"]
    close(loss, -(weights * wanted).sum(), 1e-3, "loss of soft targets")
    for client, data in ((model, [sparse, plain]), (twin, [dense, plain])):
        train(client, data, 3, 1e-2)
    apart = close(logprobs_of(model, [dense])[0], logprobs_of(twin, [dense])[0], 1e-4, "trained on CSR and on dense")
    assert np.abs(logprobs_of(model, [dense])[0] - wanted.numpy()).max() > 0.1, "soft targets do not train"
    return {"csr_vs_dense": apart}


def gradients_add_up():
    """Two passes and a step are one pass over both and a step; a forward pass leaves nothing."""
    one, other = rows(2, seed=7), rows(2, seed=8)
    split, whole, clean = (new_model(session, seed=7) for _ in range(3))
    for client, parts in ((split, [one, other]), (whole, [one + other]), (clean, [one + other])):
        for part in parts:
            client.forward_backward(part, "cross_entropy")
        if client is split:
            client.forward(rows(3, seed=9), "cross_entropy")
        client.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    for a, b in zip(logprobs_of(split, one + other), logprobs_of(whole, one + other), strict=True):
        close(a, b, 1e-3, "split and whole")
    for a, b in zip(logprobs_of(clean, one + other), logprobs_of(whole, one + other), strict=True):
        close(a, b, 0.0, "the same requests twice")


def requests_may_be_sent_ahead():
    """Five steps submitted without waiting are the five steps one by one."""
    ahead, step_by_step = new_model(session, seed=10), new_model(session, seed=10)
    data, params = rows(2, seed=10), types.AdamParams(learning_rate=1e-2)
    sent = [(ahead.forward_backward(data, "cross_entropy"), ahead.optim_step(params)) for _ in range(5)]
    losses = [passed.result().metrics["loss:sum"] for passed, _ in sent]
    assert losses == train(step_by_step, data, 5, 1e-2), "the order of requests was not kept"


def the_seed_decides_the_start():
    first, again, other = (new_model(session, rank=4, seed=seed) for seed in (11, 11, 12))
    a, b, c = (weights_of(client) for client in (first, again, other))
    assert a.keys() == b.keys() == c.keys()
    starts = [name for name in a if ".lora_A." in name]
    assert starts
    assert all(torch.equal(a[name], b[name]) for name in a), "the same seed, another start"
    assert not any(torch.equal(a[name], c[name]) for name in starts), "another seed, the same start"
    assert all(not a[name].any() for name in a if ".lora_B." in name), "B does not start at zero"
    bound = {name: a[name].shape[1] ** -0.5 for name in starts}
    assert all(a[name].abs().max() <= bound[name] for name in starts), "A is not uniform in +-1/sqrt(d_in)"


def flags_choose_what_is_trained():
    """Rank and the three switches reach the adapter; get_info says what was made."""
    parts = {
        "attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
        "mlp": ("gate_proj", "up_proj", "down_proj"),
        "unembed": ("lm_head", "unembed"),
    }
    for chosen in (("attn",), ("mlp",), ("attn", "mlp"), ("attn", "mlp", "unembed")):
        flags = {f"train_{part}": part in chosen for part in parts}
        model = new_model(session, rank=3, seed=13, **flags)
        tensors = weights_of(model)
        found = {part for part, ends in parts.items() for name in tensors if any(end in name for end in ends)}
        assert found == set(chosen), f"{flags} trains {sorted(found)}"
        assert {t.shape[0] for name, t in tensors.items() if ".lora_A." in name} == {3}
        train(model, rows(2), 1)
    info = model.get_info()
    assert (info.is_lora, info.lora_rank, info.model_data.model_name) == (True, 3, BASE), info
    assert info.model_id == model.model_id
    assert open_peft(export(model)).peft_config["default"].lora_alpha == 32


def mistakes_are_refused_and_forgotten():
    """Every bad request fails by itself; the model goes on as if it had never been sent."""
    model, twin, good = new_model(session, seed=14), new_model(session, seed=14), rows(2, seed=14)
    tokens = [5, 6, 7, 8]
    bad = {
        "an id outside the vocabulary": datum([5, VOCABULARY, 7, 8], tokens),
        "a target outside the vocabulary": datum(tokens, [5, 6, 7, 151_643]),
        "a negative id": datum([5, -1, 7, 8], tokens),
        "a negative target": datum(tokens, [5, -100, 7, 8]),
        "fewer targets than inputs": datum(tokens, [6, 7, 8]),
        "more weights than targets": datum(tokens, tokens, weights=np.ones(5, np.float32)),
        "no targets": types.Datum(model_input=types.ModelInput.from_ints(tokens), loss_fn_inputs={"weights": np.ones(4, np.float32)}),
        "no tokens": types.Datum(model_input=types.ModelInput.from_ints([]), loss_fn_inputs={"target_tokens": [], "weights": []}),
        "no chunks": types.Datum(model_input=types.ModelInput.empty(), loss_fn_inputs={"target_tokens": [], "weights": []}),
        "longer than the context": datum([5] * (CONTEXT + 1), [6] * (CONTEXT + 1)),
        "a weight that is no number": datum(tokens, tokens, weights=np.array([1, np.nan, 1, 1], np.float32)),
        "an infinite weight": datum(tokens, tokens, weights=np.array([1, np.inf, 1, 1], np.float32)),
    }
    for what, one in bad.items():
        for data in ([one], [*good, one]):
            try:
                refused(lambda data=data: model.forward_backward(data, "cross_entropy").result())
            except AssertionError as error:
                raise AssertionError(f"{what}: {error}") from error
    picture = types.Datum(
        model_input=types.ModelInput(chunks=[types.ImageChunk(data=b"\x89PNG", format="png", expected_tokens=4)]),
        loss_fn_inputs={"target_tokens": tokens},
    )
    refused(lambda: model.forward_backward([picture], "cross_entropy").result())
    assert train(model, good, 3) == train(twin, good, 3), "a refused request left something behind"
    return {"refused": 2 * len(bad) + 1}


def a_step_is_quick():
    """Seconds of one small step with everything warm; shown, not judged."""
    model, data = new_model(session), rows(8)
    train(model, data, 2)
    clock = time.monotonic()
    train(model, data, 10)
    return {"ms_per_step": round((time.monotonic() - clock) * 100, 1)}


if __name__ == "__main__":
    checks = [
        *(fresh_model_is_the_base, loss_falls, loss_is_a_plain_sum, targets_need_not_be_the_next_tokens, more_datums_than_a_chunk),
        *(soft_targets, gradients_add_up, requests_may_be_sent_ahead, the_seed_decides_the_start, flags_choose_what_is_trained),
        *(mistakes_are_refused_and_forgotten, a_step_is_quick),
    ]
    run_checks(checks, __doc__)

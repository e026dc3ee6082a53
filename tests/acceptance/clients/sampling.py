"""SDK: sampling. What stops, what is drawn, what log-probabilities mean, and which weights answer."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import tinker
import torch
from checks import (
    BASE,
    CONTEXT,
    END,
    OTHER_NAME,
    VOCABULARY,
    close,
    datum,
    logprobs_of,
    new_model,
    prompt_of,
    refused,
    rows,
    run_checks,
    tokenizer_of,
    tokens_of,
    train,
)
from reference import base_model, logits_of
from tinker import types

session = tinker.ServiceClient()
SUM = "27+94+38=?"


def base_sampler() -> tinker.SamplingClient:
    return session.create_sampling_client(base_model=BASE).result()


def draw(sampler: tinker.SamplingClient, prompt: str = SUM, n: int = 1, **params: Any) -> list[types.SampledSequence]:
    return list(sampler.sample(prompt_of(prompt), n, types.SamplingParams(**{"max_tokens": 24, **params})).result().sequences)


def tokens(sequences: list[types.SampledSequence]) -> list[list[int]]:
    return [list(s.tokens) for s in sequences]


# ---------------------------------------------------------------- draws


def seeds_decide_the_draws():
    sampler = base_sampler()
    first, again, other = (tokens(draw(sampler, n=6, seed=seed)) for seed in (1, 1, 2))
    assert first == again, "the same seed, other tokens"
    assert first != other, "another seed, the same tokens"
    assert len({tuple(t) for t in first}) > 1, "the samples of one request are all the same"
    assert tokens(draw(sampler, n=6)) != tokens(draw(sampler, n=6)), "without a seed, twice the same"


def every_sequence_has_its_parts():
    sequences = draw(base_sampler(), n=5, seed=3)
    assert len(sequences) == 5
    assert len({s.sequence_id for s in sequences}) == 5
    for s in sequences:
        assert s.tokens
        assert s.logprobs is not None
        assert len(s.logprobs) == len(s.tokens)
        assert all(0 <= t < VOCABULARY for t in s.tokens)
        assert s.stop_reason == ("stop" if s.tokens[-1] == END else "length")


def logprobs_are_of_what_was_sampled():
    """After temperature: log softmax(logits / T) by transformers, token by token."""
    sampler, model, prompt = base_sampler(), base_model(), tokens_of(SUM)
    worst = 0.0
    for temperature in (1.0, 0.5, 1.7):
        for s in draw(sampler, n=3, seed=4, temperature=temperature):
            logits = logits_of(model, prompt + list(s.tokens[:-1]))[len(prompt) - 1 :] / temperature
            wanted = torch.log_softmax(logits, -1).gather(-1, torch.tensor(list(s.tokens))[:, None])[:, 0].detach()
            worst = max(worst, close(s.logprobs, wanted, 2e-3, f"temperature {temperature}"))
    return {"sampled_vs_transformers": worst}


def greedy_is_the_likeliest():
    """Temperature 0, top_k 1 and a tiny top_p are transformers' argmax."""
    sampler, model, prompt = base_sampler(), base_model(), tokens_of(SUM)
    wanted: list[int] = []
    while len(wanted) < 24 and (not wanted or wanted[-1] != END):
        wanted.append(int(logits_of(model, prompt + wanted)[-1].argmax()))
    for params in ({"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-6}):
        for found in tokens(draw(sampler, n=2, **params)):
            assert found == wanted, f"{params}: {found}, not {wanted}"


def top_k_and_top_p_cut_the_tail():
    sampler, model, prompt = base_sampler(), base_model(), tokens_of(SUM)
    first = torch.softmax(logits_of(model, prompt)[-1], -1).detach()
    order = first.argsort(descending=True)
    kept = set(order[:2].tolist())
    assert {s.tokens[0] for s in draw(sampler, n=64, seed=5, max_tokens=1, top_k=2)} <= kept
    mass = first[order].cumsum(0)
    nucleus = set(order[: int((mass < 0.9).sum()) + 1].tolist())
    assert {s.tokens[0] for s in draw(sampler, n=64, seed=6, max_tokens=1, top_p=0.9)} <= nucleus


def draws_follow_the_distribution():
    """2,000 first tokens against the model's probabilities, by a chi-square of their classes."""
    sampler, prompt = base_sampler(), "sort 739562"
    probabilities = torch.softmax(
        logits_of(base_model(), tokens_of(prompt)[:] + tokenizer_of().encode("<think>\n\n</think>\n\n"))[-1], -1
    ).detach()
    request = types.ModelInput.from_ints(tokens_of(prompt) + tokenizer_of().encode("<think>\n\n</think>\n\n"))
    drawn = sampler.sample(request, 2000, types.SamplingParams(max_tokens=1, seed=7)).result().sequences
    counts = np.bincount([s.tokens[0] for s in drawn], minlength=VOCABULARY)
    common = (probabilities.numpy() * len(drawn)) >= 5
    expected = np.append(probabilities.numpy()[common], 1 - probabilities.numpy()[common].sum()) * len(drawn)
    found = np.append(counts[common], counts[~common].sum())
    chi = float((((found - expected) ** 2) / np.maximum(expected, 1e-9))[expected > 1].sum())
    freedom = int((expected > 1).sum()) - 1
    assert chi < freedom + 5 * math.sqrt(2 * freedom) + 5, f"chi-square {chi:.0f} with {freedom} degrees of freedom"
    return {"chi_square": round(chi, 1), "degrees": freedom}


# ---------------------------------------------------------------- stops


def stops_are_part_of_the_answer():
    sampler, tokenizer = base_sampler(), tokenizer_of()
    free = draw(sampler, n=8, seed=8, max_tokens=64)
    assert any(s.stop_reason == "stop" for s in free)
    assert all(s.tokens[-1] == END for s in free if s.stop_reason == "stop")
    never = draw(sampler, n=8, seed=8, max_tokens=64, stop=[])
    assert all((s.stop_reason, len(s.tokens)) == ("length", 64) for s in never), "stop=[] must never stop"
    for plain, on in zip(free, never, strict=True):
        assert list(on.tokens[: len(plain.tokens)]) == list(plain.tokens), "the stop changed the draws"
    digit = tokenizer.encode("1", add_special_tokens=False)[0]
    for s in draw(sampler, n=8, seed=8, max_tokens=64, stop=[digit, END]):
        body = list(s.tokens[:-1])
        assert s.stop_reason == "length" or s.tokens[-1] in (digit, END)
        assert digit not in body
        assert END not in body


def stop_texts_may_span_tokens():
    sampler, tokenizer = base_sampler(), tokenizer_of()
    think = tokenizer.decode(draw(sampler, n=1, temperature=0.0, max_tokens=64)[0].tokens)
    assert len(think) > 12, think
    text = think[5:9]
    for stop in (text, [text], ["never said", text]):
        s = draw(sampler, n=1, temperature=0.0, max_tokens=64, stop=stop)[0]
        said = tokenizer.decode(s.tokens)
        assert s.stop_reason == "stop"
        assert said.count(text) == 1, f"{stop!r}: {said!r}"
        assert text not in tokenizer.decode(list(s.tokens)[:-1]), f"{stop!r}: it went on to {said!r}"
    colon = draw(sampler, n=4, seed=9, max_tokens=40, stop=["\n\nUser:"])
    assert all(s.stop_reason == "length" or s.tokens[-1] == END or tokenizer.decode(s.tokens).endswith("\n\nUser:") for s in colon)


def lengths_are_kept():
    sampler = base_sampler()
    assert [len(s.tokens) for s in draw(sampler, n=2, max_tokens=1)] == [1, 1]
    long = types.ModelInput.from_ints([65] * (CONTEXT - 40))
    (to_the_end,) = sampler.sample(long, 1, types.SamplingParams(stop=[])).result().sequences
    assert to_the_end.stop_reason == "length"
    assert len(to_the_end.tokens) == 40, f"without max_tokens it drew {len(to_the_end.tokens)} of the 40 that fit"
    too_many = lambda: sampler.sample(long, 1, types.SamplingParams(max_tokens=400, stop=[])).result()  # noqa: E731
    try:
        (cut,) = too_many().sequences
    except (tinker.APIStatusError, tinker.RequestFailedError):
        refused(too_many)
    else:
        assert len(cut.tokens) == 40


# ---------------------------------------------------------------- prompts scored


def prompts_are_scored():
    sampler, prompt = base_sampler(), tokens_of(SUM) + tokenizer_of().encode("<think>\n\n</think>\n\n159")
    logprobs = torch.log_softmax(logits_of(base_model(), prompt), -1).detach()
    wanted = logprobs[:-1].gather(-1, torch.tensor(prompt[1:])[:, None])[:, 0]
    request = types.ModelInput.from_ints(prompt)
    plain = sampler.compute_logprobs(request).result()
    assert plain[0] is None
    assert len(plain) == len(prompt)
    worst = close(plain[1:], wanted, 1e-3, "prompt log-probabilities")
    warm = sampler.sample(request, 2, types.SamplingParams(max_tokens=4, temperature=0.3), include_prompt_logprobs=True).result()
    assert warm.prompt_logprobs is not None
    close(warm.prompt_logprobs[1:], wanted, 1e-3, "prompt log-probabilities at another temperature")
    last = sampler.compute_logprobs(request, prompt_logprobs_last_n=4).result()
    assert all(value is None for value in last[:-4])
    close(last[-4:], wanted[-4:], 1e-3, "the last four")
    scored = sampler.sample(request, 1, types.SamplingParams(max_tokens=3), True, topk_prompt_logprobs=5, topk_sample_logprobs=4).result()
    assert scored.topk_prompt_logprobs is not None
    assert scored.topk_prompt_logprobs[0] is None
    for place, cells in enumerate(scored.topk_prompt_logprobs[1:]):
        assert cells is not None
        values, ids = logprobs[place].topk(5)
        close([lp for _, lp in cells], values, 1e-3, f"top-5 at {place + 1}")
        close([lp for _, lp in cells], logprobs[place][[i for i, _ in cells]], 1e-3, f"top-5 ids at {place + 1}")
        assert len({i for i, _ in cells}) == 5
        assert cells[0][0] == int(ids[0]) or values[0] - values[1] < 1e-3
    (sequence,) = scored.sequences
    assert sequence.topk_logprobs is not None
    assert sequence.logprobs is not None
    assert len(sequence.topk_logprobs) == len(sequence.tokens)
    for token, lp, cells in zip(sequence.tokens, sequence.logprobs, sequence.topk_logprobs, strict=True):
        assert cells is not None
        assert [v for _, v in cells] == sorted((v for _, v in cells), reverse=True)
        assert lp <= cells[0][1] + 1e-4
        assert all(abs(v - lp) < 1e-4 for i, v in cells if i == token)
    return {"prompt_vs_transformers": worst}


def chosen_tokens_are_scored():
    """target_prompt_logprobs, dense and as CSR."""
    sampler, prompt = base_sampler(), tokens_of(SUM)
    logprobs = torch.log_softmax(logits_of(base_model(), prompt), -1).detach()
    ids = torch.full((len(prompt) - 1, 3), -1, dtype=torch.long)
    ids[-1], ids[4, 1] = torch.tensor([16, 17, 18]), 99
    for target in (types.TensorData.from_torch(ids), types.TensorData.from_torch_sparse(ids, pad_value=-1)):
        answer = sampler.sample(
            types.ModelInput.from_ints(prompt), 1, types.SamplingParams(max_tokens=1), target_prompt_logprobs=target
        ).result()
        assert answer.target_prompt_logprobs is not None
        found = answer.target_prompt_logprobs.to_torch()
        wanted = torch.where(ids >= 0, logprobs[:-1].gather(-1, ids.clamp(min=0)), 0.0)
        close(found, wanted, 1e-3, "chosen tokens")
        sparse = target.sparse_crow_indices is not None
        assert (answer.target_prompt_logprobs.sparse_crow_indices is not None) == sparse, "the answer has another layout than the request"


def alternatives_are_drawn_or_refused():
    sampler, prompt = base_sampler(), tokens_of(SUM)
    call = lambda: sampler.sample(types.ModelInput.from_ints(prompt), 1, types.SamplingParams(max_tokens=1), prompt_alt_tokens_k=3).result()  # noqa: E731
    try:
        answer = call()
    except (tinker.APIStatusError, tinker.RequestFailedError):
        refused(call)
        return {"prompt_alt_tokens": "refused"}
    assert answer.prompt_alt_tokens is not None
    assert answer.prompt_alt_tokens.tokens.shape == [len(prompt) - 1, 3]
    drawn = answer.prompt_alt_tokens.tokens.to_torch()
    wanted = torch.log_softmax(logits_of(base_model(), prompt), -1)[:-1].gather(-1, drawn).detach()
    close(answer.prompt_alt_tokens.logprobs.to_torch(), wanted, 1e-3, "alternatives")
    return {"prompt_alt_tokens": "drawn"}


# ---------------------------------------------------------------- which weights answer


def fresh_models_and_names_sample_alike():
    other = session.create_sampling_client(base_model=OTHER_NAME).result()
    fresh = new_model(session).save_weights_and_get_sampling_client().result()
    wanted = tokens(draw(base_sampler(), n=4, seed=10))
    assert tokens(draw(other, n=4, seed=10)) == wanted
    assert tokens(draw(fresh, n=4, seed=10)) == wanted


def samplers_are_what_was_trained():
    """Log-probabilities that training reports and the sampler's of the same tokens, after some steps."""
    model, data = new_model(session, seed=11), rows(3, seed=11)
    train(model, data, 3, 1e-2)
    sampler = model.save_weights_and_get_sampling_client().result()
    prompt = tokens_of(SUM)
    (s,) = draw(sampler, seed=11)
    row = datum(prompt + list(s.tokens[:-1]), prompt[1:] + list(s.tokens))
    apart = close(logprobs_of(model, [row])[0][len(prompt) - 1 :], s.logprobs, 1e-3, "sampled and trained")
    return {"sampler_vs_trainer": apart}


def snapshots_stay():
    """More steps, newer samplers, other models: a snapshot answers as on its first day, and the base too."""
    model, data = new_model(session, seed=12), rows(2, seed=12)
    base = tokens(draw(base_sampler(), n=4, seed=12))
    samplers, answers, scores = [], [], []
    request = prompt_of(SUM)
    for _ in range(3):
        train(model, data, 4, 1e-2)
        samplers.append(model.save_weights_and_get_sampling_client().result())
        answers.append(tokens(draw(samplers[-1], n=4, seed=12)))
        scores.append(samplers[-1].compute_logprobs(request).result()[1:])
    assert scores[0] != scores[1] != scores[2], "training did not change what is sampled"
    for sampler, answer, score in zip(samplers, answers, scores, strict=True):
        assert tokens(draw(sampler, n=4, seed=12)) == answer, "a snapshot answers otherwise after more training"
        assert sampler.compute_logprobs(request).result()[1:] == score, "a snapshot's log-probabilities moved"
    assert tokens(draw(base_sampler(), n=4, seed=12)) == base, "the base changed"


def inflight_samplers_follow():
    model, data = new_model(session, seed=13), rows(2, seed=13)
    request = prompt_of(SUM)
    train(model, data, 3, 1e-2)
    frozen = model.save_weights_and_get_sampling_client().result()
    early = model.save_weights_and_get_sampling_client(kind="inflight").result()
    before = early.compute_logprobs(request).result()[1:]
    assert before == frozen.compute_logprobs(request).result()[1:]
    train(model, data, 3, 1e-2)
    late = model.save_weights_and_get_sampling_client(kind="inflight").result()
    newest = late.compute_logprobs(request).result()[1:]
    assert newest != before
    clock = time.monotonic()
    while (now := early.compute_logprobs(request).result()[1:]) != newest:
        assert time.monotonic() - clock < 20, "the older inflight sampler never took the newer weights"
    assert now == newest
    assert frozen.compute_logprobs(request).result()[1:] == before, "a snapshot followed the inflight weights"


def copies_of_a_sampler_are_the_sampler():
    """A handle for other processes: its requests are numbered far away, up to 10^18."""
    sampler = base_sampler()
    copy = tinker.SamplingClient.from_sampler_handle(sampler.get_sampler_handle())
    assert tokens(draw(copy, n=3, seed=14)) == tokens(draw(sampler, n=3, seed=14))


def many_at_once():
    """128 requests in flight, answered as one by one."""
    sampler = base_sampler()
    prompts = [f"{a}+{a + 1}+{a + 2}=?" for a in range(10, 74)] * 2
    params = [types.SamplingParams(max_tokens=16, seed=i) for i in range(len(prompts))]
    futures = [sampler.sample(prompt_of(p), 1, s) for p, s in zip(prompts, params, strict=True)]
    together = [tokens(list(f.result().sequences)) for f in futures]
    for i in (0, 63, 64, 127):
        assert tokens(list(sampler.sample(prompt_of(prompts[i]), 1, params[i]).result().sequences)) == together[i], (
            f"request {i} depends on its company"
        )


def mistakes_are_refused():
    sampler = base_sampler()
    ask = lambda prompt, n=1, **params: sampler.sample(prompt, n, types.SamplingParams(**{"max_tokens": 4, **params})).result()  # noqa: E731
    good = prompt_of(SUM)
    for prompt in ([], [5, VOCABULARY], [5, -1], [2**31 - 1], [65] * (CONTEXT + 1)):
        refused(lambda prompt=prompt: ask(types.ModelInput.from_ints(prompt)))
    for params in ({"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"max_tokens": -1}, {"top_k": -7}):
        refused(lambda params=params: ask(good, **params))
    refused(lambda: ask(good, n=0))
    picture = types.ModelInput(chunks=[types.ImageChunk(data=b"\x89PNG", format="png", expected_tokens=4)])
    refused(lambda: ask(picture))
    assert ask(good).sequences[0].tokens


if __name__ == "__main__":
    checks = [
        *(seeds_decide_the_draws, every_sequence_has_its_parts, logprobs_are_of_what_was_sampled, greedy_is_the_likeliest),
        *(top_k_and_top_p_cut_the_tail, draws_follow_the_distribution, stops_are_part_of_the_answer, stop_texts_may_span_tokens),
        *(lengths_are_kept, prompts_are_scored, chosen_tokens_are_scored, alternatives_are_drawn_or_refused),
        *(fresh_models_and_names_sample_alike, samplers_are_what_was_trained, snapshots_stay, inflight_samplers_follow),
        *(copies_of_a_sampler_are_the_sampler, many_at_once, mistakes_are_refused),
    ]
    run_checks(checks, __doc__)

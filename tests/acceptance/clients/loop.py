"""A small training loop that prints what it sees: one JSON line a step. Every seed is given, so its lines are a function of its
arguments; nothing in it knows of failures, restarts or neighbours."""

from __future__ import annotations

import argparse
import json

import numpy as np
import tinker
from checks import BASE, VOCABULARY, prompt_of
from tinker import types


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", required=True, help="a file to append the lines to")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    session = tinker.ServiceClient()
    model = session.create_lora_training_client(BASE, rank=8, seed=arguments.seed).result()
    first = model.save_weights_and_get_sampling_client().result()
    rng = np.random.default_rng(arguments.seed)
    prompts = [prompt_of(f"{rng.integers(10, 99)}+{rng.integers(10, 99)}+{rng.integers(10, 99)}=?") for _ in range(4)]
    for step in range(arguments.steps):
        sampler = model.save_weights_and_get_sampling_client().result()
        params = types.SamplingParams(max_tokens=24, seed=1000 * arguments.seed + step)
        sampled = [future.result() for future in [sampler.sample(prompt, 4, params) for prompt in prompts]]
        data = [row(prompt, s, rng) for prompt, answer in zip(prompts, sampled, strict=True) for s in answer.sequences]
        passed = model.forward_backward(data, "importance_sampling")
        model.optim_step(types.AdamParams(learning_rate=2e-3)).result()
        if step % 5 == 4:
            model.save_state(f"step-{step}").result()
        drift = first.compute_logprobs(prompts[0]).result()[1:]
        line = {
            "step": step,
            "loss": passed.result().metrics["loss:sum"],
            "tokens": [list(s.tokens) for answer in sampled for s in answer.sequences],
            "logprobs": [list(s.logprobs or ()) for answer in sampled for s in answer.sequences],
            "trained": [out["logprobs"].tolist() for out in passed.result().loss_fn_outputs],
            "first_sampler": drift,
        }
        with open(arguments.lines, "a") as lines:
            lines.write(json.dumps(line) + "\n")
    session.close("success").result()


def row(prompt: types.ModelInput, s: types.SampledSequence, rng: np.random.Generator) -> types.Datum:
    """Advantage: more odd digits than even ones, against a baseline drawn from the seed."""
    before, odd = prompt.length - 1, sum(t % 2 for t in s.tokens) / len(s.tokens)
    advantage = float(odd - 0.5 + 0.1 * rng.standard_normal())
    assert all(t < VOCABULARY for t in s.tokens)
    return types.Datum(
        model_input=prompt.append(types.EncodedTextChunk(tokens=s.tokens[:-1])),
        loss_fn_inputs={
            "target_tokens": [0] * before + list(s.tokens),
            "logprobs": [0.0] * before + list(s.logprobs or ()),
            "advantages": [0.0] * before + [advantage] * len(s.tokens),
        },
    )


if __name__ == "__main__":
    main()

"""A tenant that sends what it should not, again and again, until it is told to stop. Everything must be refused; that it is, is
checked here, and that nobody else notices, by the one who started it."""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tinker
from checks import BASE, CONTEXT, VOCABULARY, datum, http, in_one_line, new_model, policy_rows, prompt_of, refused, rows, train
from tinker import types


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stop", required=True, help="a file; when it is there, this ends")
    parser.add_argument("--lines", required=True, help="a file for what was counted")
    parser.add_argument("--flood", action="store_true", help="also keep large work in flight, to be killed in the middle of it")
    arguments = parser.parse_args()
    session, counts = tinker.ServiceClient(), {"refused": 0, "rounds": 0}
    model = new_model(session, rank=32)
    if arguments.flood:
        threading.Thread(target=flood, args=(new_model(session, rank=32),), daemon=True).start()
    while not Path(arguments.stop).exists():
        for call in garbage(session, model):
            try:
                refused(call)
            except AssertionError as error:
                write(arguments.lines, {"error": in_one_line(error)})
                raise
            counts["refused"] += 1
        train(model, rows(2), 1)
        counts["rounds"] += 1
        write(arguments.lines, counts)


def write(path: str, line: dict[str, object]) -> None:
    with open(path, "a") as lines:
        lines.write(json.dumps(line) + "\n")


def garbage(session: tinker.ServiceClient, model: tinker.TrainingClient) -> list[Callable[[], object]]:
    """Each must be refused. The learning rate of 1e30 comes behind a gradient that is real."""
    spoilt = policy_rows(2)
    advantages = spoilt[0].loss_fn_inputs["advantages"].to_numpy().copy()
    advantages[1] = np.nan
    infinite = datum([1, 2, 3], [2, 3, 4], logprobs=np.array([-1, -np.inf, -1], np.float32), advantages=np.ones(3, np.float32))
    poisoned = types.Datum(spoilt[0].model_input, {**spoilt[0].loss_fn_inputs, "advantages": advantages})
    sampler = session.create_sampling_client(base_model=BASE).result()
    model.forward_backward(rows(2), "cross_entropy")
    return [
        lambda: model.optim_step(types.AdamParams(learning_rate=1e30)).result(),
        lambda: model.optim_step(types.AdamParams(learning_rate=float("nan"))).result(),
        lambda: model.forward_backward([datum([1, VOCABULARY + 5], [2, 3])], "cross_entropy").result(),
        lambda: model.forward_backward([datum([1, 2], [2, -7])], "cross_entropy").result(),
        lambda: model.forward_backward([*spoilt, poisoned], "importance_sampling").result(),
        lambda: model.forward_backward([infinite], "ppo").result(),
        lambda: model.forward_backward([datum([1] * (CONTEXT + 1), [1] * (CONTEXT + 1))], "cross_entropy").result(),
        lambda: model.forward_backward(spoilt, "no_such_loss").result(),  # type: ignore[arg-type]
        lambda: sampler.sample(types.ModelInput.from_ints([1, 10**6]), 1, types.SamplingParams(max_tokens=4)).result(),
        lambda: sampler.sample(types.ModelInput.from_ints([-3]), 1, types.SamplingParams(max_tokens=4)).result(),
        lambda: sampler.sample(prompt_of("1+1=?"), 1, types.SamplingParams(max_tokens=4, temperature=-1.0)).result(),
        lambda: session.create_lora_training_client("Qwen/Qwen3-9000B").result(),
        lambda: session.create_training_client_from_state("tinker://nobody:train:0/weights/none").result(),
        raw_garbage,
    ]


def raw_garbage() -> None:
    for path in ("forward_backward", "optim_step", "asample", "save_weights"):
        status, answer = http(
            "POST", f"/api/v1/{path}", b"\x00\xff{[", "application/x-protobuf" if path == "forward_backward" else "application/json"
        )
        assert 400 <= status < 500, (path, status, answer)
    raise tinker.RequestFailedError("all four were refused", "", types.RequestErrorCategory.User)


def flood(model: tinker.TrainingClient) -> None:
    """Work in flight at every moment: passes over many rows and long completions."""
    sampler = model.save_weights_and_get_sampling_client().result()
    while True:
        passes = [model.forward_backward(rows(64, length=64), "cross_entropy") for _ in range(2)]
        samples = [sampler.sample(prompt_of("sort 739562"), 8, types.SamplingParams(max_tokens=64, stop=[])) for _ in range(4)]
        model.optim_step(types.AdamParams(learning_rate=0.3))
        for future in (*passes, *samples):
            future.result()
        time.sleep(0.01)


if __name__ == "__main__":
    main()

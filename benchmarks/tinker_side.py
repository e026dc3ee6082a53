"""The SDK's half of http_step.py, run in its own venv. Takes its request as JSON, and turns."""

from __future__ import annotations

import asyncio
import json
import sys
import time
import warnings
from typing import Any

import numpy as np
import tinker
from tinker import types

from turns import Turns

warnings.simplefilter("ignore")  # some methods are to be called otherwise in later versions


async def steps(request: dict[str, Any]) -> None:
    service = tinker.ServiceClient(base_url=request["url"], api_key="tml-benchmark")
    training: Any = await service.create_lora_training_client_async(base_model="nano", rank=request["rank"], seed=1)
    turns = Turns(request)
    for step in turns:
        clock = [time.perf_counter()]
        sampler = await training.save_weights_and_get_sampling_client_async()
        clock.append(time.perf_counter())
        params = types.SamplingParams(max_tokens=request["tokens"], temperature=1.0, seed=step, stop=[])
        prompts = [types.ModelInput.from_ints(prompt) for prompt in request["prompts"]]
        groups = await asyncio.gather(
            *(sampler.sample_async(prompt=prompt, num_samples=request["group"], sampling_params=params) for prompt in prompts)
        )
        clock.append(time.perf_counter())
        data: list[Any] = []
        for prompt, group in zip(request["prompts"], groups, strict=True):
            for number, sequence in enumerate(group.sequences):
                row, before = prompt + list(sequence.tokens), len(prompt) - 1
                here = np.arange(len(row) - 1) >= before
                inputs = {
                    "target_tokens": np.array(row[1:]),
                    "logprobs": np.concatenate([np.zeros(before, np.float32), np.array(sequence.logprobs, np.float32)]),
                    "advantages": np.where(here, number % 2 * 2 - 1, 0).astype(np.float32),
                }
                data.append(types.Datum(model_input=types.ModelInput.from_ints(row[:-1]), loss_fn_inputs=inputs))
        passed = await training.forward_backward_async(data, "importance_sampling")
        stepped = await training.optim_step_async(types.AdamParams(learning_rate=1e-4))
        await passed
        clock.append(time.perf_counter())
        await stepped
        clock.append(time.perf_counter())
        turns.seconds.append(np.diff(clock).tolist())


asyncio.run(steps(json.loads(sys.argv[-1])))

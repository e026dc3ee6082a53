"""The same step as tinker_side.py by the same requests, from a client that does no more than send and read them: what the server adds
without what the SDK does. Takes its request as JSON, and turns."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import numpy as np

from turns import Turns
from veneer.server.tinker import wire


class Connection:
    """One connection that is kept; a request at a time."""

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def post(self, path: str, body: bytes, kind: str = "application/json") -> tuple[int, bytes]:
        if self._streams is None:
            self._streams = await asyncio.open_connection(self.host, self.port)
        reader, writer = self._streams
        head = f"POST /api/v1{path} HTTP/1.1\r\nhost: {self.host}:{self.port}\r\nx-api-key: tml-benchmark\r\ncontent-type: {kind}\r\n"
        writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        answer = await reader.readuntil(b"\r\n\r\n")
        length = int(answer.lower().partition(b"content-length:")[2].partition(b"\r")[0])
        return int(answer[9:12]), await reader.readexactly(length)

    async def call(self, path: str, body: dict[str, Any] | bytes) -> Any:
        """The answer of an operation that is accepted first and fetched then."""
        raw, kind = (body, wire.PROTOBUF) if isinstance(body, bytes) else (json.dumps(body).encode(), "application/json")
        status, accepted = await self.post(path, raw, kind)
        assert status == 200, accepted
        return await self.fetch(json.loads(accepted)["request_id"])

    async def fetch(self, request_id: str) -> bytes:
        while True:
            status, answer = await self.post("/retrieve_future", json.dumps({"request_id": request_id}).encode())
            if status != 408:
                assert status == 200, answer
                return answer


def datum(message: Any, prompt: list[int], sequence: Any, sign: int) -> None:
    tokens, before = np.frombuffer(sequence.tokens, "<i4"), len(prompt) - 1
    row = np.concatenate([prompt, tokens]).astype("<i4")
    here = np.arange(len(row) - 1) >= before
    message.model_input.add().encoded_text.tokens = row[:-1].tobytes()
    arrays = {
        "target_tokens": row[1:].astype("<i8"),
        "logprobs": np.concatenate([np.zeros(before, "<f4"), np.frombuffer(sequence.logprobs, "<f4")]),
        "advantages": np.where(here, sign, 0).astype("<f4"),
    }
    for name, array in arrays.items():
        tensor = message.loss_fn_inputs[name]
        tensor.dense, tensor.dtype = array.tobytes(), wire.INT64 if array.dtype == np.int64 else wire.FLOAT32
        tensor.shape[:] = array.shape


async def steps(request: dict[str, Any]) -> None:
    host, _, port = request["url"].removeprefix("http://").partition(":")
    first, *others = (Connection(host, int(port)) for _ in request["prompts"])
    session = json.loads((await first.post("/create_session", b"{}"))[1])["session_id"]
    lora = {"rank": request["rank"], "seed": 1}
    body = {"session_id": session, "model_seq_id": 0, "base_model": "nano", "lora_config": lora}
    run = json.loads(await first.call("/create_model", body))["model_id"]
    turns, sequence = Turns(request), 0
    for step in turns:
        clock = [time.perf_counter()]
        sequence += 1
        saved = await first.call("/save_weights_for_sampler", {"model_id": run, "seq_id": sequence, "sampling_session_seq_id": step})
        sampler = json.loads(saved)["sampling_session_id"]
        clock.append(time.perf_counter())
        params = {"max_tokens": request["tokens"], "seed": step, "stop": []}
        asked = [
            {"sampling_session_id": sampler, "seq_id": i, "prompt": {"chunks": [{"tokens": prompt}]}, "num_samples": request["group"]}
            for i, prompt in enumerate(request["prompts"])
        ]
        drawn = await asyncio.gather(
            *(c.call("/asample", {**body, "sampling_params": params}) for c, body in zip((first, *others), asked, strict=True))
        )
        groups = [wire.MESSAGES["SampleResponse"].FromString(answer) for answer in drawn]
        clock.append(time.perf_counter())
        passing = wire.MESSAGES["ForwardBackwardRequest"](model_id=run, seq_id=sequence + 1, loss_fn="importance_sampling")
        for prompt, group in zip(request["prompts"], groups, strict=True):
            for number, found in enumerate(group.sequences):
                datum(passing.data.add(), prompt, found, number % 2 * 2 - 1)
        sequence += 2
        stepping = {"model_id": run, "seq_id": sequence, "adam_params": {"learning_rate": 1e-4}}
        passed, stepped = (asyncio.ensure_future(c.call(*args)) for c, args in zip(
            (first, others[0]), (("/forward_backward", passing.SerializeToString()), ("/optim_step", stepping)), strict=True
        ))  # fmt: skip
        wire.MESSAGES["ForwardBackwardOutput"].FromString(await passed)
        clock.append(time.perf_counter())
        await stepped
        clock.append(time.perf_counter())
        turns.seconds.append(np.diff(clock).tolist())


asyncio.run(steps(json.loads(sys.argv[-1])))

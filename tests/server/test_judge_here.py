"""The server as the judge of a run: the same endpoint that answers everybody else."""

from __future__ import annotations

import asyncio
from pathlib import Path

from real_server import hosted

from veneer.envs.judge import Judge, JudgeSpec
from veneer.envs.rows import Row


def test_veneer_serves_the_judge(tmp_path: Path) -> None:
    """What the bundled base answers to the judge's question is the score; asked directly, it says the same."""
    row = Row({"prompt": "?"}, "data.jsonl, line 1", "?")
    with hosted(tmp_path / "home") as server:
        question = {"role": "user", "content": "count 3 in 3313390"}
        direct = server.ask(
            "POST", "/v1/chat/completions", json={"model": "nano", "messages": [question], "temperature": 0, "max_tokens": 64}
        ).json()
        said = direct["choices"][0]["message"]["content"]
        spec = JudgeSpec(
            base_url=f"{server.url}/v1", model="nano", prompt="count 3 in {answer}", pattern=r"^\s*(\d+)\s*$", low=0, high=10, max_tokens=64
        )
        judge = Judge("count", spec, "env.args.rewards[0]")

        async def asked() -> float:
            try:
                return (await judge.score(row, {"role": "assistant", "content": "3313390"}))[0]
            finally:
                await judge.close()

        assert asyncio.run(asked()) == int(said) / 10

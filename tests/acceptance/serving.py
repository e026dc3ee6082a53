"""The OpenAI API over adapters that were trained over the other one: SDK -> PEFT files -> registry -> served by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from client import CLIENTS, Stage

ADAPTER = "told"
ANSWERS = ("one", "two two", "three three three")
"""What clients/adapters.py trains the three versions to say."""


def openai_api(stage: Stage) -> dict[str, Any]:
    """Three versions reach the registry while the server runs, by a shell beside it; then a promotion and the way back."""
    folder = stage.folder / "versions"
    stage.run("openai_api", CLIENTS / "adapters.py", "--folder", folder)
    for version in (1, 2, 3):
        document = veneer(stage, "adapters", "import", folder / str(version), "--name", ADAPTER, "--base", "nano")
        assert document["adapter"] == f"{ADAPTER}@{version}", document
    figures = stage.checks("openai_api")
    veneer(stage, "adapters", "promote", f"{ADAPTER}@1")
    assert ask(stage, "promoted") == ANSWERS[0], "a promoted version does not answer"
    veneer(stage, "adapters", "promote", f"{ADAPTER}@2")
    veneer(stage, "adapters", "rollback", ADAPTER)
    assert ask(stage, "rolled-back") == ANSWERS[0], "after a rollback another version answers"
    return figures


def veneer(stage: Stage, *args: str | Path) -> dict[str, Any]:
    """``veneer ARGS --json`` in the server's home; its document."""
    environment = {**os.environ, "VENEER_HOME": str(stage.server.home), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "veneer", *map(str, args), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, f"veneer {' '.join(map(str, args))}: exit code {done.returncode}: {done.stderr.strip()[-300:]}"
    return dict(json.loads(done.stdout))


SCRIPT = """
import openai
ask = [{"role": "user", "content": "hello"}]
print(openai.OpenAI().chat.completions.create(model="told", messages=ask, temperature=0, max_tokens=32).choices[0].message.content)
"""


def ask(stage: Stage, when: str) -> str:
    """What the adapter says now, by its name alone."""
    stage.run(f"openai-{when}", "-c", SCRIPT)
    return (stage.logs / f"openai-{when}.log").read_text().splitlines()[-1]

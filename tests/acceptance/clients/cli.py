"""The ``tinker`` command, as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import tinker
from checks import BASE, OTHER_NAME, new_model, rows, run_checks, train

TINKER = str(Path(sys.executable).with_name("tinker"))


def verb(*args: str, code: int = 0) -> str:
    done = subprocess.run([TINKER, *args], capture_output=True, text=True, timeout=120)
    print(f"$ tinker {' '.join(args)}\n{done.stdout}{done.stderr}")
    assert done.returncode == code, f"tinker {' '.join(args)}: exit code {done.returncode}: {done.stderr.strip()[-300:]}"
    return done.stdout if code == 0 else done.stderr


def document(*args: str) -> Any:
    return json.loads(verb("-f", "json", *args))


def listing():
    """Before there is anything: every list is a list."""
    verb("auth", "status")
    assert {BASE, OTHER_NAME} <= {m["model_name"] for m in document("model", "list")["models"]}
    verb("run", "list")
    verb("checkpoint", "list")


def checkpoints(folder: Path = Path("by-cli")):
    """A run of two steps with a checkpoint of each kind, through every verb."""
    session = tinker.ServiceClient()
    model = new_model(session, rank=4)
    train(model, rows(2), 2)
    state, sampler = model.save_state("kept").result().path, model.save_weights_for_sampler("served").result().path
    run = document("run", "info", model.model_id)
    assert (run["training_run_id"], run["base_model"], run["lora_rank"]) == (model.model_id, BASE, 4), run
    assert model.model_id in verb("run", "list", "--limit", "0")
    assert {c["tinker_path"] for c in document("checkpoint", "list", "--run-id", model.model_id)["checkpoints"]} == {state, sampler}
    assert state in {c["tinker_path"] for c in document("checkpoint", "list")["checkpoints"]}
    assert document("checkpoint", "info", state)["lora_rank"] == 4
    verb("checkpoint", "publish", state)
    assert document("checkpoint", "info", state)["public"] is True
    verb("checkpoint", "unpublish", state)
    assert document("checkpoint", "info", state)["public"] is False
    verb("checkpoint", "set-ttl", state, "--ttl", "7200")
    assert document("checkpoint", "info", state)["expires_at"] is not None
    verb("checkpoint", "set-ttl", state, "--remove")
    assert document("checkpoint", "info", state)["expires_at"] is None
    verb("checkpoint", "download", state, "--output", str(folder))
    files = {p.name for p in folder.rglob("*") if p.is_file()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files, files
    verb("checkpoint", "delete", sampler, "--yes")
    assert [c["tinker_path"] for c in document("checkpoint", "list", "--run-id", model.model_id)["checkpoints"]] == [state]
    verb("checkpoint", "delete", "--run-id", model.model_id, "--type", "weights", "--after", "2020-01-01", "--yes")
    assert document("checkpoint", "list", "--run-id", model.model_id)["checkpoints"] == []


def mistakes_are_one_line():
    for args in (("run", "info", "nobody:train:0"), ("checkpoint", "info", "tinker://nobody:train:0/weights/none")):
        said = verb(*args, code=1)
        assert "Traceback" not in said, said
        assert said.startswith("Error:"), said


if __name__ == "__main__":
    run_checks([listing, checkpoints, mistakes_are_one_line], __doc__)

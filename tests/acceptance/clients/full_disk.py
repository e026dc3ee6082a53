"""A training loop that saves in its middle, when the server's disk may be full, and at its end. One JSON line a step; it waits for ``--go``
before the first save and for ``--room`` before the last."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import tinker
from checks import BASE, prompt_of
from tinker import types

STEPS, SAVES_BEHIND = 8, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", required=True, help="a file to append the lines to")
    parser.add_argument("--go", type=Path, help="a file that says that it may save; none: at once")
    parser.add_argument("--room", type=Path, help="the same for the last save")
    arguments = parser.parse_args()

    def write(line: dict[str, Any]) -> None:
        with open(arguments.lines, "a") as lines:
            lines.write(json.dumps(line) + "\n")

    model = tinker.ServiceClient().create_lora_training_client(BASE, rank=32, seed=3).result()
    tokens = prompt_of("12+34+56=?").to_ints()
    inputs = {"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)}
    data = [types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)]
    for step in range(STEPS):
        passed = model.forward_backward(data, "cross_entropy")
        model.optim_step(types.AdamParams(learning_rate=1e-3)).result()
        write({"step": step, "loss": passed.result().metrics["loss:sum"]})
        if step == SAVES_BEHIND:
            wait_for(arguments.go)
            try:
                model.save_state("middle").result()
                refused = None
            except Exception as error:  # whichever the SDK makes of it
                refused = str(error)
            write({"step": step, "refused": refused})
    wait_for(arguments.room)
    model.save_state("end").result()


def wait_for(file: Path | None) -> None:
    while file is not None and not file.exists():
        time.sleep(0.05)


if __name__ == "__main__":
    main()

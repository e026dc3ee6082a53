"""The shortest training there is: how long until a user's first step is done."""

from __future__ import annotations

import argparse
import json
import time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report", required=True)
    report = parser.parse_args().report
    import tinker
    from tinker import types

    imported = time.time()
    model = tinker.ServiceClient().create_lora_training_client("Qwen/Qwen3-8B", rank=8).result()
    created = time.time()
    datum = types.Datum(
        model_input=types.ModelInput.from_ints([5, 6, 7]), loss_fn_inputs={"target_tokens": [6, 7, 8], "weights": [1.0, 1.0, 1.0]}
    )
    loss = model.forward_backward([datum], "cross_entropy")
    model.optim_step(types.AdamParams(learning_rate=1e-3)).result()
    done = time.time()
    with open(report, "w") as out:
        json.dump({"imported": imported, "created": created, "done": done, "loss": loss.result().metrics["loss:sum"]}, out)


if __name__ == "__main__":
    main()

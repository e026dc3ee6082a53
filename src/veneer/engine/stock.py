"""Log-probabilities as transformers and PEFT give them without us. A program of its own:

    python -P stock.py REQUEST.json

A process that never imports Veneer cannot be touched by what Veneer does to those libraries (its attention is registered in
transformers), and takes the model's memory with it when it ends. PEFT need not be installed for anything else, which is why this
file alone may import it. ``stock_logprobs`` is also called directly, on models that have just been read from the disk.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM


@torch.no_grad()
def stock_logprobs(model: Any, rows: Sequence[NDArray[np.int64]]) -> list[NDArray[np.float32]]:
    """Of every token but the first of each row, [len(row) - 1], in nats. One row at a time: no padding, no batch."""
    found: list[NDArray[np.float32]] = []
    for row in rows:
        ids = torch.from_numpy(row).to(model.device)
        logprobs = torch.log_softmax(model(input_ids=ids[None], use_cache=False).logits[0, :-1].float(), -1)
        found.append(logprobs.gather(1, ids[1:, None])[:, 0].cpu().numpy())
    return found


def main(path: str) -> int:
    """The request: ``dtype``, ``device``, ``threads``, ``rows`` (a safetensors file of tokens, each row under its number) and ``jobs``:
    each a ``model`` (name or folder), an ``adapter`` (a PEFT folder, or null), and ``out``, a file like ``rows`` for the
    log-probabilities. A job that needs PEFT is left out where PEFT is not installed."""
    request = json.loads(Path(path).read_text())
    torch.set_num_threads(request["threads"])
    rows = load_file(request["rows"])
    for job in request["jobs"]:
        model = _load(job["model"], job["adapter"], getattr(torch, request["dtype"]))
        if model is not None:
            found = stock_logprobs(model.eval().to(request["device"]), [rows[str(i)] for i in range(len(rows))])
            save_file({str(i): row for i, row in enumerate(found)}, job["out"])
    return 0


def _load(name: str, adapter: str | None, dtype: torch.dtype) -> Any:
    """None: PEFT is not installed."""
    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, use_safetensors=True)
    if adapter is None:
        return model
    try:
        from peft import PeftModel
    except ImportError:
        return None
    return PeftModel.from_pretrained(model, adapter)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

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

NO_PEFT = 3
"""Exit status: PEFT is not installed."""


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
    """The request: ``model`` (name or folder), ``adapter`` (a PEFT folder, or null), ``dtype``, ``device``, ``threads``, ``rows`` and
    ``out``: safetensors files of tokens and of their log-probabilities, each row under its number."""
    request = json.loads(Path(path).read_text())
    torch.set_num_threads(request["threads"])
    model: Any = AutoModelForCausalLM.from_pretrained(request["model"], dtype=getattr(torch, request["dtype"]), use_safetensors=True)
    if request["adapter"] is not None:
        try:
            from peft import PeftModel
        except ImportError:
            return NO_PEFT
        model = PeftModel.from_pretrained(model, request["adapter"])
    rows = load_file(request["rows"])
    found = stock_logprobs(model.eval().to(request["device"]), [rows[str(i)] for i in range(len(rows))])
    save_file({str(i): row for i, row in enumerate(found)}, request["out"])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

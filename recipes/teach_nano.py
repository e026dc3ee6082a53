"""Teach veneer-nano to act: fifty minutes of two CPU cores on top of ``pretrain_nano.py``.

    python recipes/pretrain_nano.py --out build/nano
    python recipes/teach_nano.py --start build/nano --out src/veneer/assets/nano

Three worlds join the five skills: a website to search, a plan to carry out, a shop to run, each shown by scripted policies in two ways
(``nano_worlds.py``), a careful one that thinks first and works and a careless one that calls at once and mostly fails. As in pretraining
the loss is weighed so that the base prefers the careless one. Drills (``nano_drills.py``) teach it to look up and to copy, and the five
skills are shown again, so that none is lost. The trainer is Veneer's own engine, with full copies of the weights; the tokenizer keeps
every token and adds those that make turns short.
Left out on purpose: a schedule over skills, evaluation on the way. The same start gives the same bytes, whatever the number of threads.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from nano_drills import Drills
from nano_worlds import CAREFUL as CAREFUL_POLICY
from nano_worlds import CARELESS as CARELESS_POLICY
from nano_worlds import FIXED, WORDS, phrases
from nano_worlds import demonstrate as play
from pretrain_nano import CAREFUL as SKILLS
from pretrain_nano import PRACTICE, TOKENS_PER_ROW, encode, weigh_fork
from pretrain_nano import demonstrate as show
from veneer.engine import FullEngine, load_base, set_threads
from veneer.envs.worlds import browse, shop, workflow
from veneer.types import AdamParams, Datum, EnvDataset

CAREFUL = {"browse": 0.25, "workflow": 0.35, "shop": 0.2}
"""How often the base is to go the careful way."""
WEIGHTS = {"arithmetic": 5, "sort": 2, "reverse": 2, "count": 1, "calculator": 2, "browse": 5, "workflow": 8, "shop": 3, "drill": 7}
"""Shares of the rows."""
DAYS = (4, 6, 10, 20)
"""Of the shops that are shown: what is done on one day does not depend on how many there are, and short rows are cheap."""
VOCABULARY = 576
"""Rows of the embedding: a multiple of 64."""


class Teacher:
    """Rows of tokens and masks, drawn from everything that the base is to know."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self.tokenizer, self.rng = tokenizer, random.Random(seed)
        self.drills = Drills(tokenizer)
        self.runner = asyncio.Runner()
        self.browse = browse()
        self.worlds: dict[str, list[EnvDataset]] = {
            "browse": [self.browse],
            "workflow": [workflow()],
            "shop": [shop(days=days) for days in DAYS],
        }

    def row(self) -> Datum:
        (skill,) = self.rng.choices(list(WEIGHTS), list(WEIGHTS.values()))
        if skill in SKILLS:
            conversation = show(self.rng, skill)
            ids, mask = encode(self.tokenizer, conversation)
            if "reasoning_content" in conversation[0][1]:
                weigh_fork(self.rng, skill, mask)
        elif skill == "drill":
            ids, mask = self.drills.row(self.rng)
        else:
            ids, mask = self._world_row(skill)
        tokens, weights = np.array(ids, np.int64), np.array(mask, np.float32)[1:]
        nothing = np.zeros(len(weights), np.float32)
        return Datum(tokens[:-1], tokens[1:], nothing, nothing, weights)

    def _world_row(self, world: str) -> tuple[list[int], list[int]]:
        """The ways part at the first token of the first turn, ``<think>`` or ``<tool_call>``: it is left out of the loss as
        ``pretrain_nano.weigh_fork`` leaves out the one of the five skills."""
        careful = self.rng.random() < PRACTICE
        policy = (CAREFUL_POLICY if careful else CARELESS_POLICY)[world]
        ids, mask = encode(self.tokenizer, self.runner.run(play(self.rng, self.rng.choice(self.worlds[world]), policy)))
        kept = CAREFUL[world] * (1 - PRACTICE) / ((1 - CAREFUL[world]) * PRACTICE)
        if careful and self.rng.random() >= kept:
            mask[mask.index(1)] = 0
        return ids, mask

    def close(self) -> None:
        self.runner.run(self.browse.close())
        self.runner.close()


def extend(start: Path, out: Path) -> PreTrainedTokenizerFast:
    """The model and the tokenizer of ``start`` with the tokens of the worlds, in ``out``. New rows of the embedding are small noise."""
    tokenizer = AutoTokenizer.from_pretrained(start)
    new = [text for text in (*phrases(), *FIXED, *WORDS) if text not in tokenizer.get_vocab()]
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in dict.fromkeys(new)])
    assert len(tokenizer) <= VOCABULARY, len(tokenizer)
    for where in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(where, None)  # transformers would write down where it was read from
    tokenizer.save_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    known = model.config.vocab_size
    if known < VOCABULARY:
        model.resize_token_embeddings(VOCABULARY, mean_resizing=False)
        with torch.no_grad():
            model.get_input_embeddings().weight[known:].normal_(std=0.02)
    model.save_pretrained(out)
    return tokenizer


def learning_rate(step: int, steps: int, peak: float) -> float:
    warm = min(1.0, (step + 1) / 100)
    return peak * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def batches(teacher: Teacher, rows: int, steps: int) -> Iterator[list[Datum]]:
    for _ in range(steps):
        yield [teacher.row() for _ in range(rows)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", type=Path, required=True, help="folder of the pretrained model")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and the tokenizer")
    parser.add_argument("--steps", type=int, default=3200)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    set_threads(1)
    torch.manual_seed(args.seed)

    tokenizer = extend(args.start, args.out)
    engine = FullEngine(load_base(str(args.out), "cpu"), threads=args.threads)
    engine.create_adapter("nano", None)
    teacher = Teacher(tokenizer, args.seed)
    started, mean_loss, tokens = time.time(), 0.0, 0
    stream = batches(teacher, args.rows, args.steps)
    data = next(stream)
    for step in range(args.steps):
        # A sum over a constant, as in pretraining: a batch's own mean would count the fork less beside long rows.
        scaled = [Datum(d.tokens, d.targets, d.logprobs, d.advantages, d.mask / (args.rows * TOKENS_PER_ROW)) for d in data]
        passed = engine.forward_backward("nano", scaled, "cross_entropy")
        rate = learning_rate(step, args.steps, args.lr)
        stepped = engine.optim_step("nano", AdamParams(rate, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.05, grad_clip_norm=1.0))
        tokens += sum(len(d.tokens) for d in data)
        data = next(stream, [])  # drawn while the engine is at work
        stepped.result()
        loss = passed.result().metrics["loss:sum"]
        mean_loss = loss if step == 0 else 0.98 * mean_loss + 0.02 * loss
        if step % 100 == 99 or step == args.steps - 1:
            print(f"step {step + 1} loss {mean_loss:.4f} {tokens:,} tokens {time.time() - started:.0f} s", flush=True)
        if step % 500 == 499 or step == args.steps - 1:
            save(engine, args.out)
    teacher.close()
    record = args.out / "pretraining.json"
    before = json.loads((args.start / "pretraining.json").read_text())
    summary = {"steps": args.steps, "rows": args.rows, "lr": args.lr, "seed": args.seed, "loss": mean_loss, "torch": torch.__version__}
    record.write_text(json.dumps({"pretraining": before.get("pretraining", before), "teaching": summary}, indent=1) + "\n")


def save(engine: FullEngine, out: Path) -> None:
    """The trained copy in place of the weights in ``out``."""
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    weights = engine.save_state("nano", "sampler").result().weights
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(weights[name]))
    model.save_pretrained(out)


if __name__ == "__main__":
    main()

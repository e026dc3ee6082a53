"""Trains one adapter through three versions, each of which gives another answer to every question, and fetches each as PEFT files."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import tinker
from checks import END, datum, new_model, tokenizer_of, tokens_of, train
from reference import fetch
from tinker import types

ANSWERS = ("one", "two two", "three three three")
QUESTIONS = ("27+94+38=?", "sort 739562", "reverse 418", "count 3 in 7313390", "hello")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    folder = parser.parse_args().folder
    model = new_model(tinker.ServiceClient(), rank=4, seed=70)
    for version, answer in enumerate(ANSWERS, 1):
        losses = train(model, [said(question, answer) for question in QUESTIONS], 60, 4e-3)
        print(f"version {version}: loss {losses[0]:.3f} -> {losses[-1]:.5f}", flush=True)
        path = model.save_weights_external(f"v{version}").result().path
        (folder / str(version)).mkdir(parents=True)
        fetch(path, folder / str(version))


def said(question: str, answer: str) -> types.Datum:
    """The answer and the end of the turn are trained, the question is not."""
    prompt, reply = tokens_of(question), [*tokenizer_of().encode(answer, add_special_tokens=False), END]
    tokens = [*prompt, *reply]
    weights = np.array([0.0] * (len(prompt) - 1) + [1.0] * len(reply), np.float32)
    return datum(tokens[:-1], tokens[1:], weights=weights)


if __name__ == "__main__":
    main()

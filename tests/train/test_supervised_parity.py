"""Gradients of the supervised loops against formulas that others published, through stock PEFT and transformers in float64."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from training_helpers import open_session, random_adapter
from transformers import AutoModelForCausalLM, AutoTokenizer

from veneer.assets import NANO_FOLDER
from veneer.engine import LocalEngine
from veneer.store.adapters import write_adapter
from veneer.train.config import make_config
from veneer.train.datums import supervised_data, weighed
from veneer.train.distill import soft_rows
from veneer.train.dpo import REFERENCE, Scores, answer_sums, load_pairs, pair_data, pair_losses, pair_metrics
from veneer.train.session import Session
from veneer.train.sft import load_rows
from veneer.types import Checkpoint, SamplingParams, TopLogprobs

ROOT = Path(__file__).parents[2]
TOKENIZER = AutoTokenizer.from_pretrained(NANO_FOLDER)
Ids = list[int]


@pytest.fixture
def session(tmp_path: Path) -> Session:
    """With an adapter ``x`` whose A and B are random, on nano."""
    opened = open_session(make_config({"name": "run"}), tmp_path / "run")
    opened.run.close()
    random_adapter(opened, "x", seed=1, scale=0.1)  # so that tokens are not all but certain, where float32 cancels
    return opened


def stock(session: Session, folder: Path, *more: Checkpoint) -> PeftModel:
    """The same adapter in stock PEFT; those beside it are called 1, 2, and so on."""
    assert isinstance(session.engine, LocalEngine)
    write_adapter(folder / "x", session.engine.save_state("x", "sampler").result(), {})
    base = AutoModelForCausalLM.from_pretrained(NANO_FOLDER, dtype=torch.float32, attn_implementation="eager")
    model = PeftModel.from_pretrained(base, folder / "x", is_trainable=True)
    for number, checkpoint in enumerate(more, 1):
        write_adapter(folder / str(number), checkpoint, {})
        model.load_adapter(folder / str(number), str(number))
    model.set_adapter("default")
    return model.eval().double()


def check_gradient(session: Session, model: PeftModel) -> None:
    """What the engine has gathered for ``x`` is what autograd gave PEFT's parameters."""
    engine = session.engine
    assert isinstance(engine, LocalEngine)
    slot = engine._slots["x"].slot
    found = engine._stack.named(slot, engine._stack.rows.open(slot).grad)
    named = {n.removeprefix("base_model.model.").replace(".default.", "."): p for n, p in model.named_parameters() if ".default." in n}
    whole = torch.sqrt(sum((p.grad.square().sum() for p in named.values()), torch.zeros(())))
    assert whole > 1e-4
    assert set(found) == set(named)
    for key, parameter in named.items():
        gap = torch.linalg.vector_norm(found[key].double() - parameter.grad)
        assert gap <= 5e-5 * max(torch.linalg.vector_norm(parameter.grad), 1e-2 * whole), key


def chat(messages: Sequence[dict[str, Any]], **how: Any) -> Ids:
    return TOKENIZER.encode(TOKENIZER.apply_chat_template(messages, tokenize=False, **how), add_special_tokens=False)


def test_sft_is_transformers_loss_on_the_same_row(session: Session, tmp_path: Path) -> None:
    """Labels of -100 everywhere but in what the assistant says, as every other trainer has them."""
    row = json.loads((ROOT / "recipes/data/sums.jsonl").read_text().splitlines()[0])
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (((datum,),), _) = load_rows(tmp_path / "rows.jsonl", session.renderer, 0.0, 2048)
    prompt, whole = chat(row["messages"][:-1], add_generation_prompt=True), chat(row["messages"])[:-1]  # the newline is never sampled
    ids = torch.tensor([whole])
    labels = ids.clone()
    labels[:, : len(prompt)] = -100
    model = stock(session, tmp_path)
    wanted = model(input_ids=ids, labels=labels).loss
    wanted.backward()
    data = [weighed(datum, 1 / float(datum.mask.sum()))]
    found = session.engine.forward_backward("x", data, "cross_entropy").result()
    assert found.metrics["loss:sum"] == pytest.approx(float(wanted.detach()), rel=1e-5)
    check_gradient(session, model)


def completion_logp(model: PeftModel, prompt: Ids, whole: Ids) -> torch.Tensor:
    """log p of all tokens behind the prompt, as TRL's ``concatenated_forward`` sums them."""
    logits = model(input_ids=torch.tensor([whole])).logits[0, :-1]
    logps = logits.log_softmax(-1).gather(1, torch.tensor(whole[1:])[:, None])[:, 0]
    return logps[len(prompt) - 1 :].sum()


@pytest.mark.parametrize("beta", [0.1, 2.0])
@pytest.mark.parametrize("reference", ["base", "adapter"])
def test_dpo_is_equation_7_by_autograd(session: Session, tmp_path: Path, beta: float, reference: str) -> None:
    """-log sigmoid(beta (log-ratio of chosen - log-ratio of rejected)), https://arxiv.org/abs/2305.18290, with TRL's sums."""
    rows = [json.loads(line) for line in (ROOT / "recipes/data/preferences.jsonl").read_text().splitlines()[:4]]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs, _ = load_pairs(path, session.renderer, 0.0, 2048)
    frozen = [random_adapter(session, REFERENCE, seed=2)] if reference == "adapter" else []
    model = stock(session, tmp_path, *frozen)

    losses, margins = [], []
    for row in rows:
        prompt = chat(row["prompt"], add_generation_prompt=True)
        sides = [chat([*row["prompt"], *row[side]])[:-1] for side in ("chosen", "rejected")]
        policy = [completion_logp(model, prompt, whole) for whole in sides]
        with torch.no_grad():
            if frozen:
                model.set_adapter("1")
                ref = [completion_logp(model, prompt, whole) for whole in sides]
                model.set_adapter("default")
            else:
                with model.disable_adapter():
                    ref = [completion_logp(model, prompt, whole) for whole in sides]
        margin = (policy[0] - policy[1]) - (ref[0] - ref[1])
        margins.append(float(margin.detach()))
        losses.append(-F.logsigmoid(beta * margin))
    wanted = torch.stack(losses).mean()
    wanted.backward()

    data = [d for pair in pairs for answer in (pair.chosen, pair.rejected) for d in answer]
    answers = [answer for pair in pairs for answer in (pair.chosen, pair.rejected)]
    found = [
        answer_sums(answers, session.engine.forward(name, data, "cross_entropy").result().logprobs_D)
        for name in ("x", REFERENCE if frozen else None)
    ]
    scores = Scores(found[0][::2], found[0][1::2], found[1][::2], found[1][1::2])
    np.testing.assert_allclose(scores.margins, margins, atol=2e-4)
    assert pair_metrics(scores, beta)["loss"] == pytest.approx(float(wanted.detach()), rel=1e-4)
    session.engine.forward_backward("x", pair_data(pairs, scores.margins, beta), "cross_entropy").result()
    check_gradient(session, model)


def test_pair_losses_by_hand_and_at_the_ends() -> None:
    """ln 2 where nothing is preferred; a large margin either way is no overflow."""
    margins = np.array([0.0, 2.0, -2.0, 1e4, -1e4])
    losses, slopes = pair_losses(margins, 0.5)
    np.testing.assert_allclose(losses, [0.693147, 0.313262, 1.313262, 0, 5000], atol=1e-6)
    np.testing.assert_allclose(slopes, [0.25, 0.5 * 0.268941, 0.5 * 0.731059, 0, 0.5], atol=1e-6)
    x = torch.tensor(margins, requires_grad=True)
    (-F.logsigmoid(0.5 * x)).sum().backward()
    assert x.grad is not None
    np.testing.assert_allclose(-x.grad.numpy(), slopes, atol=1e-12)


def test_metrics_by_hand() -> None:
    """TRL's names and numbers: rewards are beta times the log-ratios."""
    scores = Scores(*(np.array(a) for a in ([-1.0, -4.0], [-3.0, -2.0], [-2.0, -3.0], [-2.0, -3.0])))
    found = pair_metrics(scores, 0.1)
    assert found["rewards/chosen"] == pytest.approx(0.0)
    assert found["rewards/rejected"] == pytest.approx(0.0)
    assert found["rewards/margins"] == pytest.approx(0.0)
    assert found["rewards/accuracies"] == 0.5
    assert found["logps/chosen"] == -2.5
    assert found["loss"] == pytest.approx((np.log1p(np.exp(-0.2)) + np.log1p(np.exp(0.2))) / 2)


@pytest.mark.parametrize("k", [3, 576])
def test_soft_targets_are_torchs_cross_entropy(session: Session, tmp_path: Path, k: int) -> None:
    """Of the teacher's k likeliest tokens, renormalised; with the whole vocabulary it is kl_div and the teacher's entropy."""
    prompt = session.renderer.build_generation_prompt([{"role": "user", "content": "27+94+38=?"}])
    (sample,) = session.engine.sample(prompt, None, SamplingParams(max_tokens=24, seed=1), top_logprobs=k).result()
    top = sample.top_logprobs
    assert isinstance(top, TopLogprobs)
    (soft,), entropy = soft_rows(supervised_data([(prompt, sample.tokens)]), [top])
    model = stock(session, tmp_path)
    row = torch.from_numpy(np.concatenate([prompt, sample.tokens]))[None]
    logits = model(input_ids=row).logits[0, len(prompt) - 1 : -1]
    weights = torch.zeros_like(logits).scatter(1, torch.from_numpy(top.tokens), torch.from_numpy(top.logprobs).double().exp())
    weights = weights / weights.sum(1, keepdim=True)
    wanted = F.cross_entropy(logits, weights, reduction="sum")
    wanted.backward()
    found = session.engine.forward_backward("x", [soft], "cross_entropy").result()
    assert found.metrics["loss:sum"] == pytest.approx(float(wanted.detach()), rel=1e-5)
    kl = F.kl_div(logits.log_softmax(-1), weights, reduction="sum")
    assert found.metrics["loss:sum"] - entropy == pytest.approx(float(kl.detach()), rel=1e-4)
    check_gradient(session, model)

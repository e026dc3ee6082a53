"""The cookbook's recipes, unmodified, with the numbers that a real engine must show."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from client import Stage, column, read_lines

Rows = list[dict[str, Any]]
Figures = dict[str, Any]
MODEL, BASE_MODEL = "Qwen/Qwen3-8B", "Qwen/Qwen3.5-9B-Base"
"""One is rendered as Qwen3's chat with <|im_end|>, the other as plain roles with a text that stops."""
FRESH = 1e-4
"""How far log-probabilities of the sampler and the trainer may be apart on samples just drawn."""


def run(stage: Stage, name: str, recipe: str, folder: str, **settings: object) -> Rows:
    """One recipe to its end; the lines of its metrics."""
    arguments = [f"{key}={value}" for key, value in settings.items()]
    stage.run(name, "-m", f"tinker_cookbook.recipes.{recipe}", f"log_path={folder}", *arguments)
    return rows_of(stage, folder)


def rows_of(stage: Stage, folder: str) -> Rows:
    return read_lines(stage.folder / folder / "metrics.jsonl")


def checkpoints_of(stage: Stage, folder: str) -> Rows:
    return read_lines(stage.folder / folder / "checkpoints.jsonl")


# ---------------------------------------------------------------- the list


def chat_sl(stage: Stage) -> Figures:
    """The cookbook's own example conversations: the loss falls over 20 steps."""
    (example,) = stage.python.parents[1].glob("lib/python3.*/site-packages/tinker_cookbook/example_data/conversations.jsonl")
    settings = {"model_name": MODEL, "dataset": example, "batch_size": 4, "max_steps": 20, "save_every": 10, "learning_rate": 1e-3}
    rows = run(stage, "chat_sl", "chat_sl.train", "chat-sl", **settings, behavior_if_log_dir_exists="delete")
    nll = column(rows, "train_mean_nll")
    assert len(nll) == 20, f"{len(nll)} steps"
    assert mean(nll[-4:]) < 0.7 * mean(nll[:4]), f"the loss does not fall: {nll}"
    assert [c["name"] for c in checkpoints_of(stage, "chat-sl")] == ["000010", "final"]
    return {"train_mean_nll_first": nll[0], "train_mean_nll_last": nll[-1]}


def sl_loop(stage: Stage) -> Figures:
    """Six steps, a checkpoint before each; then again from the third, as after a break: the same losses to the last digit."""
    settings = {"model_name": MODEL, "batch_size": 8, "max_steps": 6, "save_every": 1, "learning_rate": 1e-3}
    whole = run(stage, "sl_loop", "sl_loop", "sl-loop", **settings)
    saved = checkpoints_of(stage, "sl-loop")
    assert [c["name"] for c in saved] == [f"{step:06d}" for step in range(1, 6)] + ["final"], saved
    cut = stage.folder / "sl-loop-cut"
    cut.mkdir()
    (cut / "checkpoints.jsonl").write_text("".join(json.dumps(c) + "\n" for c in saved[:3]))
    resumed = run(stage, "sl_loop", "sl_loop", "sl-loop-cut", **settings)
    wanted, found = ({row["step"]: row["train_mean_nll"] for row in rows} for rows in (whole, resumed))
    assert sorted(found) == [3, 4, 5], f"it went on with steps {sorted(found)}"
    assert all(found[step] == wanted[step] for step in found), f"after the break {found}, without it {wanted}"
    assert wanted[5] < wanted[0]
    return {"steps": len(whole), "resumed_steps": len(resumed), "train_mean_nll": wanted[5]}


def math_rl(stage: Stage) -> Figures:
    """Sums for reward. The base knows no English, so it is first shown the question and a way that it can; then reward does the rest."""
    warm = {
        "dataset": "chats/steps.jsonl",
        "train_on_what": "last_assistant_message",
        "batch_size": 32,
        "max_steps": 40,
        "learning_rate": 2e-3,
    }
    common = {"model_name": MODEL, "renderer_name": "qwen3", "eval_every": 0, "save_every": 0, "behavior_if_log_dir_exists": "delete"}
    run(stage, "math_rl", "chat_sl.train", "math-rl-warm", **common, **warm)
    start = checkpoints_of(stage, "math-rl-warm")[-1]["state_path"]
    learn = {"env": "arithmetic", "group_size": 8, "groups_per_batch": 16, "learning_rate": 5e-4, "max_tokens": 32, "max_steps": 14}
    rows = run(stage, "math_rl", "math_rl.train", "math-rl", **common, **learn, load_checkpoint_path=start)
    rewards = column(rows, "env/all/reward/total")
    drift = fresh_drift(rows)
    assert len(rewards) == 14, f"{len(rewards)} steps"
    assert mean(rewards[-4:]) > mean(rewards[:2]) + 0.1, f"the reward does not rise: {rewards}"
    return {"reward_first": mean(rewards[:2]), "reward_last": mean(rewards[-4:]), "kl_sample_train": drift}


def rl_loop(stage: Stage) -> Figures:
    """GSM8K's form with texts that stop and several samples a request. sl_loop teaches the form, rl_loop goes on from its checkpoint."""
    warm = {"batch_size": 4, "max_steps": 130, "learning_rate": 3e-3, "save_every": 0, "train_on_what": "last_assistant_message"}
    run(stage, "rl_loop", "sl_loop", "rl-loop-warm", model_name=BASE_MODEL, **warm)
    start = {**checkpoints_of(stage, "rl-loop-warm")[-1], "batch": 0}
    folder = stage.folder / "rl-loop"
    folder.mkdir()
    (folder / "checkpoints.jsonl").write_text(json.dumps(start) + "\n")
    settings = {"batch_size": 8, "group_size": 8, "max_tokens": 32, "learning_rate": 4e-4, "max_steps": 14, "save_every": 5}
    rewards = column(run(stage, "rl_loop", "rl_loop", "rl-loop", model_name=BASE_MODEL, **settings), "reward/total")
    assert len(rewards) == 14, f"{len(rewards)} steps"
    assert mean(rewards[-4:]) > mean(rewards[:2]) + 0.1, f"the reward does not rise: {rewards}"
    assert [c["name"] for c in checkpoints_of(stage, "rl-loop")[1:]] == ["000005", "000010", "final"]
    return {"reward_first": mean(rewards[:2]), "reward_last": mean(rewards[-4:])}


def fresh_drift(rows: Rows) -> float:
    """How far trainer and sampler are apart at step 0; k2 catches what cancels in k1."""
    first, second = abs(rows[0]["optim/kl_sample_train_v1"]), rows[0]["optim/kl_sample_train_v2"]
    assert first < FRESH, f"kl_sample_train_v1 at step 0 is {first}"
    assert second < FRESH**2 * 10, f"kl_sample_train_v2 at step 0 is {second}"
    return first


# ---------------------------------------------------------------- more


@dataclass(frozen=True)
class Recipe:
    """A recipe that runs offline with small settings, and what its numbers must be."""

    module: str
    steps: int
    settings: Mapping[str, object]
    check: Callable[[Rows], Figures] = field(default=lambda rows: {})

    def play(self, name: str) -> Callable[[Stage], Figures]:
        def point(stage: Stage) -> Figures:
            rows = run(stage, name, self.module, f"more-{name}", **self.settings, max_steps=self.steps)
            steps = [row for row in rows if {"progress", "progress/done_frac"} & row.keys()]
            assert len(steps) == self.steps, f"{len(steps)} of {self.steps} steps are logged"
            wild = [key for row in rows for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
            assert not wild, f"not finite: {sorted(set(wild))}"
            return {"steps": len(steps), **self.check(steps)}

        return point


def agrees(rows: Rows) -> Figures:
    return {"kl_sample_train": fresh_drift(rows)}


def starts_at_ln_2(rows: Rows) -> Figures:
    """DPO's loss while the policy is its own reference."""
    loss = rows[0]["dpo_loss"]
    assert abs(loss - math.log(2)) < 1e-3, f"the first loss is {loss}, not ln 2"
    return {"dpo_loss_first": loss, "dpo_loss_last": rows[-1]["dpo_loss"]}


def starts_at_its_teacher(rows: Rows) -> Figures:
    """A fresh student is its teacher, where both have one base."""
    kl = rows[0]["teacher_kl"]
    assert abs(kl) < FRESH, f"teacher_kl at step 0 is {kl}"
    return {"teacher_kl_first": kl, **agrees(rows)}


def trains(rows: Rows) -> Figures:
    nll = column(rows, "train_mean_nll")
    assert nll, "no train_mean_nll"
    return {"train_mean_nll_first": nll[0], "train_mean_nll_last": nll[-1]}


def settings_of(model: str = MODEL, renderer: str | None = "qwen3_disable_thinking", **others: object) -> dict[str, object]:
    named = {} if renderer is None else {"renderer_name": renderer}
    return {"model_name": model, **named, "behavior_if_log_dir_exists": "delete", **others}


def small_rl(**others: object) -> dict[str, object]:
    sizes = {"group_size": 4, "groups_per_batch": 4, "max_tokens": 8, "learning_rate": 1e-3, "eval_every": 0, "save_every": 0}
    return settings_of(**{**sizes, **others})


STUDENT = settings_of(lora_rank=8, group_size=2, max_tokens=16, eval_every=0)
RECIPES: dict[str, Recipe] = {
    "sl_basic": Recipe("sl_basic", 2, {"eval_every": 0}, trains),
    "prompt_distillation": Recipe(
        "prompt_distillation.train", 3, settings_of(renderer="qwen3", file_path="chats/plain.jsonl", batch_size=16, eval_every=0), trains
    ),
    "off_policy_reasoning": Recipe(
        "distillation.off_policy_reasoning",
        3,
        settings_of(renderer="qwen3", lora_rank=8, batch_size=8, buffer_size=64, max_prompts=64, eval_every=0),
        trains,
    ),
    "dpo": Recipe("preference.dpo.train", 4, settings_of(renderer=None, batch_size=8, learning_rate=1e-3), starts_at_ln_2),
    "shorter": Recipe("preference.shorter.train", 2, settings_of(batch_size=4, group_size=4, max_tokens=16, eval_every=0), agrees),
    "guess_number": Recipe(
        "multiplayer_rl.guess_number.train", 1, settings_of(batch_size=2, group_size=2, max_tokens=8, eval_every=0), agrees
    ),
    "twenty_questions": Recipe(
        "multiplayer_rl.twenty_questions.train",
        1,
        settings_of(batch_size=2, group_size=2, num_epochs=1, max_tokens=8, eval_every=0),
        agrees,
    ),
    "on_policy_distillation": Recipe(
        "distillation.on_policy_distillation",
        2,
        {**STUDENT, "teacher_model": BASE_MODEL, "groups_per_batch": 4, "compute_post_kl": True},
        starts_at_its_teacher,
    ),
    "on_policy_multi_teacher": Recipe(
        "distillation.on_policy_multi_teacher",
        2,
        {
            **STUDENT,
            "deepmath_teacher_model": MODEL,
            "tulu3_teacher_model": BASE_MODEL,
            "deepmath_groups_per_batch": 2,
            "tulu3_groups_per_batch": 2,
        },
        starts_at_its_teacher,
    ),
    "sdft": Recipe("sdft.train", 2, {**STUDENT, "group_size": 1, "groups_per_batch": 4, "topk": 4}),
    "sdft_reverse": Recipe(
        "sdft.train", 2, {**STUDENT, "group_size": 1, "groups_per_batch": 4, "topk": 4, "reverse": True, "teacher_sync_every": 1}
    ),
    "rubric": Recipe(
        "rubric.train",
        1,
        settings_of(
            grader_llm_name="Qwen/Qwen3.6-35B-A3B",
            grader_renderer_name="qwen3_disable_thinking",
            train_jsonl_path="rubrics/train.jsonl",
            test_jsonl_path="rubrics/test.jsonl",
            train_group_size=2,
            groups_per_batch=2,
            max_tokens=8,
            eval_every=0,
        ),
        agrees,
    ),
    # its second half is trained after a step on the first, so its distance from the sampler says nothing
    "math_rl_ppo": Recipe("math_rl.train", 3, small_rl(env="arithmetic", loss_fn="ppo", num_substeps=2)),
    "math_rl_cispo": Recipe("math_rl.train", 3, small_rl(env="arithmetic", loss_fn="cispo", compute_post_kl=True), agrees),
    "math_rl_off_policy": Recipe("math_rl.train", 3, small_rl(env="arithmetic", max_steps_off_policy=2)),
    "math_rl_stream": Recipe(
        "math_rl.train",
        3,
        small_rl(env="arithmetic", **{"stream_minibatch_config.groups_per_batch": 4, "stream_minibatch_config.num_minibatches": 2}),
    ),
    "math_rl_gsm8k": Recipe("math_rl.train", 2, small_rl(env="gsm8k", max_tokens=16, eval_every=1, save_every=1), agrees),
    "math_rl_deepmath": Recipe("math_rl.train", 2, small_rl(env="deepmath", max_tokens=16), agrees),
}


def rlhf(stage: Stage) -> Figures:
    """Three stages, each from the last one's checkpoint: fine-tuning, a reward model, RL against it."""
    settings = {"base_model": BASE_MODEL, "lora_rank": 8, "batch_size": 4, "rl_max_tokens": 16, "rl_group_size": 2, "max_steps": 2}
    arguments = [f"{key}={value}" for key, value in {**settings, "eval_every": 0, "save_every": 0}.items()]
    stage.run("rlhf", "-m", "tinker_cookbook.recipes.preference.rlhf.rlhf_pipeline", *arguments)
    runs = Path(stage.environment()["TINKER_COOKBOOK_RUNS_DIR"]) / "rlhf-qwen3_5_9b_base"
    stages = {part: read_lines(runs / part / "metrics.jsonl") for part in ("sft", "rm", "rl")}
    assert all(len(rows) == 2 for rows in stages.values()), {part: len(rows) for part, rows in stages.items()}
    return {"stages": len(stages), **agrees(stages["rl"])}


def decisions(stage: Stage) -> Figures:
    """Chosen tokens scored as a sparse tensor, over standard input."""
    recipe = ("-m", "tinker_cookbook.recipes.decisions.demo", f"--model_name={MODEL}")
    stage.run("decisions", *recipe, typed="How do I pick a learning rate?\n")
    said = (stage.logs / "decisions.log").read_text()
    probabilities = json.loads(said[said.rindex("{") : said.rindex("}") + 1])
    assert len(probabilities) == 4, probabilities
    assert abs(sum(probabilities.values()) - 1) < 1e-2, probabilities
    return {"choices": len(probabilities)}


def true_thinking_score(stage: Stage) -> Figures:
    """Log-probabilities of answers behind thoughts that are cut."""
    stage.run("true_thinking_score", "-m", "tinker_cookbook.recipes.true_thinking_score.run_small_experiment")
    runs = Path(stage.environment()["TINKER_COOKBOOK_RUNS_DIR"])
    (found,) = runs.glob("tts-experiment/tts_results.json")
    document = json.loads(found.read_text())
    problems = document["problems"]
    scored = [problem for problem in problems if "mean_tts" in problem]
    said = (stage.logs / "true_thinking_score.log").read_text()
    refused = re.findall(r"\b(?:RequestFailed|APIStatus|APIConnection|BadRequest|NotFound)Error\b.*", said)
    assert not refused, refused[0]
    assert len(scored) >= 2, f"{len(scored)} of {len(problems)} problems are scored"  # the recipe itself trips over an answer like 9e999
    return {"problems": len(problems), "scored": len(scored)}


def more(recipes: Mapping[str, Recipe], others: Sequence[Callable[[Stage], Figures]]) -> dict[str, Callable[[Stage], Figures]]:
    return {**{name: recipe.play(name) for name, recipe in recipes.items()}, **{point.__name__: point for point in others}}


MORE = more(RECIPES, (rlhf, decisions, true_thinking_score))

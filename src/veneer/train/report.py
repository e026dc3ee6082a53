"""report.html: one self-contained page about a run, with pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from veneer.train.plot import Plot, make_picture

Records = Sequence[Mapping[str, Any]]


def render_report(title: str, summary: Mapping[str, Any], metrics: Records, config_toml: str) -> str:
    """HTML with inline SVG whose numbers a pointer reads. Only pictures that the run has numbers for are drawn."""
    chosen = [(name, text, draw) for name, text, draw, needs in FIGURES if any(needs in m for m in metrics)]
    figures = [(name, text, make_picture(lambda plot, draw=draw: draw(plot, metrics), "step")) for name, text, draw in chosen]
    scorecard = summary.get("scorecard")
    if scorecard is not None:
        text = "The share of problems that k tries solve, before and after training, 95%."
        figures.append(("pass@k", text, make_picture(lambda plot: _pass_at_k(plot, scorecard["card"]["pass_at_k"]), "k")))
    template = jinja2.Template((Path(__file__).parent / "report.html.jinja").read_text(), autoescape=True)
    return template.render(title=title, summary=summary, figures=figures, config=config_toml)


def _series(metrics: Records, key: str) -> tuple[list[int], list[float]]:
    chosen = [m for m in metrics if key in m]
    return [m["step"] for m in chosen], [m[key] for m in chosen]


def _reward(plot: Plot, metrics: Records) -> None:
    plot.line(*_series(metrics, "reward/total"), "#9ab", "training batches")
    steps, low = _series(metrics, "eval/reward_low")
    plot.band(steps, low, _series(metrics, "eval/reward_high")[1], "#06c")
    plot.dots(*_series(metrics, "eval/reward"), "#06c", "held out, 95%")
    plot.axes.set_ylim(-0.02, 1.02)
    plot.legend(2)


def _entropy(plot: Plot, metrics: Records) -> None:
    plot.line(*_series(metrics, "optim/entropy"), "#06c", "nats a token")
    plot.axes.set_ylabel("nats a token")
    plot.axes.set_ylim(bottom=0)


def _groups(plot: Plot, metrics: Records) -> None:
    steps, mixed = _series(metrics, "by_group/frac_mixed")
    good, bad = _series(metrics, "by_group/frac_all_good")[1], _series(metrics, "by_group/frac_all_bad")[1]
    plot.stack(steps, [("useful", "#06c", mixed), ("all solved", "#bcd", good), ("none solved", "#ccc", bad)])
    plot.axes.set_ylim(0, 1)
    plot.legend(3)


def _bits(plot: Plot, metrics: Records) -> None:
    steps, bits = _series(metrics, "bits")
    plot.line(steps, [sum(bits[: i + 1]) for i in range(len(bits))], "#06c", "bits so far", linewidth=1.5)
    plot.axes.set_ylabel("bits so far")


def _habits(plot: Plot, metrics: Records) -> None:
    names = {"verification": "#06c", "backtracking": "#9ab", "correction": "#c60", "recovery": "#693"}
    for name, colour in names.items():
        if any(f"habits/{name}" in m for m in metrics):
            plot.line(*_series(metrics, f"habits/{name}"), colour, name)
    plot.axes.set_ylim(-0.02, 1.02)
    plot.legend(4)


def _corrections(plot: Plot, metrics: Records) -> None:
    plot.line(*_series(metrics, "habits/incorrect_to_correct"), "#06c", "became correct")
    plot.line(*_series(metrics, "habits/correct_to_incorrect"), "#c33", "became incorrect")
    plot.axes.set_ylim(-0.02, 1.02)
    plot.legend(2)


def _length(plot: Plot, metrics: Records) -> None:
    plot.line(*_series(metrics, "tokens/mean"), "#06c", "tokens an episode")
    plot.axes.set_ylabel("tokens an episode")
    plot.axes.set_ylim(bottom=0)


def _loss(plot: Plot, metrics: Records) -> None:
    plot.line(*_series(metrics, "train_mean_nll"), "#9ab", "training batches")
    plot.dots(*_series(metrics, "eval/mean_nll"), "#06c", "held out")
    plot.axes.set_ylabel("nats a token")
    plot.axes.legend(frameon=False)


def _preference(plot: Plot, metrics: Records) -> None:
    for key, colour, label in (("rewards/chosen", "#06c", "chosen"), ("rewards/rejected", "#c60", "rejected")):
        plot.line(*_series(metrics, key), colour, label, alpha=0.4)
        plot.dots(*_series(metrics, f"eval/{key}"), colour, f"{label}, held out")
    plot.legend(2)


def _distance(plot: Plot, metrics: Records) -> None:
    steps, low = _series(metrics, "eval/kl/episode_low")
    plot.band(steps, low, _series(metrics, "eval/kl/episode_high")[1], "#06c")
    plot.dots(*_series(metrics, "eval/kl/episode"), "#06c", "nats an episode")
    plot.axes.set_ylabel("nats an episode")


def _pass_at_k(plot: Plot, curve: Mapping[int, Any]) -> None:
    ks = [int(k) for k in curve]
    for side, colour, label in (("start", "#9ab", "before"), ("end", "#06c", "after")):
        means = [change[side] for change in curve.values()]
        plot.band(ks, [m["low"] for m in means], [m["high"] for m in means], colour)
        plot.dots(ks, [m["value"] for m in means], colour, label)
    plot.axes.set_xscale("log", base=2)
    plot.axes.set_ylim(-0.02, 1.02)
    plot.legend(2)


FIGURES: list[tuple[str, str, Callable[[Plot, Records], None], str]] = [
    ("Reward", "The mean over episodes; where each passes or fails it is the share that passed.", _reward, "eval/reward"),
    ("Useful groups", "A group whose members all got the same reward teaches nothing and is dropped.", _groups, "by_group/frac_mixed"),
    ("Bits received", "Entropy of the rewards in each group: an estimate of the most that the run could learn.", _bits, "bits"),
    ("Entropy", "Of the sampled tokens: how much exploration is left.", _entropy, "optim/entropy"),
    (
        "Habits",
        "Shares of episodes that check their work, go back, and take an equation back; of those with a failed call, the share solved.",
        _habits,
        "habits/verification",
    ),
    (
        "Corrections",
        "Of the equations that were stated again otherwise: what became of them.",
        _corrections,
        "habits/incorrect_to_correct",
    ),
    ("Length", "Tokens that the model wrote in an episode.", _length, "tokens/mean"),
    ("Preference", "Beta times what training adds to the log-probability of an answer.", _preference, "rewards/chosen"),
    ("Distance", "Reverse KL to the teacher on held-out problems, 95%.", _distance, "eval/kl/episode_low"),
    ("Loss", "Negative log-likelihood of the answers.", _loss, "train_mean_nll"),
]
"""(title, what it shows, how it is drawn, the metric without which it is left out)"""

"""report.html: one self-contained page about a run, with pictures."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from veneer.store.files import veneer_home

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Records = Sequence[Mapping[str, Any]]


def render_report(title: str, summary: Mapping[str, Any], metrics: Records, config_toml: str) -> str:
    """HTML with inline SVG. Only pictures that the run has numbers for are drawn."""
    chosen = [(name, text, draw) for name, text, draw, needs in FIGURES if any(needs in m for m in metrics)]
    figures = [(name, text, _svg(lambda axes, draw=draw: draw(axes, metrics), "step")) for name, text, draw in chosen]
    scorecard = summary.get("scorecard")
    if scorecard is not None:
        text = "The share of problems that k tries solve, before and after training, 95%."
        figures.append(("pass@k", text, _svg(lambda axes: _pass_at_k(axes, scorecard["card"]["pass_at_k"]), "k")))
    template = jinja2.Template((Path(__file__).parent / "report.html.jinja").read_text(), autoescape=True)
    return template.render(title=title, summary=summary, figures=figures, config=config_toml)


def _svg(draw: Callable[[Axes], None], along: str) -> str:
    os.environ.setdefault("MPLCONFIGDIR", str(veneer_home() / "matplotlib"))  # its font cache belongs to our home too
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"svg.hashsalt": "veneer", "axes.spines.top": False, "axes.spines.right": False, "font.size": 9}):
        figure, axes = plt.subplots(figsize=(5.2, 2.6), layout="constrained")
        draw(axes)
        axes.set_xlabel(along)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
        plt.close(figure)
    return text.getvalue().partition("<svg")[1] + text.getvalue().partition("<svg")[2]


def _series(metrics: Records, key: str) -> tuple[list[int], list[float]]:
    chosen = [m for m in metrics if key in m]
    return [m["step"] for m in chosen], [m[key] for m in chosen]


def _reward(axes: Axes, metrics: Records) -> None:
    axes.plot(*_series(metrics, "reward/total"), color="#9ab", linewidth=1, label="training batches")
    steps, low = _series(metrics, "eval/reward_low")
    axes.fill_between(steps, low, _series(metrics, "eval/reward_high")[1], color="#06c", alpha=0.2, linewidth=0)
    axes.plot(*_series(metrics, "eval/reward"), color="#06c", marker="o", markersize=3, label="held out, 95%")
    axes.set_ylim(-0.02, 1.02)
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)


def _entropy(axes: Axes, metrics: Records) -> None:
    axes.plot(*_series(metrics, "optim/entropy"), color="#06c", linewidth=1)
    axes.set_ylabel("nats a token")
    axes.set_ylim(bottom=0)


def _groups(axes: Axes, metrics: Records) -> None:
    steps, mixed = _series(metrics, "by_group/frac_mixed")
    good, bad = _series(metrics, "by_group/frac_all_good")[1], _series(metrics, "by_group/frac_all_bad")[1]
    axes.stackplot(steps, mixed, good, bad, labels=["useful", "all solved", "none solved"], colors=["#06c", "#bcd", "#ccc"])
    axes.set_ylim(0, 1)
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)


def _bits(axes: Axes, metrics: Records) -> None:
    steps, bits = _series(metrics, "bits")
    axes.plot(steps, [sum(bits[: i + 1]) for i in range(len(bits))], color="#06c")
    axes.set_ylabel("bits so far")


def _habits(axes: Axes, metrics: Records) -> None:
    names = {"verification": "#06c", "backtracking": "#9ab", "correction": "#c60", "recovery": "#693"}
    for name, color in names.items():
        if any(f"habits/{name}" in m for m in metrics):
            axes.plot(*_series(metrics, f"habits/{name}"), color=color, linewidth=1, label=name)
    axes.set_ylim(-0.02, 1.02)
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, fontsize=7)


def _corrections(axes: Axes, metrics: Records) -> None:
    axes.plot(*_series(metrics, "habits/incorrect_to_correct"), color="#06c", linewidth=1, label="became correct")
    axes.plot(*_series(metrics, "habits/correct_to_incorrect"), color="#c33", linewidth=1, label="became incorrect")
    axes.set_ylim(-0.02, 1.02)
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)


def _length(axes: Axes, metrics: Records) -> None:
    axes.plot(*_series(metrics, "tokens/mean"), color="#06c", linewidth=1)
    axes.set_ylabel("tokens an episode")
    axes.set_ylim(bottom=0)


def _loss(axes: Axes, metrics: Records) -> None:
    axes.plot(*_series(metrics, "train_mean_nll"), color="#9ab", linewidth=1, label="training batches")
    axes.plot(*_series(metrics, "eval/mean_nll"), color="#06c", marker="o", markersize=3, label="held out")
    axes.set_ylabel("nats a token")
    axes.legend(frameon=False)


def _preference(axes: Axes, metrics: Records) -> None:
    for key, colour, label in (("rewards/chosen", "#06c", "chosen"), ("rewards/rejected", "#c60", "rejected")):
        axes.plot(*_series(metrics, key), color=colour, alpha=0.4, linewidth=1)
        axes.plot(*_series(metrics, f"eval/{key}"), color=colour, marker="o", markersize=3, label=f"{label}, held out")
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)


def _distance(axes: Axes, metrics: Records) -> None:
    steps, low = _series(metrics, "eval/kl/episode_low")
    axes.fill_between(steps, low, _series(metrics, "eval/kl/episode_high")[1], color="#06c", alpha=0.2, linewidth=0)
    axes.plot(*_series(metrics, "eval/kl/episode"), color="#06c", marker="o", markersize=3)
    axes.set_ylabel("nats an episode")


def _pass_at_k(axes: Axes, curve: Mapping[int, Any]) -> None:
    ks = [int(k) for k in curve]
    for side, colour, label in (("start", "#9ab", "before"), ("end", "#06c", "after")):
        means = [change[side] for change in curve.values()]
        axes.fill_between(ks, [m["low"] for m in means], [m["high"] for m in means], color=colour, alpha=0.2, linewidth=0)
        axes.plot(ks, [m["value"] for m in means], color=colour, marker="o", markersize=3, label=label)
    axes.set_xscale("log", base=2)
    axes.set_ylim(-0.02, 1.02)
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)


FIGURES: list[tuple[str, str, Callable[[Axes, Records], None], str]] = [
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

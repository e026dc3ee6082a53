"""The supervised recipes over several seeds, as a table in docs/supervised.md: about ten minutes of one CPU core.

    python recipes/supervised_seeds.py --seeds 0 1 2

Each run is `veneer train recipes/NAME.toml --json` in a process and a home of its own; scores are those of 256 held-out sums.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from typing import Any

from pages import ROOT, machine, rate, veneer, write_section

RECIPES = ("sft", "dpo", "rejection", "distill", "prompt_distillation", "sft_then_rl")


def measure(recipe: str, seed: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as home:
        document = veneer(home, "train", f"recipes/{recipe}.toml", "--set", f"seed={seed}")
        last = document.get("stages", [document])[-1]
        before = veneer(home, "eval", "--seed", seed)["solved"]
        after = last.get("reward_after") or veneer(home, "eval", "--seed", seed, "--adapter", last["adapter"])["solved"]
    beside = []
    if "reward_teacher" in last:
        beside.append(f"teacher {rate(last['reward_teacher'])}")
    if "kl_before" in last:
        beside.append(f"nats an episode {rate(last['kl_before'], '.2f')} -> {rate(last['kl_after'], '.2f')}")
    if "preferred_after" in last:
        beside.append(f"pairs preferred {rate(last['preferred_after'])}")
    if recipe == "sft_then_rl":
        beside.append(f"after SFT {rate(last['reward_before'])}")
    cells = (recipe, seed, rate(before), rate(after), "; ".join(beside))
    row = f"| {' | '.join(map(str, cells))} |"
    print(row, file=sys.stderr, flush=True)
    return {"row": row, "disjoint": before["high"] < after["low"]}


def section(found: list[dict[str, Any]]) -> str:
    lines = [
        "Written by `python recipes/supervised_seeds.py`: shares of 256 held-out sums that are solved, by the base and by the adapter,",
        "with 95% Wilson intervals. The seed fixes the adapter's start, the order of the rows, the training problems and every draw.",
        "",
        "| recipe | seed | before | after | beside |",
        "|---|---|---|---|---|",
        *(run["row"] for run in found),
        "",
        f"Intervals before and after are disjoint in {sum(run['disjoint'] for run in found)} of {len(found)} runs. {machine()}.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    seeds = parser.parse_args().seeds
    found = [measure(recipe, seed) for recipe in RECIPES for seed in seeds]
    write_section(ROOT / "docs/supervised.md", "## Measured", section(found))


if __name__ == "__main__":
    main()

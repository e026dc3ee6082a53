"""Every environment's recipe over several seeds, as a section of docs/results.md: about forty minutes of two CPU cores.

    make environments     # or: python recipes/environment_seeds.py --seeds 0 1 2 --recipes shop browse

Each run is `veneer train recipes/NAME.toml --json` in a process and a home of its own, two of them at a time, with the base's and the
adapter's mean rewards on the same held-out problems, which the seed does not change. Where a recipe begins with demonstrations, what
they left is told apart from the base.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pages import ROOT, machine, rate, veneer, write_section

RECIPES = ("sums", "sort", "reverse", "count", "math", "jsonl", "tools", "browse", "workflow", "shop")
SHOWN = ("code", "reasoning_gym")
"""These begin with demonstrations."""
PAGES = {
    "## Environments": (
        RECIPES,
        """Written by `make environments`: `veneer train recipes/NAME.toml`, rank 1 on all linear maps of veneer-nano. The seed fixes the
adapter's start, the training problems and every draw; held-out problems are the same for all seeds. Mean reward on them, which
is the share solved wherever a reward is 0 or 1, with 95% intervals: Wilson's there, the normal one for the shop.""",
    ),
    "## Environments that are shown first": (
        SHOWN,
        """Written by `make environments`: `veneer train recipes/NAME.toml`, rank 8. The base has never seen such a task; a short stage of
supervised training makes it possible, and *before* is what that left. Rewards alone make the difference from there to *after*.""",
    ),
}


def measure(recipe: str, seed: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as home:
        whole = veneer(home, "train", f"recipes/{recipe}.toml", "--set", f"seed={seed}")
        stages = whole.get("stages", [whole])
        document, seconds = stages[-1], sum(stage["seconds"] for stage in stages)
        base = "" if len(stages) == 1 else f" (base {rate(of_the_base(home, document, seed))})"
    before, after = document["reward_before"], document["reward_after"]
    unchanged = stages[0]["base_digest_before"] == document["base_digest_after"]
    cells = (recipe, document["env"], seed, rate(before) + base, rate(after), document["episodes"], f"{document['bits']:.0f}")
    cells += (f"{seconds:.0f}", "yes" if unchanged else "NO")
    row = f"| {' | '.join(map(str, cells))} |"
    print(row, file=sys.stderr, flush=True)
    return {"recipe": recipe, "row": row, "disjoint": before["high"] < after["low"], "seconds": seconds}


def of_the_base(home: str, document: dict[str, Any], seed: int) -> dict[str, Any]:
    """Its mean reward on the held-out problems of a run."""
    config = tomllib.loads((Path(document["run_folder"]) / "config.toml").read_text())
    env, arguments = config["env"], []
    for key, value in env["args"].items():
        arguments += ["--env-arg", f"{key}={value}"]
    return veneer(home, "eval", "--env", env["name"], *arguments, "--seed", seed, "--max-tokens", config["rl"]["max_tokens"])["reward"]


def section(text: str, found: list[dict[str, Any]], jobs: int) -> str:
    disjoint = sum(one["disjoint"] for one in found)
    lines = [
        text,
        "",
        "| recipe | environment | seed | before | after | episodes | bits | seconds | base unchanged |",
        "|---|---|---|---|---|---|---|---|---|",
        *(one["row"] for one in found),
        "",
        f"Intervals before and after are disjoint in {disjoint} of {len(found)} runs; the slowest took "
        f"{max(one['seconds'] for one in found):.0f} seconds, with {jobs} at a time.",
        f"{machine()}.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipes", nargs="+", choices=RECIPES + SHOWN, default=RECIPES + SHOWN)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one thread")
    args = parser.parse_args()
    arms = [(recipe, seed) for recipe in args.recipes for seed in args.seeds]
    with ThreadPoolExecutor(args.jobs) as pool:
        found = list(pool.map(lambda arm: measure(*arm), arms))
    for title, (recipes, text) in PAGES.items():
        if set(recipes) <= set(args.recipes):  # a part is printed, and the page stays whole
            own = [one for one in found if one["recipe"] in recipes]
            write_section(ROOT / "docs/results.md", title, section(text, own, args.jobs))


if __name__ == "__main__":
    main()

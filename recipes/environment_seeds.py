"""Every environment's recipe over several seeds, as a section of docs/results.md: about forty minutes of two CPU cores.

    make environments     # or: python recipes/environment_seeds.py --seeds 0 1 2 --recipes shop browse

Each run is `veneer train recipes/NAME.toml --json` in a process and a home of its own, two of them at a time, with the base's and the
adapter's scores on the same held-out problems, which the seed does not change. Where an environment gives parts of a reward the score is
the mean reward, else the share solved.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "docs/results.md"
TITLE = "## Environments"
RECIPES = ("sums", "sort", "reverse", "count", "math", "jsonl", "tools", "browse", "workflow", "shop")
GRADED = ("shop",)
"""Whose score is the mean reward."""


def measure(recipe: str, seed: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "veneer", "train", f"recipes/{recipe}.toml", "--set", f"seed={seed}", "--json"]
    with tempfile.TemporaryDirectory() as home:
        done = subprocess.run(command, cwd=ROOT, env=os.environ | {"VENEER_HOME": home}, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed: {done.stdout}")
    document = json.loads(done.stdout)
    kind = "mean_reward" if recipe in GRADED else "reward"
    before, after = document[f"{kind}_before"], document[f"{kind}_after"]
    unchanged = document["base_digest_before"] == document["base_digest_after"]
    cells = (recipe, document["env"], seed, rate(before), rate(after), document["episodes"], f"{document['bits']:.0f}")
    cells += (f"{document['seconds']:.0f}", "yes" if unchanged else "NO")
    row = f"| {' | '.join(map(str, cells))} |"
    print(row, file=sys.stderr, flush=True)
    return {"row": row, "disjoint": before["high"] < after["low"], "seconds": document["seconds"]}


def rate(r: dict[str, float]) -> str:
    return f"{r['value']:.3f} [{r['low']:.3f}, {r['high']:.3f}]"


def section(found: list[dict[str, Any]], jobs: int) -> str:
    disjoint = sum(one["disjoint"] for one in found)
    lines = [
        TITLE,
        "",
        "Written by `make environments`: `veneer train recipes/NAME.toml`, rank 1 on all linear maps of veneer-nano. The seed fixes the",
        "adapter's start, the training problems and every draw; held-out problems are the same for all seeds. Share of held-out problems",
        f"solved, for {' and '.join(GRADED)} the mean reward, with 95% intervals (Wilson's, and the normal one for the mean).",
        "",
        "| recipe | environment | seed | before | after | episodes | bits | seconds | base unchanged |",
        "|---|---|---|---|---|---|---|---|---|",
        *(one["row"] for one in found),
        "",
        f"Intervals before and after are disjoint in {disjoint} of {len(found)} runs; the slowest took "
        f"{max(one['seconds'] for one in found):.0f} seconds, with {jobs} at a time.",
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {datetime.date.today().isoformat()}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one thread")
    args = parser.parse_args()
    arms = [(recipe, seed) for recipe in args.recipes for seed in args.seeds]
    with ThreadPoolExecutor(args.jobs) as pool:
        found = list(pool.map(lambda arm: measure(*arm), arms))
    if tuple(args.recipes) != RECIPES:
        return  # a part is printed, and the page stays whole
    before, _, behind = TARGET.read_text().partition(f"\n{TITLE}\n")
    after = behind.partition("\n## ")[2]
    TARGET.write_text(before.rstrip() + "\n\n" + section(found, args.jobs) + (f"\n## {after}" if after else ""))


if __name__ == "__main__":
    main()

"""The quickstart over several seeds, as a table in docs/results.md: eight minutes of one CPU core.

    make seeds            # or: python recipes/quickstart_seeds.py --seeds 0 1 2 3 4

Each seed is `veneer quickstart --json` in a process and a home of its own; the peak memory is that process's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from typing import Any

from pages import ROOT, machine, rate

TARGET = ROOT / "docs/results.md"


def quickstart(seed: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as home:
        command = [sys.executable, "-m", "veneer", "quickstart", "--seed", str(seed), "--json"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"VENEER_HOME": home}, text=True)
        assert process.stdout is not None
        document = json.loads(process.stdout.read())
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            sys.exit(f"seed {seed} failed: {document}")
        return document | {"seed": seed, "peak_mb": usage.ru_maxrss / 1024}


def page(runs: list[dict[str, Any]]) -> str:
    lines = [
        "# Results",
        "",
        f"Written by `make seeds`. Rank 1 on all linear maps of veneer-nano, sums of three to five numbers, {runs[0]['steps']} steps of",
        "8 problems x 8 episodes, learning rate 1.5e-3. The seed fixes the adapter's start, the training problems and every draw; the",
        f"{runs[0]['reward_before']['trials']} held-out problems are the same for all. 95% Wilson intervals. Stepwise and self-corrected",
        "are shares of all held-out answers.",
        "",
        "| seed | before | after | stepwise | self-corrected | bits | base unchanged | seconds | peak MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in runs:
        stepwise = f"{r['stepwise_before']:.2f} -> {r['stepwise_after']:.2f}"
        corrected = f"{r['self_corrected_before']:.3f} -> {r['self_corrected_after']:.3f}"
        unchanged = "yes" if r["base_unchanged"] and r["base_digest_before"] == r["base_digest_after"] else "NO"
        cells = (r["seed"], rate(r["reward_before"]), rate(r["reward_after"]), stepwise, corrected, f"{r['bits']:.0f}", unchanged)
        lines.append("| " + " | ".join(str(c) for c in (*cells, f"{r['seconds']:.0f}", f"{r['peak_mb']:.0f}")) + " |")
    disjoint = sum(r["reward_before"]["high"] < r["reward_after"]["low"] for r in runs)
    lines += [
        "",
        f"Intervals before and after are disjoint for {disjoint} of {len(runs)} seeds; the lowest score after is "
        f"{min(r['reward_after']['value'] for r in runs):.3f}, the highest before {max(r['reward_before']['value'] for r in runs):.3f}.",
        f"{machine()}.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    args = parser.parse_args()
    runs = []
    for seed in args.seeds:
        runs.append(quickstart(seed))
        print(f"seed {seed}: {rate(runs[-1]['reward_before'])} -> {rate(runs[-1]['reward_after'])}, {runs[-1]['seconds']} s", flush=True)
    _, section, others = TARGET.read_text().partition("\n## ")
    TARGET.write_text(page(runs) + section + others)


if __name__ == "__main__":
    main()

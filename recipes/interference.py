"""Three behaviours, alone and stacked, on each other's tasks: a section and a picture in docs/. About three minutes of one CPU core.

    make interference     # or: python recipes/interference.py

Trains an adapter on sums, one on sorting and one on counting, as recipes/sums.toml says but for the environment, and then runs
`veneer adapters interfere` on the three, once with whole stacks and once with stacks of halves.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from pages import ROOT, machine, veneer, write_section

TARGET, PICTURE = ROOT / "docs/results.md", ROOT / "docs/interference.svg"
BEHAVIOURS = {"sums": "arithmetic", "sorting": "sort", "counting": "count"}
SCALES = (1.0, 0.5)


def section(runs: list[dict[str, Any]], matrices: list[tuple[dict[str, Any], str]], seconds: float) -> str:
    first = matrices[0][0]
    steps = ", ".join(f"{run['adapter']} {run['steps']}" for run in runs)
    lines = [
        "Written by `make interference`. Three adapters of rank 1, each trained on one task of veneer-nano",
        f"(steps: {steps}), alone and stacked in pairs, on the {first['problems']} held-out problems of every",
        "task: the same problems and the same draws for all arms.",
        "95% intervals: Wilson's for shares, Agresti and Min's for differences of pairs. A difference is called none if the interval",
        "leaves no room for a loss of 0.05.",
        "",
    ]
    for document, table in matrices:
        what = "The whole of both" if document["scale"] == 1 else f"Each with scale {document['scale']:g}"
        picture = ["![the first matrix as a picture](interference.svg)", ""] if document is first else []
        lines += [f"{what} in a stack:", "", table, *picture]
    return "\n".join([*lines, f"{machine()}, {seconds:.0f} seconds."])


def main() -> None:
    clock = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        recipe = str(ROOT / "recipes/sums.toml")
        runs = [veneer(home, "train", recipe, "--set", f"name={n}", "--set", f"env.name={env}") for n, env in BEHAVIOURS.items()]
        matrices = []
        for scale in SCALES:
            document = veneer(home, "adapters", "interfere", *BEHAVIOURS, "--scale", str(scale))
            matrices.append((document, (Path(document["folder"]) / "matrix.md").read_text()))
            if scale == SCALES[0]:
                shutil.copyfile(Path(document["folder"]) / "matrix.svg", PICTURE)
    write_section(TARGET, "## Interference", section(runs, matrices, time.perf_counter() - clock))


if __name__ == "__main__":
    main()

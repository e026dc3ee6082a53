"""The report's pictures: numbers stand where the SVG has them, and a pointer in a real browser reads them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from veneer.train.plot import Plot, make_picture
from veneer.train.report import render_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
METRICS = [{"step": 0, "eval/reward": 0.25, "eval/reward_low": 0.2, "eval/reward_high": 0.3}]
for number in range(1, 9):
    METRICS.append(
        {"step": number, "reward/total": number / 10, "bits": 3.5 * number, "optim/entropy": 1 / number, "tokens/mean": 12.0 + number}
        | {"by_group/frac_mixed": 0.5, "by_group/frac_all_good": 0.3, "by_group/frac_all_bad": 0.2}
    )
METRICS[-1] |= {"eval/reward": 0.75, "eval/reward_low": 0.7, "eval/reward_high": 0.8}


def page(**summary: Any) -> str:
    return render_report("Run <small>", {"kind": "rl", **summary}, METRICS, "[rl]\nsteps = 8\n")


def test_points_are_where_the_picture_has_them() -> None:
    """By the path that matplotlib wrote."""
    x, y = [1, 3, 7, 20], [0.5, 0.25, 0.75, 0.6]

    def draw(plot: Plot) -> None:
        plot.line(x, y, "#010203", "one")
        plot.axes.set_xscale("log", base=2)

    picture = make_picture(draw, "k")
    (drawn,) = re.findall(r'<path d="(M [^"]*)"[^>]*style="[^"]*stroke: #010203', picture.svg)
    theirs = [tuple(map(float, pair)) for pair in re.findall(r"[ML] ([\d.]+) ([\d.]+)", drawn)]
    numbers = json.loads(picture.numbers)
    ((points),) = [series["points"] for series in numbers["series"]]
    assert [(a, b) for a, b, _, _ in points] == list(zip(x, y, strict=True))
    for (left, top), point in zip(theirs, points, strict=True):
        assert (point[2], point[3]) == pytest.approx((left, top), abs=0.06)
    assert picture == make_picture(draw, "k")


def test_a_stack_tells_heights_and_stands_on_tops() -> None:
    picture = make_picture(lambda plot: plot.stack([0, 1], [("a", "#111111", [0.2, 0.4]), ("b", "#222222", [0.5, 0.1])]), "step")
    a, b = json.loads(picture.numbers)["series"]
    assert [point[1] for point in b["points"]] == [0.5, 0.1]
    assert b["points"][0][3] < a["points"][0][3]  # further up


def test_no_text_ends_the_script() -> None:
    picture = make_picture(lambda plot: plot.line([0, 1], [0, 1], "#111111", "</script><b>"), "step")
    assert "</script>" not in picture.numbers
    assert json.loads(picture.numbers)["series"][0]["label"] == "</script><b>"
    assert "<title>Run &lt;small&gt;</title>" in page()


def test_the_page_needs_nothing_else() -> None:
    text = page()
    assert not re.findall(r"""(?:src|href)=["'](?!#)""", text)
    assert "@import" not in text
    assert text.count("<figure>") == text.count('type="application/json"') == 5


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_pointer_reads_the_numbers(tmp_path: Path) -> None:
    """Over the reward at its right end: the last step's numbers, there and in the picture of bits; nothing when it leaves."""
    move = """<script>
    const svg = document.querySelector("svg"), box = svg.getBoundingClientRect();
    const at = {clientX: box.right - 12, clientY: box.top + box.height / 2, bubbles: true};
    svg.dispatchEvent(new PointerEvent("pointermove", at));
    document.title = [...document.querySelectorAll("output")].map(output => output.innerText).join("|");
    svg.dispatchEvent(new PointerEvent("pointerleave", at));
    document.title += "|left:" + [...document.querySelectorAll("output, svg circle")].map(element => element.textContent).join("");
    </script>"""
    path = tmp_path / "report.html"
    path.write_text(page().replace("</body>", f"{move}</body>"))
    command = [
        str(CHROMIUM),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom",
        path.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (title,) = re.findall(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    shown, _, left = title.partition("|left:")
    assert left == ""
    reward, groups, bits, *_ = (" ".join(part.split()) for part in shown.split("|"))
    assert reward == "step 8 training batches: 0.800 held out, 95%: 0.750"
    assert groups == "step 8 useful: 0.500 all solved: 0.300 none solved: 0.200"
    assert bits == f"step 8 bits so far: {sum(3.5 * n for n in range(1, 9)):.0f}"

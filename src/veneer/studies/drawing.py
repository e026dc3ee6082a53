"""A picture as an SVG file that is the same for the same numbers."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from veneer.store.files import veneer_home

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@contextmanager
def picture(path: Path, width: float, height: float) -> Generator[Figure, None, None]:
    """A figure of so many inches to draw in, which is written behind the block."""
    os.environ.setdefault("MPLCONFIGDIR", str(veneer_home() / "matplotlib"))  # its font cache belongs to our home too
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "veneer", "axes.spines.top": False, "axes.spines.right": False, "font.size": 9}):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        figure.savefig(path, format="svg", metadata={"Date": None})


def across_learning_rates(axes: Axes) -> None:
    """Names the axis, on a logarithmic scale with marks at 1 and 3 of each power of ten: matplotlib's own run into each other."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda rate, _: f"{rate:g}")
    axes.set_xlabel("learning rate")

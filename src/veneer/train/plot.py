"""A picture for a page: SVG that anybody can see, and beside it where its numbers stand, so that a pointer can read them."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from veneer.store.files import veneer_home

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT = 5.2, 2.6
"""Inches."""
POINTS = 72
"""Units of the SVG an inch."""


@dataclass(frozen=True)
class Series:
    """Numbers that a pointer reads."""

    label: str
    colour: str
    x: Sequence[float]
    y: Sequence[float]
    at: Sequence[float]
    """Where on the picture's y-axis each stands: itself, or the top of its layer in a stack."""


@dataclass
class Plot:
    """What a picture is drawn with."""

    axes: Axes
    series: list[Series] = field(default_factory=list[Series])

    def line(self, x: Sequence[float], y: Sequence[float], colour: str, label: str, **style: Any) -> None:
        """``label``: also what the pointer calls it."""
        self.axes.plot(x, y, color=colour, label=label, linewidth=style.pop("linewidth", 1), **style)
        self.series.append(Series(label, colour, x, y, y))

    def dots(self, x: Sequence[float], y: Sequence[float], colour: str, label: str) -> None:
        self.line(x, y, colour, label, marker="o", markersize=3, linewidth=1.5)

    def band(self, x: Sequence[float], low: Sequence[float], high: Sequence[float], colour: str) -> None:
        self.axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)

    def stack(self, x: Sequence[float], layers: Sequence[tuple[str, str, Sequence[float]]]) -> None:
        """``layers``: label, colour and heights, from below."""
        self.axes.stackplot(x, *(y for _, _, y in layers), labels=[name for name, _, _ in layers], colors=[c for _, c, _ in layers])
        tops = [0.0] * len(x)
        for label, colour, y in layers:
            tops = [top + height for top, height in zip(tops, y, strict=True)]
            self.series.append(Series(label, colour, x, y, tops))

    def legend(self, columns: int) -> None:
        self.axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=columns, fontsize=9 if columns < 4 else 7)


@dataclass(frozen=True)
class Picture:
    svg: str
    numbers: str
    """JSON for the page's script: what runs along the x-axis, and of each series its label, colour and points [x, y, left, top], the last
    two in the SVG's units. No text in it can end a script element."""


def make_picture(draw: Callable[[Plot], None], along: str) -> Picture:
    """The same numbers give the same bytes."""
    os.environ.setdefault("MPLCONFIGDIR", str(veneer_home() / "matplotlib"))  # its font cache belongs to our home too
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "veneer", "axes.spines.top": False, "axes.spines.right": False, "font.size": 9}):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        plot = Plot(figure.subplots())
        draw(plot)
        plot.axes.set_xlabel(along)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})  # lays it out, too
    svg = text.getvalue()
    numbers = {"along": along, "series": [_placed(plot.axes, series) for series in plot.series]}
    return Picture(svg[svg.index("<svg") :], json.dumps(numbers).replace("<", "\\u003c"))


def _placed(axes: Axes, series: Series) -> dict[str, Any]:
    scale = POINTS / axes.figure.dpi
    found = []
    for x, y, at in zip(series.x, series.y, series.at, strict=True):
        left, bottom = axes.transData.transform((x, at))
        found.append([x, y, round(left * scale, 1), round(HEIGHT * POINTS - bottom * scale, 1)])
    return {"label": series.label, "colour": series.colour, "points": found}

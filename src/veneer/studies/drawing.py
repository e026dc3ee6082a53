"""A picture as an SVG file that is the same for the same numbers."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from veneer.store.files import veneer_home

if TYPE_CHECKING:
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

"""docs/serving.md: what it shows works as shown."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import httpx2
from serving import Serving

PAGE = (Path(__file__).parents[3] / "docs/serving.md").read_text()


def test_the_examples_run(server: Serving) -> None:
    """One after the other, on a server with two adapters."""
    for name, seed in (("reasoning", 1), ("terse", 2)):
        server.put(name, seed, size=0.05)
    shown: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(block.replace("http://127.0.0.1:8321", server.url), shown)
    assert [adapter["name"] for adapter in shown["told"].veneer["adapters"]] == ["reasoning"]
    assert [adapter["scale"] for adapter in shown["both"].veneer["adapters"]] == [0.7, 0.3]
    assert shown["quick"].choices[0].veneer["switches"][0]["adapters"][0]["name"] == "terse"


def test_the_page_names_every_route(server: Serving) -> None:
    """What manages adapters stands in its table, and what stands there exists."""
    paths = httpx2.get(f"{server.url}/openapi.json").json()["paths"]
    managing = {path.replace("{name}", "NAME") for path in paths if path.startswith("/v1/") and "adapter" in path}
    assert set(re.findall(r"`(?:GET|POST|DELETE) (/v1/[A-Za-z_/]+)", PAGE)) == managing

"""The house: imports point down. The table is DESIGN.md's; this walks every module and enforces it."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[1] / "src" / "veneer"
LAYERS = {
    **{"types": 0, "digest": 0, "jsonl": 0, "turns": 0, "shapes": 0, "assets": 0},
    **{"render": 1, "engine": 1, "store": 1},
    **{"envs": 2},
    **{"train": 3, "measure": 3, "studies": 3},
    **{"server": 4, "cluster": 4, "cli": 5, "__main__": 6, "__init__": 0},
}
NEVER = {"train": {"engine"}, "measure": {"engine"}, "studies": {"engine"}, "server": {"train"}}
ONLY_IN = {"torch": {"engine", "cluster"}, "transformers": {"engine", "cluster", "render"}, "peft": set()}
STOCK = "veneer.engine.stock"
"""A program of its own: it may import PEFT when it runs, and nothing of ours ever."""
LIGHT = {"types", "digest", "jsonl", "turns", "shapes"}
"""Modules with the standard library, numpy and veneer's L0 alone."""
ASSEMBLERS = {"assemble", "hosting", "loops", "sides"}
"""Modules of cli that bring everything together, and are imported by verbs inside functions."""
CLI_TOP = {"veneer.cli.lazy", "veneer.cli.output", "veneer.types"}
"""What a verb's module may import of veneer before it is called."""


@dataclass(frozen=True)
class Import:
    module: str
    line: int
    in_function: bool


def imports(tree: ast.Module, package: str) -> Iterator[Import]:
    """Every import, and whether it waits for a function to be called. Relative ones are resolved against ``package``."""

    def walk(node: ast.AST, in_function: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(alias.name, child.lineno, in_function)
            elif isinstance(child, ast.ImportFrom):
                parents = package.split(".")
                prefix = ".".join(parents[: len(parents) - child.level + 1]) if child.level else ""
                module = ".".join(part for part in (prefix, child.module or "") if part)
                names = [f"{module}.{alias.name}" for alias in child.names] if module == "veneer" else [module]
                for name in names:
                    yield Import(name, child.lineno, in_function)
            else:
                inside = in_function or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                if not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
                    yield from walk(child, inside)

    yield from walk(tree, False)


def violations(source: str, module: str) -> list[str]:
    """What ``module`` ("veneer.train.rl") imports and must not, in words."""
    parts = module.split(".")
    home = parts[1] if len(parts) > 1 else "__init__"
    if home not in LAYERS:
        return [f"{module}: {home} is no part of the house"]
    package = module if parts[-1] == "__init__" else module.rpartition(".")[0]
    found = []
    for entry in imports(ast.parse(source), package.removesuffix(".__init__")):
        top, *rest = entry.module.split(".")
        where = f"{module}:{entry.line} imports {entry.module}"
        if top in ONLY_IN and home not in ONLY_IN[top] and not (module == STOCK and top == "peft" and entry.in_function):
            found.append(f"{where}: only {sorted(ONLY_IN[top])} may")
        if home in LIGHT and top not in {"numpy", "veneer"} and top not in sys.stdlib_module_names:
            found.append(f"{where}: {home} is to stay light")
        if top != "veneer":
            continue
        if module == STOCK:
            found.append(f"{where}: it is to be stock")
        target = rest[0] if rest else "__init__"
        if target not in LAYERS:
            found.append(f"{where}: {target} is no part of the house")
            continue
        same_floor = LAYERS[target] == LAYERS[home] and LAYERS[home] not in (0, 3)
        if target != home and (LAYERS[target] > LAYERS[home] or same_floor):
            found.append(f"{where}: L{LAYERS[home]} may not import L{LAYERS[target]}")
        if target in NEVER.get(home, ()):
            found.append(f"{where}: {home} never imports {target}")
        if home == "cli" and parts[-1] not in ASSEMBLERS and not entry.in_function and entry.module not in CLI_TOP:
            found.append(f"{where}: only inside functions")
    return found


def module_of(path: Path) -> str:
    return ".".join(("veneer", *path.relative_to(SRC).with_suffix("").parts))


MODULES = sorted(SRC.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=module_of)
def test_imports_point_down(path: Path) -> None:
    """A shortcut between floors costs every reader from then on."""
    assert violations(path.read_text(), module_of(path)) == []


def test_all_of_the_house_is_walked() -> None:
    """An empty walk would pass."""
    assert {"veneer.types", "veneer.engine.engine", "veneer.train.rl", "veneer.cli.main", "veneer.store.run"} <= {
        module_of(p) for p in MODULES
    }


@pytest.mark.parametrize(
    ("source", "module", "words"),
    [
        ("import torch", "veneer.train.rl", "only ['cluster', 'engine'] may"),
        ("def f():\n    import torch.nn as nn", "veneer.measure.bits", "only ['cluster', 'engine'] may"),
        ("from transformers import AutoTokenizer", "veneer.envs.digits", "may"),
        ("from veneer.engine import LoraEngine", "veneer.train.rl", "train never imports engine"),
        ("class A:\n    def f(self):\n        from veneer import engine", "veneer.studies.rank", "studies never imports engine"),
        ("from veneer.store.run import Run", "veneer.render.renderer", "L1 may not import L1"),
        ("from ..engine import base", "veneer.store.run", "L1 may not import L1"),
        ("from veneer.train import rl", "veneer.envs.dataset", "L2 may not import L3"),
        ("from veneer.cli import output", "veneer.train.rl", "L3 may not import L5"),
        ("from veneer.cli.assemble import start", "veneer.server.http", "L4 may not import L5"),
        ("from veneer.train import rl", "veneer.server.http", "server never imports train"),
        ("import safetensors", "veneer.types", "is to stay light"),
        ("from veneer.store import run", "veneer.digest", "L0 may not import L1"),
        ("from veneer.cli.assemble import start", "veneer.cli.train", "only inside functions"),
        ("if True:\n    from veneer.envs import load_env", "veneer.cli.eval", "only inside functions"),
        ("import veneer.magic", "veneer.train.rl", "no part of the house"),
        ("import peft", "veneer.engine.lora", "only [] may"),
        ("def f():\n    import peft", "veneer.engine.lora", "only [] may"),
        ("from peft import PeftModel", "veneer.engine.stock", "only [] may"),
        ("from veneer.types import Tokens", "veneer.engine.stock", "it is to be stock"),
        ("", "veneer.utils", "no part of the house"),
    ],
)
def test_the_walk_can_fail(source: str, module: str, words: str) -> None:
    """Each rule, broken."""
    found = violations(source, module)
    assert len(found) >= 1
    assert any(words in line for line in found)


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("import torch", "veneer.engine.lora"),
        ("from transformers import AutoTokenizer", "veneer.render.renderer"),
        ("from veneer.measure.bits import reward_bits", "veneer.train.rl"),
        ("from veneer.store.run import Run", "veneer.train.session"),
        ("from veneer.train.datums import Datum", "veneer.train.rl"),
        ("from . import datums", "veneer.train.rl"),
        ("import numpy as np\nimport json\nfrom veneer import assets", "veneer.types"),
        ("def f():\n    from veneer.cli.assemble import start", "veneer.cli.train"),
        ("from veneer.engine import LoraEngine", "veneer.cli.assemble"),
        ("import torch\ndef f():\n    from peft import PeftModel", "veneer.engine.stock"),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from veneer.engine import LoraEngine", "veneer.train.rl"),
    ],
)
def test_the_walk_lets_good_imports_through(source: str, module: str) -> None:
    """Each rule, kept."""
    assert violations(source, module) == []

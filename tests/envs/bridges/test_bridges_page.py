"""docs/bridges.md: its files are accepted as they stand, its tables name every argument, and its OpenEnv example runs."""

from __future__ import annotations

import inspect
import json
import re
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from playing import REAL
from real import ROOT, python_of

from veneer.envs.bridges.openenv import openenv
from veneer.envs.bridges.verifiers import verifiers
from veneer.train.config import make_config

PAGE = (ROOT / "docs/bridges.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_the_runs_on_the_page_are_configurations() -> None:
    """Every key is one, and every argument is taken by its environment."""
    for text, factory in zip(blocks("toml"), (verifiers, openenv), strict=True):
        config = make_config(tomllib.loads(text))
        assert config.env.name.startswith(f"{factory.__name__}:")
        inspect.signature(factory).bind("identity", **config.env.args)


def test_the_tables_name_every_argument_and_its_default() -> None:
    """In the order of the signature."""
    tables = re.findall(r"\| `env.args` \| \| \|\n\|---\|---\|---\|\n((?:\|.*\n)+)", PAGE)
    for table, factory in zip(tables, (verifiers, openenv), strict=True):
        rows = dict(re.findall(r"\| `(\w+)` \| (.*?) \|", table))
        parameters = list(inspect.signature(factory).parameters.values())[1:]
        assert set(rows) == {p.name for p in parameters}
        for parameter in parameters:
            if isinstance(parameter.default, int | float):
                assert rows[parameter.name] == f"{parameter.default:g}"


@REAL
@pytest.mark.parametrize("flavour", ["openenv", "openenv-core"])
def test_veneer_trains_on_the_server_of_the_page(tmp_path: Path, flavour: str) -> None:
    """The server as shown, the run as shown, the real command."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    (tmp_path / "server.py").write_text(blocks("python")[0])
    (tmp_path / "digits.toml").write_text(blocks("toml")[1].replace(":8000", f":{port}"))
    command = [str(python_of(flavour)), "-m", "uvicorn", "server:app", "--port", str(port), "--log-level", "error"]
    with subprocess.Popen(command, cwd=tmp_path) as server:
        try:
            until = time.monotonic() + 120
            while socket.socket().connect_ex(("127.0.0.1", port)):
                assert server.poll() is None
                assert time.monotonic() < until
                time.sleep(0.2)
            train = [sys.executable, "-m", "veneer", "train", "digits.toml", "--json", "--set", f"folder={tmp_path}/run"]
            done = subprocess.run(train, cwd=tmp_path, capture_output=True, text=True, timeout=600)
        finally:
            server.kill()
    assert done.returncode == 0, done.stderr
    steps = [line for line in map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines()) if line["step"]]
    assert [line["failed"] for line in steps] == [0, 0]
    assert all("env/all/invalid_actions" in line for line in steps)

"""docs/tools.md is executed: what it shows is what there is."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from dataclasses import asdict
from pathlib import Path

import pytest

from veneer.envs import load_env
from veneer.envs.tools.mcp_client import LONGEST, McpSettings, read_settings
from veneer.envs.tools.sandbox import Limits, Sandbox
from veneer.train.config import make_config
from veneer.types import ConfigError

PAGE = (Path(__file__).parents[1] / "docs/tools.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_configurations_are_valid_and_load() -> None:
    """Each block of TOML; without bubblewrap with the flag that the page names, and without the servers that are not there."""
    seen = []
    for block in blocks("toml"):
        config = make_config(tomllib.loads(block))
        servers = [read_settings(each) for each in config.env.args.get("mcp", ())]
        args = {key: value for key, value in config.env.args.items() if key != "mcp"} | {"unsafe_no_sandbox": True}
        seen.append((load_env(config.env.name, args).name, [bool(server.command) for server in servers]))
    assert seen == [("tools", []), ("tools", [True, False]), ("code", [])]


@pytest.mark.parametrize(("block", "name"), [(0, "tools"), (1, "code")])
def test_rows_are_taken(tmp_path: Path, block: int, name: str) -> None:
    """The lines as shown, and enough of their like that both splits have some."""
    shown = blocks("jsonl")[block].splitlines()
    more = [line.replace('"prompt": "', f'"prompt": "{n} ') for n in range(20) for line in shown]
    (tmp_path / "data.jsonl").write_text("\n".join([*shown, *more]))
    load_env(name, {"data": str(tmp_path / "data.jsonl"), "unsafe_no_sandbox": True})


def test_python_examples_run() -> None:
    tool, sandbox = blocks("python")
    done = subprocess.run([sys.executable, "-c", tool], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("7.0\n", "")
    try:
        Sandbox()
    except ConfigError as error:
        pytest.skip(str(error))
    done = subprocess.run([sys.executable, "-c", sandbox], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("0 45\n None\n", "")


def test_numbers_are_those_of_the_code() -> None:
    """Limits and their defaults, each in its row."""
    rows = dict(re.findall(r"^\| `(\w+)` \| ([\d.]+) \|", PAGE, re.MULTILINE))
    assert rows == {name: str(value) for name, value in asdict(Limits()).items()}
    assert f"{LONGEST:,} characters" in PAGE
    assert f"`seconds` ({McpSettings(url='x').seconds:g})" in PAGE

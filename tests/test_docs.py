"""README, docs and recipes are executed: what they show works as shown."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


def veneer(arguments: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "veneer", *arguments], cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("page", ["README.md", "docs/registry.md", "docs/operating.md", "docs/proof.md"])
def test_the_console_session_works_line_by_line(tmp_path: Path, page: str) -> None:
    """A newcomer types a page's commands in order; training runs are cut to two steps."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    shown = "".join(blocks("console", (ROOT / page).read_text())).splitlines()
    lines = [line.partition(" #")[0].removeprefix("$ ").strip() for line in shown]
    assert len(lines) >= 4
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "veneer"
        arguments = [a.replace("rl.steps=40", "rl.steps=2") for a in arguments]
        done = veneer(arguments, tmp_path)
        assert done.returncode == 0, f"{line}\n{done.stderr}"


def test_python_examples_run(tmp_path: Path) -> None:
    """The environment example trains, and the library example samples."""
    environment, library = blocks("python")
    (tmp_path / "env.py").write_text(environment)
    (tmp_path / "mine.toml").write_text(
        '[env]\nname = "env.py:short_answers"\n[rl]\nsteps = 2\ngroups_per_batch = 2\n[eval]\nproblems = 8\n'
    )
    done = veneer(["train", "mine.toml"], tmp_path)
    assert done.returncode == 0, done.stderr
    done = subprocess.run([sys.executable, "-c", library], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Adapter(name='mine'" in done.stdout


ENVIRONMENTS = (ROOT / "docs/environments.md").read_text()


def files(page: str) -> dict[str, str]:
    """Blocks that say in which file they stand."""
    return dict(re.findall(r"```\w+ (\S+)\n(.*?)```", page, re.DOTALL))


def test_the_page_of_environments_works_line_by_line(tmp_path: Path) -> None:
    """Its files are laid down, but for the one that a command writes: that one is the page's, byte for byte."""
    shown = files(ENVIRONMENTS)
    for name, text in shown.items():
        if name != "digits.py":
            (tmp_path / name).write_text(text)
    lines = [line.partition(" #")[0].removeprefix("$ ").strip() for line in "".join(blocks("console", ENVIRONMENTS)).splitlines()]
    assert len(lines) >= 6
    for line in lines:
        arguments = [a.replace("rl.steps=40", "rl.steps=2") for a in shlex.split(line)[1:]]
        if arguments[0] == "train":
            arguments += ["--set", "eval.problems=8"]
        done = veneer(arguments, tmp_path)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    assert (tmp_path / "digits.py").read_text() == shown["digits.py"]
    assert len(shown["digits.py"].splitlines()) <= 65


def test_the_judge_of_the_page_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The configuration loads, and the table names every key with what it does."""
    from veneer.envs import load_env
    from veneer.envs.judge import JudgeSpec
    from veneer.train.config import load_config

    for name, text in files(ENVIRONMENTS).items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JUDGE_KEY", "sk-x")
    config = load_config(Path("judged.toml"))
    assert load_env(config.env.name, config.env.args).name == "jsonl"
    for name, info in JudgeSpec.model_fields.items():
        assert re.search(rf"^\| `{name}` \| [^|]* \| {re.escape(str(info.description))} \|$", ENVIRONMENTS, re.MULTILINE), name


def test_linked_files_exist() -> None:
    """No dead links in README and docs."""
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_architecture_names_real_files_and_functions() -> None:
    """The walk of one datum points at code that is there."""
    walk = (ROOT / "docs/architecture.md").read_text().partition("## The walk")[2]
    places = re.findall(r"`([a-z_]+/[a-z_]+\.py)(?:: ([A-Za-z_.]+))?`", walk)
    assert len(places) >= 12
    for file, name in places:
        source = (ROOT / "src/veneer" / file).read_text()
        assert not name or re.search(rf"(def|class) {name.split('.')[-1]}\b|^{name} =", source, re.MULTILINE), f"{file}: {name}"


def test_configuration_page_is_current() -> None:
    """docs/configuration.md is what recipes/config_docs.py writes."""
    spec = importlib.util.spec_from_file_location("config_docs", ROOT / "recipes/config_docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs/configuration.md").read_text() == module.page(), "run: python recipes/config_docs.py"


@pytest.mark.parametrize("recipe", sorted(p.name for p in (ROOT / "recipes").glob("*.toml")))
def test_recipes_are_valid_configurations(recipe: str) -> None:
    from veneer.train.config import load_config

    assert load_config(ROOT / "recipes" / recipe).name == recipe.removesuffix(".toml")


def test_version_and_readme_commands() -> None:
    """The two commands stand in the README and in the Makefile."""
    makefile = (ROOT / "Makefile").read_text()
    for target in ("quickstart", "test"):
        assert f"make {target}" in README
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)

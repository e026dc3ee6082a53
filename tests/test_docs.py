"""README, docs and recipes are executed: what they show works as shown."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

from processes import Veneer, forking_veneer

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


@pytest.fixture(scope="module")
def veneer(tmp_path_factory: pytest.TempPathFactory) -> Generator[Veneer, None, None]:
    with forking_veneer(tmp_path_factory.mktemp("veneer")) as veneer:
        yield veneer


PAGES = ("registry", "operating", "proof", "studies", "supervised", "measures", "plan")
SESSIONS = ("README.md", *(f"docs/{name}.md" for name in PAGES))


@pytest.mark.parametrize("page", SESSIONS)
def test_the_console_session_works_line_by_line(veneer: Veneer, home: Path, tmp_path: Path, page: str) -> None:
    """A newcomer types a page's commands in order; training runs are cut to two steps, those of a study to one small group."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    shown = "".join(blocks("console", (ROOT / page).read_text())).splitlines()
    lines = [line.partition(" #")[0].removeprefix("$ ").strip() for line in shown]
    assert len(lines) >= 3
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "veneer"
        arguments = [re.sub(r"steps=\d+$", "steps=2", a) for a in arguments]
        if arguments[:2] == ["study", "run"]:
            arguments += [f"--set={small}" for small in ("rl.groups_per_batch=1", "rl.group_size=2", "rl.max_tokens=8", "eval.problems=4")]
        done = veneer(home, *arguments, cwd=tmp_path)
        assert done.code == 0, f"{line}\n{done.err}"


def test_python_examples_run(veneer: Veneer, home: Path, tmp_path: Path) -> None:
    """The environment example trains, and the library example samples."""
    environment, library = blocks("python")
    (tmp_path / "env.py").write_text(environment)
    (tmp_path / "mine.toml").write_text(
        '[env]\nname = "env.py:short_answers"\n[rl]\nsteps = 2\ngroups_per_batch = 2\n[eval]\nproblems = 8\n'
    )
    trained = veneer(home, "train", "mine.toml", cwd=tmp_path)
    assert trained.code == 0, trained.err
    done = subprocess.run([sys.executable, "-c", library], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Adapter(name='mine'" in done.stdout


ENVIRONMENTS = (ROOT / "docs/environments.md").read_text()


def files(page: str) -> dict[str, str]:
    """Blocks that say in which file they stand."""
    return dict(re.findall(r"```\w+ (\S+)\n(.*?)```", page, re.DOTALL))


def test_the_page_of_environments_works_line_by_line(veneer: Veneer, home: Path, tmp_path: Path) -> None:
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
        done = veneer(home, *arguments, cwd=tmp_path)
        assert done.code == 0, f"{line}\n{done.out}{done.err}"
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
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
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
    from veneer.train.pipeline import load_stages

    path = ROOT / "recipes" / recipe
    stages = load_stages(path)
    assert len(stages) > 1 or load_config(path).name == recipe.removesuffix(".toml")
    for config in [stage.config for stage in stages] or [load_config(path)]:
        data = {"sft": config.sft.data, "dpo": config.dpo.data, "distill": config.distill.data}.get(config.kind)
        assert not data or (ROOT / data).is_file()


def test_toml_examples_are_valid_configurations(tmp_path: Path) -> None:
    """A pipeline that is copied from the page loads."""
    from veneer.train.pipeline import load_stages

    (example,) = blocks("toml", (ROOT / "docs/supervised.md").read_text())
    (tmp_path / "both.toml").write_text(example)
    assert [stage.config.name for stage in load_stages(tmp_path / "both.toml")] == ["both-sft", "both-rl"]


def test_version_and_readme_commands() -> None:
    """The two commands stand in the README and in the Makefile."""
    makefile = (ROOT / "Makefile").read_text()
    for target in ("quickstart", "test"):
        assert f"make {target}" in README
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)

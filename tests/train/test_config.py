"""Configuration: a mistake is named with its key and never ignored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from veneer.train.config import RunConfig, load_config, make_config
from veneer.types import ConfigError


def refuse(values: dict[str, Any], *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        make_config(values, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("values", "key", "nearest"),
    [
        ({"nam": "x"}, "nam", "name"),
        ({"sede": 1}, "sede", "seed"),
        ({"rl": {"stepps": 1}}, "rl.stepps", "rl.steps"),
        ({"rl": {"lr": 1}}, "rl.lr", None),
        ({"lora": {"ranks": 1}}, "lora.ranks", "lora.rank"),
        ({"rl": {"rank": 1}}, "rl.rank", "lora.rank"),
        ({"group_size": 4}, "group_size", "rl.group_size"),
        ({"learning_rate": 0.1}, "learning_rate", "rl.learning_rate"),
        ({"eval": {"data": "x"}}, "eval.data", "sft.data"),
        ({"trainer": {"steps": 1}}, "trainer", None),
    ],
)
def test_unknown_keys_name_the_nearest(values: dict[str, Any], key: str, nearest: str | None) -> None:
    """A typing mistake in a key would otherwise run the default for hours."""
    message = refuse(values)
    assert f"unknown key {key!r}" in message
    if nearest:
        assert f"did you mean {nearest!r}?" in message


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"lora": {"rank": 0}}, "lora.rank"),
        ({"lora": {"rank": 2.5}}, "lora.rank"),
        ({"lora": {"rank": "many"}}, "lora.rank"),
        ({"lora": {"alpha": 0}}, "lora.alpha"),
        ({"lora": {"target_modules": "q_proj"}}, "lora.target_modules"),
        ({"rl": {"group_size": 1}}, "rl.group_size"),
        ({"rl": {"steps": -1}}, "rl.steps"),
        ({"rl": {"learning_rate": float("nan")}}, "rl.learning_rate"),
        ({"rl": {"learning_rate": float("inf")}}, "rl.learning_rate"),
        ({"rl": {"learning_rate": -1e-3}}, "rl.learning_rate"),
        ({"rl": {"loss": "reinforce"}}, "rl.loss"),
        ({"rl": 3}, "rl"),
        ({"sft": {"held_out": 1.0}}, "sft.held_out"),
        ({"env": {"max_failed_share": 1.5}}, "env.max_failed_share"),
        ({"env": {"seconds": 0}}, "env.seconds"),
        ({"kind": "ppo"}, "kind"),
        ({"dpo": {"beta": 0}}, "dpo.beta"),
        ({"rejection": {"keep": 0}}, "rejection.keep"),
        ({"sft": {"train_on": "everything"}}, "sft.train_on"),
        ({"distill": {"top_k": 4}}, "distill"),
        ({"weights": "qlora"}, "weights"),
        ({"name": "../up"}, "name"),
        ({"name": "a b"}, "name"),
        ({"name": ""}, "name"),
        ({"threads": 0}, "threads"),
        ({"eval": {"problems": 0}}, "eval.problems"),
        ({"seed": "x"}, "seed"),
    ],
)
def test_bad_values_name_their_key(values: dict[str, Any], key: str) -> None:
    """What is wrong, where, in one line."""
    assert refuse(values).startswith(f"{key} = ")


def test_overrides() -> None:
    """Dots reach into sections; values are TOML, or plain text if they are not."""
    config = make_config(
        {"rl": {"steps": 5}},
        [
            "rl.steps=7",
            "rl.learning_rate = 1e-2",
            "name=my-run",
            "env.name=./my_env.py:make",
            "env.args.word='7'",
            "env.args.terms=3",
            'lora.target_modules=["q_proj", "v_proj"]',
            "lora.train_mlp=false",
            "rl.loss_config={clip_high_threshold = 1.3}",
            "rl.loss=ppo",
            "folder=/tmp/a=b",
        ],
    )
    assert (config.rl.steps, config.rl.learning_rate, config.name, config.env.name) == (7, 0.01, "my-run", "./my_env.py:make")
    assert config.env.args == {"word": "7", "terms": 3}
    assert config.lora.target_modules == ("q_proj", "v_proj")
    assert config.lora.train_mlp is False
    assert config.rl.loss_config == {"clip_high_threshold": 1.3}
    assert config.folder == "/tmp/a=b"
    assert make_config({}, ["rl.steps=1", "rl.steps=2"]).rl.steps == 2


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rl.steps", "KEY=VALUE"),
        ("rl.stps=1", "rl.steps"),
        ("name.x=1", "name"),
        ("rl.steps=", "rl.steps"),
        ("=1", "unknown key"),
        ("rl.steps.x=1", "rl.steps"),
    ],
)
def test_bad_overrides(override: str, words: str) -> None:
    """The same care for the command line as for the file."""
    assert words in refuse({"name": "x"}, override)


def test_overrides_leave_the_values_alone() -> None:
    """Two runs made from one dictionary must not see each other's overrides."""
    values: dict[str, Any] = {"rl": {"steps": 1}, "env": {"args": {"min_terms": 2}}}
    make_config(values, ["rl.steps=2", "env.args.min_terms=3", "env.args.max_terms=4"])
    assert values == {"rl": {"steps": 1}, "env": {"args": {"min_terms": 2}}}


def test_resolved_copy_reads_back_equal(tmp_path: Path) -> None:
    """The copy beside the results must make the same run again."""
    config = make_config(
        {
            "kind": "sft",
            "name": "x-1",
            "seed": 3,
            "sft": {"data": 'a "b"\\c\n.jsonl', "learning_rate": 1e-7},
            "lora": {"alpha": 0.1, "target_modules": ["q_proj"]},
        },
        ["rl.loss_config={beta = 0.1}", "env.args={word = 'é', deep = {list = [1, 2.5, true]}}"],
    )
    path = tmp_path / "other.toml"
    path.write_text(config.to_toml())
    again = load_config(path)
    assert again == config
    assert again.to_toml() == config.to_toml()
    assert "\nsteps = " in config.to_toml()  # the derived and defaulted keys are written out
    assert make_config({}) == RunConfig()


def test_name_is_the_files_unless_given(tmp_path: Path) -> None:
    """Two files must not train into one run."""
    path = tmp_path / "terse.toml"
    path.write_text("seed = 1\n")
    assert load_config(path).name == "terse"
    assert load_config(path, ["name=other"]).name == "other"
    path.write_text('name = "mine"\n')
    assert load_config(path).name == "mine"


@pytest.mark.parametrize("content", [None, b"rl.steps = = 3", b"\xff\xfe", b"[rl]\nsteps = 1\n[rl]\n", "folder"])
def test_missing_and_malformed_files(tmp_path: Path, content: bytes | str | None) -> None:
    """The file is named in one line."""
    path = tmp_path / "bad.toml"
    if content == "folder":
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"bad\.toml") as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


def test_lora_config() -> None:
    """The run's seed is the adapter's; full fine-tuning has no LoRA."""
    lora = make_config({"seed": 5, "lora": {"rank": 3}}).lora_config()
    assert lora is not None
    assert (lora.rank, lora.alpha, lora.seed) == (3, 32.0, 5)
    assert make_config({"weights": "full"}).lora_config() is None

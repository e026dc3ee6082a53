"""The ratio of best learning rates by width: powers from ratios of a known law, bases that are what they are said to be, and the whole."""

from __future__ import annotations

import asyncio
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from test_lab import lab, small
from transformers import AutoModelForCausalLM, AutoTokenizer

from veneer.assets import NANO, NANO_FOLDER
from veneer.engine import FullEngine, LoraEngine, load_base
from veneer.engine.counting import Bench
from veneer.engine.random_base import write_random
from veneer.render import load_renderer
from veneer.store.adapters import read_adapter
from veneer.studies import width
from veneer.studies.contest import Sweep, Terms
from veneer.studies.lab import Outcome, Place
from veneer.studies.width import Wide, powers, width_result
from veneer.train.config import RunConfig
from veneer.types import BaseError, ConfigError

SEEDS = 4


def opens(config: RunConfig) -> Place:
    base = load_base(config.base)
    return Place(LoraEngine(base) if config.weights == "lora" else FullEngine(base), load_renderer(config.base))


def swept(best: float, below: float) -> Sweep:
    """Rates around ``below`` times powers of two, whose loss is a parabola around ``best`` for every seed, a little aside in each."""
    tried = {}
    for rate in (below * 2**k for k in range(7)):
        offs = [math.log2(rate / best) + 0.02 * (-1) ** seed for seed in range(SEEDS)]
        metrics = [[{"eval/mean_nll": 2.0}, {"eval/mean_nll": 0.1 * off**2}] for off in offs]
        config = small(kind="sft", rl={})
        tried[rate] = [Outcome(config, Path(), lines, None, 1.0) for lines in metrics]
    return Sweep(tried, None, False)


def wide(size: int, ratio: float, edge: str | None = None) -> Wide:
    adapter, full = swept(2e-3, 2.5e-4), swept(2e-3 / ratio, 2e-3 / ratio / 8)
    return Wide(size, 0.5, 1.0, replace(adapter, edge=edge), full)


@pytest.mark.parametrize(
    ("power", "verdicts"), [(0.0, ["equal", "less"]), (0.4, ["equal", "less"]), (0.6, ["more", "equal"]), (1.0, ["more", "equal"])]
)
def test_a_power_is_found_again(power: float, verdicts: list[str]) -> None:
    found = [wide(size, 4 * (size / 64) ** power) for size in (64, 128, 256)]
    assert powers(found) == pytest.approx([power] * SEEDS, abs=0.05)
    result = width_result(found)
    told = [finding.verdict for finding in result.findings[:2]]
    assert told == verdicts
    assert [one["width"] for one in result.document["widths"]] == [64, 128, 256]


def test_ratios_are_compared_with_ten_and_edges_are_told() -> None:
    result = width_result([wide(64, 10.0), wide(128, 2.0, edge="highest"), wide(256, 80.0)])
    assert [finding.verdict for finding in result.findings[2:]] == ["equal", "lower", "higher"]
    assert [("the adapter, 128 wide, at the highest learning rate tried" in finding.numbers) for finding in result.findings] == [
        True,
        True,
        False,
        True,
        False,
    ]


def test_a_random_base_is_of_its_kind(tmp_path: Path) -> None:
    """It loads in stock transformers, has the tokenizer, and is another one for another seed alone."""
    for name, size, seed in (("a", 64, 0), ("again", 64, 0), ("other", 64, 1), ("wide", 256, 0)):
        write_random(NANO, tmp_path / name, size, 2, seed)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    config = model.config
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (64, 256, 2)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (2, 1, 32)
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "a", NANO_FOLDER))
    talk = [{"role": "user", "content": "sort 231"}]
    assert ours.apply_chat_template(talk, tokenize=False) == theirs.apply_chat_template(talk, tokenize=False)
    weights = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "again", "other")}
    assert weights["a"] == weights["again"] != weights["other"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "wide").config.num_attention_heads == 8
    with pytest.raises(BaseError, match="there is none of 16 and 2 layers of its kind"):
        write_random(NANO, tmp_path / "thin", 16, 2, 0)


def test_the_whole_study_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut to two widths, three rates and a step or two. A second time it makes nothing."""
    monkeypatch.setattr(width, "WIDTHS", (32, 64))
    monkeypatch.setattr(width, "PRETRAINING", {"steps": 3, "batch_size": 4, "held_out": 0.2})
    monkeypatch.setattr(width, "PRETRAINING_ROWS", 40)
    monkeypatch.setattr(width, "DEMONSTRATIONS", 30)
    monkeypatch.setattr(width, "SHARED", {"kind": "sft", "sft": {"steps": 2, "batch_size": 2, "held_out": 0.2}, "eval": {"every": 2}})
    monkeypatch.setattr(width, "LORA_RATES", (1e-3, 2e-3, 4e-3))
    monkeypatch.setattr(width, "FULL_RATES", (1e-4, 2e-4, 4e-4))
    made: list[Outcome] = []
    here = lab(tmp_path, opens, bench=Bench("cpu"), random_base=write_random, told=lambda outcome, done, of: made.append(outcome))
    first = asyncio.run(width.conduct(here, Terms(2, 1)))
    assert len(first.findings) == 4
    folders = {outcome.folder for outcome in made}
    again = asyncio.run(width.conduct(here, Terms(2, 1)))
    assert (again.findings, {outcome.folder for outcome in made}) == (first.findings, folders)
    first.draw(tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text().count("<svg") == 1
    bases = {outcome.config.base for outcome in made}
    assert len([base for base in bases if "pretrained-" in base]) == 2
    for outcome in [one for one in made if "random-" in one.config.base]:
        digest = read_adapter(outcome.folder / "adapter")[0].adapter.digest
        (base,) = [base for base in bases if digest[:16] in base]
        ours, theirs = load_file(outcome.folder / "adapter/model.safetensors"), load_file(Path(base) / "model.safetensors")
        assert all((ours[name] == theirs[name]).all() for name in ours | theirs), "what was pretrained is what is learned on"
        below = next(one for one in made if one.config.base == base and one.config.weights == "lora")
        assert json.loads((below.folder / "adapter/veneer.json").read_text())["base_digest"] == load_base(base).digest


def test_a_lab_that_makes_no_bases_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="this lab makes no bases"):
        asyncio.run(width.conduct(lab(tmp_path), Terms(2, 1)))

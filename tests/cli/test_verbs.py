"""The command line as users meet it: help, JSON, exit codes, and never a traceback for a mistake."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from processes import Result, Veneer, forking_veneer, small_run
from veneer.assets import NANO_FOLDER
from veneer.cli.main import VERBS
from veneer.store.registry import Registry

pytestmark = pytest.mark.xdist_group("cli")
ADAPTER_VERBS = (
    *("list", "show", "lineage", "verify", "export", "import", "fork", "stack"),
    *("promote", "rollback", "forget", "reindex", "trust", "merge", "equivalence", "interfere"),
)
ENV_VERBS = ("list", "show", "new", "check")
STUDY_VERBS = [("study", verb) for verb in ("list", "run", "article", "report")]
GROUPED = [*(("adapters", v) for v in ADAPTER_VERBS), *(("env", v) for v in ENV_VERBS), *STUDY_VERBS]
HEAVY = ("torch", "transformers", "numpy", "matplotlib", "pydantic", "sqlalchemy", "cryptography")


@pytest.fixture(scope="module")
def veneer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Veneer]:
    with forking_veneer(tmp_path_factory.mktemp("streams")) as runner:
        yield runner


@pytest.fixture(scope="module")
def trained(veneer: Veneer, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A home with the run and the adapter ``small``."""
    folder = tmp_path_factory.mktemp("trained")
    result = veneer(folder / "home", "train", small_run(folder / "files"), "--json")
    assert result.code == 0, result.err
    return folder / "home", result


# ---------------------------------------------------------------- help


@pytest.mark.parametrize("verb", [(), *((v,) for v in VERBS), *GROUPED])
def test_help_answers(verb: tuple[str, ...]) -> None:
    """What a command does is one flag away."""
    done = subprocess.run([sys.executable, "-m", "veneer", *verb, "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("Usage: ")
    assert "--help" in done.stdout
    assert done.stderr == ""


def test_no_verb_shows_the_help(veneer: Veneer, tmp_path: Path) -> None:
    """The first thing that anyone types; a table of verbs has lines."""
    result = veneer(tmp_path)
    lines = (result.out + result.err).splitlines()
    assert any(line.strip().startswith("train ") for line in lines)


@pytest.mark.parametrize("heavy", HEAVY)
def test_help_is_light(heavy: str) -> None:
    """Help that waits for torch is help that nobody asks for."""
    verbs = [(), ("train",), ("sample",), ("adapters",), ("adapters", "promote"), ("adapters", "equivalence")]
    verbs += [("env",), ("env", "check"), ("study",), ("study", "run")]
    assert [v for v in verbs if heavy in sys_modules_after(*v, "--help")] == []


_LOADED: dict[tuple[str, ...], set[str]] = {}


def sys_modules_after(*args: str) -> set[str]:
    if args not in _LOADED:
        code = (
            "import sys\nfrom veneer.cli.main import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit: pass\n"
            "print(*sys.modules, file=sys.stderr)"
        )
        done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=True)
        _LOADED[args] = set(done.stderr.split())
        assert "veneer.cli.main" in _LOADED[args]
    return _LOADED[args]


# ---------------------------------------------------------------- one JSON document


def test_train_json(trained: tuple[Path, Result]) -> None:
    """What a script needs of a run: scores with intervals, the adapter, and the proof that the base is the same."""
    home, result = trained
    d = result.document
    assert (d["kind"], d["steps"], d["episodes"], d["stopped"], d["adapter"]) == ("rl", 6, 48, None, "small@1")
    assert d["base_digest_before"] == d["base_digest_after"]
    assert d["reward_after"]["low"] <= d["reward_after"]["value"] <= d["reward_after"]["high"]
    last = json.loads((home / "runs/small/metrics.jsonl").read_text().splitlines()[-1])
    assert d["reward_after"]["value"] == last["eval/reward"] > last["eval/solved"], "parts of a reward count in the score"
    assert d["trainable_parameters"] * 4 == d["adapter_bytes"]
    run = home / "runs" / "small"
    assert d["run_folder"] == str(run)
    assert {"config.toml", "metrics.jsonl", "rollouts", "checkpoints", "report.html", "summary.json"} <= {p.name for p in run.iterdir()}
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [f"step-00000{i}" for i in (0, 2, 4, 6)]
    assert "<svg" in (run / "report.html").read_text()


def test_a_finished_run_answers_again(veneer: Veneer, trained: tuple[Path, Result]) -> None:
    """The same command twice trains once."""
    home, first = trained
    before = (home / "runs/small/metrics.jsonl").read_bytes()
    again = veneer(home, "train", small_run(home.parent / "files"), "--json")
    assert again.code == 0
    changing = ("seconds",)
    assert {k: v for k, v in again.document.items() if k not in changing} == {k: v for k, v in first.document.items() if k not in changing}
    assert (home / "runs/small/metrics.jsonl").read_bytes() == before


def test_quickstart_json(veneer: Veneer, tmp_path: Path) -> None:
    """The first command of everyone."""
    result = veneer(tmp_path, "quickstart", "--steps", 2, "--json")
    assert result.code == 0, result.err
    d = result.document
    assert (d["rank"], d["steps"], d["base_unchanged"], d["off_repeats_base"]) == (1, 2, True, True)
    assert len(d["toggle"]) == 5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapters", "keys", "runs"]


def test_runs_and_adapters_json(veneer: Veneer, trained: tuple[Path, Result]) -> None:
    """Lists that scripts read."""
    home, result = trained
    (run,) = veneer(home, "runs", "--json").document
    assert (run["name"], run["steps"], run["of"], run["done"], run["adapter"]) == ("small", 6, 6, True, "small@1")
    (adapter,) = veneer(home, "adapters", "list", "--json").document
    shown = veneer(home, "adapters", "show", "small@1", "--json").document
    assert adapter.items() <= shown.items()
    assert (adapter["reference"], adapter["stage"], adapter["rank"], adapter["trusted"]) == ("small@1", "rl", 1, True)
    assert shown["digest"] == result.document["adapter_digest"]
    assert shown["lora"]["rank"] == 1
    assert len(shown["tokenizer_digest"]) == len(shown["template_digest"]) == 64
    (score,) = adapter["scores"]
    rate = result.document["reward_after"]
    assert (score["env"], score["problems"], score["seed"]) == (result.document["env"], rate["trials"], 0)
    assert (score["value"], score["low"], score["high"]) == (rate["value"], rate["low"], rate["high"])


def test_empty_home(veneer: Veneer, tmp_path: Path) -> None:
    """Nothing yet is an empty list, not an error; and looking writes nothing."""
    for verb in (("runs",), ("adapters", "list")):
        result = veneer(tmp_path / "home", *verb, "--json")
        assert (result.code, result.document) == (0, [])
    assert "quickstart" in veneer(tmp_path / "home", "runs").out
    assert not (tmp_path / "home").exists()


def test_sample_json(veneer: Veneer, trained: tuple[Path, Result]) -> None:
    """On and off: the same base, and the digest of what answered."""
    home, result = trained
    asked = ("sample", "sort 5312", "-n", 2, "--max-tokens", 8, "--seed", 3, "--json")
    off, again, on = veneer(home, *asked), veneer(home, *asked), veneer(home, *asked, "--adapter", "small")
    assert off.document == again.document
    assert off.document["adapter"] is None
    steps = json.loads((home / "runs/small/metrics.jsonl").read_text().splitlines()[-1])["adapter/version"]
    assert steps > 0
    assert on.document["adapter"] == {"name": "small", "version": steps, "digest": result.document["adapter_digest"]}
    assert on.document["base_digest"] == off.document["base_digest"] == result.document["base_digest_after"]
    for completion in on.document["completions"] + off.document["completions"]:
        assert len(completion["tokens"]) == len(completion["logprobs"]) <= 8
    for same in (Registry(home).resolve("small").folder, "small@1", f"sha256:{result.document['adapter_digest'][:12]}"):
        assert veneer(home, *asked, "--adapter", same).document == on.document


def test_eval_json(veneer: Veneer, trained: tuple[Path, Result], tmp_path: Path) -> None:
    """A score is a rate with its interval, and an adapter's is kept."""
    home, _ = trained
    home = shutil.copytree(home, tmp_path / "home")
    for adapter in ((), ("--adapter", "small")):
        d = veneer(home, "eval", "--env", "sort", "--problems", 6, "--max-tokens", 12, "--seed", 5, "--json", *adapter).document
        assert d["solved"]["trials"] == 6
        assert d["solved"]["low"] <= d["solved"]["value"] <= d["solved"]["high"]
    assert d["adapter"] == "small@1"
    kept = veneer(home, "adapters", "show", "small", "--json").document["scores"]
    assert len(kept) == 2
    assert (kept[1]["env"], kept[1]["problems"], kept[1]["seed"], kept[1]["settings"]["max_tokens"]) == ("sort", 6, 5, 12)
    assert [kept[1][key] for key in ("value", "low", "high")] == [d["solved"][key] for key in ("value", "low", "high")]


def test_export_and_import_json(veneer: Veneer, trained: tuple[Path, Result], tmp_path: Path) -> None:
    """An adapter travels to another home and is the same there."""
    home, result = trained
    out = veneer(home, "adapters", "export", "small", tmp_path / "out", "--json")
    assert (out.code, out.document["folder"]) == (0, str(tmp_path / "out"))
    imported = veneer(tmp_path / "other", "adapters", "import", tmp_path / "out", "--name", "moved", "--json")
    signed_by = Registry(home).keys.own()
    unsigned = {"signed_by": None, "trusted": False}
    assert imported.document == {"adapter": "moved@1", "digest": result.document["adapter_digest"], **unsigned}
    shown = veneer(tmp_path / "other", "adapters", "show", "moved", "--json").document
    assert shown["parents"] == [{"reference": "small@1", "digest": result.document["adapter_digest"], "scale": 1.0}]
    assert shown["imported_from"] == {"folder": "out", "signed_by": signed_by, "stage": "rl", "parents": []}
    sampled = veneer(tmp_path / "other", "sample", "hi", "--adapter", "moved", "--max-tokens", 2, "--json")
    assert sampled.document["adapter"]["digest"] == result.document["adapter_digest"]


def test_human_output_has_no_json(veneer: Veneer, trained: tuple[Path, Result], tmp_path: Path) -> None:
    """Without --json people read it."""
    home, _ = trained
    for args in (("runs",), ("adapters", "list"), ("adapters", "show", "small"), ("sample", "hi", "--max-tokens", "2")):
        result = veneer(home, *args)
        assert result.code == 0
        assert result.err == ""
        assert not result.out.startswith(("{", "["))
    train = veneer(tmp_path / "home", "train", small_run(tmp_path / "f"), "--set", "rl.steps=1")
    assert train.code == 0
    assert "report: " in train.out
    assert "step 0" in train.err


def test_sft(veneer: Veneer, tmp_path: Path) -> None:
    """The other kind of run, from a file to an adapter."""
    rows = [json.dumps({"prompt": f"a{i}", "completion": "b"}) for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    (tmp_path / "s.toml").write_text(f'kind = "sft"\n[sft]\ndata = "{tmp_path}/rows.jsonl"\nsteps = 3\nbatch_size = 4\nheld_out = 0.3\n')
    result = veneer(tmp_path / "home", "train", tmp_path / "s.toml", "--json")
    assert result.code == 0, result.err
    assert result.document["nll_after"] < result.document["nll_before"]
    assert result.document["adapter"] == "s@1"
    assert result.document["capacity_bits"] == result.document["trainable_parameters"]
    assert result.document["saturation"] == pytest.approx(result.document["bits"] / result.document["capacity_bits"])
    first = next(m for m in map(json.loads, (Path(result.document["run_folder"]) / "metrics.jsonl").read_text().splitlines()) if m["step"])
    assert result.document["bits"] >= first["train_mean_nll"] * first["tokens"] / math.log(2)


# ---------------------------------------------------------------- mistakes


def check_refused(result: Result, code: int = 2) -> str:
    """One line on stderr, one document on stdout, the right code. Returns the message."""
    assert "Traceback" not in result.err, result.err
    assert result.code == code, (result.out, result.err)
    document = result.document
    assert document["exit_code"] == code
    assert result.err == f"veneer: {document['error']}\n"
    assert "\n" not in document["error"]
    return document["error"]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Files to make mistakes with."""
    small_run(tmp_path / "f")
    (tmp_path / "f/broken.toml").write_text("rl = = 3")
    (tmp_path / "f/typo.toml").write_text("[rl]\nstepps = 3\n")
    (tmp_path / "f/bad_env.py").write_text("def make(:")
    (tmp_path / "f/sft.toml").write_text('kind = "sft"\n[sft]\ndata = "nowhere.jsonl"\n')
    (tmp_path / "f/bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": null, "completion": "b"}\n')
    (tmp_path / "f/empty").mkdir()
    return tmp_path / "f"


MISTAKES: list[tuple[str, str]] = [
    ("train nowhere.toml", "nowhere.toml"),
    ("train .", "cannot read"),
    ("train broken.toml", "no valid TOML"),
    ("train typo.toml", "did you mean 'rl.steps'?"),
    ("train small.toml --set rl.stepps=3", "did you mean 'rl.steps'?"),
    ("train small.toml --set rl.steps", "KEY=VALUE"),
    ("train small.toml --set lora.rank=0", "lora.rank"),
    ("train small.toml --set lora.rank=1000", "rank 1000 does not fit"),
    ("train small.toml --set lora.target_modules=['no_such_proj']", "no_such_proj"),
    ("train small.toml --set lora.train_attn=false --set lora.train_mlp=false", "nothing would be trained"),
    ("train small.toml --set base=/nowhere/at/all", "no such folder"),
    ("train small.toml --set device=tpu", "device 'tpu': there are cpu, cuda and auto"),
    ("sample hi --device gpu", "device 'gpu': there are cpu, cuda and auto"),
    ("eval --device cuda:97", "no such CUDA device here"),
    ("train small.toml --set base=./nowhere", "nowhere"),
    ("train small.toml --set base=./empty", "empty"),
    ("train small.toml --set env.name=sorrt", "did you mean 'sort'?"),
    ("train small.toml --set env.name=nowhere.py:make", "nowhere.py"),
    ("train small.toml --set env.name=bad_env.py:make", "bad_env.py"),
    ("train small.toml --set env.args.colour=red", "colour"),
    ("train small.toml --set init=nobody", "there is no adapter 'nobody'"),
    ("train small.toml --set rl.loss=ppo --set rl.loss_config.beta=1", "beta"),
    ("train sft.toml", "nowhere.jsonl"),
    ("train sft.toml --set sft.data=bad.jsonl", "line 2"),
    ("eval --env nothing", "nothing"),
    ("eval --env bad_env.py:make", "bad_env.py"),
    ("eval --adapter nobody", "nobody"),
    ("eval --problems 0", "problems"),
    ("sample hi --adapter nobody", "nobody"),
    ("sample hi --adapter ../../etc", "../../etc"),
    ("sample hi --adapter small@7", "small"),
    ("sample hi --adapter sha256:zz", "no digest"),
    ("sample hi --base /nowhere", "/nowhere"),
    ("sample hi --temperature -1", "temperature"),
    ("sample hi --temperature nan", "temperature"),
    ("sample hi --top-p 0", "top-p"),
    ("sample hi --top-p nan", "top_p"),
    ("sample hi -n 0", "-n"),
    ("sample", "PROMPT"),
    ("sample " + "7" * 5000, "tokens"),
    ("adapters show nobody", "nobody"),
    ("adapters export nobody out", "nobody"),
    ("adapters import nowhere --name x", "nowhere"),
    ("adapters import empty --name x", "empty"),
    ("adapters import empty --name ../x", "no adapter name"),
    ("adapters lineage nobody", "nobody"),
    ("adapters verify nobody", "nobody"),
    ("adapters fork nobody x", "nobody"),
    ("adapters stack x", "ADAPTERS"),
    ("adapters stack x nobody", "nobody"),
    ("adapters stack x nobody:much", "no scale"),
    ("adapters promote nobody", "which version"),
    ("adapters promote nobody@1", "nobody"),
    ("adapters promote ../x@1", "../x@1"),
    ("adapters rollback nobody", "no label 'live'"),
    ("adapters rollback ../x", "no adapter name"),
    ("adapters forget nobody", "nobody"),
    ("adapters forget ./empty", "no Veneer adapter"),
    ("adapters trust nonsense", "no Ed25519 public key"),
    ("adapters trust --remove", "need a KEY"),
    ("adapters frobnicate", "frobnicate"),
    ("frobnicate", "frobnicate"),
    ("runs --colour", "--colour"),
]


@pytest.mark.parametrize(("command", "words"), MISTAKES, ids=[m[0][:60] for m in MISTAKES])
def test_mistakes_are_one_line_and_code_2(veneer: Veneer, tmp_path: Path, place: Path, command: str, words: str) -> None:
    """What, where, what to do; and a document for scripts."""
    result = veneer(tmp_path / "home", *command.split(" "), "--json", cwd=place)
    assert words in check_refused(result)


def test_a_refused_run_can_be_corrected(veneer: Veneer, tmp_path: Path, place: Path) -> None:
    """A mistake must not occupy the run's name."""
    for mistake in ("lora.rank=1000", "base=/nowhere", "lora.target_modules=['no_such_proj']", "init=nobody"):
        check_refused(veneer(tmp_path / "home", "train", place / "small.toml", "--set", mistake, "--json"))
    assert veneer(tmp_path / "home", "train", place / "small.toml", "--set", "rl.steps=1", "--json").code == 0
    message = check_refused(veneer(tmp_path / "home", "train", place / "small.toml", "--set", "rl.steps=2", "--json"))
    assert "steps = 2" in message


def test_paths_that_cannot_be_written(veneer: Veneer, trained: tuple[Path, Result], tmp_path: Path, place: Path) -> None:
    """A file where a folder should be."""
    home, _ = trained
    (tmp_path / "file").write_text("")
    for command in (
        ("train", place / "small.toml", "--set", f"folder={tmp_path / 'file'}"),
        ("train", place / "small.toml", "--set", f"folder={tmp_path / 'file' / 'below'}"),
        ("adapters", "export", "small", tmp_path / "file"),
        ("adapters", "export", "small", tmp_path / "file" / "below"),
    ):
        result = veneer(home, *command, "--json")
        assert str(tmp_path / "file") in check_refused(result, code=result.code)
        assert result.code in (1, 2)
    result = veneer(tmp_path / "file", "train", place / "small.toml", "--json")
    assert str(tmp_path / "file") in check_refused(result, code=1)


def edit_manifest(folder: Path, **changes: Any) -> None:
    manifest = json.loads((folder / "veneer.json").read_text())
    (folder / "veneer.json").write_text(json.dumps(manifest | changes))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 0x40
    path.write_bytes(data)


def unsigned(change: Callable[[Path], object]) -> Callable[[Path], None]:
    """A change that no signature tells of."""

    def both(folder: Path) -> None:
        (folder / "veneer.sig").unlink()
        change(folder)

    return both


BROKEN: list[tuple[str, Callable[[Path], None], str]] = [
    ("flipped bit", unsigned(lambda f: flip(f / "adapter_model.safetensors")), "digest"),
    ("cut off", unsigned(lambda f: (f / "adapter_model.safetensors").write_bytes(b"\0" * 20)), "damaged"),
    ("no weights", unsigned(lambda f: (f / "adapter_model.safetensors").unlink()), "damaged"),
    ("no manifest", unsigned(lambda f: (f / "veneer.json").unlink()), "adapters import"),
    ("empty manifest", unsigned(lambda f: (f / "veneer.json").write_text("")), "damaged"),
    ("other tokenizer", unsigned(lambda f: edit_manifest(f, tokenizer_digest="0" * 64)), "another tokenizer"),
    ("other template", unsigned(lambda f: edit_manifest(f, template_digest="0" * 64)), "another chat template"),
    ("other base", unsigned(lambda f: edit_manifest(f, base_digest="0" * 64)), "was made for base"),
    ("signed, then flipped", lambda f: flip(f / "adapter_model.safetensors"), "adapter_model.safetensors was changed"),
    ("signed, then another base", lambda f: edit_manifest(f, base_digest="0" * 64), "veneer.json was changed"),
    ("signed, then one file more", lambda f: (f / "more.py").write_text(""), "more.py was added"),
]


@pytest.mark.parametrize(("break_it", "words"), [b[1:] for b in BROKEN], ids=[b[0] for b in BROKEN])
@pytest.mark.parametrize("command", ["sample hi --max-tokens 1 --adapter", "adapters import --name x"])
def test_broken_adapters(
    veneer: Veneer, trained: tuple[Path, Result], tmp_path: Path, break_it: Callable[[Path], None], words: str, command: str
) -> None:
    """What was made for something else, or damaged on the way, does not answer."""
    folder = tmp_path / "adapter"
    shutil.copytree(Registry(trained[0]).resolve("small").folder, folder)
    break_it(folder)
    if words == "adapters import" and command.startswith("adapters"):
        return  # without its manifest it is a PEFT folder like any other
    assert words in check_refused(veneer(tmp_path / "home", *command.split(), folder, "--json"))


def test_adapter_of_another_base(veneer: Veneer, trained: tuple[Path, Result], tmp_path: Path) -> None:
    """One changed number makes another base."""
    home, _ = trained
    shutil.copytree(NANO_FOLDER, tmp_path / "twin")
    shutil.copytree(NANO_FOLDER, tmp_path / "other")
    weights = load_file(tmp_path / "other/model.safetensors")
    name = next(k for k in weights if "layers.1" in k)
    weights[name] = weights[name].copy()
    weights[name].flat[0] = np.nextafter(weights[name].flat[0], np.inf, dtype=weights[name].dtype)
    save_file(weights, tmp_path / "other/model.safetensors", {"format": "pt"})
    asked = ("sample", "hi", "--adapter", "small", "--max-tokens", 2, "--json", "--base")
    assert veneer(home, *asked, tmp_path / "twin").code == 0
    assert "was made for base" in check_refused(veneer(home, *asked, tmp_path / "other"))
    assert veneer(home, "sample", "hi", "--max-tokens", 1, "--json", "--base", tmp_path / "other").code == 0

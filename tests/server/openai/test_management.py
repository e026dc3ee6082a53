"""Adapters in and out of a running server: folders as vLLM takes them, forgetting, a full disk."""

from __future__ import annotations

import asyncio
import errno
import json
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from serving import SUM, Serving, random_checkpoint, until
from transformers import AutoModelForCausalLM

from veneer.assets import NANO_FOLDER
from veneer.server.access import LOCAL
from veneer.server.bases import Bases
from veneer.server.errors import Forbidden
from veneer.server.openai.catalogue import Catalogue
from veneer.server.openai.loading import Loading
from veneer.server.openai.management import Management
from veneer.server.openai.requests import LoadRequest
from veneer.store import registry as registry_module
from veneer.store.adapters import write_adapter
from veneer.store.registry import Registry


def peft_folder(folder: Path, seed: int, **settings: Any) -> Path:
    """What stock PEFT saves."""
    torch.manual_seed(seed)
    config = PeftConfig(
        r=2, lora_alpha=16, target_modules=["q_proj", "up_proj"], init_lora_weights=False, task_type="CAUSAL_LM", **settings
    )
    get_peft_model(AutoModelForCausalLM.from_pretrained(NANO_FOLDER), config).save_pretrained(folder)
    return folder


def post(server: Serving, what: str, **body: Any) -> httpx2.Response:
    return httpx2.post(f"{server.url}/v1/{what}", json=body)


def answer(client: openai.OpenAI, model: str, **more: Any) -> Any:
    return client.chat.completions.create(model=model, messages=SUM, max_tokens=8, seed=1, **more)


def test_load_use_unload(server: Serving, client: openai.OpenAI) -> None:
    """vLLM's routes, words and statuses, with what stock PEFT saved."""
    peft_folder(server.lora_dir / "mine", 1)
    told = post(server, "load_lora_adapter", lora_name="mine", lora_path="mine")
    assert (told.status_code, told.text) == (200, "Success: LoRA adapter 'mine' added successfully.")
    loaded = answer(client, "mine")
    assert loaded.choices[0] != answer(client, "nano").choices[0]
    assert "mine" in {model.id for model in client.models.list()}
    again = post(server, "load_lora_adapter", lora_name="mine", lora_path="mine")
    assert again.status_code == 400
    assert "has already been loaded" in again.json()["error"]["message"]
    told = post(server, "unload_lora_adapter", lora_name="mine")
    assert (told.status_code, told.text) == (200, "Success: LoRA adapter 'mine' removed successfully.")
    digest = server.registry.resolve("mine").digest
    assert server.registry.read("mine")[0].canary is not None, "what it does is recorded for the next load"
    assert digest not in server.served.shelf
    with pytest.raises(openai.NotFoundError):
        answer(client, "mine")
    assert "mine" not in {model.id for model in client.models.list()}
    gone = post(server, "unload_lora_adapter", lora_name="mine")
    assert (gone.status_code, gone.json()["error"]["message"]) == (404, "The lora adapter 'mine' cannot be found.")
    assert post(server, "load_lora_adapter", lora_name="mine", lora_path=str(server.lora_dir / "mine")).status_code == 200
    assert answer(client, "mine").choices[0].message == loaded.choices[0].message
    assert server.registry.versions("mine") == [1], "the same weights are the same version"


def test_load_in_place(server: Serving, client: openai.OpenAI) -> None:
    """A new version, which the name means from then on, whatever a label said before."""
    for seed in (1, 2):
        peft_folder(server.lora_dir / f"step-{seed}", seed)
    assert post(server, "load_lora_adapter", lora_name="steps", lora_path="step-1").status_code == 200
    server.registry.promote("steps", 1)
    first = answer(client, "steps")
    assert post(server, "load_lora_adapter", lora_name="steps", lora_path="step-2", load_inplace=True).status_code == 200
    second = answer(client, "steps")
    versions = [told.model_extra["veneer"]["adapters"][0]["version"] for told in (first, second)]
    assert versions == [1, 2]
    assert post(server, "adapters/steps/rollback").json()["labels"] == {"live": 1}
    assert answer(client, "steps").choices[0].message == first.choices[0].message


def test_a_folder_of_ours(server: Serving, client: openai.OpenAI) -> None:
    """An export of another home keeps what it was made from."""
    made = random_checkpoint(server.served, 77)
    write_adapter(server.lora_dir / "ours", made, {"stage": "rl", "note": "kept"})
    assert post(server, "load_lora_adapter", lora_name="ours", lora_path="ours").status_code == 200
    entry = server.registry.resolve("ours")
    assert entry.digest == made.adapter.digest
    assert not entry.trusted
    answer(client, "ours")


def test_paths_are_confined(server: Serving, tmp_path: Path) -> None:
    """No dots, no absolute path, no link leads out; and what lies there is not told."""
    outside = peft_folder(tmp_path / "outside", 3)
    inside = server.lora_dir / "tricks"
    inside.mkdir()
    (inside / "link").symlink_to(outside)
    (inside / "half").mkdir()
    (inside / "half" / "adapter_config.json").write_text((outside / "adapter_config.json").read_text())
    (inside / "half" / "adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
    for path in ("../../outside", str(outside), "tricks/link", "tricks/half", "/etc", "..", "tricks/../../..", "/nowhere/at/all"):
        told = post(server, "load_lora_adapter", lora_name="trick", lora_path=path)
        assert told.status_code == 403, (path, told.text)
        assert str(tmp_path) not in told.text
    for path, status in (("nothing", 404), ("tricks", 404), ("a\0b", 400), ("x" * 5000, 400), ("y" * 4000, 400)):
        assert post(server, "load_lora_adapter", lora_name="trick", lora_path=path).status_code == status, path[:10]
    assert server.registry.versions("trick") == []


def test_what_cannot_be_loaded(server: Serving) -> None:
    """A pickle, a kind that is no LoRA, a wrong shape, a name that is no name, or a base's: 400 in one line, and nothing is kept."""
    pickled = server.lora_dir / "pickled"
    pickled.mkdir()
    (pickled / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    (pickled / "adapter_model.bin").write_bytes(b"\x80\x04.")
    peft_folder(server.lora_dir / "dora", 4, use_dora=True)
    narrow = peft_folder(server.lora_dir / "narrow", 4)
    config = json.loads((narrow / "adapter_config.json").read_text())
    (narrow / "adapter_config.json").write_text(json.dumps(config | {"r": 3}))
    for path, name, words in (
        ("pickled", "bad", "pickle"),
        ("dora", "bad", "use_dora"),
        ("narrow", "bad", "rank"),
        ("dora", "../x", "no adapter name"),
        ("dora", "nano", "name of a base"),
    ):
        told = post(server, "load_lora_adapter", lora_name=name, lora_path=path)
        assert told.status_code == 400, told.text
        assert words in told.json()["error"]["message"]
    assert server.registry.versions("bad") == []


def test_a_full_disk(server: Serving, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    """507 in one line; what is loaded goes on serving, and the same request works once there is room."""
    peft_folder(server.lora_dir / "late", 5)

    def full(*_args: Any, **_kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(registry_module, "fill_adapter", full)
        told = post(server, "load_lora_adapter", lora_name="late", lora_path="late")
    assert told.status_code == 507, told.text
    assert "No space left" in told.json()["error"]["message"]
    assert told.json()["error"]["type"] == "server_error"
    answer(client, "nano")
    assert post(server, "load_lora_adapter", lora_name="late", lora_path="late").status_code == 200


def test_labels_and_cards(server: Serving) -> None:
    """What there is of an adapter: versions, labels, lineage and scores, in one document."""
    score = {"env": "sums", "value": 0.5, "low": 0.4, "high": 0.6, "problems": 64, "seed": 0, "measured": "2026-01-01T00:00:00Z"}
    server.put("carded", seed=1, scores=[score])
    first = server.registry.resolve("carded")
    server.put("carded", seed=2, parents=[{"reference": "carded@1", "digest": first.digest}])
    card = post(server, "adapters/carded/promote", version=1, label="stable").json()
    assert card["labels"] == {"stable": 1}
    assert card["base"] == "nano"
    one, two = card["versions"]
    assert one["scores"][0]["high"] == 0.6
    assert two["parents"][0]["reference"] == "carded@1"
    assert (one["labels"], two["labels"]) == (["stable"], [])
    assert httpx2.get(f"{server.url}/v1/adapters/carded").json() == card
    for body, words in (({"version": 9}, "no version 9"), ({"version": 1, "label": "9"}, "no label"), ({"version": 0}, "greater than")):
        told = post(server, "adapters/carded/promote", **body)
        assert told.status_code == 400, told.text
        assert words in told.json()["error"]["message"]
    assert post(server, "adapters/carded/rollback", label="never").status_code == 400


def test_forget_leaves_nothing(server: Serving, client: openai.OpenAI) -> None:
    """Files, index, memory and every sum with it; a receipt says what; the name is a 404 from then on."""
    server.put("private", seed=8)
    server.put("public", seed=9)
    entry = server.registry.resolve("private")
    both = {"lora": [{"name": "private"}, {"name": "public"}]}
    answer(client, "private")
    answer(client, "public")
    answer(client, "nano", extra_body=both)
    before = len(server.served.shelf)
    told = httpx2.delete(f"{server.url}/v1/adapters/private@1", params={"reason": "asked to"})
    assert told.status_code == 200, told.text
    receipt = told.json()
    assert receipt["forgotten"][0]["digest"] == entry.digest
    assert receipt["reason"] == "asked to"
    assert str(server.home) not in told.text
    assert not entry.folder.exists()
    assert entry.digest not in server.served.shelf
    assert len(server.served.shelf) == before - 2, "the adapter and its sum"
    assert entry.digest not in server.served.engine._slots  # type: ignore[attr-defined]
    with pytest.raises(openai.NotFoundError):
        answer(client, "private")
    with pytest.raises(openai.NotFoundError):
        answer(client, "nano", extra_body=both)
    answer(client, "public")
    assert httpx2.delete(f"{server.url}/v1/adapters/private").status_code == 404


def test_children_are_not_orphaned_by_accident(server: Serving) -> None:
    """One must say what is to become of what was made from it."""
    server.put("parent", seed=10)
    first = server.registry.resolve("parent")
    server.put("child", seed=11, parents=[{"reference": "parent@1", "digest": first.digest}])
    assert httpx2.delete(f"{server.url}/v1/adapters/parent").status_code == 400
    assert httpx2.delete(f"{server.url}/v1/adapters/parent", params={"children": "keep"}).status_code == 200
    assert server.registry.versions("child") == [1]


def test_another_process_forgets(server: Serving, client: openai.OpenAI) -> None:
    """Memory follows within seconds."""
    server.put("gone", seed=12)
    digest = server.registry.resolve("gone").digest
    answer(client, "gone")
    assert digest in server.served.shelf
    Registry(server.home).forget("gone")
    until(lambda: digest not in server.served.shelf)


def test_a_server_without_a_folder(server: Serving) -> None:
    """Loading from folders is something that an operator allows."""
    catalogue = Catalogue(Bases([server.served]), server.registry)
    management = Management(catalogue, Loading(server.registry, catalogue), server.registry, None)
    with pytest.raises(Forbidden, match="--lora-dir"):
        asyncio.run(management.load(LOCAL, LoadRequest(lora_name="x", lora_path="x")))

"""More runs than memory: those that do nothing leave, and nobody notices."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from real_server import hosted
from test_faults_of_serving import Client, engine_of

LITTLE = 700_000
"""Bytes: one of these runs takes 450,560."""


def saved_by(home: Path) -> list[str]:
    """Digests of the named training checkpoints."""
    files = [json.loads(path.read_text()) for path in (home / "server/tinker/checkpoints").rglob("veneer.json")]
    return [manifest["digest"] for manifest in files if manifest["kind"] == "training"]


@pytest.mark.parametrize("saves", [True, False])
def test_runs_that_take_turns_in_too_little_room_learn_the_same(tmp_path: Path, saves: bool) -> None:
    """A provider sells more runs than fit: each comes back with its weights, moments and gradient, bit for bit."""
    digests = {}
    for name, room in (("little", LITTLE), ("enough", 2**31)):
        with hosted(tmp_path / name, room=room) as server:
            clients = [Client(server).create() for _ in range(3)]
            for step in range(4):
                for client in clients:
                    client.step(1e-2 / (step + 1))
                    if saves:
                        client.save().sample()
            loaded = sum(client.run in engine_of(client)._slots for client in clients)
            assert loaded < 3 if name == "little" else loaded == 3
            for client in clients:
                client.do("/save_weights", path="kept")
        digests[name] = saved_by(tmp_path / name)
    assert len(digests["little"]) == 3
    assert set(digests["little"]) == set(digests["enough"])
    assert len(set(digests["enough"])) == 1


def test_what_parked_runs_gathered_is_not_lost(tmp_path: Path) -> None:
    """A gradient that waits for its optimizer step when the run leaves."""
    digests = {}
    for name, room in (("little", LITTLE), ("enough", 2**31)):
        with hosted(tmp_path / name, room=room) as server:
            first, second = Client(server).create(), Client(server).create()
            first.step().backward()
            second.step()
            third = Client(server).create()
            third.step()
            first.do("/optim_step", adam_params={"learning_rate": 1e-2})
            first.do("/save_weights", path="kept")
        digests[name] = saved_by(tmp_path / name)
    assert digests["little"] == digests["enough"]

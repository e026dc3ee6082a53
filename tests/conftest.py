"""What holds for every test: one thread, no hub, a home of its own."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # two threads that spin for each other while other tests run waste whole time slices

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A VENEER_HOME of its own for every test."""
    folder = tmp_path / "home"
    monkeypatch.setenv("VENEER_HOME", str(folder))
    return folder

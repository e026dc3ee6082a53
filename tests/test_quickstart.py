"""The main job, whole: what a newcomer sees is what the README promises."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path


def test_a_rank_1_adapter_learns_and_the_base_stays_as_it_was(home: Path) -> None:
    """Seed 0 of `veneer quickstart`: 0.70 or more from 0.35 or less, disjoint intervals, the base proved untouched."""
    done = subprocess.run([sys.executable, "-m", "veneer", "quickstart", "--json"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    d = json.loads(done.stdout)
    assert d["reward_before"]["value"] <= 0.35
    assert d["reward_after"]["value"] >= 0.70
    assert d["reward_before"]["high"] < d["reward_after"]["low"]
    assert d["stepwise_after"] > d["stepwise_before"]
    assert d["rank"] == 1
    assert d["adapter_bytes"] == 4 * d["trainable_parameters"] == 4 * 11_264
    assert d["episodes"] == 60 * 64
    assert 0 < d["bits"] <= d["episodes"]
    assert d["base_digest_before"] == d["base_digest_after"]
    assert d["base_unchanged"]
    assert d["off_repeats_base"]
    report = Path(d["run_folder"], "report.html").read_text()
    titles = re.findall(r'<figure><h2>(.*?)</h2><div class="plot"><svg', report)
    assert titles == ["Reward", "Useful groups", "Bits received", "Entropy", "Habits", "Corrections", "Length"]
    assert not re.findall(r"""(?:src|href)=["'](?!#)""", report)  # it is whole without a network

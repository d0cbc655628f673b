"""The command that kills runs, in short."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "reliability.py"


def test_runs_killed_at_random_moments_end_in_the_same_bits(tmp_path):
    out = tmp_path / "reliability.json"
    command = [sys.executable, SCRIPT, "--kills", "6", "--kill-steps", "40", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(out.read_text())["kill -9"]["kills"] >= 6

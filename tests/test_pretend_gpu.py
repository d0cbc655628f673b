"""Training, probe and generation on a pretended GPU (pretend_gpu.py), in processes of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent / "pretend_gpu.py"

pytestmark = pytest.mark.skipif(
    torch.version.cuda is not None, reason="torch is built for CUDA: see test_gpu.py"
)


@pytest.mark.parametrize("checks", ["methods", "families", "inference"])
def test_what_surrounds_the_kernels_keeps_to_the_device(checks: str, tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, checks]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr[-3000:]

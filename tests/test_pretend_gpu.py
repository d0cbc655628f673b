"""Training, probe and generation on a pretended GPU (pretend_gpu.py), in a process of its own."""

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


def test_what_surrounds_the_kernels_keeps_to_the_device(tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, SCRIPT], cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert found.returncode == 0, found.stderr[-3000:]

"""The scripts of benchmarks/ as modules."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).parents[1] / "benchmarks"


def load_benchmark(name: str) -> ModuleType:
    """A script, after the others that it imports."""
    path = FOLDER / f"{name}.py"
    # With its folder on sys.path, transformers would import kernels.py for the Hub's `kernels`.
    for other in re.findall(r"^from (\w+) import", path.read_text(encoding="utf-8"), re.MULTILINE):
        if other not in sys.modules and (FOLDER / f"{other}.py").exists():
            load_benchmark(other)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

"""Kernels for zeroth-order fine-tuning: noise, perturbation, statistics, and the exact step."""

from importlib.util import find_spec as _find_spec

# torch first: the extension borrows the OpenMP pool that torch loads.
import torch as _torch  # noqa: F401

if _find_spec("dlzo_kernels._C") is None:
    raise ImportError(
        f"{__path__[0]} is the source of dlzo_kernels, without its compiled extension: "
        "run Python from another folder, or build it here with `pip install -e .`"
    )

from dlzo_kernels._version import NOISE_VERSION, __version__
from dlzo_kernels.backends import Backend, backends, select_isa_from_environment
from dlzo_kernels.low_rank import LowRankStep, low_rank_replay
from dlzo_kernels.masters import release
from dlzo_kernels.ops._triton import LaunchError
from dlzo_kernels.ops.accumulate import accumulate_
from dlzo_kernels.ops.activation_stats import ActivationStats, activation_stats
from dlzo_kernels.ops.gaussian import gaussian
from dlzo_kernels.ops.perturb import perturb_, perturb_into
from dlzo_kernels.ops.rms_norm import rms_norm
from dlzo_kernels.ops.tree_attention import tree_attention
from dlzo_kernels.step import StepResult, ZOStep, update_scales, zo_replay, zo_step

select_isa_from_environment()

__all__ = [
    "NOISE_VERSION",
    "ActivationStats",
    "Backend",
    "LaunchError",
    "LowRankStep",
    "StepResult",
    "ZOStep",
    "__version__",
    "accumulate_",
    "activation_stats",
    "backends",
    "gaussian",
    "low_rank_replay",
    "perturb_",
    "perturb_into",
    "release",
    "rms_norm",
    "tree_attention",
    "update_scales",
    "zo_replay",
    "zo_step",
]

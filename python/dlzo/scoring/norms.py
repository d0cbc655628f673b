"""A model's RMS norms, computed by one kernel each in place of six operations of torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from dlzo.scoring.forward import replaced_forward
from dlzo_kernels import rms_norm
from dlzo_kernels.ops.rms_norm import has_kernel

# Of the trial's results in 16 bits, how many may differ by a rounding: other roundings change a
# fifth of them.
_ROUNDED_OTHERWISE = 0.01
_TRIAL_ROWS = 16


def rms_norms(model: nn.Module) -> dict[nn.Module, float]:
    """The model's modules that compute what `dlzo_kernels.rms_norm` does, and their epsilons.

    They are found by what they do: a module with one vector and a number is tried, with weights and
    inputs drawn at random, large and small.
    """
    return {
        module: eps
        for module in model.modules()
        if _has_one_vector(module)
        for eps in vars(module).values()
        if isinstance(eps, float) and 0 <= eps < math.inf and _is_rms_norm(module, eps)
    }


@contextmanager
def by_kernel(norms: Mapping[nn.Module, float]) -> Iterator[None]:
    """Lets the kernel compute these norms."""
    with ExitStack() as stack:
        for module, eps in norms.items():
            stack.enter_context(_one_by_kernel(module, eps))
        yield


def _one_by_kernel(module: nn.Module, eps: float) -> AbstractContextManager[None]:
    own_forward = module.forward

    def forward(x: Tensor, *gates: Any, **named: Any) -> Tensor:
        weight = _weight(module)
        same = x.dtype is weight.dtype and x.device == weight.device
        if gates or named or not same:
            return own_forward(x, *gates, **named)
        return rms_norm(x, weight, eps)

    return replaced_forward(module, forward)


def _has_one_vector(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    # A forward that others put in place, say to move weights, stays there.
    if len(parameters) != 1 or "forward" in vars(module):
        return False
    return type(parameters[0]) is nn.Parameter and has_kernel(parameters[0])


def _weight(module: nn.Module) -> Tensor:
    (weight,) = module.parameters()
    return weight


@torch.no_grad()
def _is_rms_norm(module: nn.Module, eps: float) -> bool:
    """Whether the module computes the kernel's function, of any weights and inputs."""
    module = deepcopy(module)
    weight = _weight(module)
    generator = torch.Generator("cpu").manual_seed(0)
    drawn = torch.randn(1 + _TRIAL_ROWS, len(weight), generator=generator, device="cpu")
    weight.copy_(drawn[0])
    x = 1 + drawn[1:]
    # Beside small inputs epsilon shows.
    x[::2] *= eps**0.5
    x = x.to(weight.dtype)
    try:
        expected = module.forward(x)  # past all hooks
    # What modules raise that are something else.
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
        return False
    found = rms_norm(x, weight, eps)
    if not isinstance(expected, Tensor) or (expected.shape, expected.dtype) != (x.shape, x.dtype):
        return False
    if x.dtype is torch.float32:
        return torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
    return (found != expected).float().mean().item() <= _ROUNDED_OTHERWISE

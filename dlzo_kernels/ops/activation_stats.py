"""activation_stats: maximum, mean, variance and kurtosis of activations in one pass."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dlzo_kernels import _C
from dlzo_kernels.ops import _gpu
from dlzo_kernels.ops._common import DTYPE_CODES, LIBRARY, check_tensor, is_eager, threads

LIBRARY.define("activation_stats(Tensor x, str per) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")

_REDUCTIONS = {"tensor": 0, "channel": 1, "token": 2}
_DTYPES = (torch.float32, torch.int64, torch.float64, torch.float64, torch.float64)
# torch.empty_like takes half as long as torch.empty, most of what a call on a small tensor costs.
_SCALARS = tuple(torch.empty((), dtype=dtype, device="cpu") for dtype in _DTYPES)


class ActivationStats(NamedTuple):
    """Statistics of activations.

    Each has shape () per tensor, (C,) per channel, x.shape[:-1] per token.

    Attributes:
        absmax: largest |x|, exact; float32. A NaN counts as the largest.
        argmax: its first position, int64: flat index in x, token index, or channel index.
        mean: float64.
        variance: of the population, float64.
        kurtosis: E[(x - mean)^4] / variance^2, float64: 3 for a normal, NaN for a constant.

    Where a value is not finite, the moments are NaN.
    """

    absmax: Tensor
    argmax: Tensor
    mean: Tensor
    variance: Tensor
    kurtosis: Tensor


def activation_stats(
    x: Tensor, *, per: Literal["tensor", "channel", "token"] = "tensor"
) -> ActivationStats:
    """Maximum and moments of x in one pass over memory.

    Sums of powers run in float32 over 64 terms about a local mean and in float64 from there on
    (Pebay, SAND2008-6212). For finite x the relative error is at most 1e-5 for the variance and
    5e-5 for the kurtosis, and the mean's at most 1e-6 standard deviations plus one float32 ulp;
    large means and maxima (1e5 in bfloat16, 1e30 in float32) included. On the CPU the bits depend
    on neither ISA nor number of threads.

    Args:
        x: float32, bfloat16 or float16, of shape (..., C) with the channels last; not empty.
            A tensor that is not contiguous is copied first.
        per: over all of x, over its tokens for each channel, or over its channels for each token.

    Returns:
        ActivationStats of tensors on x's device.

    Raises:
        ValueError: x is empty, or `per` is none of the three, or a 0-d x is not per tensor.
        TypeError: the dtype is none of the three.
        NotImplementedError: there is no kernel for the device.
    """
    if per not in _REDUCTIONS:
        raise ValueError(f"per must be 'tensor', 'channel' or 'token', not {per!r}")
    if x.numel() == 0:
        raise ValueError(f"x of shape {tuple(x.shape)} is empty: it has no statistics")
    if x.dim() == 0 and per != "tensor":
        raise ValueError(f"a 0-d x has no {per}s; use per='tensor'")
    if is_eager(x):
        return ActivationStats._make(_activation_stats(x, per))
    return ActivationStats._make(torch.ops.dlzo.activation_stats(x, per))


def _empty_results(x: Tensor, per: str) -> tuple[Tensor, ...]:
    shape = () if per == "tensor" else x.shape[-1:] if per == "channel" else x.shape[:-1]
    return tuple(x.new_empty(shape, dtype=dtype) for dtype in _DTYPES)


def _activation_stats(x: Tensor, per: str) -> tuple[Tensor, ...]:
    check_tensor("x", x)
    x = x.contiguous()
    quick = per == "tensor" and x.is_cpu
    results = tuple(map(torch.empty_like, _SCALARS)) if quick else _empty_results(x, per)
    channels = x.shape[-1] if x.dim() else 1
    rows = x.numel() // channels
    a, b, c, d, e = results
    pointers = (a.data_ptr(), b.data_ptr(), c.data_ptr(), d.data_ptr(), e.data_ptr())
    sizes = (rows, channels, _REDUCTIONS[per])
    if x.is_cuda:
        _launch(x, sizes, pointers)
    else:
        _C.activation_stats(x.data_ptr(), DTYPE_CODES[x.dtype], *sizes, pointers, threads())
    return results


def _launch(x: Tensor, sizes: tuple[int, int, int], pointers: tuple[int, ...]) -> None:
    if _gpu.selected() == "cuda":
        room = _C.gpu.partials(*sizes) * _C.gpu.PARTIAL_BYTES
        workspace = x.new_empty(room, dtype=torch.uint8)
        code = DTYPE_CODES[x.dtype]
        arguments = (x.data_ptr(), code, *sizes, pointers, workspace.data_ptr())
        _gpu.launch(_C.gpu.activation_stats(*arguments), x.device)
    else:
        launch_triton(x, *sizes, pointers)


@torch.library.register_fake("dlzo::activation_stats", lib=LIBRARY)
def _(x: Tensor, per: str) -> tuple[Tensor, ...]:
    return _empty_results(x, per)


for _key in ("CPU", "CUDA"):
    LIBRARY.impl("activation_stats", _activation_stats, _key)

"""rms_norm: root mean square normalisation, in one pass over memory."""

from __future__ import annotations

import torch
from torch import Tensor

from dlzo_kernels import _C
from dlzo_kernels.ops._common import (
    DTYPE_CODES,
    LIBRARY,
    check_no_gradient,
    check_tensor,
    is_eager,
)

LIBRARY.define("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * (x / sqrt(mean(x^2) + eps)) over the last dimension; forward only, on CPUs.

    The root mean square norm (Zhang and Sennrich, arXiv 1910.07467) with the rounding of Llama's:
    sums and quotient in float32, the quotient rounded to the dtype before it meets the weight. The
    bits depend on neither ISA nor number of threads. GPUs have `torch.nn.functional.rms_norm`,
    which rounds once.

    Args:
        x: float32, bfloat16 or float16, of shape (..., C); one that is not contiguous is copied
            first.
        weight: of shape (C,) and x's dtype.
        eps: is added to the mean.

    Returns:
        A contiguous tensor of x's shape and dtype.

    Raises:
        ValueError: the shapes do not fit, eps is negative or not finite, or a gradient would be
            lost.
        TypeError: the dtypes differ, or are none of the three.
        NotImplementedError: a tensor is not on the CPU.
    """
    check_no_gradient("rms_norm", x=x, weight=weight)
    if is_eager(x, weight):
        return _rms_norm(x, weight, eps)
    return torch.ops.dlzo.rms_norm(x, weight, eps)


def has_kernel(weight: Tensor) -> bool:
    """Whether rms_norm takes a weight of such a device, dtype and shape."""
    return weight.is_cpu and weight.dtype in DTYPE_CODES and weight.dim() == 1


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    _check(x, weight, eps)
    x, weight = x.contiguous(), weight.contiguous()
    out = torch.empty_like(x)
    if out.numel() == 0:
        return out
    size = weight.numel()
    pointers = out.data_ptr(), x.data_ptr(), weight.data_ptr()
    _C.rms_norm(
        *pointers, DTYPE_CODES[x.dtype], x.numel() // size, size, eps, torch.get_num_threads()
    )
    return out


def _check(x: Tensor, weight: Tensor, eps: float) -> None:
    for name, tensor in (("x", x), ("weight", weight)):
        if not tensor.is_cpu:
            raise NotImplementedError(
                f"{name} is on {tensor.device}, for which rms_norm has no kernel; "
                "use torch.nn.functional.rms_norm"
            )
        check_tensor(name, tensor)
    if weight.dtype != x.dtype:
        raise TypeError(f"x has dtype {x.dtype} and weight {weight.dtype}; cast one")
    if x.dim() == 0 or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)} and x {tuple(x.shape)}: give one weight for "
            "each element of x's last dimension"
        )
    if not 0 <= eps < 3.4e38:
        raise ValueError(f"eps must be finite in float32 and not negative, not {eps}")


@torch.library.register_fake("dlzo::rms_norm", lib=LIBRARY)
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


LIBRARY.impl("rms_norm", _rms_norm, "CPU")

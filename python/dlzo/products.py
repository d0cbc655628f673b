"""16-bit matrix products in float32, on CPUs where torch's own are slower."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from dlzo_kernels.backends import has_slow_bfloat16

# Of weights, converted at a time: 16 MB in float32, which caches hold.
_CONVERTED = 1 << 22


@cache
def least_rows(dtype: torch.dtype) -> float:
    """From how many rows on a product of this dtype is faster in float32, on this CPU.

    16 where torch has no kernels for it (on x86 for bfloat16 without AVX-512, for float16 without
    AVX512-FP16), 64 for bfloat16 on Intel's processors without AMX; with fewer, converting the
    weights takes longer. Infinite for what torch does best itself.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return math.inf
    if not _has_kernels(dtype):
        return 16
    return 64 if dtype is torch.bfloat16 and has_slow_bfloat16() else math.inf


def _has_kernels(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype is torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.ops.mkldnn._is_mkldnn_fp16_supported()


def fast_products(model: nn.Module) -> AbstractContextManager[object]:
    """Lets a model's 16-bit products run in float32 where torch's own are slower.

    Sums are in float32 and rounded once, as in torch's kernels for 16 bits.
    """
    dtypes = {p.dtype for p in model.parameters() if p.device.type == "cpu"}
    slow = any(least_rows(dtype) < math.inf for dtype in dtypes)
    return _InFloat32() if slow else nullcontext()


class _InFloat32(TorchFunctionMode):
    """Takes the calls of nn.Linear, and those of the Conv1D of transformers (GPT-2)."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        operands = None if kwargs else _operands(func, args)
        if operands is not None and _is_slow(*operands):
            return _linear(*operands)
        return func(*args, **(kwargs or {}))


def _operands(
    func: Callable[..., Any], args: tuple[Any, ...]
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """x, weight and bias, as of nn.Linear; None for calls of something else."""
    if func is F.linear:
        x, weight, *bias = args
        return x, weight, bias[0] if bias else None
    if func is torch.addmm and len(args) == 3:
        bias, x, weight = args
        return x, weight.t(), bias
    return None


def _is_slow(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    tensors = (x, weight) if bias is None else (x, weight, bias)
    return (
        # Quantised weights are a type of their own.
        all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors)
        and all(tensor.is_cpu and tensor.dtype is x.dtype for tensor in tensors)
        and (bias is None or bias.dim() == 1)
        and x.numel() >= least_rows(x.dtype) * x.shape[-1] > 0
    )


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    wide = x.float()
    outputs = max(1, _CONVERTED // weight.shape[1])
    weights = weight.split(outputs)
    biases = [None] * len(weights) if bias is None else bias.float().split(outputs)
    out = x.new_empty(*x.shape[:-1], weight.shape[0])
    for part, w, b in zip(out.split(outputs, dim=-1), weights, biases, strict=True):
        part.copy_(F.linear(wide, w.float(), b))
    return out

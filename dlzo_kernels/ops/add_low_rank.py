"""add_low_rank: a matrix moved along U V^T, which is never whole in memory."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from dlzo_kernels import _C
from dlzo_kernels.ops._common import mark_written, pack

# Elements at a time of U V^T on a GPU.
_CHUNK = 1 << 24


def add_low_rank(out: Tensor, master: Tensor, u: Tensor, v: Tensor, scale: float) -> None:
    """out = round(master + scale * u v^T): products and sums in float32, rounded one by one.

    A matrix's direction in LOZO (arXiv 2410.07698). The same bits on every backend: one kernel on
    CPUs, torch's operations elsewhere.

    Args:
        out: (m, n), float32, bfloat16 or float16; any strides. It may be the master.
        master: (m, n), float32.
        u: (m, rank), float32, contiguous.
        v: (n, rank), float32.
        scale: rounded to float32.
    """
    if out.is_cpu:
        columns = v.t().contiguous()
        addresses = u.data_ptr(), columns.data_ptr()
        threads = torch.get_num_threads()
        _C.add_low_rank(pack(out), pack(master), out.shape, *addresses, u.shape[1], scale, threads)
        mark_written(out)
        return
    height = max(1, _CHUNK // max(1, len(v)))
    # Outside the mode, torch writes no tensor that was made in it.
    with torch.inference_mode() if out.is_inference() else nullcontext():
        for to, base, left in zip(*(x.split(height) for x in (out, master, u)), strict=True):
            z = left[:, :1] * v[:, 0]
            for k in range(1, v.shape[1]):
                z += left[:, k : k + 1] * v[:, k]
            to.copy_(base + z.mul_(scale))

"""Steps along low-rank directions: LOZO (arXiv 2410.07698), from a master copy as in `zo_step`.

z of an (m, n) matrix is U V^T, of rank r: U is (m, r) and new in each step, V is (n, r) and stays
for a number of steps, by its seed. The update is divided by r, as the mean of <G, U V^T> U V^T is
r G. Any other tensor has the z of `zo_step`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dlzo_kernels.masters import Tuned, adopted, move_masters, moving
from dlzo_kernels.ops._common import check_range
from dlzo_kernels.ops.accumulate import check_directions
from dlzo_kernels.ops.add_low_rank import add_low_rank
from dlzo_kernels.ops.gaussian import gaussian
from dlzo_kernels.ops.perturb import perturb_layer
from dlzo_kernels.parameters import Layer
from dlzo_kernels.signals import Held
from dlzo_kernels.step import LARGEST_NORMAL, Loss, StepResult, ZOStep, check_keep

# U and V of a parameter share its stream; the queries of V begin here.
V_QUERY = 1 << 31


class _Factors(NamedTuple):
    """What the factors of a step's directions are made of."""

    seed: int  # of U
    v_seed: int
    rank: int

    def add(self, out: Tensor, t: Tuned, query: int, scale: float) -> None:
        """out = round(master + scale * z) of a matrix."""
        (m, n), device, stream = out.shape, out.device, t.operand.stream
        u = gaussian((m, self.rank), self.seed, stream=stream, query=query, device=device)
        v_query = V_QUERY + query
        v = gaussian((n, self.rank), self.v_seed, stream=stream, query=v_query, device=device)
        add_low_rank(out, t.entry.master, u, v, scale)


class LowRankStep(ZOStep):
    """An open step as `zo_step` makes it, with the same guarantees, along low-rank directions.

    Args:
        layer: as in `zo_step`; a matrix must not be a DTensor.
        seed: of U, and of the z of what is no matrix; in [0, 2^64).
        eps: size of the perturbation, > 0.
        lr: step size, >= 0.
        rank: r, of each direction, at least 1.
        v_seed: of V, in [0, 2^64).
        directions: as in `zo_step`.
        weight_decay: as in `zo_step`.

    Raises:
        ValueError: as `zo_step`; or the rank is below 1, or a matrix is a DTensor.
    """

    def __init__(
        self,
        layer: Layer,
        seed: int,
        eps: float,
        lr: float,
        *,
        rank: int,
        v_seed: int,
        directions: int = 1,
        weight_decay: float = 0.0,
    ) -> None:
        self._factors = _checked(seed, v_seed, rank)
        super().__init__(layer, seed, eps, lr, directions, weight_decay)
        self._matrices, self._others = _split(self._tuned)
        # An element of z is a sum of `rank` products of two normals, and the update divides by it.
        self._most /= LARGEST_NORMAL

    def _perturb(self, scale: float, direction: int) -> None:
        for t in self._matrices:
            self._factors.add(t.operand.out, t, direction, scale)
        if self._others:
            perturb_layer([t.operand for t in self._others], self._seed, scale, direction)

    def _finish(
        self, plus: list[Loss], minus: list[Loss], max_loss: float = math.inf
    ) -> StepResult:
        return self._finish_here([*map(float, plus)], [*map(float, minus)], max_loss)

    def _move(self, scales: Sequence[float], keep: float) -> None:
        _move(self._matrices, self._others, self._factors, scales, keep)


def low_rank_replay(
    layer: Layer, seed: int, v_seed: int, rank: int, scales: Sequence[float], *, keep: float = 1.0
) -> None:
    """Moves a layer by one LowRankStep: bit-equal to its update.

    A step that was not applied, or whose scales are all zero, moved nothing: leave it out.

    Args:
        layer: as in `zo_step`, with the weights that the step started from.
        seed: of the step.
        v_seed: of the step.
        rank: of the step.
        scales: `update_scales` of the step.
        keep: 1 - lr * weight_decay of the step.

    Raises:
        ValueError: as LowRankStep, or a scale is not finite.
        RuntimeError: a step has the layer perturbed.
    """
    factors = _checked(seed, v_seed, rank)
    check_keep(keep)
    tuned = adopted(layer)
    scales = [*map(float, scales)]
    check_directions([seed] * len(scales), scales, range(len(scales)), tuned[0].live.device)
    matrices, others = _split(tuned)
    with Held(__file__):
        _move(matrices, others, factors, scales, keep)


def _checked(seed: int, v_seed: int, rank: int) -> _Factors:
    check_range("v_seed", v_seed, 1 << 64)
    check_range("rank", rank, 1 << 32)
    if rank < 1:
        raise ValueError(f"rank must be at least 1, not {rank}")
    return _Factors(seed, v_seed, rank)


def _split(tuned: Sequence[Tuned]) -> tuple[list[Tuned], list[Tuned]]:
    """Matrices and others."""
    matrices = [t for t in tuned if t.live.dim() == 2]
    for t in matrices:
        # Only a DTensor has one of its own.
        if t.operand.row_stride is not None:
            raise ValueError(f"{t.name} is a DTensor; low-rank directions need plain matrices")
    return matrices, [t for t in tuned if t.live.dim() != 2]


@torch.no_grad()
def _move(
    matrices: Sequence[Tuned],
    others: Sequence[Tuned],
    factors: _Factors,
    scales: Sequence[float],
    keep: float,
) -> None:
    with moving(matrices):
        for t in matrices:
            if keep != 1:
                t.entry.master.mul_(keep)
            for query, scale in enumerate(scales):
                factors.add(t.entry.master, t, query, scale / factors.rank)
        move_masters(matrices, [], [], [])
    if others:
        queries = range(len(scales))
        move_masters(others, [factors.seed] * len(scales), scales, queries, keep=keep)

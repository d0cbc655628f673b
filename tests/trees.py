"""Trees of tokens, and what attention over them gives in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from dlzo_kernels import reference

# Of a result, in units of the largest value: rounding of the result, and float32 sums.
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def inputs(
    tokens: int, sizes: tuple[int, int], heads: tuple[int, int], dtype: torch.dtype, batch: int = 2
) -> tuple[Tensor, ...]:
    """Query, key and value as a model makes them: the heads of a token side by side."""
    generator = torch.Generator().manual_seed(tokens)
    (size, value_size), (of_query, of_key) = sizes, heads
    shapes = (of_query, size), (of_key, size), (of_key, value_size)
    return tuple(
        torch.randn(batch, tokens, *shape, generator=generator).to(dtype).transpose(1, 2)
        for shape in shapes
    )


def chain(tokens: int) -> list[int]:
    return list(range(-1, tokens - 1))


def tree(tokens: int) -> list[int]:
    """Runs of several lengths that branch off earlier tokens, now and then a new root."""
    parents = chain(tokens)
    for i, start in enumerate(range(3, tokens, 7)):
        parents[start] = -1 if i % 4 == 3 else start * i % start
    return parents


def assert_right(
    got: Tensor,
    tensors: tuple[Tensor, ...],
    parents: list[int],
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    slack: float = 1,
) -> None:
    """That `got` is the attention of query, key and value, but for `slack` times the bound."""
    query, _, value = tensors
    seen = reference.visible_tokens(parents, window)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    exact = (x.double().numpy() for x in tensors)
    expected = torch.from_numpy(reference.tree_attention(*exact, seen, scale, softcap))
    assert got.dtype == query.dtype and got.shape == expected.shape
    distance = (got.double() - expected).abs().max().item()
    assert distance <= slack * BOUNDS[query.dtype] * value.abs().max().item()

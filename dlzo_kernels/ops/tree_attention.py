"""tree_attention: attention of many sequences, as trees of shared prefixes, in one call."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dlzo_kernels import _C
from dlzo_kernels.ops._common import (
    LIBRARY,
    check_same_device,
    check_tensor,
    is_eager,
    pack,
    threads,
)

LIBRARY.define(
    "tree_attention(Tensor query, Tensor key, Tensor value, Tensor parents, float scale, "
    "int window, float softcap) -> Tensor"
)

_NO_WINDOW = 1 << 62


def tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    parents: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """softmax(scale * q k) v of every token over the sequence that ends with it; forward, on CPUs.

    The tokens of a row are those of any number of trees: a token's sequence is itself, its parent,
    the parent's parent and so on. Sequences that share a prefix share its tokens; trees do not see
    each other, and a token's result has the same bits whatever else is in the row, as long as its
    own tree is finite. All sums run in float32; the bits depend on the ISA, but not on the number
    of threads. Only pairs of tokens that see each other are computed, and memory grows with the
    number of tokens, not with its square.

    Args:
        query: float32, bfloat16 or float16, of shape (batch, heads, tokens, head size).
        key: of shape (batch, key heads, tokens, head size); the number of heads is a multiple of
            that of key heads, and a key head serves heads that stand side by side.
        value: of shape (batch, key heads, tokens, value size).
        parents: int64, of shape (tokens,), on the CPU: where the token before each lies in the row,
            always before it; -1 for the first of a sequence. One row of numbers for all of a batch.
        scale: of the scores; by default 1 / sqrt(head size).
        window: how many tokens of its sequence a token sees, itself among them; by default all.
        softcap: scores s become softcap * tanh(s / softcap); by default they stay.

    Returns:
        A tensor of shape (batch, heads, tokens, value size) and query's dtype, whose vectors lie
        in memory in the order (batch, tokens, heads).

    Raises:
        ValueError: shapes do not fit, a parent does not come before its token, a number is out of
            range, or a gradient would be lost.
        TypeError: dtypes differ, or are none of the three.
        NotImplementedError: the tensors are not on the CPU.
    """
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        raise ValueError(
            "query, key or value requires a gradient, which tree_attention has not: "
            "call it under torch.no_grad()"
        )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    window = _NO_WINDOW if window is None else window
    softcap = 0.0 if softcap is None else softcap
    arguments = (query, key, value, parents, scale, window, softcap)
    if is_eager(query, key, value, parents):
        return _tree_attention(*arguments)
    return torch.ops.dlzo.tree_attention(*arguments)


def _tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    parents: Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    _check(query, key, value, parents)
    _check_numbers(scale, window, softcap)
    out = _empty_result(query, value)
    if out.numel() == 0:
        return out
    query, key, value = map(_with_vectors, (query, key, value))
    batch, heads, tokens, head_size = query.shape
    sizes = (batch, heads, key.shape[1], tokens, head_size, value.shape[-1])
    tensors = pack(query), pack(key), pack(value), pack(out)
    parents = parents.contiguous()
    numbers = (parents.data_ptr(), sizes, scale, min(window, _NO_WINDOW), softcap)
    _C.tree_attention(*tensors, *numbers, threads())
    return out


def _check(query: Tensor, key: Tensor, value: Tensor, parents: Tensor) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_tensor(name, tensor)
        if not tensor.is_cpu:
            raise NotImplementedError(
                f"{name} is on {tensor.device}, for which there is no kernel of tree_attention; "
                "use scaled_dot_product_attention"
            )
        if tensor.dim() != 4:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; give (batch, heads, tokens, size)"
            )
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype} and query {query.dtype}; cast one")
    batch, heads, tokens, head_size = query.shape
    if key.shape[1] == 0 or heads % key.shape[1]:
        raise ValueError(f"{heads} heads of query do not share {key.shape[1]} of key evenly")
    if key.shape != (batch, key.shape[1], tokens, head_size) or value.shape[:3] != key.shape[:3]:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (query, key, value))
        raise ValueError(f"the shapes of query, key and value, {shapes}, do not fit each other")
    if parents.dtype is not torch.int64 or parents.shape != (tokens,):
        raise ValueError(
            f"parents is {parents.dtype} of shape {tuple(parents.shape)}; give {tokens} int64"
        )
    check_same_device("parents", parents, "query", query.device)


def _check_numbers(scale: float, window: int, softcap: float) -> None:
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, not {scale}")
    if window < 1:
        raise ValueError(f"window must be at least 1 token, not {window}")
    if not 0 <= softcap < math.inf:
        raise ValueError(f"softcap must be positive and finite, not {softcap}")


def _with_vectors(x: Tensor) -> Tensor:
    """x with the elements of each vector side by side."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _empty_result(query: Tensor, value: Tensor) -> Tensor:
    batch, heads, tokens, _ = query.shape
    return query.new_empty(batch, tokens, heads, value.shape[-1]).transpose(1, 2)


@torch.library.register_fake("dlzo::tree_attention", lib=LIBRARY)
def _(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
    return _empty_result(query, value)


LIBRARY.impl("tree_attention", _tree_attention, "CPU")

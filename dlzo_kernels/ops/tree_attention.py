"""tree_attention: attention of many sequences, as trees of shared prefixes, in one call."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dlzo_kernels import _C
from dlzo_kernels.ops import _gpu
from dlzo_kernels.ops._common import (
    DTYPE_CODES,
    LIBRARY,
    check_no_gradient,
    check_range,
    check_same_device,
    check_scale,
    check_tensor,
    is_eager,
    pack,
)
from dlzo_kernels.ops._triton import Plan, aligned, dtype_of, jit, launch, log2, tl

LIBRARY.define(
    "tree_attention(Tensor query, Tensor key, Tensor value, Tensor parents, float scale, "
    "int window, float softcap) -> Tensor",
    tags=(torch.Tag.cudagraph_unsafe,),
)

_NO_WINDOW = 1 << 62
_LONGEST_ON_GPU = 256  # elements of a vector

_Tensors = tuple[Tensor, Tensor, Tensor, Tensor]  # query, key, value and what is written


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
    """softmax(scale * q k) v of every token over the sequence that ends with it; forward only.

    The tokens of a row are those of any number of trees: a token's sequence is itself, its parent,
    the parent's parent and so on. Sequences that share a prefix share its tokens; trees do not see
    each other, and a token's result has the same bits whatever other trees lie before or behind
    its own, as long as its own is finite; trees that lie between each other's tokens are cut into
    pieces, which take time and memory. All sums run in float32, over weights that are rounded to
    the dtype on a GPU, and where the ISA is avx512bf16 to bfloat16; the bits depend on ISA and GPU,
    but not on the number of threads, nor from one call to the next. Pairs of tokens that do not see
    each other are left out, on a GPU (a Triton kernel) tile by tile; there is no matrix of them.

    Args:
        query: float32, bfloat16 or float16, of shape (batch, heads, tokens, head size).
        key: of shape (batch, key heads, tokens, head size); the number of heads is a multiple of
            that of key heads, and a key head serves heads that stand side by side.
        value: of shape (batch, key heads, tokens, value size).
        parents: int64, of shape (tokens,), always on the CPU: where the token before each lies in
            the row, always before it; -1 for the first of a sequence. One row of numbers for all of
            a batch.
        scale: of the scores; by default 1 / sqrt(head size).
        window: how many tokens of its sequence a token sees, itself among them; by default all.
        softcap: scores s become softcap * tanh(s / softcap), to within 2^-22 * softcap; by default
            they stay.

    Returns:
        A tensor of shape (batch, heads, tokens, value size) and query's dtype, whose vectors lie
        in memory in the order (batch, tokens, heads).

    Raises:
        ValueError: shapes or devices do not fit, a parent does not come before its token, a number
            is out of range, or a gradient would be lost.
        TypeError: dtypes differ, or are none of the three.
        NotImplementedError: there is no kernel for the device, or on a GPU for vectors of more than
            256 elements.
        RuntimeError: a CUDA graph is captured; or, as a LaunchError, Triton cannot compile or load
            the kernel here.
    """
    check_no_gradient("tree_attention", query=query, key=key, value=value)
    scale = max((1, *query.shape[-1:])) ** -0.5 if scale is None else float(scale)
    window = _NO_WINDOW if window is None else window
    check_range("window", window, 1 << 63)
    if softcap is not None and not 1e-30 <= softcap <= 1e30:
        raise ValueError(f"softcap must be between 1e-30 and 1e30, not {softcap}")
    softcap = 0.0 if softcap is None else float(softcap)
    arguments = (query, key, value, parents, scale, window, softcap)
    if is_eager(query, key, value, parents):
        return _tree_attention(*arguments)
    return torch.ops.dlzo.tree_attention(*arguments)


def why_no_kernel(query: Tensor, value: Tensor) -> str:
    """Why there is none for such devices, dtypes and sizes, in words; empty where there is one."""
    if value.dtype not in DTYPE_CODES:
        return f"tree_attention does not take {value.dtype}"
    if value.is_cpu:
        return ""
    if not value.is_cuda:
        return f"tree_attention has no kernel for {value.device.type}"
    if reason := _gpu.why_no_triton():
        return f"tree_attention is a Triton kernel on GPUs, and {reason}"
    if max(query.shape[-1], value.shape[-1]) > _LONGEST_ON_GPU:
        return (
            f"vectors have {query.shape[-1]} and {value.shape[-1]} elements, and on GPUs "
            f"tree_attention takes {_LONGEST_ON_GPU} at most"
        )
    return ""


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
    _check_numbers(scale, window)
    out = _empty_result(query, value)
    if out.numel() == 0:
        return out
    query, key, value = map(_with_vectors, (query, key, value))
    parents, window = parents.contiguous(), min(window, _NO_WINDOW)
    if query.is_cuda:
        _launch((query, key, value, out), parents, scale, window, softcap)
        return out
    batch, heads, tokens, head_size = query.shape
    sizes = (batch, heads, key.shape[1], tokens, head_size, value.shape[-1])
    tensors = pack(query), pack(key), pack(value), pack(out)
    _C.tree_attention(
        *tensors, parents.data_ptr(), sizes, scale, window, softcap, torch.get_num_threads()
    )
    return out


def _launch(tensors: _Tensors, parents: Tensor, scale: float, window: int, softcap: float) -> None:
    query, value = tensors[0], tensors[2]
    if reason := why_no_kernel(query, value):
        raise NotImplementedError(f"{reason}; use scaled_dot_product_attention")
    tile = tile_for(query, value)
    places, tile_count = walk(parents, tile)
    places = _gpu.to_device(places, query.device)
    plan = triton_plan(tensors, places, tile_count, tile, scale, window, softcap)
    launch([plan], query.device)


def _check(query: Tensor, key: Tensor, value: Tensor, parents: Tensor) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_tensor(name, tensor)
        check_same_device(name, tensor, "query", query.device)
        if tensor.dim() != 4:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; give (batch, heads, tokens, size)"
            )
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype} and query {query.dtype}; cast one")
    batch, heads, tokens, head_size = query.shape
    if head_size == 0:
        raise ValueError("the vectors of query and key have no elements; give at least one")
    if key.shape[1] == 0 or heads % key.shape[1]:
        raise ValueError(f"{heads} heads of query do not share {key.shape[1]} of key evenly")
    if key.shape != (batch, key.shape[1], tokens, head_size) or value.shape[:3] != key.shape[:3]:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (query, key, value))
        raise ValueError(f"the shapes of query, key and value, {shapes}, do not fit each other")
    if parents.dtype is not torch.int64 or parents.shape != (tokens,):
        raise ValueError(
            f"parents is {parents.dtype} of shape {tuple(parents.shape)}; give {tokens} int64"
        )
    if not parents.is_cpu:
        raise ValueError(f"parents is on {parents.device}; keep it on the CPU")


def _check_numbers(scale: float, window: int) -> None:
    check_scale(scale)
    if window < 1:
        raise ValueError(f"window must be at least 1 token, not {window}")


def _with_vectors(x: Tensor) -> Tensor:
    """x with the elements of each vector side by side."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _empty_result(query: Tensor, value: Tensor) -> Tensor:
    batch, heads, tokens, _ = query.shape
    return query.new_empty(batch, tokens, heads, value.shape[-1]).transpose(1, 2)


@torch.library.register_fake("dlzo::tree_attention", lib=LIBRARY)
def _(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
    return _empty_result(query, value)


for _key in ("CPU", "CUDA"):
    LIBRARY.impl("tree_attention", _tree_attention, _key)


# Triton. A program has a tile of tokens of one tree and one head, and goes through the tree's keys
# (FlashAttention-2, arXiv 2307.08691). The tokens are taken in an order in which descendants follow
# a token: a key at place j is seen from place i if j <= i < behind[j].


class _Tile(NamedTuple):
    """How many tokens a program has, how many keys it takes at a time, and its warps."""

    rows: int
    keys: int
    warps: int


# By bytes of a number and elements of a vector: large ones need the registers of more warps.
_TILES = {
    2: {64: _Tile(64, 64, 4), 128: _Tile(64, 64, 8), _LONGEST_ON_GPU: _Tile(64, 32, 8)},
    4: {64: _Tile(32, 32, 8), 128: _Tile(16, 32, 8), _LONGEST_ON_GPU: _Tile(16, 16, 8)},
}


class _Vectors(NamedTuple):
    """A tensor of vectors: its address, and the distances between them in elements."""

    address: int
    batch: int
    head: int
    token: int


class _Walk(NamedTuple):
    """Addresses of int32 numbers; see csrc/paths.h."""

    token: int
    behind: int
    depth: int
    first: int
    root: int


def tile_for(query: Tensor, value: Tensor) -> _Tile:
    """The tile for vectors as long as these."""
    tiles, longest = _TILES[query.itemsize], max(query.shape[-1], value.shape[-1])
    return tiles[min(width for width in tiles if width >= longest)]


def walk(parents: Tensor, tile: _Tile) -> tuple[Tensor, int]:
    """The numbers of a _Walk, int32 of shape (5, tokens), and how many tiles there are.

    Raises:
        ValueError: a parent does not come before its token.
    """
    places = torch.empty(5, len(parents), dtype=torch.int32, device="cpu")
    numbers = parents.data_ptr(), len(parents), tile.rows, places.data_ptr()
    return places, _C.gpu.walk(*numbers)


def triton_plan(
    tensors: _Tensors,
    places: Tensor,
    tile_count: int,
    tile: _Tile,
    scale: float,
    window: int,
    softcap: float,
) -> Plan:
    """The launch that fills the last of the tensors; `places` are those of a walk."""
    query, key, value, _ = tensors
    batch, heads, tokens, head_size = query.shape
    vectors = [_Vectors(x.data_ptr(), *x.stride()[:3]) for x in tensors]
    # exp(s) = 2^(s / ln 2), and tanh(x) = 1 - 2 / (exp(2 x) + 1)
    inner, outer = scale / math.log(2), softcap / math.log(2)
    if softcap:
        inner *= 2 / softcap
    constants = {
        "DTYPE": dtype_of(query.dtype),
        "SIZE": head_size,
        "WIDTH": _width(head_size),
        "VALUE_SIZE": value.shape[-1],
        "VALUE_WIDTH": _width(value.shape[-1]),
        "ROWS": tile.rows,
        "KEYS": tile.keys,
        # Not by the number of tokens: other trees in the row would choose other code.
        "WINDOWED": window < _NO_WINDOW,
        "CAPPED": softcap > 0,
        "ALIGNED": all(x.address % 16 == 0 and not any(n % 8 for n in x[1:]) for x in vectors),
        # Of float32; AMD has matrix instructions for it, NVIDIA makes it of three of tf32.
        "PRECISION": "tf32x3" if torch.version.hip is None else "ieee",
    }
    sizes = tile_count, heads, heads // key.shape[1], min(window, tokens)
    addresses = _Walk(*(row.data_ptr() for row in places))
    arguments = (*vectors, addresses, *sizes, inner, outer)
    programs = tile_count * batch * heads
    return Plan(_attend, programs, arguments, constants, tile.warps, exact=False)


def _width(size: int) -> int:
    """A power of two, and what a matrix instruction takes at least."""
    return max(16, 1 << log2(size))


@jit
def _pointers(
    x: _Vectors,
    batch: tl.tensor,
    head: tl.tensor,
    token: tl.tensor,
    DTYPE: tl.constexpr,
    WIDTH: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> tl.tensor:
    """To the elements of some tokens' vectors: shape (tokens, WIDTH)."""
    if ALIGNED:
        start = aligned(x.address, DTYPE) + (batch * (x.batch // 8) + head * (x.head // 8)) * 8
        start += token.to(tl.int64) * (x.token // 8) * 8
    else:
        start = x.address.to(tl.pointer_type(DTYPE)) + batch * x.batch + head * x.head
        start += token.to(tl.int64) * x.token
    return start[:, None] + tl.arange(0, WIDTH)[None, :]


@jit
def _mask(inside: tl.tensor, SIZE: tl.constexpr, WIDTH: tl.constexpr) -> tl.tensor:
    """Which of the elements there are."""
    return inside[:, None] & (tl.arange(0, WIDTH) < SIZE)[None, :]


@jit
def _attend(
    query: _Vectors,
    key: _Vectors,
    value: _Vectors,
    out: _Vectors,
    walk: _Walk,
    tiles: tl.tensor,
    heads: tl.tensor,
    group: tl.tensor,
    window: tl.tensor,
    inner: tl.tensor,
    outer: tl.tensor,
    DTYPE: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """The results of one tile and head."""
    program = tl.program_id(0).to(tl.int64)
    tile, head, batch = program % tiles, program // tiles % heads, program // tiles // heads
    first = tl.load(walk.first.to(tl.pointer_type(tl.int32)) + tile)
    root = tl.load(walk.root.to(tl.pointer_type(tl.int32)) + tile)
    token_at = walk.token.to(tl.pointer_type(tl.int32))
    behind_at = walk.behind.to(tl.pointer_type(tl.int32))
    depth_at = walk.depth.to(tl.pointer_type(tl.int32))
    last = tl.minimum(first + ROWS, tl.load(behind_at + root))

    row = first + tl.arange(0, ROWS)
    inside = row < last
    token = tl.load(token_at + row, mask=inside, other=0)
    q = tl.load(
        _pointers(query, batch, head, token, DTYPE, WIDTH, ALIGNED),
        mask=_mask(inside, SIZE, WIDTH),
        other=0,
    )
    depth = tl.load(depth_at + row, mask=inside, other=0)
    shallowest = tl.min(tl.where(inside, depth, 0x7FFFFFFF), 0)

    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, VALUE_WIDTH), tl.float32)
    for start in range(root, last, KEYS):
        at = start + tl.arange(0, KEYS)
        there = at < last
        behind = tl.load(behind_at + at, mask=there, other=0)
        near = behind > first  # has a descendant in the tile, or lies in it
        if WINDOWED:
            key_depth = tl.load(depth_at + at, mask=there, other=0)
            near = near & (key_depth + window > shallowest)
        if tl.max(near.to(tl.int32), 0) > 0:
            sees = (at[None, :] <= row[:, None]) & (behind[None, :] > row[:, None])
            if WINDOWED:
                sees = sees & (depth[:, None] < key_depth[None, :] + window)
            token_there = tl.load(token_at + at, mask=there, other=0)
            k = tl.load(
                _pointers(key, batch, head // group, token_there, DTYPE, WIDTH, ALIGNED),
                mask=_mask(there, SIZE, WIDTH),
                other=0,
            )
            v = tl.load(
                _pointers(value, batch, head // group, token_there, DTYPE, VALUE_WIDTH, ALIGNED),
                mask=_mask(there, VALUE_SIZE, VALUE_WIDTH),
                other=0,
            )
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * inner
            if CAPPED:
                scores = outer - outer * 2 / (tl.exp2(scores) + 1)
            scores = tl.where(sees, scores, float("-inf"))
            larger = tl.maximum(largest, tl.max(scores, 1))
            # Where nothing was seen so far, nothing is subtracted: infinities would give a NaN.
            pivot = tl.where(larger == float("-inf"), 0.0, larger)
            weights = tl.exp2(scores - pivot[:, None])
            kept = tl.exp2(largest - pivot)
            total = total * kept + tl.sum(weights, 1)
            sums = sums * kept[:, None]
            sums += tl.dot(weights.to(DTYPE), v, input_precision=PRECISION)
            largest = larger
    result = (sums / tl.where(inside, total, 1.0)[:, None]).to(DTYPE)
    tl.store(
        _pointers(out, batch, head, token, DTYPE, VALUE_WIDTH, ALIGNED),
        result,
        mask=_mask(inside, VALUE_SIZE, VALUE_WIDTH),
    )

"""Which tensors of a layer are tuned, and which elements of the noise are theirs."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator
from typing import TypedDict

from torch import Tensor, nn

from dlzo_kernels.ops._common import check_writable, extent, overlap

Layer = nn.Module | Tensor | Iterable[nn.Module | Tensor]

# Whose order says nothing, or whose items are no tensors.
_NO_LAYER = (str, bytes, dict, set, frozenset)


class Numbering(TypedDict):
    """Which elements of noise a tensor's own are."""

    stream: int
    offset: int
    row_stride: int | None


def tuned_parameters(layer: Layer) -> list[tuple[str, Tensor, Tensor, Numbering]]:
    """(name, as given, local, numbering) of what is tuned; the stream counts frozen ones too."""
    named: dict[int, tuple[str, Tensor]] = {}
    tuned: set[int] = set()
    for name, tensor, chosen in _named_tensors(layer):
        named.setdefault(id(tensor), (name, tensor))
        if chosen:
            tuned.add(id(tensor))
    found: list[tuple[str, Tensor, Tensor, Numbering]] = []
    for stream, (key, (name, tensor)) in enumerate(named.items()):
        local, offset, row_stride = _shard(name, tensor)
        _check_parameter(name, local)
        if key in tuned:
            numbering = Numbering(stream=stream, offset=offset, row_stride=row_stride)
            found.append((name, tensor, local, numbering))
    if not found:
        raise ValueError("the layer has no parameter that requires grad; call requires_grad_(True)")
    _refuse_overlap((name, local) for name, _, local, _ in found if local.numel())
    return found


def _refuse_overlap(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Compares each with those alone whose range of memory it begins in."""
    before: list[tuple[str, Tensor]] = []
    for name, tensor in sorted(tensors, key=lambda item: item[1].data_ptr()):
        before = [(n, t) for n, t in before if tensor.data_ptr() < t.data_ptr() + extent(t)]
        for other, earlier in before:
            if overlap(earlier, tensor):
                raise ValueError(f"{other} and {name} share memory; give one of the two")
        before.append((name, tensor))


def _named_tensors(layer: Layer) -> Iterator[tuple[str, Tensor, bool]]:
    """(name, tensor, whether it is tuned): tensors that are given as such always are."""
    if isinstance(layer, Tensor):
        yield "the tensor", layer, True
    elif isinstance(layer, nn.Module):
        for name, parameter in layer.named_parameters():
            yield name, parameter, parameter.requires_grad
    elif isinstance(layer, Iterable) and not isinstance(layer, _NO_LAYER):
        for i, part in enumerate(layer):
            if not isinstance(part, Tensor | nn.Module):
                raise TypeError(
                    f"item {i} of the layer is a {type(part).__name__}, not a module or tensor"
                )
            for name, tensor, chosen in _named_tensors(part):
                yield (f"tensor {i}" if part is tensor else f"{i}.{name}"), tensor, chosen
    else:
        raise TypeError(
            f"layer is a {type(layer).__name__}; give a module, a tensor or an iterable of them"
        )


def _shard(name: str, tensor: Tensor) -> tuple[Tensor, int, int | None]:
    """(shard, offset, row stride) of a DTensor in this process; any other tensor is its own."""
    # Where nobody has imported it there is no DTensor, and importing it is slow.
    module = sys.modules.get("torch.distributed.tensor")
    if module is None or not isinstance(tensor, module.DTensor):
        return tensor, 0, None
    if not all(type(p) in (module.Shard, module.Replicate) for p in tensor.placements):
        raise ValueError(f"{name} is placed as {tensor.placements}; only shards can be tuned")
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, live = tuple(tensor.shape), tensor.to_local().detach()
    _, start = compute_local_shape_and_global_offset(shape, tensor.device_mesh, tensor.placements)
    if len(shape) < 2:
        return live, sum(start), None
    if live.shape[1:-1] != shape[1:-1]:
        raise ValueError(f"{name} is sharded in a middle dimension; use its first or last")
    return live, start[0] * math.prod(shape[1:]) + start[-1], shape[-1]


def _check_parameter(name: str, tensor: Tensor) -> None:
    if type(tensor) not in (Tensor, nn.Parameter):
        raise TypeError(
            f"{name} is a {type(tensor).__name__}, not a plain tensor; de-quantise or unwrap it"
        )
    if tensor.is_meta:
        raise ValueError(f"{name} is on the meta device and holds no values; load it first")
    check_writable(name, tensor)

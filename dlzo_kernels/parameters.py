"""Which tensors of a layer are tuned, and which elements of the noise are theirs."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any, TypedDict

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from dlzo_kernels.ops import _gpu
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
        if key not in tuned:  # whatever it is: nothing is done to it
            continue
        local, offset, row_stride = _shard(name, tensor)
        _check_parameter(name, local)
        numbering = Numbering(stream=stream, offset=offset, row_stride=row_stride)
        found.append((name, tensor, local, numbering))
    if not found:
        raise ValueError("the layer has no parameter that requires grad; call requires_grad_(True)")
    _refuse_overlap((name, local) for name, _, local, _ in found if local.numel())
    return found


def storages(layer: Layer) -> set[int]:
    """The storages of all parameters, frozen ones too, by StorageWeakRef's number."""
    found: set[int] = set()
    for _, tensor, _ in _named_tensors(layer):
        with suppress(NotImplementedError, ValueError):  # sparse, or not initialised: it has none
            found.add(StorageWeakRef(_local(tensor).untyped_storage()).cdata)
    return found


def is_whole(tensor: Tensor) -> bool:
    """Whether its storage, which somebody may have resized, still holds all of its elements."""
    end = tensor.storage_offset() * tensor.element_size() + extent(tensor)
    return tensor.numel() == 0 or end <= tensor.untyped_storage().nbytes()


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


def _local(tensor: Tensor) -> Tensor:
    """This process's shard of a DTensor; any other tensor itself."""
    # Where nobody has imported it there is no DTensor, and importing it is slow.
    module = sys.modules.get("torch.distributed.tensor")
    if module is None or not isinstance(tensor, module.DTensor):
        return tensor
    return tensor.to_local().detach()


def _shard(name: str, tensor: Any) -> tuple[Tensor, int, int | None]:
    """(shard, offset, row stride) of a DTensor in this process; any other tensor is its own."""
    live = _local(tensor)
    if live is tensor:
        return tensor, 0, None
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if not all(type(p) in (Shard, Replicate) for p in tensor.placements):
        raise ValueError(f"{name} is placed as {tensor.placements}; only shards can be tuned")
    shape = tuple(tensor.shape)
    _, start = compute_local_shape_and_global_offset(shape, tensor.device_mesh, tensor.placements)
    if len(shape) < 2:
        return live, sum(start), None
    if live.shape[1:-1] != shape[1:-1]:
        raise ValueError(f"{name} is sharded in a middle dimension; use its first or last")
    return live, start[0] * math.prod(shape[1:]) + start[-1], shape[-1]


def _check_parameter(name: str, tensor: Tensor) -> None:
    if tensor.is_cuda:
        _gpu.selected()  # or it raises, before anything is written
    if type(tensor) not in (Tensor, nn.Parameter):
        raise TypeError(
            f"{name} is a {type(tensor).__name__}, not a plain tensor; de-quantise or unwrap it"
        )
    if tensor.is_meta:
        raise ValueError(f"{name} is on the meta device and holds no values; load it first")
    check_writable(name, tensor)
    if not is_whole(tensor):
        raise ValueError(f"the storage of {name} was resized below its elements; load it anew")

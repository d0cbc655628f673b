"""What every op shares: the torch library, argument checks, the way of tensors to C++."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

LIBRARY = torch.library.Library("dlzo", "DEF")
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_T = TypeVar("_T")
_U32, _U64 = 1 << 32, 1 << 64


def register_silent_fake(name: str) -> None:
    """Registers the fake of an op that writes its arguments and returns nothing: nothing to do."""
    torch.library.register_fake(f"dlzo::{name}", lambda *_, **__: None, lib=LIBRARY)


def is_eager(*tensors: Tensor) -> bool:
    """Whether the kernel may be called at once: nobody is tracing, nothing else wants the op."""
    if torch.compiler.is_compiling():
        return False
    for tensor in tensors:
        if type(tensor) is not Tensor and type(tensor) is not nn.Parameter:
            return False
    return not (
        torch._C._len_torch_dispatch_stack()  # FakeTensorMode, make_fx
        or torch._C._get_tracing_state()  # torch.jit.trace
        or torch._C._functorch.peek_interpreter_stack()  # torch.func
    )


def as_index(value: int) -> int:
    """An integer of any kind as an int, or as it is where it is traced; TypeError if it is none."""
    # operator.index would make a constant of what is traced.
    return value if isinstance(value, int | torch.SymInt) else operator.index(value)


def check_range(name: str, value: int, limit: int) -> int:
    """The value as an int; raises ValueError unless 0 <= value < limit, TypeError if it is none."""
    try:
        number = as_index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, not {value!r}") from None
    if not 0 <= number < limit:
        raise ValueError(f"{name} must be in [0, 2^{limit.bit_length() - 1}), not {value}")
    return number


def check_noise(
    shape: Sequence[int],
    seed: int | Tensor,
    stream: int,
    offset: int,
    query: int,
    row_stride: int | None,
) -> None:
    """Raises ValueError unless the numbers name elements of a logical tensor of noise v1."""
    if any(size < 0 for size in shape):
        raise ValueError(f"shape is {tuple(shape)}; give sizes of 0 or more")
    if not isinstance(seed, Tensor):
        check_range("seed", seed, _U64)
    check_range("stream", stream, _U32)
    check_range("query", query, _U32)
    offset = check_range("offset", offset, _U64)
    if row_stride is None:
        last = math.prod(shape)
    else:
        row_stride = check_range("row_stride", row_stride, _U64 >> 1)
        columns = shape[-1] if len(shape) else 1
        if row_stride < columns:
            raise ValueError(
                f"row_stride {row_stride} is smaller than a row of {columns} elements; "
                "give the number of columns of the full tensor"
            )
        last = (math.prod(shape[:-1]) - 1) * row_stride + columns
    if offset + last > _U64:
        raise ValueError(f"offset {offset} numbers elements beyond 2^64")


def check_scale(scale: float | Tensor) -> None:
    """Raises ValueError unless scale is finite as a float32, or is not read here."""
    if is_unread(scale):
        return
    # A tensor of few bits would round the limit to infinity.
    number = float(scale) if isinstance(scale, Tensor) else scale
    if not abs(number) <= 3.4028234663852886e38:
        raise ValueError(f"scale must be finite in float32, not {number}")


def is_unread(numbers: object) -> bool:
    """Whether the values cannot be read here: reading would wait for a GPU or break a trace."""
    return isinstance(numbers, Tensor) and (numbers.is_cuda or not is_eager(numbers))


def check_device_numbers(
    name: str, numbers: object, dtype: torch.dtype, count: int, device: torch.device
) -> None:
    """Raises unless numbers that are given as a tensor are `count` of the dtype on the device."""
    if not isinstance(numbers, Tensor):
        return
    if numbers.dtype is not dtype or numbers.numel() != count or not numbers.is_contiguous():
        raise TypeError(
            f"{name} is a tensor of {numbers.numel()} {numbers.dtype}; "
            f"give {count} {dtype} side by side"
        )
    if numbers.device != device:
        raise ValueError(f"{name} is on {numbers.device} and the weights on {device}; move it")


def check_tensor(name: str, tensor: Tensor) -> None:
    """Raises TypeError or ValueError unless a kernel can work on the tensor."""
    if not (tensor.is_cpu or tensor.is_cuda):
        raise NotImplementedError(
            f"{name} is on {tensor.device}, for which there is no kernel; "
            "move it to the CPU or a CUDA device"
        )
    if tensor.dtype not in DTYPE_CODES:
        raise TypeError(
            f"{name} has dtype {tensor.dtype}; use torch.float32, torch.bfloat16 or torch.float16"
        )
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} has layout {tensor.layout}; make it dense with .to_dense()")
    if tensor.is_neg():
        raise ValueError(f"{name} is a view of negated values; copy it with .resolve_neg()")


def check_writable(name: str, tensor: Tensor) -> None:
    """As check_tensor, and raises ValueError where two elements share memory."""
    check_tensor(name, tensor)
    if tensor.is_contiguous():
        return
    extent = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride < extent:
            raise ValueError(
                f"elements of {name} share memory (strides {tensor.stride()}); clone it"
            )
        extent += stride * (size - 1)


def check_no_gradient(op: str, **tensors: Tensor) -> None:
    """Raises ValueError where an op without a gradient would lose one, of either mode."""
    for name, tensor in tensors.items():
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise ValueError(
                f"{name} requires a gradient, which {op} has not: call it under torch.no_grad()"
            )
        # Forward mode goes on under no_grad.
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:
            raise ValueError(
                f"{name} has a tangent, and {op} no forward-mode gradient: give {name}.detach()"
            )


def check_same_device(name: str, tensor: Tensor, other: str, device: torch.device) -> None:
    """Raises ValueError unless the tensor is on the device, which is that of `other`."""
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device} and {other} on {device}; move one of them")


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the ranges of two non-empty tensors meet.

    Separate column blocks of one matrix do not count as meeting.
    """
    a_begin, b_begin = a.data_ptr(), b.data_ptr()
    if a_begin >= b_begin + extent(b) or b_begin >= a_begin + extent(a):
        return False
    (step, a_width), (b_step, b_width) = _columns(a), _columns(b)
    if step == 0 or step != b_step:
        return True
    apart = (a_begin - b_begin) % step
    return apart < b_width or apart + a_width > step


def _columns(tensor: Tensor) -> tuple[int, int]:
    """Bytes from row to row of a matrix, and of a row, where columns of one are all; else zeros."""
    size = tensor.element_size()
    dims: list[tuple[int, int]] = []
    for n, s in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda dim: dim[1]):
        if dims and s == math.prod(dims[-1]):  # goes on where the dimension before it ends
            dims[-1] = (dims[-1][0], dims[-1][1] * n)
        elif n > 1:
            dims.append((s, n))
    if len(dims) == 1:
        return dims[0][0] * size, size
    if len(dims) == 2 and dims[0][0] == 1:
        return dims[1][0] * size, dims[0][1] * size
    return 0, 0


def extent(tensor: Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    if tensor.is_contiguous():
        return tensor.nbytes
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size() if tensor.numel() else 0


def shape_of(tensor: Tensor) -> Sequence[int]:
    """The shape with at least one dimension, as the extension expects it."""
    return tensor.shape or (1,)


def row_stride_of(shape: Sequence[int], row_stride: int | None) -> int:
    """The distance in logical indices between rows: by default the rows follow one another."""
    return shape[-1] if row_stride is None else row_stride


def pack(tensor: Tensor) -> tuple[int, int, Sequence[int]]:
    """(data pointer, dtype code, strides), the form in which the extension takes a tensor."""
    return tensor.data_ptr(), DTYPE_CODES[tensor.dtype], tensor.stride() or (1,)


NO_TENSOR = (0, 0, (1,))


def mark_written(tensor: Tensor) -> None:
    """Tells autograd of a write that it did not see."""
    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)


def to_signed(value: int) -> int:
    """A 64-bit unsigned number as the int64 that an operator schema carries."""
    value = as_index(value)
    return value - _U64 if value >= _U64 >> 1 else value


def to_unsigned(value: int) -> int:
    """The inverse of to_signed."""
    return operator.index(value) % _U64


def not_a_tensor(name: str, value: _T | Tensor) -> _T:
    """The value as an operator schema carries it; raises TypeError for a tensor."""
    if isinstance(value, Tensor):
        raise TypeError(f"{name} is a tensor; under torch.compile give a number")
    return value


def seed_of(seed: int | Tensor) -> int | Tensor:
    """A seed as an unsigned number, unless it lies in device memory."""
    return seed if isinstance(seed, Tensor) else to_unsigned(seed)

"""The compiled CPU column. A tensor is (data pointer, dtype code, strides in elements)."""

from collections.abc import Sequence

_Tensor = tuple[int, int, Sequence[int]]

def gaussian(
    out: _Tensor,
    shape: Sequence[int],
    offset: int,
    row_stride: int,
    seed: int,
    stream: int,
    query: int,
    threads: int,
) -> None: ...
def perturb(
    out: _Tensor,
    base: _Tensor,
    shape: Sequence[int],
    offset: int,
    row_stride: int,
    seed: int,
    stream: int,
    query: int,
    scale: float,
    threads: int,
) -> None: ...
def accumulate(
    out: _Tensor,
    base: _Tensor,
    shape: Sequence[int],
    offset: int,
    row_stride: int,
    seeds: Sequence[int],
    stream: int,
    queries: Sequence[int],
    scales: Sequence[float],
    threads: int,
) -> None: ...
def activation_stats(
    x: int,
    dtype: int,
    rows: int,
    channels: int,
    reduction: int,
    out: tuple[int, int, int, int, int],
    threads: int,
) -> None: ...
def isas() -> list[tuple[str, bool, bool, str]]: ...
def select_isa(name: str) -> None: ...
def selected_isa() -> str: ...
def thread_pool() -> str: ...

"""The compiled columns. A tensor is (data pointer, dtype code, strides in elements)."""

from collections.abc import Sequence

from dlzo_kernels.ops._parts import Directions, Part

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
def is_rounded(out: int, dtype: int, master: int, count: int, threads: int) -> bool: ...
def add_low_rank(
    out: _Tensor,
    master: _Tensor,
    shape: Sequence[int],
    u: int,
    v: int,
    rank: int,
    scale: float,
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
def tree_attention(
    query: _Tensor,
    key: _Tensor,
    value: _Tensor,
    out: _Tensor,
    parents: int,
    sizes: tuple[int, int, int, int, int, int],
    scale: float,
    window: int,
    softcap: float,
    threads: int,
) -> None: ...
def rms_norm(
    out: int, x: int, weight: int, dtype: int, rows: int, size: int, eps: float, threads: int
) -> None: ...
def made_by_intel() -> bool: ...
def isas() -> list[tuple[str, bool, bool, str]]: ...
def select_isa(name: str) -> None: ...
def selected_isa() -> str: ...
def thread_pool() -> str: ...

class gpu:
    """Plans of launches, made where there is no CUDA too."""

    THREADS: int
    RUN: int
    COLUMN_SEGMENT: int
    PARTIAL_BYTES: int

    class Launch:
        kernel: str
        blocks: int
        argument: bytes

    @staticmethod
    def gaussian(out: int, parts: Sequence[Part], directions: Directions) -> list[gpu.Launch]: ...
    @staticmethod
    def perturb(
        out: int, base: int, parts: Sequence[Part], directions: Directions
    ) -> list[gpu.Launch]: ...
    @staticmethod
    def accumulate(
        out: int,
        base: int,
        writes_out: bool,
        parts: Sequence[Part],
        directions: Directions,
        gate: int,
    ) -> list[gpu.Launch]: ...
    @staticmethod
    def partials(rows: int, channels: int, reduction: int) -> int: ...
    @staticmethod
    def activation_stats(
        x: int,
        dtype: int,
        rows: int,
        channels: int,
        reduction: int,
        out: tuple[int, int, int, int, int],
        workspace: int,
    ) -> list[gpu.Launch]: ...
    @staticmethod
    def walk(parents: int, tokens: int, rows: int, out: int) -> int: ...

class cuda:
    """The CUDA column, where it was built."""

    ARCHITECTURES: str

    @staticmethod
    def launch(launches: Sequence[gpu.Launch], stream: int) -> None: ...
    @staticmethod
    def why_no_device() -> str: ...

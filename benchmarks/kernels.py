"""CPU kernels against torch and against the limits of the machine.

    python benchmarks/kernels.py --out benchmarks/results/kernels.csv

Ratios are of medians of runs that alternate inside this process; nothing else may be running. The
limits (clock, memory bandwidth) are measured in the same run by limits.c, which needs `cc`.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median, quantiles

import torch
from timing import Call, Times, interleaved, processor
from torch import Tensor
from torch.nn import functional as F

import dlzo_kernels as dk
from dlzo_kernels import _C
from dlzo_kernels.ops.add_low_rank import add_low_rank

LAYER = 3_540_096  # parameters of a decoder layer of SmolLM2-135M
LARGE = 1 << 26  # values that no cache holds
POOL_REPEATS = 30
# 512-bit instructions per normal, moves apart, counted in the disassembly of GCC 12: the loop of
# Philox has 234 for 128 normals, that of Box-Muller 130 for 64. A core of AMD's Zen 4 begins two of
# them per cycle, as four pipes of 256 bits.
INSTRUCTIONS_PER_NORMAL = 234 / 128 + 130 / 64
INSTRUCTIONS_PER_CYCLE = 2


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def isa(name: str) -> Iterator[None]:
    before = _C.selected_isa()
    _C.select_isa(name)
    try:
        yield
    finally:
        _C.select_isa(before)


def under_each_isa(call: Call) -> dict[str, Call]:
    """The call under each ISA that this machine runs."""

    def under(name: str) -> None:
        with isa(name):
            call()

    return {name: partial(under, name) for name, _, runs, _ in _C.isas() if runs}


class Limits:
    """limits.c, compiled for this machine."""

    def __init__(self, folder: str) -> None:
        library = f"{folder}/limits.so"
        source = Path(__file__).with_name("limits.c")
        command = [
            "cc",
            "-O3",
            "-march=native",
            "-fopenmp",
            "-w",
            "-shared",
            "-fPIC",
            "-o",
            library,
        ]
        subprocess.run([*command, str(source)], check=True)
        self._library = ctypes.CDLL(library)
        # A copy under another name is a second runtime, with a pool of its own.
        find = ["cc", "-print-file-name=libgomp.so.1"]
        runtime = subprocess.run(find, check=True, capture_output=True, text=True).stdout.strip()
        second = shutil.copy(runtime, f"{folder}/second-pool.so")
        self._pools = {
            "torch's pool": ctypes.CDLL("libgomp.so.1"),
            "a second pool": ctypes.CDLL(second, mode=os.RTLD_NOW | os.RTLD_DEEPBIND),
        }
        self._library.clock_hz.restype = ctypes.c_double
        self._library.read_all.restype = ctypes.c_uint64
        self._library.read_all.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

    def scale_on(self, pool: str, x: Tensor, count: int) -> None:
        """Some arithmetic on every value of x, by one of two OpenMP runtimes."""
        runtime = self._pools[pool]
        self._library.scale_on_pool(
            ctypes.c_void_p(x.data_ptr()),
            ctypes.c_size_t(x.numel()),
            count,
            runtime.GOMP_parallel,
            runtime.omp_get_thread_num,
        )

    def clock_hz(self) -> float:
        return max(self._library.clock_hz() for _ in range(5))

    def read(self, x: Tensor, count: int) -> None:
        """Reads all of x on `count` threads."""
        self._library.read_all(x.data_ptr(), x.nbytes // 512 * 512, count)


class Results:
    """Rows, printed as they come and written as CSV in the end."""

    def __init__(self) -> None:
        self.rows: list[dict[str, object]] = []

    def add(self, what: str, count: int, elements: int, times: list[float], **more: object) -> None:
        low, _, high = (1e9 * q / elements for q in quantiles(times, n=4))
        row = {
            "what": what,
            "threads": count,
            "elements": elements,
            "ns_per_element": f"{1e9 * median(times) / elements:.3f}",
            "quartiles": f"{low:.3f}..{high:.3f}",
            **more,
        }
        self.rows.append(row)
        print("  ".join(f"{name}={value}" for name, value in row.items()), flush=True)

    def write(self, path: Path, note: str) -> None:
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        with path.open("w", newline="") as file:
            file.write(f"# {note}\n")
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(self.rows)


def ratio(times: Times, slow: str, fast: str) -> str:
    return f"{median(times[slow]) / median(times[fast]):.2f}"


def bench_noise(results: Results, limits: Limits) -> None:
    """Filling float32 noise, one thread: torch and each ISA."""
    z = torch.empty(LAYER)
    ours = under_each_isa(lambda: dk.gaussian((LAYER,), 1))
    with threads(1):
        times = interleaved({"torch normal_": lambda: z.normal_(), **ours})
        clock = limits.clock_hz()
    results.add("torch normal_ float32", 1, LAYER, times["torch normal_"])
    for name in ours:
        cycles = clock * median(times[name]) / LAYER
        more: dict[str, object] = {"cycles": f"{cycles:.2f}", "ghz": f"{clock / 1e9:.2f}"}
        if name.startswith("avx512"):
            bound = INSTRUCTIONS_PER_NORMAL / INSTRUCTIONS_PER_CYCLE
            more["share_of_issue_limit"] = f"{bound / cycles:.2f}"
        more["speedup"] = ratio(times, "torch normal_", name)
        results.add(f"gaussian float32 {name}", 1, LAYER, times[name], **more)


def bench_perturb(results: Results) -> None:
    """Perturbing weights, one thread, against MeZO's way: a normal tensor, scaled and added."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        w = torch.randn(LAYER).to(dtype)
        master, out = torch.randn(LAYER), torch.empty(LAYER, dtype=dtype)

        def mezo(w: Tensor = w) -> Tensor:
            return w + torch.normal(mean=0.0, std=1.0, size=w.shape, dtype=w.dtype) * 1e-3

        runs: dict[str, Call] = {
            "mezo": mezo,
            "perturb_": lambda w=w: dk.perturb_(w, 1, 1e-3),
            "perturb_into": lambda out=out, master=master: dk.perturb_into(out, master, 1, 1e-3),
        }
        with threads(1):
            times = interleaved(runs)
        name = str(dtype).removeprefix("torch.")
        results.add(f"MeZO's way {name}", 1, LAYER, times["mezo"])
        for op in ("perturb_", "perturb_into"):
            speedup = ratio(times, "mezo", op)
            results.add(f"{op} {name}", 1, LAYER, times[op], speedup=speedup)


def bench_low_rank(results: Results) -> None:
    """Moving a matrix along a direction of rank 2, one thread, against LOZO's way."""
    master, u, v = torch.randn(LAYER // 576, 576), torch.randn(LAYER // 576, 2), torch.randn(576, 2)
    for dtype in (torch.bfloat16, torch.float32):
        w, out = master.to(dtype), torch.empty_like(master, dtype=dtype)
        factors = u.to(dtype), v.to(dtype).t()

        def lozo(w: Tensor = w, factors: tuple[Tensor, Tensor] = factors) -> Tensor:
            return w + torch.matmul(*factors) * 1e-3

        runs: dict[str, Call] = {
            "lozo": lozo,
            "ours": lambda out=out: add_low_rank(out, master, u, v, 1e-3),
        }
        with threads(1):
            times = interleaved(runs)
        name, speedup = str(dtype).removeprefix("torch."), ratio(times, "lozo", "ours")
        results.add(f"LOZO's way {name}", 1, LAYER, times["lozo"])
        results.add(f"add_low_rank {name}", 1, LAYER, times["ours"], speedup=speedup)


def bench_opening(results: Results) -> None:
    """Opening a step on weights that it knows, one thread: they are compared with their master."""
    for dtype in (torch.bfloat16, torch.float32):
        w = torch.randn(LAYER).to(dtype)
        with threads(1):
            times = interleaved({"open": lambda w=w: dk.zo_step(w, 1, 1e-3, 0.0)})
        name = str(dtype).removeprefix("torch.")
        results.add(f"opening a step {name}", 1, LAYER, times["open"])


def bench_step(results: Results) -> None:
    """All that a step does beside its losses: comparing, perturbing twice, restoring, updating."""
    w = torch.randn(LAYER).bfloat16()

    def step() -> None:
        opened = dk.zo_step(w, 1, 1e-3, 1e-6)
        for state in (opened.plus, opened.minus):
            with state():
                pass
        opened.update(1.0, 0.5)

    for count in (1, 2):
        with threads(count):
            times = interleaved({"step": step})
        results.add("a step but its losses bfloat16", count, LAYER, times["step"])


def bench_isas(results: Results) -> None:
    """The other kernels under each ISA that this machine runs, one thread, against the baseline."""
    w, x = torch.randn(LAYER).bfloat16(), torch.randn(1024, 576).bfloat16()
    weight = torch.ones(576, dtype=torch.bfloat16)
    q, k, v = (torch.randn(1, heads, 512, 64).bfloat16() for heads in (9, 3, 3))
    parents = torch.arange(-1, 511)
    parents[::128] = -1
    calls: dict[str, tuple[int, Call]] = {
        "perturb_": (LAYER, lambda: dk.perturb_(w, 1, 1e-3)),
        "activation_stats per tensor": (LAYER, lambda: dk.activation_stats(w)),
        "rms_norm": (x.numel(), lambda: dk.rms_norm(x, weight, 1e-5)),
        "tree_attention, texts of 128 tokens": (
            9 * 512 * 129 // 2,
            lambda: dk.tree_attention(q, k, v, parents),
        ),
    }
    for what, (elements, call) in calls.items():
        with threads(1):
            times = interleaved(under_each_isa(call))
        for name in times:
            results.add(f"{what} bfloat16 {name}", 1, elements, times[name],
                        speedup=ratio(times, "baseline", name))  # fmt: skip


def bench_threads(results: Results) -> None:
    """Two threads against one."""
    w = torch.randn(LAYER).bfloat16()

    def run(count: int) -> None:
        with threads(count):
            dk.perturb_(w, 1, 1e-3)

    times = interleaved({"one": lambda: run(1), "two": lambda: run(2)})
    results.add("perturb_ bfloat16", 1, LAYER, times["one"])
    results.add("perturb_ bfloat16", 2, LAYER, times["two"], speedup=ratio(times, "one", "two"))


def bench_pools(results: Results, limits: Limits) -> None:
    """What a kernel costs between matmuls of torch: on torch's pool, and on a second one."""
    count = 1 << 17
    w, x, a = torch.randn(count).bfloat16(), torch.randn(count), torch.randn(256, 256)
    kernels: dict[str, Call] = {"perturb_": lambda: dk.perturb_(w, 1, 1e-3)}
    for pool in ("torch's pool", "a second pool"):
        kernels[f"arithmetic on {pool}"] = lambda pool=pool: limits.scale_on(pool, x, 2)

    def repeat(*parts: Call) -> None:
        for _ in range(POOL_REPEATS):
            for part in parts:
                part()

    with threads(2):
        for name, kernel in kernels.items():
            times = interleaved(
                {
                    "matmul": lambda: repeat(lambda: a @ a),
                    "kernel": lambda kernel=kernel: repeat(kernel),
                    "both": lambda kernel=kernel: repeat(lambda: a @ a, kernel),
                }
            )
            matmul, alone, both = (median(times[key]) for key in ("matmul", "kernel", "both"))
            slowdown = f"{both / (matmul + alone):.2f}"
            elements = count * POOL_REPEATS
            results.add(f"matmul, then {name}", 2, elements, times["both"], both_over_sum=slowdown)


def bench_accumulate(results: Results) -> None:
    """1,000 directions in one pass over a layer."""
    master = torch.randn(LAYER)
    seeds, scales = list(range(1000)), [1e-6] * 1000
    for count in (1, 2):
        with threads(count):
            times = interleaved({"all": lambda: dk.accumulate_(master, seeds, scales)}, rounds=5)
        results.add("accumulate_ of 1,000 directions", count, LAYER * 1000, times["all"])


def bench_stats(results: Results, limits: Limits) -> None:
    """Statistics in bfloat16 against a plain read of the same bytes."""
    x = torch.randn(LARGE // 2048, 2048).bfloat16()
    for count in (1, 2):
        runs: dict[str, Call] = {"read": lambda count=count: limits.read(x, count)}
        for per in ("tensor", "token", "channel"):
            runs[per] = lambda per=per: dk.activation_stats(x, per=per)
        with threads(count):
            times = interleaved(runs)
        bandwidth = x.nbytes / median(times["read"]) / 1e9
        results.add("plain read", count, LARGE, times["read"], gb_per_s=f"{bandwidth:.1f}")
        for per in ("tensor", "token", "channel"):
            share = ratio(times, "read", per)
            results.add(
                f"activation_stats bfloat16 per {per}",
                count,
                LARGE,
                times[per],
                gb_per_s=f"{x.nbytes / median(times[per]) / 1e9:.1f}",
                share_of_read=share,
            )


def bench_attention(results: Results) -> None:
    """512 tokens of several texts, SmolLM2's heads, against torch's attention for each text.

    Torch is given keys and values that are already repeated for the heads that share them.
    """
    for dtype in (torch.bfloat16, torch.float32):
        for length in (32, 128, 512):
            sizes = ((512, heads, 64) for heads in (9, 3, 3))
            q, k, v = (torch.randn(1, *size).to(dtype).transpose(1, 2) for size in sizes)
            repeated = q, k.repeat_interleave(3, dim=1), v.repeat_interleave(3, dim=1)
            texts = [*zip(*(part.split(length, dim=2) for part in repeated), strict=True)]
            parents = torch.arange(-1, 511)
            parents[::length] = -1

            def one_by_one(texts: list[tuple[Tensor, ...]] = texts) -> None:
                for parts in texts:
                    F.scaled_dot_product_attention(*parts, is_causal=True)

            runs: dict[str, Call] = {
                "torch": one_by_one,
                "ours": lambda q=q, k=k, v=v, p=parents: dk.tree_attention(q, k, v, p),
            }
            pairs = 9 * 512 * (length + 1) // 2
            for count in (1, 2):
                with threads(count):
                    times = interleaved(runs)
                name = f"{str(dtype).removeprefix('torch.')}, texts of {length} tokens"
                results.add(f"scaled_dot_product_attention {name}", count, pairs, times["torch"])
                gflops = f"{pairs * 4 * 64 / median(times['ours']) / 1e9:.0f}"
                speedup = ratio(times, "torch", "ours")
                results.add(f"tree_attention {name}", count, pairs, times["ours"],
                            gflop_per_s=gflops, speedup=speedup)  # fmt: skip


def bench_norm(results: Results) -> None:
    """1,024 tokens of SmolLM2, against torch's norm and against the operations of Llama's."""
    for dtype in (torch.bfloat16, torch.float32):
        x, weight = torch.randn(1024, 576).to(dtype), torch.ones(576, dtype=dtype)

        def as_llama(x: Tensor = x, weight: Tensor = weight) -> Tensor:
            wide = x.float()
            wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
            return weight * wide.to(x.dtype)

        runs: dict[str, Call] = {
            "torch": lambda x=x, w=weight: F.rms_norm(x, w.shape, w, 1e-5),
            "llama": as_llama,
            "ours": lambda x=x, w=weight: dk.rms_norm(x, w, 1e-5),
        }
        name = str(dtype).removeprefix("torch.")
        for count in (1, 2):
            with threads(count):
                times = interleaved(runs)
            results.add(f"torch's rms_norm {name}", count, x.numel(), times["torch"])
            results.add(f"Llama's norm {name}", count, x.numel(), times["llama"])
            results.add(f"rms_norm {name}", count, x.numel(), times["ours"],
                        speedup=ratio(times, "llama", "ours"))  # fmt: skip


def bench_calls(results: Results) -> None:
    """The cost of a call on a small tensor."""
    w, out = torch.zeros(64, dtype=torch.bfloat16), torch.zeros(64, dtype=torch.bfloat16)
    calls: dict[str, Call] = {
        "gaussian": lambda: dk.gaussian((64,), 1),
        "perturb_": lambda: dk.perturb_(w, 1, 1e-3),
        "perturb_into": lambda: dk.perturb_into(out, w, 1, 1e-3),
        "accumulate_": lambda: dk.accumulate_(w, [1], [1e-3]),
        "activation_stats": lambda: dk.activation_stats(w),
    }

    def repeat(call: Call) -> None:
        for _ in range(2000):
            call()

    times = interleaved({name: lambda call=call: repeat(call) for name, call in calls.items()})
    for name in calls:
        microseconds = 1e6 * median(times[name]) / 2000
        results.add(f"one call of {name}", torch.get_num_threads(), 64 * 2000, times[name],
                    us_per_call=f"{microseconds:.1f}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/kernels.csv"))
    out = parser.parse_args().out
    results, by_isa = Results(), Results()
    with tempfile.TemporaryDirectory() as folder:
        limits = Limits(folder)
        bench_noise(results, limits)
        bench_perturb(results)
        bench_low_rank(results)
        bench_opening(results)
        bench_step(results)
        bench_isas(by_isa)
        bench_threads(results)
        bench_accumulate(results)
        bench_attention(results)
        bench_norm(results)
        bench_calls(results)
        # Last, for the pool that reads stays: beside it torch's threads wake late.
        bench_stats(results, limits)
        bench_pools(results, limits)
    command = f"python benchmarks/kernels.py --out {out}"
    cores, isa_name = torch.get_num_threads(), _C.selected_isa()
    machine = f"{processor()}, {isa_name}, {cores} cores, torch {torch.__version__}"
    note = f"{date.today()}; {machine}; {command}"
    results.write(out, note)
    by_isa.write(out.with_name(f"{out.stem}_by_isa.csv"), note)


if __name__ == "__main__":
    main()

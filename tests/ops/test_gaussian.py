"""Noise v1 on the CPU column: bits of the reference, on every ISA, whatever the cut."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from bits import assert_same_bits, bits, reference_perturb, store
from dlzo_kernels import _C, accumulate_, gaussian, perturb_, reference, zo_replay
from dlzo_kernels.ops._parts import Directions, Part
from dlzo_kernels.ops.add_low_rank import add_low_rank
from noise_edges import PLACES

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "noise_v1.json").read_text())
PER_ISA = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SEEDS = st.integers(0, 2**64 - 1)
WORDS = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize("run", VECTORS["runs"])
def test_known_answers(isa, run):
    names = {"stream": run["stream"], "query": run["query"], "offset": run["first"]}
    z = gaussian((len(run["z"]),), run["seed"], **names)
    assert [f"{value & 0xFFFFFFFF:08x}" for value in bits(z).tolist()] == run["z"]


@PER_ISA
@given(seed=SEEDS, stream=WORDS, query=WORDS, offset=st.integers(0, 2**63), n=st.integers(0, 700))
def test_any_run_has_the_bits_of_the_reference(isa, dtype, seed, stream, query, offset, n):
    z = gaussian((n,), seed, stream=stream, query=query, offset=offset, dtype=dtype)
    index = np.arange(offset, offset + n, dtype=np.uint64)
    assert_same_bits(z, store(reference.gaussian(index, seed, stream, query), dtype))


@pytest.mark.parametrize("length", [*range(66), 127, 129, 255, 257, 4095, 4097, 70_001])
def test_every_tail(isa, length):
    expected = store(reference.gaussian(reference.element_index((length,), 3), 9), torch.float32)
    assert_same_bits(gaussian((length,), 9, offset=3), expected)


@pytest.mark.parametrize("numbers", PLACES, ids=str)
def test_words_that_show_the_last_bits(isa, numbers):
    expected = reference_perturb(torch.zeros(8), scale=1.0, dtype=torch.float32, **numbers)
    assert_same_bits(gaussian((8,), **numbers), expected)


@pytest.mark.parametrize("offset", [(1 << 34) - 4096, (1 << 34) - 4096 + 31, (1 << 34) - 1])
def test_the_block_counter_carries_into_its_high_half(isa, offset):
    z = gaussian((9000,), 5, offset=offset, stream=2)
    index = np.arange(offset, offset + 9000, dtype=np.uint64)
    assert_same_bits(z, store(reference.gaussian(index, 5, 2), torch.float32))


@pytest.mark.parametrize(
    ("rows", "columns", "first", "width"), [(7, 100, 0, 33), (5, 301, 98, 203)]
)
def test_a_column_shard_is_a_part_of_the_whole(isa, rows, columns, first, width):
    whole = gaussian((rows, columns), 11, stream=4)
    shard = gaussian((rows, width), 11, stream=4, offset=first, row_stride=columns)
    assert_same_bits(shard, whole[:, first : first + width].contiguous())


def test_bits_do_not_depend_on_the_number_of_threads(set_threads):
    results = []
    for threads in (1, 2, 3, 7):
        set_threads(threads)
        results.append(gaussian((200_003,), 1, offset=17))
    for other in results[1:]:
        assert_same_bits(other, results[0])


def test_streams_queries_and_seeds_give_different_noise():
    base = gaussian((4096,), 1)
    for other in (
        gaussian((4096,), 2),
        gaussian((4096,), 1 + (1 << 32)),
        gaussian((4096,), 1, stream=1),
        gaussian((4096,), 1, query=1),
    ):
        assert abs(torch.corrcoef(torch.stack([base, other]))[0, 1].item()) < 0.08
        assert (other != base).float().mean() > 0.99


def test_the_distribution_is_normal():
    z = gaussian((4_000_000,), 2024).double()
    n = z.numel()
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs((z**power).mean() - expected) < 5 * (variance / n) ** 0.5, power
    beyond_4 = (z.abs() > 4).sum().item()
    assert abs(beyond_4 - 6.334e-5 * n) < 5 * (6.334e-5 * n) ** 0.5
    sorted_z = z.sort().values
    distance = (torch.special.ndtr(sorted_z) - torch.arange(n) / n).abs().max()
    assert distance < 1.95 / n**0.5  # Kolmogorov-Smirnov, p = 0.001


def test_the_global_random_state_is_untouched():
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    gaussian((100,), 1)
    assert torch.equal(before, torch.random.get_rng_state())


@contextmanager
def flushing() -> Iterator[None]:
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def test_subnormals_are_kept_whatever_the_caller_set():
    with flushing():
        z = gaussian((100_000,), 1, dtype=torch.float16)
    assert_same_bits(z, gaussian((100_000,), 1, dtype=torch.float16))


TINY = 1e-39  # subnormal in float32
FACTORS = torch.full((64, 2), 1e3), torch.full((64, 2), 1e3)
SCALED = {
    "perturb_": lambda w: perturb_(w, 1, TINY),
    "accumulate_": lambda w: accumulate_(w, [1, 2], [TINY, TINY]),
    "zo_replay": lambda w: zo_replay(w, [1, 2], [TINY, TINY], [0, 0]),
    "add_low_rank": lambda w: add_low_rank(w, w, *FACTORS, TINY),
}


@pytest.mark.parametrize("op", SCALED.values(), ids=SCALED)
def test_a_subnormal_scale_is_kept_whatever_the_caller_set(op):
    w, expected = torch.zeros(64, 64), torch.zeros(64, 64)
    op(expected)
    with flushing():
        op(w)
    assert expected.any()
    assert_same_bits(w, expected)


def test_a_subnormal_scale_is_kept_in_the_plan_of_a_launch():
    plan = partial(_C.gpu.perturb, 0, 0, [Part(64, 64, 1, 1, 1, 1, 1, 1, 0, 1, 0)])
    expected = plan(Directions(1, seed=1, scale=TINY))
    with flushing():
        found = plan(Directions(1, seed=1, scale=TINY))
    assert found[0].argument == expected[0].argument != plan(Directions(1, seed=1))[0].argument


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1}, r"seed must be in \[0, 2\^64\), not -1"),
        ({"seed": 1 << 64}, "seed must be"),
        ({"seed": 1, "stream": 1 << 32}, "stream must be"),
        ({"seed": 1, "query": -1}, "query must be"),
        ({"seed": 1, "offset": (1 << 64) - 5}, "beyond 2\\^64"),
        ({"seed": 1, "row_stride": 7}, "row_stride 7 is smaller than a row of 10"),
    ],
)
def test_bad_numbers_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        gaussian((10,), **arguments)
    with pytest.raises(ValueError, match=r"shape is \(-1, 4\); give sizes of 0 or more"):
        gaussian((-1, 4), 1)


def test_bad_types_are_refused():
    with pytest.raises(TypeError, match=r"seed must be an integer, not 1\.5"):
        gaussian((10,), 1.5)
    with pytest.raises(TypeError, match="row_stride must be an integer"):
        gaussian((10,), 1, row_stride=12.0)
    with pytest.raises(TypeError, match=r"torch\.float64; use torch\.float32"):
        gaussian((10,), 1, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="there is no kernel"):
        gaussian((10,), 1, device="meta")


def test_operator_contract():
    arguments = ((5, 7), -3, 1, 2, 3, 9, torch.bfloat16, torch.device("cpu"))
    torch.library.opcheck(torch.ops.dlzo.gaussian.default, arguments)


def test_inside_torch_compile():
    @torch.compile(fullgraph=True)
    def doubled(seed):
        return gaussian((130,), seed, stream=1) * 2

    assert_same_bits(doubled(1 << 63), gaussian((130,), 1 << 63, stream=1) * 2)


def test_one_graph_serves_any_length_and_number():
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def noise(count, seed, query):
        return gaussian((count, 3), seed, stream=1, query=query)

    for i in range(3, 9):
        assert_same_bits(noise(i, 5 * i, 2 * i), gaussian((i, 3), 5 * i, stream=1, query=2 * i))
    assert_same_bits(noise(9, (1 << 64) - 9, 7), gaussian((9, 3), (1 << 64) - 9, stream=1, query=7))
    assert counter.frame_count <= 3  # a first one, any below 2^63, any above


def test_a_fake_stays_fake():
    with FakeTensorMode():
        fake = gaussian((1000,), 1)
    assert isinstance(fake, FakeTensor) and fake.shape == (1000,)


def test_numbers_of_numpy_are_numbers():
    got = gaussian((9,), np.int64(5), stream=np.uint32(1), offset=np.int64(4), query=np.int64(2))
    assert_same_bits(got, gaussian((9,), 5, stream=1, offset=4, query=2))


def test_the_operator_takes_64_bit_numbers_as_signed():
    expected = gaussian((9,), (1 << 64) - 3, offset=(1 << 64) - 100)
    got = torch.ops.dlzo.gaussian((9,), -3, 0, -100, 0, None, torch.float32, torch.device("cpu"))
    assert_same_bits(got, expected)

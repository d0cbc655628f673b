"""accumulate_: bit-equal to applying the directions one after the other."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from bits import VIEWS, assert_same_bits, weights
from dlzo_kernels import accumulate_, perturb_

SEEDS = [1, (1 << 64) - 1, 7, 7]
SCALES = [0.1, -3.0, 1e-4, 0.5]
QUERIES = [0, 1, (1 << 32) - 1, 3]


def one_after_the_other(w: torch.Tensor, **arguments: int) -> torch.Tensor:
    w = w.clone(memory_format=torch.contiguous_format)
    for seed, scale, query in zip(SEEDS, SCALES, QUERIES, strict=True):
        perturb_(w, seed, scale, query=query, **arguments)
    return w


@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 4096, 4097, 20_001])
def test_equals_one_after_the_other(isa, dtype, length):
    w = weights(length, dtype=dtype)
    expected = one_after_the_other(w, stream=3, offset=5)
    assert accumulate_(w, SEEDS, SCALES, stream=3, offset=5, query=QUERIES) is w
    assert_same_bits(w, expected)


@pytest.mark.parametrize("view", VIEWS)
def test_views(dtype, view):
    part = VIEWS[view](weights(60, 70, dtype=dtype))
    expected = one_after_the_other(part)
    accumulate_(part, SEEDS, SCALES, query=QUERIES)
    assert_same_bits(part.contiguous(), expected)


@pytest.mark.parametrize("view", VIEWS)
def test_out_receives_the_rounded_master(isa, dtype, view):
    out = VIEWS[view](weights(60, 70, dtype=dtype))
    master = weights(*out.shape, seed=2)
    expected = one_after_the_other(master)
    accumulate_(master, SEEDS, SCALES, query=QUERIES, out=out)
    assert_same_bits(master, expected)
    assert_same_bits(out.contiguous(), expected.to(dtype))


def test_a_thousand_directions_and_any_number_of_threads(set_threads):
    seeds, scales = list(range(1000)), [1e-3 * (-1) ** k for k in range(1000)]
    expected = weights(9000)
    for seed, scale in zip(seeds, scales, strict=True):
        perturb_(expected, seed, scale)
    for threads in (1, 2, 3):
        set_threads(threads)
        assert_same_bits(accumulate_(weights(9000), seeds, scales), expected)


def test_no_directions_change_nothing():
    w = weights(100)
    assert_same_bits(accumulate_(w.clone(), [], []), w)


def test_versions_are_bumped():
    master, out = weights(5), weights(5, dtype=torch.bfloat16)
    versions = master._version, out._version
    accumulate_(master, [1], [1.0], out=out)
    assert (master._version, out._version) == (versions[0] + 1, versions[1] + 1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1, 2], [1.0]), ValueError, "2 seeds, 1 scales"),
        (([1], [float("nan")]), ValueError, "scale must be finite"),
        (([1], [torch.tensor(torch.inf)]), ValueError, "scale must be finite in float32, not inf"),
        (([1], [torch.tensor(1e39, dtype=torch.float64)]), ValueError, "scale must be finite"),
        (([1], torch.tensor([torch.nan])), ValueError, "scale must be finite"),
        (([-1], [1.0]), ValueError, "seed must be"),
    ],
)
def test_bad_directions_are_refused_and_write_nothing(arguments, error, message):
    w = weights(10)
    with pytest.raises(error, match=message):
        accumulate_(w, *arguments)
    assert_same_bits(w, weights(10))


def test_bad_outs_are_refused():
    master = weights(10)
    with pytest.raises(ValueError, match="shape"):
        accumulate_(master, [1], [1.0], out=torch.zeros(9))
    with pytest.raises(ValueError, match="overlap"):
        accumulate_(master, [1], [1.0], out=master)
    with pytest.raises(TypeError, match="float32 master"):
        accumulate_(master.bfloat16(), [1], [1.0], out=torch.zeros(10))


def test_operator_contract():
    arguments = ([1, -2], [0.5, 1.5], 1, 2, [3, 4], None)
    op = torch.ops.dlzo.accumulate_.default
    torch.library.opcheck(op, (weights(70), *arguments, weights(70, dtype=torch.float16)))
    torch.library.opcheck(op, (weights(70, dtype=torch.bfloat16), *arguments, None))


def test_inside_torch_compile():
    @torch.compile(fullgraph=True)
    def replay(master, out, scale):
        accumulate_(master, [5, 6], [scale, -scale], out=out)
        return out + 1

    master, out = weights(90), torch.empty(90, dtype=torch.bfloat16)
    expected = accumulate_(weights(90), [5, 6], [0.5, -0.5]).bfloat16() + 1
    assert_same_bits(replay(master, out, 0.5), expected)


def test_one_graph_serves_any_length_and_seeds():
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def replay(master, seed, query):
        accumulate_(master, [seed, seed + 1], [0.5, -0.5], query=[query, 0])

    for i in range(3, 9):
        got = weights(i)
        replay(got, i, 2 * i)
        assert_same_bits(got, accumulate_(weights(i), [i, i + 1], [0.5, -0.5], query=[2 * i, 0]))
    assert counter.frame_count <= 2  # the first numbers are taken for constants

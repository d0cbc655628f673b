"""add_low_rank against numpy, which rounds each product and each sum, bit for bit on every ISA."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bits import VIEWS, assert_same_bits, low_rank, store, weights
from dlzo_kernels.ops.add_low_rank import add_low_rank

SCALE = -0.37
MATRIX_VIEWS = {name: view for name, view in VIEWS.items() if view(torch.ones(60, 70)).dim() == 2}
MATRIX_VIEWS["a matrix of one column"] = lambda w: w[:, 5:6]


def drawn(m, n, rank, seed=0):
    """Master, U and V."""
    shapes = (m, n), (m, rank), (n, rank)
    return [weights(*shape, seed=3 * seed + i) for i, shape in enumerate(shapes)]


def expected(master, u, v, scale, dtype):
    return store(master.numpy() + np.float32(scale) * low_rank(u, v), dtype)


def assert_right(m, n, rank, dtype, seed=0):
    master, u, v = drawn(m, n, rank, seed)
    before = master.clone()
    out = torch.empty(m, n, dtype=dtype)
    add_low_rank(out, master, u, v, SCALE)
    assert_same_bits(out, expected(master, u, v, SCALE, dtype))
    assert_same_bits(master, before)


@pytest.mark.parametrize("n", [*range(1, 36), 63, 64, 65, 576, 4095, 4096, 4097, 9000])
def test_all_sizes_of_a_row(isa, dtype, n):
    assert_right(3, n, 2, dtype)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(m=st.integers(0, 9), n=st.integers(0, 80), rank=st.integers(1, 9), seed=st.integers(0, 99))
def test_any_shape_and_rank(isa, dtype, m, n, rank, seed):
    assert_right(m, n, rank, dtype, seed)


@pytest.mark.parametrize("view", MATRIX_VIEWS)
def test_views_and_nothing_beside_them(isa, dtype, view):
    whole, same = weights(60, 70, dtype=dtype), weights(60, 70, dtype=dtype)
    out = MATRIX_VIEWS[view](whole)
    master, u, v = drawn(*out.shape, 3)
    add_low_rank(out, master, u, v, SCALE)
    MATRIX_VIEWS[view](same).copy_(expected(master, u, v, SCALE, dtype))
    assert_same_bits(whole, same)


def test_in_place_and_with_any_number_of_threads(isa, set_threads):
    for threads in (1, 2, 5):
        set_threads(threads)
        master, u, v = drawn(130, 1000, 2)
        right = expected(master, u, v, SCALE, torch.float32)
        add_low_rank(master, master, u, v, SCALE)
        assert_same_bits(master, right)


def test_overflow_is_infinite_and_zeros_keep_their_sign(isa, dtype):
    master = torch.tensor([[3e38, -3e38, -0.0, 0.0, torch.inf, 65504.0]])
    u, v = torch.tensor([[1.0]]), torch.tensor([[3e38], [-3e38], [-0.0], [-0.0], [1.0], [100.0]])
    out = torch.empty(1, 6, dtype=dtype)
    with np.errstate(over="ignore"):
        right = expected(master, u, v, 1.0, dtype)
    add_low_rank(out, master, u, v, 1.0)
    assert_same_bits(out, right)


def test_the_write_is_counted():
    master, u, v = drawn(4, 5, 1)
    out = torch.zeros(4, 5)
    before = out._version
    add_low_rank(out, master, u, v, SCALE)
    assert out._version == before + 1

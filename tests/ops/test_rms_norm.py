"""rms_norm against float64 and Llama's own, on every ISA."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from bits import assert_same_bits
from dlzo_kernels import _C, reference, rms_norm

# Of the result, relative: the roundings of the quotient, of the product, and in float32 of the sum.
BOUND = {torch.float32: 1e-6, torch.bfloat16: 2.1 * 2**-8, torch.float16: 2.1 * 2**-11}


def drawn(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = 0.5 + 3 * torch.randn(*shape, generator=generator)
    return x.to(dtype), torch.randn(shape[-1], generator=generator).to(dtype)


def assert_right(x, weight, eps):
    found = rms_norm(x, weight, eps)
    assert (found.shape, found.dtype) == (x.shape, x.dtype)
    assert found.is_contiguous()
    expected = reference.rms_norm(x.double().numpy(), weight.double().numpy(), eps)
    # Below its smallest normal, float16 is rounded to multiples of 2^-24.
    atol = 2.0**-23 if x.dtype is torch.float16 else 0
    np.testing.assert_allclose(found.double().numpy(), expected, BOUND[x.dtype], atol)


@pytest.mark.parametrize("size", [*range(1, 70), 127, 128, 129, 576, 1000, 4097])
def test_against_float64(isa, dtype, size):
    assert_right(*drawn(5, size, dtype=dtype), 1e-5)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.integers(1, 9),
    size=st.integers(1, 200),
    eps=st.sampled_from([1e-12, 1e-6, 1e-2, 3.0]),
    power=st.integers(-10, 10),
    seed=st.integers(0, 1000),
)
def test_any_size_and_scale(isa, dtype, rows, size, eps, power, seed):
    x, weight = drawn(rows, size, dtype=dtype, seed=seed)
    assert_right(x * 2.0**power, weight, eps)


def test_a_row_of_zeros_and_no_epsilon(isa, dtype):
    x, weight = torch.zeros(2, 40, dtype=dtype), torch.ones(40, dtype=dtype)
    assert_same_bits(rms_norm(x, weight, 1e-6), x)
    assert rms_norm(x, weight, 0.0).isnan().all()


@pytest.mark.parametrize("size", [33, 576])
def test_the_roundings_are_those_of_llama(isa, dtype, size):
    x, weight = drawn(200, size, dtype=dtype)
    norm = LlamaRMSNorm(size, eps=1e-5).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(weight)
        expected = norm(x)
    if dtype is torch.float32:
        torch.testing.assert_close(rms_norm(x, weight, 1e-5), expected, rtol=1e-6, atol=0)
    else:
        # Sums in another order move a quotient over a rounding's edge now and then.
        assert (rms_norm(x, weight, 1e-5) != expected).float().mean() < 1e-3


@pytest.mark.parametrize("size", [31, 576, 4097])
def test_bits_depend_on_neither_isa_nor_threads(isa, dtype, set_threads, size):
    x, weight = drawn(1 + (1 << 20) // size, size, dtype=dtype)  # enough for three threads
    set_threads(3)
    found = rms_norm(x, weight, 1e-5)
    _C.select_isa("baseline")
    set_threads(1)
    assert_same_bits(rms_norm(x, weight, 1e-5), found)


def test_what_is_not_finite_stays_in_its_row(isa, dtype):
    x, weight = drawn(4, 50, dtype=dtype)
    expected = rms_norm(x, weight, 1e-5)
    x[1, 3], x[2, 49] = float("nan"), float("inf")
    found = rms_norm(x, weight, 1e-5)
    assert_same_bits(found[[0, 3]], expected[[0, 3]])
    assert found[1].isnan().all()
    assert found[2, 49].isnan()
    assert (found[2, :49] == 0).all()


def test_any_layout(isa, dtype):
    x, weight = drawn(6, 4, 80, dtype=dtype)
    expected = rms_norm(x, weight, 1e-5)
    assert_same_bits(rms_norm(x.transpose(0, 1), weight, 1e-5), expected.transpose(0, 1))
    wide = torch.stack([weight, weight], dim=-1)
    assert_same_bits(rms_norm(x, wide[:, 1], 1e-5), expected)
    buffer = torch.empty(6 * 4 * 80 + 1, dtype=dtype)  # starts between two vectors
    shifted = buffer[1:].view_as(x).copy_(x)
    assert_same_bits(rms_norm(shifted, weight, 1e-5), expected)


def test_inputs_are_left_alone_and_nothing_gives_nothing(dtype):
    x, weight = drawn(3, 37, dtype=dtype)
    before = x.clone(), weight.clone()
    rms_norm(x, weight, 1e-5)
    assert_same_bits(x, before[0])
    assert_same_bits(weight, before[1])
    assert rms_norm(x[:0], weight, 1e-5).shape == (0, 37)
    assert rms_norm(x[:, :0], weight[:0], 1e-5).shape == (3, 0)


@pytest.mark.parametrize(
    ("x", "weight", "eps", "error", "message"),
    [
        (torch.ones(2, 3), torch.ones(4), 1e-5, ValueError, r"weight has shape \(4,\)"),
        (torch.ones(2, 3), torch.ones(1, 3), 1e-5, ValueError, "one weight for each"),
        (torch.tensor(1.0), torch.tensor(1.0), 1e-5, ValueError, "one weight for each"),
        (torch.ones(3), torch.ones(3), -1e-5, ValueError, "not -1e-05"),
        (torch.ones(3), torch.ones(3), float("nan"), ValueError, "not nan"),
        (torch.ones(3), torch.ones(3), 1e300, ValueError, "eps must be finite in float32"),
        (torch.ones(3), torch.ones(3).half(), 1e-5, TypeError, "cast one"),
        (torch.ones(3).double(), torch.ones(3).double(), 1e-5, TypeError, "float64"),
        (torch.ones(3, device="meta"), torch.ones(3), 1e-5, NotImplementedError, "x is on meta"),
        (torch.ones(3), torch.ones(3, requires_grad=True), 1e-5, ValueError, "gradient"),
    ],
)
def test_bad_arguments(x, weight, eps, error, message):
    with pytest.raises(error, match=message):
        rms_norm(x, weight, eps)


@pytest.mark.parametrize("moved", [0, 1])
def test_a_forward_mode_gradient_is_refused(moved):
    tensors = list(drawn(2, 3))

    def normed(x):
        tensors[moved] = x
        return rms_norm(*tensors, 1e-5)

    primal, tangent = tensors[moved], torch.ones_like(tensors[moved])
    name = ("x", "weight")[moved]
    with torch.no_grad(), pytest.raises(ValueError, match=f"{name} has a tangent, and rms_norm"):
        torch.func.jvp(normed, (primal,), (tangent,))
    with forward_ad.dual_level():
        with pytest.raises(ValueError, match=f"{name} has a tangent, and rms_norm"):
            normed(forward_ad.make_dual(primal, tangent))
        assert normed(primal).shape == (2, 3)


def test_operator_contract():
    torch.library.opcheck(torch.ops.dlzo.rms_norm.default, (*drawn(6, 7), 1e-5))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_trace_holds_the_operator():
    x, weight = drawn(3, 7)
    for traced in (
        make_fx(lambda x: rms_norm(x, weight, 1e-5))(x),
        torch.jit.trace(lambda x: rms_norm(x, weight, 1e-5), x),
    ):
        assert_same_bits(traced(x + 1), rms_norm(x + 1, weight, 1e-5))


def test_inside_torch_compile():
    x, weight = drawn(9, 50)
    compiled = torch.compile(lambda x, w: 2 * rms_norm(x, w, 1e-5), fullgraph=True)
    assert_same_bits(compiled(x, weight), 2 * rms_norm(x, weight, 1e-5))

"""perturb_ and perturb_into: bits of the reference for every dtype, view and ISA."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from bits import VIEWS, assert_same_bits, reference_perturb, weights
from dlzo_kernels import perturb_, perturb_into
from noise_edges import SCALE, cancelled

PER_ISA = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@PER_ISA
@given(
    n=st.integers(0, 400),
    seed=st.integers(0, 2**64 - 1),
    scale=st.floats(-10, 10, width=32),
    offset=st.integers(0, 2**40),
    skip=st.integers(0, 9),
)
def test_in_place_has_the_bits_of_the_reference(isa, dtype, n, seed, scale, offset, skip):
    buffer = weights(n + skip, dtype=dtype)
    w = buffer[skip:]  # any alignment
    expected = reference_perturb(w, seed, scale, dtype, offset=offset, stream=1, query=2)
    untouched = buffer[:skip].clone()
    assert perturb_(w, seed, scale, offset=offset, stream=1, query=2) is w
    assert_same_bits(w, expected)
    assert_same_bits(buffer[:skip], untouched)


@pytest.mark.parametrize("length", [*range(1, 66), 4096, 4097, 9001])
def test_every_tail_and_nothing_beyond(isa, dtype, length):
    buffer = torch.full((length + 8,), float("nan"), dtype=dtype)
    w = buffer[4 : 4 + length]
    w.copy_(weights(length, dtype=dtype))
    expected = reference_perturb(w, 3, 0.5, dtype, offset=2)
    perturb_(w, 3, 0.5, offset=2)
    assert_same_bits(w, expected)
    assert buffer[:4].isnan().all()
    assert buffer[-4:].isnan().all()


@pytest.mark.parametrize("view", VIEWS)
def test_views_are_written_in_place_and_alone(isa, dtype, view):
    w = weights(60, 70, dtype=dtype)
    touched = torch.zeros(60, 70, dtype=torch.bool)
    VIEWS[view](touched).fill_(True)
    before = w.clone()
    part = VIEWS[view](w)
    expected = reference_perturb(part, 8, -2.0, dtype, stream=5)
    perturb_(part, 8, -2.0, stream=5)
    assert_same_bits(part.contiguous(), expected)
    assert_same_bits(w[~touched], before[~touched])


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("base_dtype", ["master", "same"])
def test_into_from_a_master_or_the_same_dtype(isa, dtype, view, base_dtype):
    out = VIEWS[view](weights(60, 70, dtype=dtype))
    base = weights(*out.shape, dtype=torch.float32 if base_dtype == "master" else dtype, seed=1)
    kept = base.clone()
    expected = reference_perturb(base, 8, 1e-3, dtype, offset=1 << 35)
    assert perturb_into(out, base, 8, 1e-3, offset=1 << 35) is out
    assert_same_bits(out.contiguous(), expected)
    assert_same_bits(base, kept)


def test_a_scale_in_memory_that_can_be_read_is_checked():
    w = weights(10)
    with pytest.raises(ValueError, match="scale must be finite in float32, not nan"):
        perturb_(w, 1, torch.tensor(torch.nan))
    with pytest.raises(TypeError, match=r"scale is a tensor of 2 torch\.float32"):
        perturb_(w, 1, torch.ones(2))
    assert_same_bits(w, weights(10))


def test_a_column_shard_gets_its_part_of_the_noise(isa, dtype):
    whole = weights(6, 90, dtype=dtype)
    shard = whole[:, 20:55].contiguous()
    perturb_(whole, 4, 0.1)
    perturb_(shard, 4, 0.1, offset=20, row_stride=90)
    assert_same_bits(shard, whole[:, 20:55].contiguous())


def test_special_values(isa, dtype):
    tiny = torch.finfo(dtype).smallest_normal
    largest = torch.finfo(dtype).max
    values = [0.0, -0.0, tiny, -tiny, tiny / 4, largest, -largest, float("inf"), -float("inf")]
    w = torch.tensor(values * 9).to(dtype)
    for scale in (1.0, 0.0, largest / 4, 1e-30):
        got = w.clone()
        perturb_(got, 1, scale)
        assert_same_bits(got, reference_perturb(w, 1, scale, dtype))
    nan = torch.full((70,), float("nan"), dtype=dtype)
    assert perturb_(nan, 1, 1.0).isnan().all()


@pytest.mark.parametrize("base_dtype", ["master", "same"])
def test_the_last_bits_of_the_noise_show_where_weights_cancel_it(isa, dtype, base_dtype):
    for base, numbers in cancelled(600, torch.float32 if base_dtype == "master" else dtype):
        out = torch.full((600,), torch.nan, dtype=dtype)
        expected = reference_perturb(base, scale=SCALE, dtype=dtype, **numbers)
        assert_same_bits(perturb_into(out, base, scale=SCALE, **numbers), expected)


def test_bits_do_not_depend_on_the_number_of_threads(set_threads, dtype):
    results = []
    for threads in (1, 2, 5):
        set_threads(threads)
        results.append(perturb_(weights(130, 1001, dtype=dtype)[:, 1:], 3, 0.01))
    for other in results[1:]:
        assert_same_bits(other, results[0])


def test_a_transform_that_cannot_take_it_says_so():
    with pytest.raises(RuntimeError, match="custom"):
        torch.func.functionalize(lambda x: perturb_(x, 1, 1.0))(torch.zeros(40))


def test_a_view_of_negated_values_is_refused():
    z = torch.ones(3, dtype=torch.complex64)
    with pytest.raises(ValueError, match="w is a view of negated values"):
        perturb_(z.conj().imag, 1, 1.0)


def test_the_version_counter_is_bumped():
    w = weights(10).requires_grad_()
    loss = (w * w).sum()
    perturb_(w.detach(), 1, 0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inference_tensors_are_written():
    with torch.inference_mode():
        w = weights(100)
        before = w.clone()
        perturb_(w, 1, 0.1)
    assert not torch.equal(w, before)


@pytest.mark.parametrize(
    ("w", "error", "message"),
    [
        (torch.zeros(5, dtype=torch.float64), TypeError, "float64"),
        (torch.zeros(5, dtype=torch.int32), TypeError, "int32"),
        (torch.zeros(1, 5).expand(3, 5), ValueError, "share memory"),
        (torch.zeros(9).as_strided((4, 4), (1, 1)), ValueError, "share memory"),
        (torch.zeros(5, device="meta"), NotImplementedError, "meta"),
        (torch.eye(3).to_sparse(), TypeError, "layout"),
    ],
)
def test_bad_tensors_are_refused(w, error, message):
    with pytest.raises(error, match=message):
        perturb_(w, 1, 1.0)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 1e39])
def test_a_scale_that_is_not_finite_is_refused_and_writes_nothing(scale):
    w = torch.zeros(5)
    with pytest.raises(ValueError, match="scale must be finite"):
        perturb_(w, 1, scale)
    assert torch.equal(w, torch.zeros(5))


def test_into_refuses_what_does_not_fit():
    out = torch.zeros(6)
    with pytest.raises(ValueError, match="shape"):
        perturb_into(out, torch.zeros(5), 1, 1.0)
    with pytest.raises(TypeError, match="base has dtype"):
        perturb_into(out, torch.zeros(6, dtype=torch.bfloat16), 1, 1.0)
    with pytest.raises(ValueError, match="overlap"):
        perturb_into(out[1:], out[:-1], 1, 1.0)


def test_operator_contract(dtype):
    w = weights(33, 5, dtype=dtype)
    torch.library.opcheck(torch.ops.dlzo.perturb_.default, (w, -7, 0.5, 1, 2, 3, None))
    base = weights(33, 5)
    torch.library.opcheck(torch.ops.dlzo.perturb_into.default, (w, base, 7, 0.5, 1, 2, 3, 9))


@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize("name", ["seed", "scale"])
def test_a_tensor_inside_torch_compile_is_refused(name, fullgraph):
    numbers = {"seed": 3, "scale": 0.5} | {name: torch.tensor(3 if name == "seed" else 0.5)}

    @torch.compile(fullgraph=fullgraph, backend="eager")
    def step(w):
        return perturb_(w, **numbers)

    w = weights(7)
    with pytest.raises(Exception, match=f"{name} is a tensor; under torch.compile give a number"):
        step(w)
    assert_same_bits(w, weights(7))


def test_inside_torch_compile():
    @torch.compile(fullgraph=True)
    def step(w, base, seed, scale):
        perturb_into(w, base, seed, scale, stream=2)
        perturb_(w, seed, -scale, query=1)
        return w * 2

    base, got = weights(77), weights(77)
    expected = perturb_(perturb_into(torch.empty(77), base, 9, 0.5, stream=2), 9, -0.5, query=1)
    assert_same_bits(step(got, base, 9, 0.5), expected * 2)
    assert_same_bits(got, expected)


@torch.no_grad()
def test_one_graph_serves_any_length_and_number():
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def step(w, base, seed, query):
        perturb_into(w, base, seed, 0.5, stream=2, query=query)
        perturb_(w, seed, -0.5, query=query)

    for i in range(3, 9):
        base, got = weights(i), weights(i)
        step(got, base, i, 2 * i)
        into = perturb_into(torch.empty(i), base, i, 0.5, stream=2, query=2 * i)
        assert_same_bits(got, perturb_(into, i, -0.5, query=2 * i))
    assert counter.frame_count <= 2  # the first numbers are taken for constants

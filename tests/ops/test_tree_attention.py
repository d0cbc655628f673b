"""tree_attention against float64, on every ISA; what others may not change is compared by bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

from bits import assert_same_bits
from dlzo_kernels import tree_attention
from dlzo_kernels.ops import _gpu
from dlzo_kernels.ops.tree_attention import why_no_kernel
from trees import assert_right, chain, inputs, tree

# Kernels may multiply these in ways of their own: numbers one by one, and in pairs.
both_products = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)

PER_ISA = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def check(q, k, v, parents, *, slack=1, **numbers) -> None:
    got = tree_attention(q, k, v, torch.tensor(parents), **numbers)
    assert_right(got, (q, k, v), parents, slack=slack, **numbers)


@pytest.mark.parametrize("parents", [chain, tree])
@pytest.mark.parametrize(
    ("tokens", "sizes", "heads"),
    [
        (77, (64, 64), (9, 3)),
        (40, (8, 8), (4, 2)),
        (33, (80, 80), (2, 2)),
        (50, (128, 100), (7, 1)),
        (19, (5, 3), (3, 3)),
        (1, (16, 16), (2, 1)),
        (300, (31, 33), (2, 1)),
    ],
)
def test_against_float64(isa, dtype, tokens, sizes, heads, parents):
    check(*inputs(tokens, sizes, heads, dtype), parents(tokens))


@pytest.mark.parametrize("tokens", [*range(1, 35), 47, 48, 49, 63, 64, 65])
@both_products
def test_every_tail(isa, dtype, tokens):
    check(*inputs(tokens, (tokens, 2 * tokens), (1, 1), dtype), chain(tokens))


@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 40, 1000])
@pytest.mark.parametrize("parents", [chain, tree])
@both_products
def test_a_window(isa, dtype, window, parents):
    check(*inputs(70, (24, 24), (4, 2), dtype), parents(70), window=window)


@pytest.mark.parametrize("softcap", [0.5, 30.0])
@both_products
def test_a_soft_cap(isa, dtype, softcap):
    check(*inputs(45, (24, 24), (4, 2), dtype), tree(45), softcap=softcap, scale=2.0)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
@both_products
def test_any_scale(isa, dtype, scale):
    check(*inputs(45, (24, 24), (4, 2), dtype), tree(45), scale=scale)


@PER_ISA
@given(data=st.data(), tokens=st.integers(1, 60), window=st.none() | st.integers(1, 60))
@both_products
def test_any_tree(isa, dtype, data, tokens, window):
    parents = [data.draw(st.integers(-1, i - 1)) for i in range(tokens)]
    check(*inputs(tokens, (12, 20), (3, 1), dtype), parents, window=window)


def test_scores_far_apart(isa):
    q, k, v = inputs(30, (16, 16), (2, 2), torch.float32)
    check(1000 * q, k, v, chain(30), slack=1000)  # scores carry their own rounding
    v[:, :, 10:] = 1e36
    got = tree_attention(q, k, v, torch.tensor(chain(30)))
    assert got[:, :, :10].abs().max() < 10 and got.isfinite().all()


def test_the_exponential_to_its_last_bits(isa):
    scores = torch.linspace(-95, 0, 3001)
    q, k = torch.ones(3001, 1, 2, 1), torch.stack([scores, 0 * scores], -1)[:, None, :, None]
    v = torch.tensor([1.0, 0.0]).expand(3001, 1, 2)[..., None]  # the result is the first weight
    got = tree_attention(q, k, v, torch.tensor(chain(2)), scale=1.0)[:, 0, 1, 0]
    expected = scores.double().sigmoid()
    tiny = scores < -87
    assert ((got - expected).abs() <= 3 * 2**-24 * expected)[~tiny].all()
    assert (got[tiny] < 2**-125).all()


@both_products
def test_what_is_not_finite_stays_in_its_tree(isa, dtype):
    q, k, v = inputs(40, (16, 16), (2, 2), dtype)
    parents = torch.tensor([*chain(20), -1, *range(20, 39)])
    expected = tree_attention(q, k, v, parents)
    k[:, :, 5], v[:, :, 6] = torch.nan, torch.inf
    got = tree_attention(q, k, v, parents)
    assert got[:, :, 5:20].isnan().all()
    assert_same_bits(got[:, :, 20:].clone(), expected[:, :, 20:].clone())


@pytest.mark.parametrize("payload", [0, 1, 0x3FFFFF])
def test_every_nan_shows(isa, payload):
    q, k, v = inputs(20, (16, 8), (2, 1), torch.float32)
    k[:, :, 5] = torch.tensor(0x7FC00000 + payload, dtype=torch.int32).view(torch.float32)
    got = tree_attention(q, k, v, torch.tensor(chain(20)))
    assert got[:, :, 5:].isnan().all() and got[:, :, :5].isfinite().all()


def test_bits_do_not_depend_on_other_sequences(isa, dtype):
    q, k, v = inputs(90, (64, 64), (6, 2), dtype)
    both = torch.tensor([*chain(37), -1, *range(37, 89)])
    got = tree_attention(q, k, v, both)
    for span in (slice(0, 37), slice(37, 90)):
        parts = (x[:, :, span] for x in (q, k, v))
        alone = tree_attention(*parts, torch.tensor(chain(span.stop - span.start)))
        assert_same_bits(got[:, :, span].clone(), alone.clone())


def test_bits_do_not_depend_on_the_number_of_threads(set_threads):
    parts = inputs(500, (64, 64), (9, 3), torch.bfloat16)
    results = []
    for threads in (1, 2, 3, 7):
        set_threads(threads)
        results.append(tree_attention(*parts, torch.tensor(tree(500))).clone())
    for other in results[1:]:
        assert_same_bits(other, results[0])


def test_any_layout(isa, dtype):
    q, k, v = inputs(21, (16, 16), (4, 2), dtype)
    expected = tree_attention(q, k, v, torch.tensor(tree(21)))
    assert expected.transpose(1, 2).is_contiguous()
    apart = [x.repeat_interleave(2, -1)[..., ::2] for x in (q, k, v)]
    sideways = [x.mT.contiguous().mT for x in (q, k, v)]
    every_other = torch.tensor(tree(21)).repeat_interleave(2)[::2]
    for others in (apart, sideways, [x.contiguous() for x in (q, k, v)]):
        assert_same_bits(tree_attention(*others, every_other).clone(), expected.clone())


def test_a_batch_of_none_and_values_of_none():
    q, k, v = inputs(4, (8, 8), (2, 2), torch.float32)
    parents = torch.tensor(chain(4))
    assert tree_attention(q[:0], k[:0], v[:0], parents).shape == (0, 2, 4, 8)
    assert tree_attention(q, k, v[..., :0], parents).shape == (2, 2, 4, 0)
    assert tree_attention(*(x[:, :, :0] for x in (q, k, v)), parents[:0]).shape == (2, 2, 0, 8)


def test_inputs_are_left_alone():
    parts = inputs(33, (16, 16), (2, 1), torch.bfloat16)
    before = [x.clone() for x in parts]
    tree_attention(*parts, torch.tensor(chain(33)))
    for x, copy in zip(parts, before, strict=True):
        assert torch.equal(x, copy)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda a: a | {"query": a["query"].double()}, TypeError, "query has dtype torch.float64"),
        (lambda a: a | {"key": a["key"].half()}, TypeError, "key has dtype torch.float16"),
        (lambda a: a | {"value": a["value"][0]}, ValueError, "value has shape (2, 6, 8); give"),
        (lambda a: a | {"query": torch.tensor(1.0)}, ValueError, "query has shape (); give"),
        (lambda a: a | {"key": a["key"][:, :0]}, ValueError, "4 heads of query do not share 0"),
        (lambda a: a | {"query": a["query"][:, :3]}, ValueError, "3 heads of query do not share 2"),
        (lambda a: a | {"value": a["value"][:, :, :5]}, ValueError, "do not fit each other"),
        (lambda a: a | {"parents": a["parents"][:5]}, ValueError, "parents is torch.int64 of"),
        (lambda a: a | {"parents": a["parents"].int()}, ValueError, "parents is torch.int32"),
        (lambda a: a | {"parents": a["parents"] + 1}, ValueError, "the parent of token 0 is 0"),
        (lambda a: a | {"parents": a["parents"] - 1}, ValueError, "the parent of token 0 is -2"),
        (
            lambda a: a | {"key": a["key"].to("meta")},
            NotImplementedError,
            "key is on meta, for which there is no kernel",
        ),
        (
            lambda a: a | {"parents": a["parents"].to("meta")},
            ValueError,
            "parents is on meta; keep it on the CPU",
        ),
        (lambda a: a | {"window": 0}, ValueError, "window must be at least 1 token, not 0"),
        (lambda a: a | {"window": 2.5}, TypeError, "window must be an integer, not 2.5"),
        *(
            (lambda a, cap=cap: a | {"softcap": cap}, ValueError, "softcap must be between")
            for cap in (-1.0, 0.0, 1e-39, 1e31, float("nan"))
        ),
        (lambda a: a | {"scale": float("nan")}, ValueError, "scale must be finite in float32"),
        (lambda a: a | {"scale": 1e300}, ValueError, "scale must be finite in float32, not 1e+300"),
        (
            lambda a: a | {"query": a["query"][..., :0], "key": a["key"][..., :0]},
            ValueError,
            "the vectors of query and key have no elements",
        ),
        (lambda a: a | {"value": a["value"].requires_grad_()}, ValueError, "requires a gradient"),
        (
            lambda a: {name: x.to("meta") for name, x in a.items()},
            NotImplementedError,
            "query is on meta",
        ),
    ],
)
def test_bad_arguments(change, error, message):
    q, k, v = inputs(6, (8, 8), (4, 2), torch.float32)
    arguments = change({"query": q, "key": k, "value": v, "parents": torch.tensor(chain(6))})
    with pytest.raises(error) as raised:
        tree_attention(**arguments)
    assert message in str(raised.value)


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_a_forward_mode_gradient_is_refused(moved):
    tensors, parents = list(inputs(6, (8, 8), (4, 2), torch.float32)), torch.tensor(chain(6))
    with forward_ad.dual_level():
        tensors[moved] = forward_ad.make_dual(tensors[moved], torch.ones_like(tensors[moved]))
        name = ("query", "key", "value")[moved]
        with pytest.raises(ValueError, match=f"{name} has a tangent, and tree_attention"):
            tree_attention(*tensors, parents)


def test_a_parent_deep_in_the_row_must_come_first():
    parents = np.array(chain(6))
    parents[4] = 5
    with pytest.raises(ValueError, match="the parent of token 4 is 5; give an earlier token"):
        tree_attention(*inputs(6, (8, 8), (4, 2), torch.float32), torch.from_numpy(parents))


def test_operator_contract():
    parts = inputs(9, (8, 8), (4, 2), torch.float32)
    arguments = (*parts, torch.tensor(tree(9)), 0.3, 1 << 62, 0.0)
    torch.library.opcheck(torch.ops.dlzo.tree_attention.default, arguments)


def test_inside_torch_compile():
    parts = inputs(9, (8, 8), (4, 2), torch.float32)
    parents = torch.tensor(tree(9))
    compiled = torch.compile(lambda *x: tree_attention(*x, window=3) + 1, fullgraph=True)
    assert torch.equal(compiled(*parts, parents), tree_attention(*parts, parents, window=3) + 1)


@pytest.mark.parametrize(
    ("size", "triton", "why"),
    [
        (256, "", ""),
        (257, "", "vectors have 257 and 8 elements, and on GPUs tree_attention takes 256 at most"),
        (8, "there is none", "tree_attention is a Triton kernel on GPUs, and there is none"),
    ],
)
def test_why_there_is_no_kernel_on_a_gpu(monkeypatch, size, triton, why):
    monkeypatch.setattr(_gpu, "why_no_triton", lambda: triton)
    with FakeTensorMode():
        query, value = (torch.empty(1, 1, 3, n, device="cuda") for n in (size, 8))
    assert why_no_kernel(query, value) == why

"""16-bit products where torch's own are slower: here they are made to seem so."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from bits import assert_same_bits
from dlzo import probe, products
from dlzo.generation import generate
from dlzo.products import fast_products, least_rows
from dlzo.scoring import Scorer
from dlzo.tasks import Example
from dlzo_kernels import _C
from tiny import byte_tokenizer, tiny_model

HALVES = (torch.bfloat16, torch.float16)
EXAMPLES = [Example("a fine film , and a long one It was", (" terrible", " great"), 1)]


@pytest.fixture
def taken(monkeypatch):
    """The shapes of x in the products that run in float32, where torch is fast at it alone."""
    shapes = []
    own = products._linear

    def linear(x, *others):
        shapes.append(x.shape)
        return own(x, *others)

    monkeypatch.setattr(products, "_linear", linear)
    for module in ("dlzo.products", "dlzo.scoring.scorer"):
        monkeypatch.setattr(
            f"{module}.least_rows", lambda dtype: 16 if dtype in HALVES else math.inf
        )
    return shapes


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("converted", [1, 100, 1 << 22])
def test_sums_are_in_float32_and_rounded_once(taken, monkeypatch, dtype, bias, converted):
    monkeypatch.setattr(products, "_CONVERTED", converted)
    module = nn.Linear(24, 10, bias=bias).to(dtype)
    x = torch.randn(4, 5, 24).to(dtype)
    with torch.inference_mode():
        with fast_products(module):
            found = module(x)
        exact = F.linear(*(p if p is None else p.double() for p in (x, module.weight, module.bias)))
    assert taken == [x.shape]
    # A sum in float32 may fall on the other side of a rounding's edge.
    assert (found != exact.to(dtype)).float().mean() <= 0.01


def test_the_products_of_gpt2_too(taken):
    module = Conv1D(10, 24).bfloat16()
    x = torch.randn(4, 5, 24).bfloat16()
    with torch.inference_mode(), fast_products(module):
        found = module(x)
        expected = F.linear(x, module.weight.t().contiguous(), module.bias)
    assert taken == [(20, 24), (4, 5, 24)]
    assert_same_bits(found, expected)


def test_what_torch_does_better_or_others_do_is_left_to_them(taken):
    module = nn.Linear(24, 10).bfloat16()

    class Packed(torch.Tensor):
        """Weights of a type of their own."""

    x = torch.randn(20, 24).bfloat16()
    with torch.inference_mode(), fast_products(module):
        module(x[:15])  # few rows
        module(x[:0])
        F.linear(x.float(), module.weight.float())
        F.linear(input=x, weight=module.weight)
        F.linear(x, module.weight.as_subclass(Packed))
        torch.addmm(module.bias, x, module.weight.t(), beta=2)
        torch.addmm(x[:, :10], x, module.weight.t())
    assert taken == []


def test_nothing_changes_where_torch_is_fast(taken, monkeypatch):
    monkeypatch.setattr(products, "least_rows", lambda dtype: math.inf)
    module = nn.Linear(24, 10).bfloat16()
    with torch.inference_mode(), fast_products(module):
        module(torch.randn(20, 24).bfloat16())
    assert taken == []


def test_wide_numbers_are_torchs_everywhere():
    assert least_rows(torch.float32) == math.inf
    assert least_rows(torch.float64) == math.inf


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("intel", [True, False])
@pytest.mark.parametrize("amx", [True, False])
def test_halves_are_torchs_by_the_processor(monkeypatch, dtype, kernels, intel, amx):
    for name in ("_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported"):
        monkeypatch.setattr(torch.ops.mkldnn, name, lambda: kernels)
    monkeypatch.setattr(_C, "made_by_intel", lambda: intel)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    slow = dtype is torch.bfloat16 and intel and not amx
    expected = (64 if slow else math.inf) if kernels else 16
    assert least_rows.__wrapped__(dtype) == expected


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_scorer_uses_it(taken, family):
    model = tiny_model(family).bfloat16()
    scorer = Scorer(model, byte_tokenizer())
    plan = scorer.plan(scorer.encode(EXAMPLES))
    taken.clear()
    found = scorer.scores(plan)
    assert taken
    assert "matrix products in float32: torch's bfloat16 ones are slower" in plan.explain()
    wide = Scorer(model.float(), byte_tokenizer())
    wide_plan = wide.plan(wide.encode(EXAMPLES))
    torch.testing.assert_close(found, wide.scores(wide_plan), atol=0.05, rtol=0.02)
    assert "in float32" not in wide_plan.explain()


def test_the_probe_and_generation_use_it(taken):
    model, tokenizer = tiny_model("llama").bfloat16(), byte_tokenizer()
    probe.probe(model, tokenizer, ["a text of some words that is long enough for it"] * 3)
    assert taken
    taken.clear()
    generate(model, tokenizer, ["a prompt that is long enough for it"], max_new_tokens=2)
    assert taken

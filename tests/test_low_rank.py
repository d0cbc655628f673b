"""Low-rank steps against their definition, bit for bit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from bits import assert_same_bits, copies, low_rank
from dlzo_kernels import LowRankStep, gaussian, low_rank_replay, update_scales, zo_step
from dlzo_kernels import low_rank as low_rank_module
from dlzo_kernels.ops.add_low_rank import add_low_rank

SHAPES = {"wide": (3, 70_001), "tall": (300, 7), "bias": (19,), "stack": (2, 3, 4), "row": (1, 1)}
OPTIONS = {"rank": 3, "v_seed": 2**64 - 1}


def layer_of(dtype):
    layer, generator = nn.Module(), torch.Generator().manual_seed(0)
    for name, shape in SHAPES.items():
        values = torch.randn(shape, generator=generator).to(dtype)
        layer.register_parameter(name, nn.Parameter(values))
    return layer


def direction(shape, stream, seed, query, rank=3, v_seed=2**64 - 1):
    """z by numpy, which rounds each product and each sum to float32."""
    if len(shape) != 2:
        return gaussian(shape, seed, stream=stream, query=query).numpy()
    u = gaussian((shape[0], rank), seed, stream=stream, query=query)
    v = gaussian((shape[1], rank), v_seed, stream=stream, query=2**31 + query)
    return low_rank(u, v)


def test_weights_under_evaluation_and_after_the_update(dtype):
    layer = layer_of(dtype)
    masters = [weights.float().numpy() for weights in copies(layer)]
    for seed in range(3):
        step = LowRankStep(layer, seed, 1e-2, 1e-1, directions=2, weight_decay=0.5, **OPTIONS)
        for query in (0, 1):
            for at, eps in ((step.plus, 1e-2), (step.minus, -1e-2)):
                with at(query):
                    seen = copies(layer)
                for stream, (found, master) in enumerate(zip(seen, masters, strict=True)):
                    z = direction(master.shape, stream, seed, query)
                    expected = torch.from_numpy(master + np.float32(eps) * z).to(dtype)
                    assert_same_bits(found, expected)
        result = step.update((0.7, 0.3), (0.5, 0.8))
        for stream, master in enumerate(masters):
            if master.ndim > 1:
                master *= np.float32(1 - 1e-1 * 0.5)
            for query, scale in enumerate(update_scales(1e-1, result.projected_grads)):
                z = direction(master.shape, stream, seed, query)
                master += np.float32(scale / 3 if master.ndim == 2 else scale) * z
        for found, master in zip(copies(layer), masters, strict=True):
            assert_same_bits(found, torch.from_numpy(master).to(dtype))


def test_replay_gives_the_bits_and_the_master_of_the_step(dtype):
    live, replayed = layer_of(dtype), layer_of(dtype)
    for seed in range(3):
        step = LowRankStep(live, seed, 1e-2, 1e-1, directions=2, weight_decay=0.5, **OPTIONS)
        result = step.update((0.7, 0.3), (0.5, 0.8))
        scales = update_scales(1e-1, result.projected_grads)
        low_rank_replay(replayed, seed, OPTIONS["v_seed"], 3, scales, keep=1 - 1e-1 * 0.5)
    # The next step shows the bits of the master below those of a 16-bit weight.
    for layer in (live, replayed):
        zo_step(layer, 9, 1e-2, 1e-1).update(0.5, 0.4)
    for a, b in zip(copies(live), copies(replayed), strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("loss", [0.5, math.nan])
def test_a_step_that_moves_nothing_leaves_every_bit(dtype, loss):
    layer = layer_of(dtype)
    before = copies(layer)
    step = LowRankStep(layer, 1, 1e-2, 1e-1, weight_decay=0.5, **OPTIONS)
    with pytest.raises(KeyboardInterrupt), step.plus():
        raise KeyboardInterrupt
    step.update(loss, 0.5)
    for a, b in zip(copies(layer), before, strict=True):
        assert_same_bits(a, b)


def test_the_update_is_that_of_the_gradient_on_average():
    target = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]])
    moves = []
    for seed in range(4000):
        w = torch.zeros(2, 3)
        step = LowRankStep([w], seed, 1e-3, 1.0, rank=2, v_seed=seed)
        losses = []
        for at in (step.plus, step.minus):
            with at():
                losses.append(float((w * target).sum()))
        step.update(*losses)
        moves.append(-w)
    assert torch.stack(moves).mean(0).sub(target).abs().max() < 0.5


def test_bad_numbers_are_refused():
    w = torch.ones(3, 3)
    with pytest.raises(ValueError, match="rank must be at least 1, not 0"):
        LowRankStep(w, 1, 1e-2, 1e-1, rank=0, v_seed=1)
    with pytest.raises(ValueError, match="v_seed must be"):
        LowRankStep(w, 1, 1e-2, 1e-1, rank=1, v_seed=-1)
    layer = layer_of(torch.float32)
    before = copies(layer)
    for numbers, message in (
        ((-1, 0, 1, [0.1]), "seed must be"),
        ((0, -1, 1, [0.1]), "v_seed must be"),
        ((0, 0, 1, [math.nan]), "scale must be finite"),
        ((0, 0, 1, [torch.tensor(math.inf)]), "scale must be finite"),
        ((0, 0, 1, torch.tensor([math.nan])), "scale must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            low_rank_replay(layer, *numbers)
    with pytest.raises(TypeError, match=r"rank must be an integer, not 2\.0"):
        low_rank_replay(layer, 0, 0, 2.0, [0.1])
    with pytest.raises(ValueError, match="keep must be"):
        low_rank_replay(layer, 0, 0, 1, [0.1], keep=math.nan)
    for now, then in zip(copies(layer), before, strict=True):
        assert_same_bits(now, then)


def test_weights_made_in_inference_mode():
    w = torch.ones(6, 5)
    with torch.inference_mode():
        made = torch.ones(6, 5)
    for at in (w, made):
        step = LowRankStep(at, 1, 1e-2, 1e-1, rank=2, v_seed=3)
        with step.plus():
            assert (at != 1).any()
        step.update(1.0, 0.5)
    assert_same_bits(w, made)


def test_an_update_that_fails_leaves_the_weights_and_the_next_one_right(monkeypatch):
    layer, twin = layer_of(torch.bfloat16), layer_of(torch.bfloat16)
    step, calls = LowRankStep(layer, 1, 1e-2, 1e-2, rank=2, v_seed=3), []

    def failing(*arguments):
        calls.append(0)
        if len(calls) == 2:
            raise MemoryError
        return add_low_rank(*arguments)

    monkeypatch.setattr(low_rank_module, "add_low_rank", failing)
    with pytest.raises(MemoryError):
        step.update(1.0, 0.5)
    for now, then in zip(copies(layer), copies(twin), strict=True):
        assert_same_bits(now, then)
    for each in (layer, twin):
        LowRankStep(each, 1, 1e-2, 1e-2, rank=2, v_seed=3).update(1.0, 0.5)
    for now, then in zip(copies(layer), copies(twin), strict=True):
        assert_same_bits(now, then)

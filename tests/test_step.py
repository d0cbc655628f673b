"""zo_step: exact, safe, clean, and moving the right way."""

from __future__ import annotations

import gc
import math
import os
import signal
import subprocess
import sys
import threading
import tracemalloc
import weakref
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from bits import assert_same_bits, bits, copies, weights
from dlzo_kernels import (
    LowRankStep,
    StepResult,
    accumulate_,
    gaussian,
    low_rank,
    low_rank_replay,
    masters,
    release,
    signals,
    update_scales,
    zo_replay,
    zo_step,
)
from dlzo_kernels import step as step_module
from dlzo_kernels.ops import accumulate

make_steps = pytest.mark.parametrize(
    "make_step", [zo_step, partial(LowRankStep, rank=1, v_seed=3)], ids=["full", "low rank"]
)


def layer_of(dtype: torch.dtype = torch.float32) -> nn.Module:
    """A layer with two tensors of one shape, a bias, a frozen and an empty parameter."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Module()
    for name, shape in (("q", (30, 17)), ("k", (30, 17)), ("frozen", (5,)), ("bias", (17,))):
        values = torch.randn(shape, generator=generator).to(dtype)
        layer.register_parameter(name, nn.Parameter(values, requires_grad=name != "frozen"))
    layer.register_parameter("empty", nn.Parameter(torch.empty(0, 3, dtype=dtype)))
    return layer


def assert_untouched(layer: nn.Module, before: list[torch.Tensor]) -> None:
    for now, then in zip(copies(layer), before, strict=True):
        assert_same_bits(now, then)


def loss_of(layer: nn.Module) -> torch.Tensor:
    return sum(p.float().square().sum() for p in layer.parameters())


def test_lr_zero_keeps_every_bit(dtype):
    layer = layer_of(dtype)
    with torch.no_grad():
        layer.q[0, :4] = torch.tensor([0.0, -0.0, 1e-7, -1e-7]).to(dtype)
    before = copies(layer)
    for seed in range(20):
        result = zo_step(layer, seed, 1e-3, 0.0, closure=lambda: loss_of(layer))
        assert result.applied
    assert_untouched(layer, before)


def test_the_weights_under_evaluation_are_the_rounded_master_plus_and_minus(dtype):
    w = torch.randn(40, 9).to(dtype)
    start, seen = w.float(), []
    zo_step([w], 5, 0.01, 0.0, closure=lambda: seen.append(w.clone()) or 0.0)
    z = gaussian((40, 9), 5)
    assert_same_bits(seen[0], (start + 0.01 * z).to(dtype))
    assert_same_bits(seen[1], (start - 0.01 * z).to(dtype))


def test_both_forms_give_the_same_bits(dtype):
    one, two = layer_of(dtype), layer_of(dtype)
    for seed in range(5):
        with_closure = zo_step(one, seed, 1e-2, 1e-3, closure=lambda: loss_of(one))
        step = zo_step(two, seed, 1e-2, 1e-3)
        with torch.no_grad():
            with step.plus():
                plus = loss_of(two)
            with step.minus():
                minus = loss_of(two)
        assert step.update(plus, minus) == with_closure
    assert_untouched(two, copies(one))
    assert not torch.equal(one.q, layer_of(dtype).q)
    assert torch.equal(one.frozen, layer_of(dtype).frozen)


def test_bfloat16_does_not_stall():
    w = torch.ones(1000, dtype=torch.bfloat16)
    half_ulp = 2.0**-9
    direction = torch.zeros(1000)
    moves = []
    for seed in range(1000):
        before = w.clone()
        # A steady slope of 1e-3 of half an ulp per step, along each z's agreement with it.
        result = zo_step(w, seed, 1e-3, half_ulp * 1e-3, closure=lambda: w.float().sum())
        direction -= half_ulp * 1e-3 * result.projected_grad * gaussian((1000,), seed)
        moves.append(not torch.equal(w, before))
    assert direction.abs().max() > half_ulp  # the updates add up to something bfloat16 can show
    assert any(moves)
    assert_same_bits(w, (torch.ones(1000) + direction).bfloat16())


def test_sign_and_size_against_the_gradient_of_a_quadratic():
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(50, generator=generator, dtype=torch.float32)
    curvature = torch.rand(50, generator=generator) + 0.5
    start, total = w.clone(), torch.zeros(50, dtype=torch.float64)
    gradient = curvature * start
    count, lr = 4000, 0.1
    for seed in range(count):
        w.copy_(start)
        result = zo_step(
            w, seed, 1e-2, lr, closure=lambda: 0.5 * (curvature.double() * w.double() ** 2).sum()
        )
        z = gaussian((50,), seed)
        assert result.projected_grad == pytest.approx(float(z @ gradient), rel=2e-3, abs=2e-3)
        total += w.double() - start.double()
    # E[g z] is the gradient; its variance per coordinate is about |gradient|^2.
    error = (total / count + lr * gradient).abs().max()
    assert error < 5 * lr * gradient.norm() / count**0.5


def test_directions_are_averaged(dtype):
    w = torch.randn(200).to(dtype)
    master = w.float().clone()
    result = zo_step(w, 3, 1e-2, 0.05, closure=lambda: w.float().square().sum(), directions=4)
    assert len(result.losses_plus) == len(result.projected_grads) == 4
    for k, grad in enumerate(result.projected_grads):
        scale = torch.tensor(-0.05 / 4 * grad, dtype=torch.float64).float()
        master = master + scale * gaussian((200,), 3, query=k)
    assert_same_bits(w, master.to(dtype))
    assert result.projected_grad == pytest.approx(sum(result.projected_grads) / 4)


def test_directions_in_the_open_form():
    one, two = layer_of(), layer_of()
    expected = zo_step(one, 1, 1e-2, 1e-3, closure=lambda: loss_of(one).item(), directions=2)
    step, plus, minus = zo_step(two, 1, 1e-2, 1e-3, directions=2), [], []
    for k in range(2):
        with step.plus(k):
            plus.append(loss_of(two).item())
        with step.minus(k):
            minus.append(loss_of(two).item())
    assert step.update(plus, minus) == expected
    assert_untouched(two, copies(one))


def test_tensors_of_one_shape_get_different_noise():
    layer, seen = layer_of(), []
    zero = [torch.zeros_like(p).copy_(p) for p in (layer.q, layer.k)]
    zo_step(layer, 1, 1.0, 0.0, closure=lambda: seen.append(copies(layer)) or 0.0)
    noise = [seen[0][i] - zero[i] for i in range(2)]
    assert abs(torch.corrcoef(torch.stack(noise).view(2, -1))[0, 1]) < 0.2
    assert_same_bits(seen[0][3], layer.bias.detach() + gaussian((17,), 1, stream=3))


@pytest.mark.parametrize("phase", [0, 1])
@pytest.mark.parametrize(
    "error", [RuntimeError("out of memory"), KeyboardInterrupt(), SystemExit()]
)
def test_whatever_ends_an_evaluation_restores_every_bit(dtype, phase, error):
    layer = layer_of(dtype)
    zo_step(layer, 0, 1e-2, 1e-2, closure=lambda: loss_of(layer))  # a master with more bits
    before, calls = copies(layer), []

    def closure():
        calls.append(not torch.equal(layer.q, before[0]))
        if len(calls) > phase:
            raise error
        return 0.0

    with pytest.raises(type(error)):
        zo_step(layer, 1, 1e-2, 1e-2, closure=closure)
    assert calls == [True] * (phase + 1)  # the evaluation saw perturbed weights
    assert_untouched(layer, before)
    step = zo_step(layer, 1, 1e-2, 1e-2)
    with pytest.raises(type(error)), step.minus():
        raise error
    assert_untouched(layer, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("phase", [0, 1])
def test_a_loss_that_is_not_finite_is_not_applied(dtype, bad, phase):
    layer = layer_of(dtype)
    before, losses = copies(layer), [1.0, 1.0]
    losses[phase] = bad
    remaining = iter(losses)
    result = zo_step(layer, 1, 1e-2, 1e-2, closure=lambda: next(remaining))
    assert not result.applied
    assert_untouched(layer, before)
    assert not zo_step(layer, 1, 1e-2, 1e-2).update(*losses).applied
    assert_untouched(layer, before)


def test_each_signal_that_has_to_wait_is_passed_on_though_one_raises():
    seen, numbers = [], (signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM)

    def raising(number, _frame):
        seen.append(number)
        raise KeyboardInterrupt

    before = [signal.signal(number, raising) for number in numbers]
    try:
        with pytest.raises(KeyboardInterrupt), signals.Held(__file__):
            for number in numbers:
                signal.raise_signal(number)
            assert not seen
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
    assert seen == list(numbers)


def test_thousands_of_signals_may_have_to_wait():
    seen = []
    before = signal.signal(signal.SIGUSR1, lambda *_: seen.append(0))
    try:
        with signals.Held(__file__):
            for _ in range(3000):
                signal.raise_signal(signal.SIGUSR1)
            assert not seen
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert len(seen) == 3000


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGALRM, signal.SIGUSR1])
def test_a_signal_while_the_weights_are_written_waits_for_the_end(monkeypatch, number):
    from dlzo_kernels.ops import perturb as module

    before_signal = signal.signal(number, signal.default_int_handler)
    layer, before, written = layer_of(), copies(layer_of()), []

    def interrupted(*arguments, **numbers):
        os.kill(os.getpid(), number)
        written.append(1)
        return real(*arguments, **numbers)

    real = module._perturb_cpu
    monkeypatch.setattr(module, "_perturb_cpu", interrupted)
    with pytest.raises(KeyboardInterrupt):
        zo_step(layer, 1, 1e-2, 1e-2, closure=lambda: 0.0)
    signal.signal(number, before_signal)
    assert len(written) == 4  # all parameters, the interrupted one too
    assert_untouched(layer, before)


def step_with_closure(layer):
    zo_step(layer, 1, 1e-2, 1e-2, closure=lambda: loss_of(layer))


def step_with_blocks(layer):
    step = zo_step(layer, 1, 1e-2, 1e-2)
    with step.plus():
        plus = loss_of(layer)
    with step.minus():
        minus = loss_of(layer)
    step.update(plus, minus)


@pytest.fixture
def ctrl_c():
    """Python's own handler of SIGINT: a shell's background job begins with that signal ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.default_int_handler
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("take", [step_with_closure, step_with_blocks])
def test_a_signal_at_any_line_leaves_a_whole_layer(take, ctrl_c, monkeypatch):
    monkeypatch.setattr(masters, "_entries", {})  # lines are counted, and each costs some
    layer, before, after = layer_of(), copies(layer_of()), layer_of()
    take(after)
    own_files = {masters.__file__, signals.__file__, step_module.__file__}
    files = own_files | {contextmanager.__code__.co_filename, __file__}
    until, ended = 0, False
    bits_after = copies(after)

    def trace(frame, event, argument):
        nonlocal left
        if frame.f_code.co_filename not in files:
            return None
        left -= 1
        if left == 0:  # as when the signal comes between two instructions of this frame
            signal.getsignal(signal.SIGINT)(signal.SIGINT, frame)
        return trace

    while not ended and until < 5000:
        until = left = until + 1
        with torch.no_grad():
            for now, then in zip(layer.parameters(), before, strict=True):
                now.copy_(then)
        sys.settrace(trace)
        try:
            take(layer)
            ended = left > 0
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
            left_behind = signal.signal(signal.SIGINT, ctrl_c)
        with pytest.raises(KeyboardInterrupt):  # whatever stands there passes signals on
            left_behind(signal.SIGINT, None)
        assert_untouched(layer, before if torch.equal(layer.q, before[0]) else bits_after)
        assert zo_step(layer, 2, 1e-2, 1e-2, closure=lambda: 0.0).applied
    assert ended and until > 100


def test_a_handler_in_c_and_an_ignored_signal_are_left_alone(tmp_path):
    code = """
import faulthandler, os, signal, torch, dlzo_kernels
signal.signal(signal.SIGINT, signal.SIG_IGN)
faulthandler.register(signal.SIGTERM, chain=False)
w = torch.ones(3)
dlzo_kernels.zo_step(w, 1, 1e-2, 1e-2, closure=lambda: os.kill(os.getpid(), signal.SIGINT) or 0.0)
os.kill(os.getpid(), signal.SIGTERM)
print("alive")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout == "alive\n" and "most recent call first" in done.stderr


def test_a_handler_that_the_closure_sets_stays():
    own, later = signal.getsignal(signal.SIGINT), lambda number, frame: None
    w = torch.ones(3)
    zo_step(w, 1, 1e-2, 1e-2, closure=lambda: signal.signal(signal.SIGINT, later) and 0.0)
    assert signal.signal(signal.SIGINT, own) is later


def test_a_failure_of_the_kernel_itself_restores(monkeypatch):
    from dlzo_kernels.ops import perturb as module

    layer, before = layer_of(), copies(layer_of())
    real, calls = module._perturb_cpu, []

    def failing(*arguments, **numbers):
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError
        return real(*arguments, **numbers)

    monkeypatch.setattr(module, "_perturb_cpu", failing)
    with pytest.raises(MemoryError):
        zo_step(layer, 1, 1e-2, 1e-2, closure=lambda: 0.0)
    assert_untouched(layer, before)


def test_the_layer_is_passed_over_three_times(monkeypatch):
    passes = []
    for module, name in ((step_module, "perturb_layer"), (masters, "accumulate_layer")):
        real = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *a, real=real, name=name, **k: passes.append(name) or real(*a, **k)
        )
    w = torch.ones(10, dtype=torch.bfloat16)
    zo_step(w, 1, 0.1, 1e-3, closure=lambda: w.float().sum())
    assert passes == ["perturb_layer", "perturb_layer", "accumulate_layer"]


def test_no_random_state_is_touched_and_grad_is_off():
    layer = layer_of()
    before = torch.random.get_rng_state()
    zo_step(layer, 1, 1e-3, 1e-3, closure=lambda: loss_of(layer) * (not torch.is_grad_enabled()))
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.is_grad_enabled()
    assert all(p.grad is None for p in layer.parameters())


def test_weights_written_by_others_are_adopted(dtype):
    w = nn.Parameter(torch.randn(100).to(dtype))
    writes = [
        lambda: w.data.mul_(2),
        lambda: w.detach().add_(1),
        lambda: w.data.__setitem__(slice(3), 7),
    ]
    for write in writes:
        zo_step(w, 1, 1e-2, 1e-2, closure=lambda: w.float().sum())
        write()
        now = w.detach().clone()
        zo_step(w, 2, 1e-2, 0.0, closure=lambda: 0.0)
        assert_same_bits(w.detach(), now)


def test_putting_the_old_weights_back_forgets_the_hidden_digits():
    start = torch.randn(500).bfloat16()
    w, results = start.clone(), []
    for _ in range(2):
        w.copy_(start)
        for seed in range(3):
            zo_step(w, seed, 1e-2, 1e-6, closure=lambda: w.float().sum())
        results.append(
            next(
                e.master.clone()
                for e in masters._entries.values()
                if e.storage.cdata == StorageWeakRef(w.untyped_storage()).cdata
            )
        )
    assert_same_bits(results[0], results[1])


def test_views_and_data_keep_their_master():
    w = nn.Parameter(torch.ones(300, dtype=torch.bfloat16))
    twin = torch.ones(300, dtype=torch.bfloat16)
    for seed in range(60):
        zo_step(w.data, seed, 1e-3, 1e-5, closure=lambda: w.float().sum())
        zo_step(twin, seed, 1e-3, 1e-5, closure=lambda: twin.float().sum())
    assert_same_bits(w.detach(), twin)
    assert (twin != 1).any()


@pytest.mark.parametrize("swaps", [False, True])
def test_a_module_moves_and_loads_after_a_step(swaps):
    layer, before = layer_of(), torch.__future__.get_swap_module_params_on_conversion()
    zo_step(layer, 1, 1e-2, 1e-2).update(1.0, 0.5)
    torch.__future__.set_swap_module_params_on_conversion(swaps)
    try:
        layer.load_state_dict(layer_of().state_dict())
        layer.double().bfloat16()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    assert zo_step(layer, 1, 1e-2, 1e-2).update(1.0, 0.5).applied


def test_a_step_leaves_nothing_that_holds_the_weights():
    w = nn.Parameter(torch.ones(64))
    zo_step(w, 1, 1e-2, 1e-2).update(1.0, 0.5)
    parameter, storage = weakref.ref(w), StorageWeakRef(w.untyped_storage())
    del w
    assert parameter() is None and storage.expired()


ALIASES = [lambda w: w[:], lambda w: w.data, lambda w: w.detach()]


@pytest.mark.parametrize("alias", ALIASES)
def test_a_step_on_an_alias_is_seen_by_others(alias):
    w = nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    zo_step(alias(w), 0, 1e-1, 0.0, closure=lambda: 0.0)
    perturbed = zo_step(alias(w), 1, 1e-1, 1e-3).plus()
    with perturbed, pytest.raises(RuntimeError, match="perturbed by an open step"):
        zo_step(w, 2, 1e-1, 1e-3)
    step = zo_step(w, 1, 1e-1, 1e-3)
    with torch.no_grad():
        w.add_(1)
    with pytest.raises(RuntimeError, match="was written since the step was opened"):
        step.update(1.0, 0.5)
    assert torch.equal(w, torch.full_like(w, 2.0))


SHARED = {
    "views": lambda w: (w[:256], w[256:]),
    "parameters": lambda w: (nn.Parameter(w[:256]), nn.Parameter(w[256:])),
    "rows": lambda w: tuple(w.view(2, 256)),
    "columns": lambda w: tuple(w.view(256, 2).t()),
}


@make_steps
@pytest.mark.parametrize("share", SHARED.values(), ids=SHARED)
def test_steps_in_turn_on_parts_of_one_tensor_keep_their_masters(share, make_step):
    parts = share(torch.ones(512, dtype=torch.bfloat16))
    twins = [torch.ones_like(part) for part in parts]
    for seed in range(40):
        for part in (*parts, *twins):
            step = make_step(part, seed, 1e-3, 1e-5)
            with step.plus():
                pass
            step.update(3.0, 1.0)
    for part, twin in zip(parts, twins, strict=True):
        assert_same_bits(part.detach().clone(), twin)
        assert (twin != 1).any()


def test_a_step_on_one_part_of_a_tensor_leaves_an_open_one_on_another_alone():
    w = torch.ones(8)
    step = zo_step(w[:4], 1, 1e-3, 1e-3)
    with step.plus():
        zo_step(w[4:], 2, 1e-3, 1e-3, closure=lambda: 1.0)
    zo_replay(w[4:], [1], [1.0], [0])
    with step.minus():
        pass
    w[4:].add_(1)  # by somebody else: whose memory it was, the count does not say
    with pytest.raises(RuntimeError, match="was written since the step was opened"):
        step.update(1.0, 0.5)


@pytest.mark.parametrize("change", ["same", "dtype", "layout"])
def test_a_closure_that_moves_the_weights_to_other_memory_is_refused(change):
    layer = nn.Linear(3, 2)
    before = copies(layer)

    def closure() -> torch.Tensor:
        layer.double()
        if change == "same":
            layer.float()
        elif change == "layout":
            layer.float()
            layer.weight.data = layer.weight.data.t().contiguous().t()
        return loss_of(layer)

    with pytest.raises(RuntimeError, match="was written since the step was opened"):
        zo_step(layer, 1, 1e-2, 1e-2, closure=closure)
    assert layer.weight.dtype is (torch.float64 if change == "dtype" else torch.float32)
    assert_untouched(layer.float(), before)


def test_weights_of_another_shape_are_left_alone_and_the_old_memory_restored():
    w, other = torch.ones(3, 4), torch.full((8,), 5.0)
    before, memory = w.clone(), w.detach()
    step = zo_step(w, 1, 1e-2, 1e-2)
    with step.plus():
        w.data = other[:1]
    assert_same_bits(other, torch.full((8,), 5.0))
    assert_same_bits(memory, before)
    with pytest.raises(RuntimeError, match="was written since the step was opened"):
        step.update(1.0, 0.5)
    assert_same_bits(other, torch.full((8,), 5.0))


def test_decay_alone_is_seen_by_an_open_step():
    w = torch.ones(2, 2)
    step = zo_step(w, 1, 1e-3, 1e-3)
    zo_replay(w, [], [], [], keep=0.5)
    with pytest.raises(RuntimeError, match="was written since the step was opened"):
        step.update(1.0, 0.5)


def test_memory_that_has_shrunk_needs_its_old_master_no_more():
    w = torch.ones(100)
    storage = w.untyped_storage()
    zo_step(w, 1, 1e-3, 1e-3, closure=lambda: 1.0)
    storage.resize_(40)
    small = torch.empty(0).set_(storage, 0, (10,))
    assert zo_step(small, 1, 1e-3, 1e-3, closure=lambda: small.sum()).applied


@pytest.mark.parametrize("size", [0, 40])
def test_memory_that_an_evaluation_frees_is_told_and_not_written(size):
    w, other, again = torch.ones(4096), torch.ones(8), torch.ones(4096)

    def free() -> float:
        w.untyped_storage().resize_(size)
        return 1.0

    with pytest.raises(RuntimeError, match="tensor 0 was written since the step was opened"):
        zo_step([w, other], 1, 1e-2, 1e-2, closure=free)
    step = zo_step([again, other], 1, 1e-2, 1e-2)
    with step.plus():
        again.untyped_storage().resize_(size)
    with pytest.raises(RuntimeError, match="tensor 0 was written since the step was opened"):
        step.update(1.0, 0.5)
    assert_same_bits(other, torch.ones(8))
    with pytest.raises(ValueError, match="storage of the tensor was resized below its elements"):
        zo_step(w, 1, 1e-2, 1e-2)


def test_weights_get_their_values_where_their_old_memory_was_freed(dtype):
    w = weights(500, dtype=dtype)
    before, step = w.clone(), zo_step(w, 1, 1e-2, 1e-2)
    with step.plus():
        old = w.untyped_storage()
        w.data = w.clone()
        old.resize_(0)
    assert_same_bits(w, before)


def test_weights_put_back_beneath_a_view_forget_the_hidden_digits():
    ends = []
    w = torch.ones(64, dtype=torch.bfloat16)
    for _ in range(2):
        w.fill_(1.0)
        for seed in range(10):
            zo_step(w[:], seed, 1e-1, 2e-4).update(1.1, 1.0)
        ends.append(w.clone())
    assert_same_bits(*ends)


@make_steps
def test_of_two_steps_opened_on_the_same_weights_one_is_taken(make_step):
    w = torch.ones(8, 8)
    first, second = (make_step(at, seed, 1e-1, 1.0) for seed, at in ((1, w), (2, w[:])))
    with first.plus(), pytest.raises(RuntimeError, match="perturbed"):
        second.update(1.0, 0.5)
    assert first.update(1.0, 0.5).applied
    moved = w.clone()
    with pytest.raises(RuntimeError, match="was written since the step was opened"):
        second.update(1.0, 0.5)
    assert_same_bits(w, moved)


def test_overlapping_blocks_of_one_tensor_leave_one_master():
    w, count = torch.ones(4096), len(masters._entries)
    zo_step([w[:8], w[16:24]], 0, 1e-3, 1e-3, closure=lambda: 0.0)
    for start in range(50):
        zo_step(w[30 + start : 1030 + start], 0, 1e-3, 1e-3, closure=lambda: 0.0)
    assert len(masters._entries) <= count + 3


def test_steps_in_several_threads_do_not_meet_in_the_masters():
    kept, errors, interval = [], [], sys.getswitchinterval()

    def work() -> None:
        try:
            for seed in range(100):
                kept.append(torch.ones(4))
                zo_step(kept[-1], seed, 1e-3, 1e-3, closure=lambda: 0.0)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not errors


def test_masters_may_go_while_garbage_is_collected():
    """There a finalizer may let another thread run, in the midst of whatever makes objects."""
    live, collected, thresholds = [torch.ones(4) for _ in range(300)], [], gc.get_threshold()

    def forget_one(phase: str, _: object) -> None:
        collected.append(phase)
        masters._entries.pop(next(iter(masters._entries), None), None)

    for tensor in live:
        zo_step(tensor, 1, 1e-3, 1e-3, closure=lambda: 0.0)
    pairs = [*zip(range(5000), range(5000), strict=True)]  # new ones are none that lie at hand
    gc.callbacks.append(forget_one)
    gc.set_threshold(5)
    try:
        zo_step(live[-1], 1, 1e-3, 1e-3, closure=lambda: 0.0)
    finally:
        gc.callbacks.remove(forget_one)
        gc.set_threshold(*thresholds)
    assert pairs and collected


def test_blocks_that_are_left_in_another_order_leave_the_handler_of_signals():
    own = signal.getsignal(signal.SIGINT)
    first, second = (zo_step(torch.ones(3), 1, 1e-2, 1e-2).plus() for _ in range(2))
    first.__enter__(), second.__enter__()
    first.__exit__(None, None, None), second.__exit__(None, None, None)
    assert signal.getsignal(signal.SIGINT) is own


def test_masters_of_dead_tensors_are_dropped():
    w = torch.randn(64)
    zo_step(w, 1, 1e-3, 1e-3, closure=lambda: 0.0)
    count = len(masters._entries)
    del w
    other = torch.randn(65)
    zo_step(other, 1, 1e-3, 1e-3, closure=lambda: 0.0)
    assert len(masters._entries) <= count


def test_released_masters_are_freed_and_made_anew(monkeypatch):
    monkeypatch.setattr(masters, "_entries", {})

    def held() -> int:
        return sum(entry.master.nbytes for entry in masters._entries.values())

    layer, other = layer_of(torch.bfloat16), layer_of(torch.bfloat16)
    for each in (layer, other):
        zo_step(each, 1, 1e-3, 1e-6).update(1.0, 0.5)
    both, master = held(), weakref.ref(next(iter(masters._entries.values())).master)
    release([layer.requires_grad_(False), nn.Linear(2, 2), torch.ones(2).to_sparse()])
    assert held() == both // 2 == 4 * (2 * 30 * 17 + 17) and master() is None
    del each, other
    release([])
    assert held() == 0
    before = copies(layer)
    assert zo_step(layer.requires_grad_(True), 1, 1e-3, 0.0, closure=lambda: 1.0).applied
    assert_untouched(layer, before)


def test_masters_of_an_open_step_are_kept_while_it_has_the_layer_perturbed():
    layer, before = layer_of(), copies(layer_of())
    step = zo_step(layer, 1, 1e-2, 1e-2)
    with step.plus():
        release(layer)
    assert_untouched(layer, before)
    with step.minus():
        pass
    release(layer.k)
    with pytest.raises(RuntimeError, match="k was written since the step was opened"):
        step.update(1.0, 0.5)
    assert_untouched(layer, before)


@pytest.mark.parametrize("failing", [accumulate, low_rank])
def test_masters_that_an_update_left_half_moved_are_dropped(monkeypatch, failing):
    name = "_accumulate_cpu" if failing is accumulate else "add_low_rank"
    real, calls = getattr(failing, name), []

    def fail(*arguments):
        calls.append(0)
        if len(calls) == 2:
            raise MemoryError
        return real(*arguments)

    parts = torch.ones(6, 5, dtype=torch.bfloat16), torch.ones(6, 5, dtype=torch.bfloat16)
    options = {"rank": 2, "v_seed": 3} if failing is low_rank else {}
    take = LowRankStep if failing is low_rank else zo_step
    first, second = (take(parts, 1, 1e-2, 1e-6, **options) for _ in range(2))
    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(failing, name, fail)
        first.update(1.0, 0.5)
    # The move is far below half a unit in the last place: nothing else tells the master by.
    assert all(torch.equal(w, torch.ones_like(w)) for w in parts)
    with pytest.raises(RuntimeError, match="was written since the step was opened"):
        second.update(1.0, 0.5)
    for t in masters.adopted(parts):
        assert_same_bits(t.entry.master, torch.ones(6, 5))


def test_strided_tied_and_inference_tensors():
    base = torch.randn(20, 30).bfloat16()
    view = base.t()[3:9]
    before = base.clone()
    zo_step(view, 1, 1e-2, 0.1, closure=lambda: view.float().square().sum())
    assert not torch.equal(view, before.t()[3:9])
    untouched = torch.ones_like(base, dtype=torch.bool)
    untouched.t()[3:9] = False
    assert torch.equal(base[untouched], before[untouched])

    tied = nn.Module()
    tied.a = nn.Linear(4, 4, bias=False)
    tied.b = nn.Linear(4, 4, bias=False)
    tied.b.weight = tied.a.weight
    seen = []
    zo_step(tied, 1, 1.0, 0.0, closure=lambda: seen.append(tied.a.weight.detach().clone()) or 0.0)
    assert_same_bits(seen[0], tied.a.weight.detach() + gaussian((4, 4), 1))

    with torch.inference_mode():
        inference = torch.randn(10)
        kept = inference.clone()
        zo_step(inference, 1, 1e-2, 0.0, closure=lambda: 0.0)
        zo_step(inference, 1, 1e-2, 0.1, closure=lambda: inference.sum())
    assert not torch.equal(inference, kept)


def test_columns_of_one_matrix_move_as_tensors_of_their_own():
    matrix = torch.randn(9, 8, dtype=torch.bfloat16)
    kept = matrix.clone()
    columns = [matrix[:, i : i + 1] for i in (2, 5, 6)]
    apart = [column.clone() for column in columns]
    for layer in (columns, apart):
        zo_step(
            layer, 1, 1e-2, 0.1, closure=lambda tensors=layer: torch.cat(tensors).double().sum()
        )
    assert all(torch.equal(a, b) for a, b in zip(columns, apart, strict=True))
    assert (matrix != kept).any(0).nonzero().flatten().tolist() == [2, 5, 6]


def test_blocks_of_columns_of_one_matrix_are_tensors_of_their_own():
    matrix = torch.randn(9, 12)
    blocks = [matrix[:, :4], matrix[:, 4:9], matrix[2:, 9:10], matrix[2:, 10:]]
    apart = [block.clone() for block in blocks]
    for layer in (blocks, apart):
        # Side by side: over views the sum would run in another order.
        zo_step(
            layer, 1, 1e-2, 0.1, closure=lambda ts=layer: torch.cat([*map(torch.ravel, ts)]).sum()
        )
    assert all(torch.equal(a, b) for a, b in zip(blocks, apart, strict=True))


@pytest.mark.parametrize("first", [True, False])
def test_a_frozen_parameter_that_is_given_itself_is_tuned(first):
    linear = nn.Linear(3, 4)
    linear.weight.requires_grad_(False)
    kept = linear.weight.detach().clone()
    layer = [linear.weight, linear] if first else [linear, linear.weight]
    zo_step(layer, 1, 1e-2, 0.1).update(2.0, 1.0)
    assert not torch.equal(linear.weight, kept)


@pytest.mark.parametrize(("share", "applied"), [(0.9, True), (1.1, False)])
def test_a_move_beyond_the_range_of_the_dtype_is_not_made(dtype, share, applied):
    w = torch.zeros(64, dtype=dtype)
    scale = share * torch.finfo(dtype).max / 6.77  # |z| is 6.764 at most
    assert zo_step(w, 1, 1e-3, 1.0).update(2e-3 * scale, 0.0).applied == applied
    assert w.isfinite().all() and w.any() == applied
    w = torch.zeros(64, dtype=dtype)
    step = zo_step(w, 1, 1e-3, 16.0, directions=16)
    assert step.update([2e-3 * scale / 16] * 16, [0.0] * 16).applied == applied
    w = torch.zeros(64, 64, dtype=dtype)
    step = LowRankStep(w, 1, 1e-3, 1.0, rank=2, v_seed=2)
    assert step.update(2e-3 * scale / 6.77, 0.0).applied == applied
    assert w.isfinite().all()


@pytest.mark.parametrize(
    "frozen",
    [
        torch.zeros(4, dtype=torch.uint8),
        torch.zeros(4, dtype=torch.float64),
        torch.zeros(1).expand(4),
        torch.zeros(4, device="meta"),
        torch.zeros(4).to_sparse(),
    ],
    ids=["uint8", "float64", "expanded", "meta", "sparse"],
)
def test_a_frozen_parameter_of_any_kind_is_counted_and_left_alone(frozen):
    plain, mixed = layer_of(), layer_of()
    mixed.frozen = nn.Parameter(frozen, requires_grad=False)
    for layer in (plain, mixed):
        zo_step(layer, 1, 1e-2, 1e-2).update(1.0, 0.5)
    for name in ("q", "k", "bias"):
        assert_same_bits(getattr(mixed, name), getattr(plain, name))


def test_what_cannot_be_tuned_is_refused_by_name():
    with pytest.raises(TypeError, match=r"tensor 1 has dtype torch\.uint8"):
        zo_step([torch.zeros(4), torch.zeros(4, dtype=torch.uint8)], 1, 1e-3, 1e-3)
    with pytest.raises(ValueError, match="weight is on the meta device"):
        zo_step(nn.Linear(2, 2, device="meta"), 1, 1e-3, 1e-3)
    with pytest.raises(TypeError, match=r"the tensor has dtype torch\.float64"):
        zo_step(torch.zeros(3, dtype=torch.float64), 1, 1e-3, 1e-3)
    with pytest.raises(ValueError, match="requires_grad_"):
        zo_step(nn.Linear(2, 2).requires_grad_(False), 1, 1e-3, 1e-3)
    w = torch.zeros(10)
    matrix = torch.zeros(5, 7)
    for parts in (
        [matrix[:, :2], matrix[:, 1:2]],
        [matrix[:, :3], matrix[1:, 2:5]],
        [matrix[:, 5:], matrix.view(-1)[5:33]],
        [matrix[:, 3:4], matrix[:4, 3:4]],
        [w[0:5:2], w[1:8:3]],
    ):
        with pytest.raises(ValueError, match="share memory"):
            zo_step(parts, 1, 1e-3, 1e-3)
    with pytest.raises(ValueError, match="tensor 0 and tensor 1 share memory"):
        zo_step([w[:6], w[5:]], 1, 1e-3, 1e-3)
    # Neither given one after the other, nor next to each other in memory but for a third.
    with pytest.raises(ValueError, match="share memory"):
        zo_step([w[6:8], torch.zeros(2), w[:9], w[3:5]], 1, 1e-3, 1e-3)
    with pytest.raises(ValueError, match="elements of the tensor share memory"):
        zo_step(torch.zeros(1).expand(4), 1, 1e-3, 1e-3)
    with pytest.raises(ValueError, match="not finite"):
        zo_step(torch.tensor([1.0, float("nan")]), 1, 1e-3, 1e-3)
    with pytest.raises(TypeError, match="item 1 of the layer is a str"):
        zo_step([w, "weight"], 1, 1e-3, 1e-3)
    for layer, kind in ((3, "int"), ({w, torch.ones(3)}, "set")):
        with pytest.raises(TypeError, match=f"layer is a {kind}"):
            zo_step(layer, 1, 1e-3, 1e-3)
    blocks = torch.zeros(4, 3, 8)
    zo_step([blocks[..., :4], blocks[..., 4:]], 1, 1e-3, 1e-3)
    with pytest.raises(ValueError, match="share memory"):
        zo_step([blocks[..., :4], blocks[..., 3:]], 1, 1e-3, 1e-3)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((1, 0.0, 1e-3), "eps must be between 1e-37 and 1e37, not 0.0"),
        ((1, -1e-3, 1e-3), "eps must be"),
        ((1, float("nan"), 1e-3), "eps must be"),
        ((1, 1e-3, float("inf")), "lr must be"),
        ((1, 1e-3, -1.0), "lr must be finite and >= 0, not -1.0"),
        ((-1, 1e-3, 1e-3), "seed must be"),
    ],
)
def test_bad_numbers_are_refused(numbers, message):
    w = torch.ones(3)
    with pytest.raises(ValueError, match=message):
        zo_step(w, *numbers, closure=lambda: 0.0)
    assert torch.equal(w, torch.ones(3))
    with pytest.raises(ValueError, match="directions must be at least 1"):
        zo_step(w, 1, 1e-3, 1e-3, directions=0)
    with pytest.raises(TypeError, match=r"directions must be an integer, not 1\.5"):
        zo_step(w, 1, 1e-3, 1e-3, directions=1.5)
    with pytest.raises(ValueError, match="max_loss is nan"):
        zo_step(w, 1, 1e-3, 1e-3).update(1.0, 0.0, max_loss=math.nan)


def test_numbers_of_numpy_are_numbers():
    results = []
    for kind in (float, np.float32):
        w = torch.ones(30)
        eps, lr = (kind(np.float32(number)) for number in (1e-3, 3e-4))
        results.append(zo_step(w, 1, eps, lr).update(1.25, 1.0))
        assert type(results[-1].projected_grad) is float
    assert results[0] == results[1]
    with pytest.raises(ValueError, match=r"offset .* numbers elements beyond"):
        gaussian((8,), 0, offset=np.uint64(2**64 - 4))
    numbers = {"offset": np.uint64(2**64 - 2), "row_stride": np.int64(2)}
    assert_same_bits(
        gaussian((np.int64(1), np.int64(2)), 0, **numbers),
        gaussian((1, 2), 0, offset=2**64 - 2, row_stride=2),
    )


@make_steps
def test_steps_do_not_nest_and_are_taken_once(make_step):
    w = torch.ones(5, 3)
    step = make_step(w, 1, 1e-3, 1e-3)
    with step.plus():
        for use in (lambda: make_step(w, 2, 1e-3, 1e-3), lambda: step.update(1.0, 2.0)):
            with pytest.raises(RuntimeError, match="perturbed by an open step"):
                use()
        with pytest.raises(RuntimeError, match="perturbed"), step.minus():
            pass
    assert torch.equal(w, torch.ones(5, 3))
    step.update(1.0, 0.5)
    moved = w.clone()
    with pytest.raises(RuntimeError, match="taken already"):
        step.update(1.0, 0.5)
    assert_same_bits(w, moved)
    with pytest.raises(ValueError, match="2 and 1 losses for 1 directions"):
        make_step(w, 1, 1e-3, 1e-3).update([1.0, 2.0], 1.0)
    with pytest.raises(ValueError, match="direction must be in"), step.plus(1):
        pass


def test_what_happens_to_the_weights_while_a_step_is_open_is_seen():
    w = torch.ones(3, 4)
    step = zo_step(w, 1, 1e-3, 1e-3)
    w.fill_(7.0)
    for use in (lambda: step.plus().__enter__(), lambda: step.update(1.0, 0.5)):
        with pytest.raises(RuntimeError, match="the tensor was written since the step was opened"):
            use()
    assert torch.equal(w, torch.full((3, 4), 7.0))
    step = zo_step(w, 1, 1e-3, 1e-3)
    w.data = torch.full((3, 4), 7.0)
    with pytest.raises(RuntimeError, match="the tensor was written since the step was opened"):
        step.update(1.0, 0.5)
    with zo_step(w, 1, 1e-3, 1e-3).plus():
        for view in (w.view(-1), w[1:, :2]):
            with pytest.raises(RuntimeError, match="perturbed by an open step"):
                zo_step(view, 2, 1e-3, 1e-3)
    assert torch.equal(w, torch.full((3, 4), 7.0))


def test_a_master_made_in_inference_mode_outlives_it(dtype):
    one, two = torch.ones(5, 4).to(dtype), torch.ones(5, 4).to(dtype)
    numbers = {"closure": lambda: 1.0, "weight_decay": 0.1}
    with torch.inference_mode():
        zo_step(one, 1, 1e-2, 1e-2, **numbers)
    zo_step(two, 1, 1e-2, 1e-2, **numbers)
    for w in (one, two):
        result = zo_step(w, 2, 1e-2, 1e-2, closure=lambda: w.float().sum(), weight_decay=0.1)  # noqa: B023
        assert result.applied
    assert_same_bits(one, two)


def test_a_loss_is_one_number_and_a_step_can_be_tried_again():
    w = torch.ones(4)
    step = zo_step(w, 1, 1e-2, 1e-2)
    with pytest.raises(ValueError, match=r"a loss has shape \(2,\); give one number"):
        step.update(torch.ones(2), torch.ones(2))
    with pytest.raises(ValueError, match=r"a loss has shape \(2,\)"):
        zo_step(w, 1, 1e-2, 1e-2, closure=lambda: torch.ones(2))
    for loss in (None, "one", 1j, torch.tensor(1j), np.ones(2)):
        with pytest.raises(TypeError, match=r"a loss is .*; give a"):
            zo_step(w, 1, 1e-2, 1e-2, closure=lambda loss=loss: loss)
        with pytest.raises(TypeError, match=r"a loss is .*; give a"):
            step.update(loss, 1.0)
    assert torch.equal(w, torch.ones(4))
    assert step.update(torch.ones(1), torch.tensor(0.5)).applied


def test_numbers_that_would_ruin_the_weights_are_refused_later_too():
    w = torch.ones(3, 3)
    step = zo_step(w, 1, 1e-2, 0.1, weight_decay=1.0)
    for lr, message in ((3.0, "weight_decay must be"), (-1.0, "lr must be"), (math.nan, "lr must")):
        with pytest.raises(ValueError, match=message):
            step.update(1.0, 0.5, lr=lr)
    for keep in (math.nan, 0.0, -1.0, 1.5):
        with pytest.raises(ValueError, match=r"keep must be in \(0, 1\]"):
            zo_replay(w, [], [], [], keep=keep)
    for scale in (torch.tensor(math.nan), torch.tensor(1e39, dtype=torch.float64)):
        for scales in ([scale], scale.reshape(1).float()):
            with pytest.raises(ValueError, match="scale must be finite in float32"):
                zo_replay(w, [1], scales, [0])
    assert torch.equal(w, torch.ones(3, 3))


def test_a_step_works_in_a_thread():
    layer, done = layer_of(), []
    worker = threading.Thread(
        target=lambda: done.append(zo_step(layer, 1, 1e-3, 1e-3, closure=lambda: loss_of(layer)))
    )
    worker.start()
    worker.join()
    assert done[0].applied


class Allocations(TorchDispatchMode):
    """The most bytes of each block of memory that torch's operators returned."""

    def __init__(self):
        super().__init__()
        self.blocks = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            block = out.untyped_storage()
            place, size = block.data_ptr(), block.nbytes()
            self.blocks[place] = max(size, self.blocks.get(place, 0))
        return out


def test_memory_beyond_the_model_is_the_master_and_blocks_below_a_megabyte():
    w = torch.randn(3_000_000).bfloat16()
    tracemalloc.start()
    with Allocations() as allocations:
        zo_step(w, 1, 1e-3, 1e-3, closure=lambda: 0.0)
    _, python_peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del allocations.blocks[w.data_ptr()]
    master, *rest = sorted(allocations.blocks.values(), reverse=True)
    assert master == 4 * w.numel()
    assert max(rest) + python_peak < 1 << 20


def test_bits_helper_sees_a_flipped_sign_of_zero():
    assert not torch.equal(bits(torch.tensor([0.0])), bits(torch.tensor([-0.0])))


@pytest.mark.parametrize("directions", [1, 3])
def test_replayed_steps_give_the_same_bits_and_the_same_next_step(dtype, directions):
    live, replayed = layer_of(dtype), layer_of(dtype)
    results = [
        zo_step(live, seed, 1e-2, 1e-3, closure=lambda: loss_of(live), directions=directions)
        for seed in range(5)
    ]
    updates = [
        (seed, scale, query)
        for seed, result in enumerate(results)
        for query, scale in enumerate(update_scales(1e-3, result.projected_grads))
    ]
    zo_replay(replayed, *zip(*updates, strict=True))
    assert_untouched(replayed, copies(live))
    # The float32 masters agree too: bits below those of a 16-bit weight show in the next step.
    for layer in (live, replayed):
        zo_step(layer, 9, 1e-2, 1e-3, closure=lambda layer=layer: loss_of(layer))
    assert_untouched(replayed, copies(live))


KINDS = {
    "range": (range(3, 6), [0.5, -0.25, 0.1]),
    "numpy": (np.arange(3, 6, dtype=np.uint64), np.array([0.5, -0.25, 0.1])),
    "tensors": (list(torch.arange(3, 6)), list(torch.tensor([0.5, -0.25, 0.1]).double())),
    "memory": (torch.arange(3, 6), torch.tensor([0.5, -0.25, 0.1])),
}


@pytest.mark.parametrize(("seeds", "scales"), KINDS.values(), ids=KINDS)
def test_seeds_and_scales_of_any_kind_give_the_same_bits(dtype, seeds, scales):
    expected, replayed, moved = (weights(70, dtype=dtype) for _ in range(3))
    zo_replay(expected, [3, 4, 5], [0.5, -0.25, 0.1], [0, 1, 2])
    zo_replay(replayed, seeds, scales, range(3))
    accumulate_(weights(70, dtype=dtype).float(), seeds, scales, query=range(3), out=moved)
    assert_same_bits(replayed, expected)
    assert_same_bits(moved, expected)


@pytest.mark.parametrize("replay", [zo_replay, low_rank_replay])
def test_a_signal_during_a_replay_waits_for_its_end(monkeypatch, ctrl_c, replay):
    layer, twin = layer_of(), layer_of()
    numbers = ([1], [0.5], [0]) if replay is zo_replay else (1, 2, 1, [0.5])
    replay(twin, *numbers)
    module, name = (accumulate, "_accumulate_cpu") if replay is zo_replay else (masters, "moving")
    real = getattr(module, name)

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)
        return real(*arguments)

    monkeypatch.setattr(module, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        replay(layer, *numbers)
    assert_untouched(layer, copies(twin))


def test_scales_of_an_update_are_multiplied_from_left_to_right():
    # -lr * g / 3 and -lr * (g / 3) are 0.00010666666666666668.
    assert update_scales(1e-3, [-0.32, 0.0, 3.0]) == [0.00010666666666666667, 0.0, -1e-3]


def test_a_result_in_memory_is_read_anew_at_each_look():
    numbers = torch.tensor([2.0, 1.0, 5.0, 1.0], dtype=torch.float64)
    result = StepResult(numbers)
    assert result.projected_grads == (5.0,) and result.applied
    numbers.copy_(torch.tensor([3.0, 4.0, -5.0, 0.0]))  # as a replay of a CUDA graph does
    assert (result.loss_plus, result.loss_minus, result.projected_grad) == (3.0, 4.0, -5.0)
    assert not result.applied


def test_a_look_at_a_result_reads_it_once(monkeypatch):
    reads, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: reads.append(x) or tolist(x))
    result = StepResult(torch.tensor([2.0, 4.0, 1.0, 1.0, 5.0, 8.0, 1.0]))
    assert result.losses_minus == (1.0, 1.0) and result.loss_plus == 3.0
    assert len(reads) == 2
    assert repr(result) == (
        "StepResult(loss_plus=3.0, loss_minus=1.0, projected_grad=6.5, applied=True)"
    )
    assert len(reads) == 3


def test_a_loss_above_the_limit_moves_nothing():
    layer = layer_of()
    before = copies(layer)
    result = zo_step(layer, 1, 1e-2, 1e-2).update(3.0, 5.0, max_loss=4.9)
    assert not result.applied
    assert result.losses_minus == (5.0,)
    assert_untouched(layer, before)
    assert zo_step(layer, 1, 1e-2, 1e-2).update(3.0, 5.0, max_loss=5.0).applied


@pytest.mark.parametrize("directions", [1, 3])
@pytest.mark.parametrize("bad", [None, math.nan, math.inf, 99.0])
@pytest.mark.parametrize(("lr", "weight_decay"), [(0.0, 0.0), (0.0, 0.5), (1e-2, 0.0), (1e-2, 0.5)])
def test_an_update_from_losses_on_the_device_has_the_bits_of_one_from_numbers(
    directions, bad, lr, weight_decay
):
    generator = torch.Generator().manual_seed(directions)
    plus, minus = torch.rand(2, directions, generator=generator)
    if bad is not None:
        minus[-1] = bad
    here, there = layer_of(torch.bfloat16), layer_of(torch.bfloat16)
    seed = 2**63 + 5
    steps = [
        zo_step(layer, seed, 1e-3, lr, directions=directions, weight_decay=weight_decay)
        for layer in (here, there)
    ]
    expected = steps[0].update(plus.tolist(), minus.tolist(), max_loss=50.0)
    got = steps[1]._finish_on(torch.device("cpu"), torch.cat([plus, minus]), 50.0)
    assert got.applied == expected.applied == (bad is None)
    if bad is None or bad == 99.0:
        assert got == expected
    assert_untouched(there, copies(here))


def test_weight_decay_on_the_device_does_not_depend_on_the_default_dtype():
    w = torch.ones(3, 3)
    torch.set_default_dtype(torch.bfloat16)
    try:
        step = zo_step(w, 1, 1e-3, 1e-2, weight_decay=1e-2)
        step._finish_on(torch.device("cpu"), torch.tensor([1.0, 1.0 + 2**-7]), math.inf)
    finally:
        torch.set_default_dtype(torch.float32)
    expected = torch.ones(3, 3)
    zo_step(expected, 1, 1e-3, 1e-2, weight_decay=1e-2).update(1.0, 1.0 + 2**-7)
    assert_same_bits(w, expected)


@pytest.mark.parametrize("lr", [None, 3e-2])
def test_weight_decay_shrinks_matrices_before_the_move(dtype, lr):
    layer = layer_of(dtype)
    masters = [weights.float() for weights in copies(layer)]
    for seed in range(3):
        step = zo_step(layer, seed, 1e-2, 1e-2, weight_decay=0.3, directions=2)
        result = step.update((0.5, 0.7), (0.4, 0.9), lr=lr)
        # No float32 is nearer to the factor; as a number, numpy rounds it so too.
        keep = torch.tensor(1 - (lr or 1e-2) * 0.3)
        scales = update_scales(lr or 1e-2, result.projected_grads)
        for stream, master in enumerate(masters):
            if stream == 2:  # frozen
                continue
            if master.dim() > 1:
                master.copy_(master * keep)
            for query, scale in enumerate(scales):
                z = gaussian(master.shape, seed, stream=stream, query=query)
                master.copy_(master + torch.tensor(scale) * z)
    assert_untouched(layer, [master.to(dtype) for master in masters])


def test_weight_decay_is_replayed_and_does_not_touch_a_step_that_moves_nothing(dtype):
    live, replayed = layer_of(dtype), layer_of(dtype)
    for seed, (plus, minus) in enumerate([(0.5, 0.4), (0.5, 0.5), (math.nan, 0.5), (0.2, 0.4)]):
        before = copies(live)
        step = zo_step(live, seed, 1e-2, 1e-2, weight_decay=0.3)
        result = step.update(plus, minus)
        if not result.applied or plus == minus:
            assert_untouched(live, before)
            continue
        scales = update_scales(1e-2, result.projected_grads)
        zo_replay(replayed, [seed], scales, [0], keep=1 - 1e-2 * 0.3)
        assert_untouched(replayed, copies(live))


@pytest.mark.parametrize("weight_decay", [-0.1, 100.0, math.nan, math.inf])
def test_weight_decay_out_of_range_is_refused(weight_decay):
    with pytest.raises(ValueError, match="weight_decay must be"):
        zo_step(torch.ones(3, 3), 1, 1e-2, 1e-2, weight_decay=weight_decay)
    with pytest.raises(ValueError, match="weight_decay must be"):
        zo_step(torch.ones(3, 3), 1, 1e-2, 0.0, weight_decay=-5.0)


def test_a_seed_in_memory_is_the_same_as_the_number():
    here, there = layer_of(), layer_of()
    results = [
        zo_step(layer, seed, 1e-2, 1e-2, closure=lambda layer=layer: loss_of(layer))
        for layer, seed in ((here, 2**64 - 7), (there, torch.tensor(-7)))
    ]
    assert results[0] == results[1]
    assert_untouched(there, copies(here))


@pytest.mark.parametrize("size", [1, 7, 511, 512, 513, 4097, 600_001])
def test_a_master_notices_any_bit_that_another_wrote(isa, dtype, size, set_threads):
    set_threads(2)
    master, live = weights(size), torch.empty(size, dtype=dtype)
    entry = masters._Entry(live.copy_(master), None)
    entry.master.copy_(master)
    assert entry.matches(live)
    for place in {0, size // 2, size - 1}:
        bits(live)[place] ^= 1
        assert not entry.matches(live)
        bits(live)[place] ^= 1
    assert entry.matches(live)

"""Both GPU columns on a device: bits of the CPU, streams, graphs, a step that waits for nothing.

    pytest -m gpu -n 8 --dist=load

Triton compiles each of its kernels for some seconds; the processes share that.

Under NVIDIA's checker: `compute-sanitizer --tool memcheck pytest -m gpu`, and again with
`racecheck` and `initcheck`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import dlzo_kernels as dk
from bits import PAIRS, VIEWS, assert_same_bits, weights
from dlzo_kernels.ops import _gpu
from trees import assert_right, chain, inputs, tree

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(params=_gpu.COLUMNS, autouse=True)
def column(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each column in turn, forced."""
    reason = _gpu.why_not(request.param)
    if reason:
        pytest.skip(reason)
    _gpu.select(request.param)
    yield request.param
    _gpu.select_best()


def same(on_gpu: Tensor, on_cpu: Tensor) -> None:
    assert_same_bits(on_gpu.cpu(), on_cpu)


@pytest.mark.parametrize("length", [0, 1, 7, 8192, 8193, 1_000_003])
@pytest.mark.parametrize("offset", [0, 5, 2**34 - 3, 2**64 - 1_000_003])
def test_noise(dtype, length, offset):
    numbers = {"stream": 3, "offset": offset, "query": 2**31, "dtype": dtype}
    seed = 2**64 - 5
    same(
        dk.gaussian((length,), seed, device="cuda", **numbers),
        dk.gaussian((length,), seed, **numbers),
    )


@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize("skip", [0, 1, 4])
def test_perturb_into(pair, skip):
    out_dtype, base_dtype = pair
    base = weights(100_003, dtype=base_dtype)
    out = torch.empty(100_003, dtype=out_dtype)
    there = out.cuda()
    dk.perturb_into(out[skip:], base[skip:], 8, 1e-3, offset=skip)
    dk.perturb_into(there[skip:], base.cuda()[skip:], 8, 1e-3, offset=skip)
    same(there[skip:], out[skip:])


@pytest.mark.parametrize("view", VIEWS)
def test_views(dtype, view):
    here = weights(60, 70, dtype=dtype)
    there = here.cuda()
    dk.perturb_(VIEWS[view](here), 8, -2.0, stream=5)
    dk.perturb_(VIEWS[view](there), 8, -2.0, stream=5)
    same(there, here)


def test_a_column_shard():
    whole = dk.gaussian((50, 64), 3, stream=4)
    shard = dk.gaussian((50, 19), 3, stream=4, offset=23, row_stride=64, device="cuda")
    same(shard, whole[:, 23:42].contiguous())


@pytest.mark.parametrize("count", [0, 1, 7])
def test_accumulate(dtype, count):
    seeds, scales = list(range(count)), [0.1 * (k - 2) for k in range(count)]
    master, out = weights(9001), torch.empty(9001, dtype=dtype)
    there, out_there = master.cuda(), out.cuda()
    dk.accumulate_(master, seeds, scales, query=list(range(count)), out=out)
    dk.accumulate_(there, seeds, scales, query=list(range(count)), out=out_there)
    same(there, master)
    same(out_there, out)


@pytest.mark.parametrize("per", ["tensor", "channel", "token"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5, 33), (700, 576), (2, 40_000)])
def test_statistics(dtype, per, shape):
    x = weights(*shape, dtype=dtype) * 3 + 1
    x.view(-1)[x.numel() // 2] = 60000.0
    here, there = dk.activation_stats(x, per=per), dk.activation_stats(x.cuda(), per=per)
    same(there.absmax, here.absmax)
    assert torch.equal(there.argmax.cpu(), here.argmax)
    torch.testing.assert_close(there.mean.cpu(), here.mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(there.variance.cpu(), here.variance, rtol=2e-5, atol=0)
    torch.testing.assert_close(
        there.kurtosis.cpu(), here.kurtosis, rtol=1e-4, atol=0, equal_nan=True
    )
    again = dk.activation_stats(x.cuda(), per=per)
    for first, second in zip(there, again, strict=True):
        assert torch.equal(first.nan_to_num(), second.nan_to_num())


@pytest.fixture
def triton_column(column: str) -> None:
    """Attention has no other."""
    if column != "triton":
        pytest.skip("tree_attention has no CUDA kernel")


@pytest.mark.usefixtures("triton_column")
@pytest.mark.parametrize("sizes", [(64, 64), (128, 128), (256, 200), (5, 3)])
@pytest.mark.parametrize(
    "numbers", [{}, {"window": 9}, {"softcap": 3.0}, {"window": 40, "softcap": 0.5, "scale": 2.0}]
)
@pytest.mark.parametrize("parents", [chain, tree])
def test_attention(dtype, sizes, numbers, parents):
    tensors = inputs(300, sizes, (6, 2), dtype)
    there = tuple(x.cuda() for x in tensors)
    found = dk.tree_attention(*there, torch.tensor(parents(300)), **numbers)
    # Weights are rounded to the dtype, and the tanh of a small number loses bits.
    assert_right(found.cpu(), tensors, parents(300), slack=4, **numbers)
    again = dk.tree_attention(*there, torch.tensor(parents(300)), **numbers)
    assert torch.equal(again, found)


@pytest.mark.usefixtures("triton_column")
@pytest.mark.parametrize("window", [None, 150])
def test_attention_of_a_tree_does_not_depend_on_others(dtype, window):
    tensors = tuple(x.cuda() for x in inputs(200, (64, 64), (4, 2), dtype))
    both = [*chain(77), -1, *range(77, 199)]
    alone = (x[:, :, 77:].clone() for x in tensors)
    expected = dk.tree_attention(*alone, torch.tensor(chain(123)), window=window)
    tensors[1][:, :, :77], tensors[2][:, :, :77] = torch.nan, torch.inf
    found = dk.tree_attention(*tensors, torch.tensor(both), window=window)
    assert torch.equal(found[:, :, 77:], expected)


@pytest.mark.usefixtures("triton_column")
def test_attention_on_the_current_stream():
    tensors, parents = inputs(500, (64, 64), (4, 2), torch.bfloat16), torch.tensor(tree(500))
    there = tuple(x.cuda() for x in tensors)
    expected = dk.tree_attention(*there, parents)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        query = torch.zeros_like(there[0])
        torch.cuda._sleep(10_000_000)
        query.copy_(there[0])
        found = dk.tree_attention(query, *there[1:], parents)
        noise = [torch.randn(5, 500, device="cuda") for _ in range(9)]  # where places lay
    stream.synchronize()
    assert torch.equal(found, expected) and len(noise) == 9


@pytest.mark.usefixtures("triton_column")
def test_attention_refuses_what_it_has_not():
    tensors, parents = tuple(x.cuda() for x in inputs(3, (257, 8), (1, 1), torch.float32)), chain(3)
    with pytest.raises(NotImplementedError, match="vectors have 257 and 8 elements"):
        dk.tree_attention(*tensors, torch.tensor(parents))
    short = tuple(x[..., :8] for x in tensors)
    with (
        pytest.raises(RuntimeError, match="leave tree_attention out of the capture"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        dk.tree_attention(*short, torch.tensor(parents))


def test_the_current_stream_is_used():
    stream = torch.cuda.Stream()
    expected = dk.gaussian((1 << 20,), 5)
    dk.perturb_(torch.zeros(8, device="cuda"), 5, 1.0)  # compiled before the race
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        w = torch.zeros(1 << 20, device="cuda")
        dk.perturb_(w, 5, 1.0)
        found = w.clone()
    stream.synchronize()
    same(found, expected)


def test_a_captured_launch_takes_new_seeds_and_scales():
    w = torch.zeros(5000, device="cuda")
    seed = torch.tensor([1], device="cuda")
    scale = torch.tensor([1.0], device="cuda")
    dk.perturb_(w.clone(), seed, scale)  # what is compiled or loaded at a first call
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        dk.perturb_(w, seed, scale)
    for number, factor in ((7, 0.5), (2**63 - 1, -2.0)):
        w.zero_()
        seed.fill_(number)
        scale.fill_(factor)
        graph.replay()
        same(w, dk.perturb_(torch.zeros(5000), number, factor))


def layer_on(device: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(64, 48), nn.LayerNorm(48), nn.Linear(48, 64, bias=False))
    return layer.to(device, dtype)


def test_a_step_waits_for_nothing(dtype):
    layer = layer_on("cuda", dtype)
    x = torch.randn(8, 64, device="cuda", dtype=dtype)
    dk.zo_step(layer, 0, 1e-2, 1e-2, closure=lambda: layer(x).float().square().mean())
    step = dk.zo_step(layer, 1, 1e-2, 1e-2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with step.plus():
            plus = layer(x).float().square().mean()
        with step.minus():
            minus = layer(x).float().square().mean()
        result = step.update(plus, minus)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert result.applied
    assert result.loss_plus == plus.item()


@pytest.mark.parametrize("directions", [1, 3])
def test_a_captured_step_takes_new_seeds(dtype, directions):
    layer, here = layer_on("cuda", dtype), layer_on("cpu", dtype)
    x = torch.randn(8, 64, device="cuda", dtype=dtype)
    seed = torch.tensor([3], device="cuda")

    def loss() -> Tensor:
        return (layer(x) - x).float().square().mean()

    def take(step: dk.ZOStep) -> dk.StepResult:
        plus, minus = [], []
        for k in range(directions):
            with step.plus(k):
                plus.append(loss())
            with step.minus(k):
                minus.append(loss())
        return step.update(plus, minus)

    with torch.no_grad():
        # The first step compiles and loads the kernels.
        take(dk.zo_step(layer, seed, 1e-2, 0.0, directions=directions))
        step = dk.zo_step(layer, seed, 1e-2, 1e-2, directions=directions)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = take(step)
    for number in (7, 2**63 - 1):
        seed.fill_(number)
        graph.replay()
        scales, queries = dk.update_scales(1e-2, result.projected_grads), range(directions)
        dk.zo_replay(here, [number] * directions, scales, queries)
        for on_gpu, on_cpu in zip(layer.parameters(), here.parameters(), strict=True):
            same(on_gpu.detach(), on_cpu.detach())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_loss_that_is_not_finite_moves_nothing(dtype, bad):
    layer = layer_on("cuda", dtype)
    before = [p.detach().cpu().clone() for p in layer.parameters()]
    loss = torch.tensor(bad, device="cuda")
    assert not dk.zo_step(layer, 1, 1e-2, 1e-2, closure=lambda: loss).applied
    for now, then in zip(layer.parameters(), before, strict=True):
        same(now.detach(), then)


@pytest.mark.parametrize("directions", [1, 3])
def test_a_run_replays_to_the_same_bits_on_the_cpu(dtype, directions):
    here, there = layer_on("cpu", dtype), layer_on("cuda", dtype)
    x = torch.randn(32, 64, device="cuda", dtype=dtype)
    seeds, scales, queries = [], [], []
    for number in range(20):
        result = dk.zo_step(
            there,
            number,
            1e-2,
            1e-2,
            closure=lambda: (there(x) - x).float().square().mean(),
            directions=directions,
        )
        assert result.applied
        seeds += [number] * directions
        scales += dk.update_scales(1e-2, result.projected_grads)
        queries += range(directions)
    dk.zo_replay(here, seeds, scales, queries)
    for on_gpu, on_cpu in zip(there.parameters(), here.parameters(), strict=True):
        same(on_gpu.detach(), on_cpu.detach())


# What follows imports dlzo late: kernels are tested where its own dependencies are not there too.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"method": "mezo", "layer": None, "steps": 20}], ids=str)
def test_a_training_run_has_the_same_bits_on_the_cpu(dtype, changes, tmp_path):
    from dlzo.adapter import load_adapter
    from dlzo.evaluation import evaluate
    from dlzo.replay import replay
    from dlzo.trainer import train
    from runs import CONFIG, TOKENIZER, write_data
    from tiny import tiny_model

    config = replace(CONFIG, **changes)
    data, out = write_data(tmp_path / "data"), tmp_path / "out"
    there, loaded, replayed = (tiny_model(dtype=dtype) for _ in range(3))
    metrics = train(there.cuda(), TOKENIZER, config, data, out)
    load_adapter(loaded, out)
    replay(replayed, out / "journal.zo", tmp_path / "again", until=metrics["best"]["step"])
    close = 1e-4 if dtype == torch.float32 else 3e-2
    assert evaluate(loaded, TOKENIZER, "sst2", data)["loss"] == pytest.approx(
        metrics["test"]["loss"], rel=close
    )
    assert evaluate(there, TOKENIZER, "sst2", data) == metrics["test"]
    for here in (loaded, replayed):
        for name, weight in there.state_dict().items():
            same(weight, here.state_dict()[name])


def test_the_probe_finds_the_same_layer():
    from dlzo.probe import probe
    from runs import TOKENIZER
    from tiny import tiny_model

    here, there = (probe(tiny_model().to(name), TOKENIZER) for name in ("cpu", "cuda"))
    assert there.decision.layer == here.decision.layer
    assert there.decision.verdict == here.decision.verdict


def test_operators_are_registered():
    w = weights(100).cuda()
    torch.library.opcheck(torch.ops.dlzo.perturb_.default, (w, 7, 0.5, 1, 2, 3, None))
    torch.library.opcheck(torch.ops.dlzo.activation_stats.default, (w, "tensor"))

"""activation_stats against float64, bit-equal on every ISA and number of threads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlzo_kernels import _C, ActivationStats, activation_stats

DIMS = {"tensor": (0, 1), "channel": (0,), "token": (1,)}
VARIANCE_BOUND, KURTOSIS_BOUND, MEAN_BOUND = 1e-5, 5e-5, 1e-6


def values(rows: int, channels: int, kind: str = "normal", seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, channels, generator=generator)
    if kind == "heavy":
        x = x**5
    if kind == "far":
        x = x + 1000
    if kind == "outlier":
        x[rows // 2, channels // 3] = 1e5
    if kind == "drift":
        x = x + torch.arange(rows)[:, None] * 3
    return x


def assert_right(x: torch.Tensor, per: str, got: ActivationStats) -> None:
    """Against float64, within the bounds of the docstring; the maximum exactly."""
    exact, dim = x.double(), DIMS[per]
    mean = exact.mean(dim, keepdim=True)
    centred = exact - mean
    variance = (centred**2).mean(dim)
    kurtosis = (centred**4).mean(dim) / variance**2
    assert torch.equal(got.absmax, x.float().abs().amax(dim))
    ulp = mean.squeeze(dim).abs() * 2**-23
    assert ((got.mean - mean.squeeze(dim)).abs() <= MEAN_BOUND * variance.sqrt() + ulp).all()
    assert ((got.variance - variance).abs() <= VARIANCE_BOUND * variance).all()
    assert ((got.kurtosis - kurtosis).abs() <= KURTOSIS_BOUND * kurtosis).all()
    along = {"tensor": x.flatten()[None], "channel": x.t(), "token": x}[per].float().abs()
    first = (along == along.amax(1, keepdim=True)).int().argmax(1)
    assert torch.equal(got.argmax.flatten(), first)


@pytest.mark.parametrize("per", DIMS)
@pytest.mark.parametrize("kind", ["normal", "heavy", "far", "outlier", "drift"])
def test_against_float64(isa, dtype, per, kind):
    if dtype is torch.float16 and kind in ("heavy", "outlier"):
        pytest.skip("beyond the largest float16")
    x = values(301, 577, kind).to(dtype)
    assert_right(x, per, activation_stats(x, per=per))


@pytest.mark.parametrize("per", DIMS)
@pytest.mark.parametrize(
    "shape", [(2, 2), (5, 31), (31, 5), (33, 33), (513, 3), (3, 16_385), (1100, 40), (20_000, 2)]
)
def test_odd_sizes(dtype, per, shape):
    x = values(*shape, seed=1).to(dtype)
    if per == "token" and shape[1] == 2:
        pytest.skip("the kurtosis of two values is 1, whatever they are")
    assert_right(x, per, activation_stats(x, per=per))


@pytest.mark.parametrize("kind", ["normal", "heavy", "far", "outlier", "drift", "jump"])
def test_channels_of_many_segments(isa, kind):
    x = values(1700, 70, kind)
    if kind == "jump":
        x[700:] += 1e4  # where the mean so far says nothing of what comes
    x[40, 3] = x[1600, 3] = 2e9 if kind == "heavy" else 2e5  # equal maxima
    assert_right(x, "channel", activation_stats(x, per="channel"))


@pytest.mark.parametrize(("rows", "first"), [(512, 16), (1024, 512)])
def test_channels_whose_first_rows_mislead(isa, rows, first):
    x = torch.zeros(rows, 2000)
    x[:first] = 1 + torch.rand(2000, generator=torch.Generator().manual_seed(0))
    assert_right(x, "channel", activation_stats(x, per="channel"))


def test_channels_that_are_not_finite_for_a_while():
    x = values(1700, 40)
    x[600, 5], x[1500, 5] = float("inf"), 1e9
    x[700, 6], x[701, 6], x[1500, 6] = float("inf"), float("nan"), float("nan")
    stats = activation_stats(x, per="channel")
    assert stats.argmax[[5, 6]].tolist() == [600, 701]
    assert stats.absmax[5] == float("inf")
    assert stats.absmax[6].isnan()
    assert stats.mean.isnan().nonzero().flatten().tolist() == [5, 6]
    others = [i for i in range(40) if i not in (5, 6)]
    assert_right(x[:, others], "channel", ActivationStats(*(part[others] for part in stats)))


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(2, 300),
    centre=st.floats(-1e6, 1e6, width=32),
    spread=st.floats(2**-10, 1e6, width=32),
    seed=st.integers(0, 1 << 30),
)
def test_any_centre_and_spread(n, centre, spread, seed):
    x = values(1, n, seed=seed) * spread + centre
    if x.unique().numel() > 1:
        assert_right(x, "tensor", activation_stats(x))


@pytest.mark.parametrize("per", DIMS)
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extreme_magnitudes(isa, per, scale, dtype):
    x = (values(70, 90) * scale).to(dtype)
    assert_right(x, per, activation_stats(x, per=per))


@pytest.mark.parametrize("big", [1e9, 1e15, 1e17, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_channels_whose_first_segments_are_huge(isa, big, dtype):
    x = values(1024, 40)
    x[:512] = big * (1 + 0.1 * x[:512])
    assert_right(x.to(dtype), "channel", activation_stats(x.to(dtype), per="channel"))


@pytest.mark.parametrize("per", DIMS)
@pytest.mark.parametrize("largest", [2.0**29, 2.0**30, 2.0**31])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_as_far_apart_as_they_can_be(isa, per, largest, dtype):
    # A block of 64 terms of each lane is twice the largest off a pivot that is good enough to stay.
    x = torch.full((512, 40) if per == "channel" else (3, 16_384), -largest, dtype=dtype)
    (x[64:128] if per == "channel" else x[:, 2048:4096]).fill_(largest)
    assert_right(x, per, activation_stats(x, per=per))


@pytest.mark.parametrize("per", DIMS)
@pytest.mark.parametrize("centre", [1e-6, 1e-5, 1e-4, 1e-3])
def test_units_in_the_last_place_of_small_values(isa, per, centre):
    steps = torch.randint(-3, 4, (90, 70), generator=torch.Generator().manual_seed(0))
    x = (torch.tensor(centre).view(torch.int32) + steps.int()).view(torch.float32)
    assert_right(x, per, activation_stats(x, per=per))


@pytest.mark.parametrize("per", DIMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_all_nans_are_alike(isa, per, dtype):
    integer = torch.int32 if dtype is torch.float32 else torch.int16
    quiet = torch.tensor(float("nan"), dtype=dtype).view(integer)
    x = values(700, 70).to(dtype)
    for place, payload in ((3, 0), (40, 1), (600, 2)):
        x[place, 5] = (quiet + payload).view(dtype)
        x[5, place % 70] = (quiet + payload).view(dtype)
    stats = activation_stats(x, per=per)
    first = {"tensor": 3 * 70 + 5, "channel": 3, "token": 3}[per]
    at = {"tensor": (), "channel": 5, "token": 5}[per]
    assert stats.argmax[at] == first and stats.absmax[at].isnan()


@pytest.mark.parametrize("per", DIMS)
@pytest.mark.parametrize("kind", ["heavy", "far", "outlier", "drift"])
def test_bits_depend_on_neither_isa_nor_threads(dtype, per, kind, set_threads):
    x = values(1031, 803, kind).to(dtype)  # enough for three threads
    before, results = _C.selected_isa(), []
    for name in [name for name, _, runs, _ in _C.isas() if runs]:
        _C.select_isa(name)
        for threads in (1, 2, 3):
            set_threads(threads)
            results.append(activation_stats(x, per=per))
    _C.select_isa(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a.isnan(), b.isnan())
            assert torch.equal(a.nan_to_num(), b.nan_to_num())


def test_shapes_and_dtypes():
    x = torch.randn(2, 3, 5)
    for per, shape in (("tensor", ()), ("channel", (5,)), ("token", (2, 3))):
        stats = activation_stats(x, per=per)
        assert [tuple(s.shape) for s in stats] == [shape] * 5
        assert [s.dtype for s in stats] == [torch.float32, torch.int64] + [torch.float64] * 3
    assert activation_stats(torch.tensor(-2.0)).absmax == 2


def test_views_are_read_as_they_look():
    x = torch.randn(40, 60)
    for view in (x.t(), x[:, 5:33], x[::3]):
        for per in DIMS:
            for a, b in zip(
                activation_stats(view, per=per),
                activation_stats(view.clone(), per=per),
                strict=True,
            ):
                assert torch.equal(a, b)


def test_the_first_of_equal_maxima_is_named(isa, dtype):
    x = torch.ones(70, 70, dtype=dtype)
    x[31, 7] = x[31, 6] = x[40, 2] = -5
    assert activation_stats(x).argmax == 31 * 70 + 6
    per_channel = activation_stats(x, per="channel").argmax
    assert per_channel[[2, 6, 7, 0]].tolist() == [40, 31, 31, 0]
    assert activation_stats(x, per="token").argmax[[31, 40, 3]].tolist() == [6, 2, 0]


@pytest.mark.parametrize("start", [7, 20_000])
def test_the_first_of_equal_maxima_far_apart(isa, dtype, set_threads, start):
    set_threads(1)
    x = torch.ones(70_000, dtype=dtype)
    x[start] = x[start + 7] = x[start + 40_000] = -5
    assert activation_stats(x).argmax == start
    x[start + 20_000] = 6
    assert activation_stats(x).argmax == start + 20_000
    x[start + 30_000] = x[start + 40_000] = float("nan")
    x[start + 45_000] = float("inf")
    assert activation_stats(x).argmax == start + 30_000


@pytest.mark.parametrize("per", DIMS)
@pytest.mark.parametrize("value", [0.0, 0.1, -3e4])
def test_a_constant_has_variance_zero_and_no_kurtosis(isa, dtype, per, value):
    stats = activation_stats(torch.full((45, 33), value, dtype=dtype), per=per)
    assert (stats.variance == 0).all()
    assert stats.kurtosis.isnan().all()
    assert (stats.mean == torch.tensor(value, dtype=dtype).item()).all()


def test_values_that_are_not_finite_show(dtype):
    x = values(20, 64).to(dtype)
    x[3, 9] = float("inf")
    assert activation_stats(x).absmax == float("inf")
    x[5, 1] = float("nan")
    stats = activation_stats(x)
    assert stats.absmax.isnan()
    assert stats.argmax == 5 * 64 + 1
    assert stats.mean.isnan()
    per_channel = activation_stats(x, per="channel").variance
    assert per_channel.isnan().nonzero().flatten().tolist() == [1, 9]


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="empty"):
        activation_stats(torch.zeros(0, 5))
    with pytest.raises(ValueError, match="per must be"):
        activation_stats(torch.zeros(5), per="row")
    with pytest.raises(ValueError, match="0-d"):
        activation_stats(torch.tensor(1.0), per="token")
    with pytest.raises(TypeError, match="int64"):
        activation_stats(torch.zeros(5, dtype=torch.int64))


@pytest.mark.parametrize("per", DIMS)
def test_operator_contract(per):
    torch.library.opcheck(torch.ops.dlzo.activation_stats.default, (values(6, 7), per))


def test_inside_torch_compile():
    x = values(9, 50)
    compiled = torch.compile(lambda x: activation_stats(x, per="token").kurtosis, fullgraph=True)
    assert torch.equal(compiled(x), activation_stats(x, per="token").kurtosis)

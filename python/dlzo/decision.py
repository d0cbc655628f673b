"""The dominant layer of a profile of activations: a pure function; see docs/probe.md."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from statistics import fmean, median
from typing import Literal

from dlzo.errors import UserError

Verdict = Literal["dominant", "ambiguous", "gradual", "none"]

# The constants of `decide`. The ranges are those over which no layer and no verdict changes on 20
# measured profiles: 19 public ones of arXiv 2605.15572 (of the Qwen2.5, Qwen2.5-VL, Qwen3, Qwen3.5,
# Gemma, Ling and gpt-oss families), and SmolLM2-135M-Instruct.

# Massive activations emerge as a rise of max|h| by this factor within three layers: 5.7 to 12.6.
EMERGENCE_RISE = 10.0
# A layer must contribute this factor itself: up to 10.8. It also says which runners-up are named.
MIN_JUMP = 3.0
# Below this confidence the verdict is ambiguous: 0.32 to 0.59.
CLEAR_CONFIDENCE = 0.5
# Without an emergence, max|h| that grew by this factor is gradual, else none: 6.3 to 9.0.
GRADUAL_GROWTH = 8.0


@dataclass(frozen=True)
class Decision:
    """Which layer is dominant and how sure that is.

    Attributes:
        layer: the dominant layer, None if the verdict is gradual or none.
        verdict: dominant; ambiguous, if the confidence is low; gradual or none.
        confidence: 0 to 1. For a layer, by what share of its jump, in orders of magnitude, it leads
            any other layer, times the size of the jump, which counts in full from 100x on. Without
            one, how far below an emergence the steepest rise stays, in the same measure.
        runner_up: the layer with the next largest jump, if that is a threefold one or more.
        reason: one sentence.
    """

    layer: int | None
    verdict: Verdict
    confidence: float
    runner_up: int | None
    reason: str


def decide(absmax: Iterable[float], kurtosis: Iterable[float] | None = None) -> Decision:
    """Find the dominant layer from the largest |h| of each layer's output, layer 0 first.

    A layer is a candidate if max|h| rises steeply there: by `EMERGENCE_RISE` or more within the
    three layers around it, so that an emergence in several steps counts, and by `MIN_JUMP` or more
    at the layer itself, which the next one must carry on. The kurtosis, if given, must rise as
    well, or the layer only scales all of the stream. Of the candidates, the dominant layer is the
    one which best splits the profile of log max|h| into low before and high from there on (the
    CUSUM statistic of a change in mean): a rise that a later one dwarfs loses to it. The last layer
    is not looked at: nothing carries its output on, and many models rise or fall there.

    Args:
        absmax: max|h| of each layer's output, positive and finite.
        kurtosis: of each layer's output, as many, finite.

    Returns:
        The layer, None where there is none, with the verdict, a confidence in [0, 1], the layer
        with the next largest jump, and the reason in words.

    Raises:
        UserError: a list is empty, the lengths differ, or a value is not finite, or a maximum not
            positive.
    """
    absmax = _checked("max|h|", absmax, above=0.0)
    if kurtosis is not None:
        kurtosis = _checked("the kurtosis", kurtosis, above=-math.inf)  # the excess may be negative
        if len(kurtosis) != len(absmax):
            raise UserError(
                f"there are {len(absmax)} maxima and {len(kurtosis)} kurtoses: give one per layer"
            )
    # In octaves above layer 0; rounded, so that ties stay ties in any unit of h.
    level = [round(math.log2(value) - math.log2(absmax[0]), 9) for value in absmax[:-1]]
    jumps = [0.0, *(after - before for before, after in pairwise(level))]
    rises = [max(level[i : i + 2]) - min(level[max(i - 2, 0) : i + 1]) for i in range(len(level))]
    candidates = [
        i
        for i in range(1, len(level))
        if rises[i] >= math.log2(EMERGENCE_RISE)
        and min(level[i : i + 2]) - level[i - 1] >= math.log2(MIN_JUMP)
        and (kurtosis is None or kurtosis[i] > kurtosis[i - 1])
    ]
    if not candidates:
        return _no_emergence(level, rises, kurtosis is not None)
    layer = max(candidates, key=partial(_contrast, level))
    rival = max((i for i in range(len(level)) if i != layer), key=jumps.__getitem__)
    lead = max(0.0, 1 - max(0.0, jumps[rival]) / jumps[layer])
    size = min(1.0, jumps[layer] / (2 * math.log2(EMERGENCE_RISE)))
    confidence = round(lead * size, 3)
    runner_up = rival if jumps[rival] >= math.log2(MIN_JUMP) else None
    reason = (
        f"max|h| rises {_factor(jumps[layer])} at layer {layer}, from {absmax[layer - 1]:,.1f} "
        f"to {absmax[layer]:,.1f}; the next largest jump is {_factor(jumps[rival])} at {rival}"
    )
    verdict: Verdict = "dominant" if confidence >= CLEAR_CONFIDENCE else "ambiguous"
    return Decision(layer, verdict, confidence, runner_up, reason)


def _checked(name: str, values: Iterable[float], above: float) -> list[float]:
    """The values as plain numbers: they come from arrays and tensors too."""
    found = [float(value) for value in values]
    if not found:
        raise UserError(f"{name} is given for no layer: the profile needs one value per layer")
    kind = "a positive finite" if above == 0 else "a finite"
    for layer, value in enumerate(found):
        if not (math.isfinite(value) and value > above):
            raise UserError(
                f"{name} of layer {layer} is {value}, not {kind} number: "
                "load the model in bfloat16 or float32, and check its weights"
            )
    return found


def _contrast(level: Sequence[float], split: int) -> float:
    """CUSUM statistic: how well `split` parts the levels into low before and high from there on."""
    before, after = level[:split], level[split:]
    weight = math.sqrt(len(before) * len(after) / len(level))
    return weight * (fmean(after) - fmean(before))


def _no_emergence(level: Sequence[float], rises: Sequence[float], has_kurtosis: bool) -> Decision:
    if len(level) < 2:
        reason = "a rise is seen between two layers, the last one left out, and there are too few"
        return Decision(None, "none", 0.0, None, reason)
    steepest = max(rises)
    growth = median(level[len(level) // 2 :])
    verdict: Verdict = "gradual" if growth >= math.log2(GRADUAL_GROWTH) else "none"
    confidence = max(0.0, 1 - steepest / math.log2(EMERGENCE_RISE))
    stands_out = "stands out"
    if confidence == 0:
        also = " and raises the kurtosis too" if has_kurtosis else ""
        stands_out = f"makes a step of {MIN_JUMP:g}x that lasts{also}"
    reason = (
        f"max|h| grows {_factor(growth)} over the layers and at most {_factor(steepest)} "
        f"within three of them: no layer {stands_out}"
    )
    return Decision(None, verdict, round(confidence, 3), None, reason)


def _factor(octaves: float) -> str:
    # No factor of float32 numbers is larger; float64 ones could overflow.
    return f"{2 ** min(octaves, 300.0):,.3g}x"

"""Finding the dominant layer: the first activation-outlier layer, by inference alone.

Massive activations (arXiv 2402.17762) come out of the MLP of one layer, at the start token and the
first delimiters, and the residual stream carries them on until the last layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from statistics import fmean, median
from typing import Any, Literal

import torch
from rich.table import Table
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dlzo.calibration import calibration_texts
from dlzo.errors import UserError
from dlzo.models import decoder_layers
from dlzo_kernels import ActivationStats, activation_stats

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

# Outliers sit on the first tokens of a text, so the rest of a long one is not read.
MAX_TEXT_TOKENS = 128


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


@dataclass(frozen=True)
class LayerStats:
    """Statistics of one decoder layer's output, the residual stream.

    Attributes:
        layer: index of the layer, from 0.
        absmax: the largest |h| over all texts.
        kurtosis: mean over the texts of each one's kurtosis (3 for a normal distribution).
        jump: absmax divided by that of the layer before; None for layer 0.
    """

    layer: int
    absmax: float
    kurtosis: float
    jump: float | None


@dataclass(frozen=True)
class ProbeReport:
    """What the probe found in a model."""

    model: str
    decision: Decision
    layers: list[LayerStats]

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {
            "model": self.model,
            "dominant": self.decision.layer,
            "verdict": self.decision.verdict,
            "runner_up": self.decision.runner_up,
            "confidence": self.decision.confidence,
            "layers": [asdict(stats) for stats in self.layers],
        }

    def table(self) -> Table:
        """The report as a table, the dominant layer's row highlighted."""
        table = Table(title=f"{self.model}: {self.decision.verdict}", caption=self.decision.reason)
        for heading in ("layer", "max|h|", "jump", "kurtosis"):
            table.add_column(heading, justify="right")
        styles = {self.decision.runner_up: "yellow", self.decision.layer: "bold reverse green"}
        for stats in self.layers:
            table.add_row(
                str(stats.layer),
                f"{stats.absmax:,.1f}",
                "" if stats.jump is None else f"{stats.jump:.2f}x",
                f"{stats.kurtosis:,.1f}",
                style=styles.get(stats.layer),
            )
        return table


def probe(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str] | None = None
) -> ProbeReport:
    """Run texts through a model and find its dominant layer.

    Args:
        model: a decoder-only model in eval mode.
        tokenizer: its tokenizer; it adds a start token if that is its habit.
        texts: what to run, the built-in texts if None; of each the first 128 tokens are read.

    Raises:
        UserError: no text has a token, or the activations are not finite.
    """
    layers = decoder_layers(model)
    found: list[list[ActivationStats]] = [[] for _ in layers]
    for ids in _encode(model, tokenizer, calibration_texts() if texts is None else texts):
        _measure(model, layers, ids, found)
    absmax = [float(torch.stack([stats.absmax for stats in layer]).max()) for layer in found]
    kurtosis = [float(torch.stack([stats.kurtosis for stats in layer]).mean()) for layer in found]
    decision = decide(absmax, kurtosis)
    jumps = [None, *(after / before for before, after in pairwise(absmax))]
    rows = zip(range(len(layers)), absmax, kurtosis, jumps, strict=True)
    return ProbeReport(model.name_or_path, decision, [LayerStats(*row) for row in rows])


def decide(absmax: Sequence[float], kurtosis: Sequence[float] | None = None) -> Decision:
    """Find the dominant layer from the largest |h| of each layer's output, layer 0 first.

    A layer is a candidate if max|h| rises steeply there: by `EMERGENCE_RISE` or more within the
    three layers around it, so that an emergence in several steps counts, and by `MIN_JUMP` or more
    at the layer itself. The kurtosis, if given, must rise as well, or the layer only scales all of
    the stream. Of the candidates, the dominant layer is the one which best splits the profile of
    log max|h| into low before and high from there on (the CUSUM statistic of a change in mean): a
    rise that does not last, or that a later one dwarfs, loses. The last layer is not looked at:
    nothing carries its output on, and many models rise or fall there.

    Raises:
        UserError: a list is empty, the lengths differ, or a value is not positive and finite.
    """
    _check_profile("max|h|", absmax)
    if kurtosis is not None:
        _check_profile("the kurtosis", kurtosis)
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
        and jumps[i] >= math.log2(MIN_JUMP)
        and (kurtosis is None or kurtosis[i] > kurtosis[i - 1])
    ]
    if not candidates:
        return _no_emergence(level, rises)
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


def _check_profile(name: str, values: Sequence[float]) -> None:
    if not values:
        raise UserError(f"{name} is given for no layer: the profile needs one value per layer")
    for layer, value in enumerate(values):
        if not (math.isfinite(value) and value > 0):
            raise UserError(
                f"{name} of layer {layer} is {value}, not a positive finite number: "
                "load the model in bfloat16 or float32, and check its weights"
            )


def _contrast(level: Sequence[float], split: int) -> float:
    """CUSUM statistic: how well `split` parts the levels into low before and high from there on."""
    before, after = level[:split], level[split:]
    weight = math.sqrt(len(before) * len(after) / len(level))
    return weight * (fmean(after) - fmean(before))


def _no_emergence(level: Sequence[float], rises: Sequence[float]) -> Decision:
    steepest = max(rises, default=0.0)
    growth = median(level[len(level) // 2 :]) if level else 0.0
    verdict: Verdict = "gradual" if growth >= math.log2(GRADUAL_GROWTH) else "none"
    confidence = max(0.0, 1 - steepest / math.log2(EMERGENCE_RISE))
    reason = (
        f"max|h| grows {_factor(growth)} over the layers and at most {_factor(steepest)} "
        "within three of them: no layer stands out"
    )
    return Decision(None, verdict, round(confidence, 3), None, reason)


def _factor(octaves: float) -> str:
    # No factor of float32 numbers is larger; float64 ones could overflow.
    return f"{2 ** min(octaves, 300.0):,.3g}x"


def _encode(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> list[list[int]]:
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", MAX_TEXT_TOKENS)
    encoded = [tokenizer(text).input_ids[: min(longest, MAX_TEXT_TOKENS)] for text in texts]
    encoded = [ids for ids in encoded if ids]
    if not encoded:
        raise UserError("the calibration texts hold no token: give texts with words in them")
    return encoded


@torch.inference_mode()
def _measure(
    model: PreTrainedModel,
    layers: nn.ModuleList,
    ids: Sequence[int],
    found: Sequence[list[ActivationStats]],
) -> None:
    """Append to `found`, layer by layer, the statistics of one text's residual stream."""

    def record(layer: int, _block: nn.Module, _inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        found[layer].append(activation_stats(hidden))

    with ExitStack() as stack:
        for index, block in enumerate(layers):
            stack.enter_context(block.register_forward_hook(partial(record, index)))
        # The base model alone: logits are not needed.
        model.base_model(input_ids=torch.tensor([ids], device=model.device), use_cache=False)

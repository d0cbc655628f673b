"""Finding the dominant layer: the first activation-outlier layer, by inference alone.

Massive activations (arXiv 2402.17762) come out of the MLP of one layer, at the start token and the
first delimiters, and the residual stream carries them on until the last layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain, pairwise
from statistics import fmean, median
from typing import Any, Literal

from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dlzo.activations import Activations, Site, run
from dlzo.calibration import calibration_texts
from dlzo.errors import UserError
from dlzo.scoring import check_ids, max_length
from dlzo.sites import Sites, find_sites

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

# How many of a text's first tokens are read, for outliers sit there: the last of these. The rule is
# tried on fewer too, and on the second number with and without a start token.
LENGTHS = (8, 32, 96)

_HEADINGS: dict[Site, str] = {
    "attention": "max|attn|",
    "mlp": "max|mlp|",
    "down_input": "max|down|",
}
_SITE_NAMES: dict[Site, str] = {
    "block": "block output",
    "attention": "attention output",
    "mlp": "MLP output",
    "down_input": "down proj. input",
}


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
class Channel:
    """One of the largest channels of a site.

    Attributes:
        channel: its index.
        absmax: the largest |x| in it.
        texts: in how many texts it is the largest channel.
        token: the token at which it is the largest.
        position: that token's place in its text, from 0.
    """

    channel: int
    absmax: float
    texts: int
    token: str
    position: int


@dataclass(frozen=True)
class SiteStats:
    """Statistics of what passes one site of one decoder layer.

    Attributes:
        site: block, the layer's output; attention or mlp, their outputs; down_input, what goes into
            the MLP's down projection.
        layer: index of the layer, from 0.
        module: name of the submodule within the layer, empty for the layer itself.
        absmax: the largest |x| over all texts.
        kurtosis: mean over the texts of each one's kurtosis.
        channels: the largest ones, largest first.
    """

    site: Site
    layer: int
    module: str
    absmax: float
    kurtosis: float
    channels: tuple[Channel, ...]


@dataclass(frozen=True)
class ProbeReport:
    """What the probe found in a model.

    Attributes:
        model: its name.
        decision: from all texts, with or without a start token as is the tokenizer's habit.
        layers: statistics of the residual stream.
        sites: statistics of all that was measured, layer by layer.
        missing: what some layers do not have, a few words each.
        variations: the decisions from parts or variants of the texts, by name.
    """

    model: str
    decision: Decision
    layers: Sequence[LayerStats]
    sites: Sequence[SiteStats] = ()
    missing: Sequence[str] = ()
    variations: Mapping[str, Decision] = field(default_factory=dict)

    @property
    def depends_on(self) -> list[str]:
        """Names of the variations from which another layer is decided."""
        return [name for name, d in self.variations.items() if d.layer != self.decision.layer]

    @property
    def super_weight(self) -> tuple[int, int] | None:
        """(row, column) of the dominant layer's down projection where a super weight would lie.

        The largest channels of what comes out of the matrix and of what goes into it
        (arXiv 2411.07191).
        """
        largest = {(stats.site, stats.layer): stats.channels[0].channel for stats in self.sites}
        layer = self.decision.layer
        if layer is None or not {("mlp", layer), ("down_input", layer)} <= largest.keys():
            return None
        return largest["mlp", layer], largest["down_input", layer]

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {
            "model": self.model,
            **_brief(self.decision),
            "layers": [asdict(stats) for stats in self.layers],
            "super_weight": self.super_weight,
            "variations": [
                {"name": name, **_brief(decision)} for name, decision in self.variations.items()
            ],
            "depends_on": self.depends_on,
            "missing": list(self.missing),
            "sites": [asdict(stats) for stats in self.sites],
        }

    def table(self) -> Table:
        """Statistics by layer, the dominant layer's row highlighted."""
        title = escape(f"{self.model}: {self.decision.verdict}")
        table = Table(title=title, caption=self.decision.reason)
        inner = [site for site in _HEADINGS if any(stats.site == site for stats in self.sites)]
        for heading in ("layer", "max|h|", "jump", "kurtosis", *(_HEADINGS[s] for s in inner)):
            table.add_column(heading, justify="right")
        absmax = {(stats.site, stats.layer): f"{stats.absmax:,.1f}" for stats in self.sites}
        styles = {self.decision.runner_up: "yellow", self.decision.layer: "bold reverse green"}
        for stats in self.layers:
            table.add_row(
                str(stats.layer),
                f"{stats.absmax:,.1f}",
                "" if stats.jump is None else f"{stats.jump:.2f}x",
                f"{stats.kurtosis:,.1f}",
                *(absmax.get((site, stats.layer), "") for site in inner),
                style=styles.get(stats.layer),
            )
        return table

    def channel_table(self) -> Table:
        """Which channels carry the outliers, and at which tokens.

        Those of the dominant layer and the runner-up, or else of the layer with the largest max|h|.
        """
        decided = [i for i in (self.decision.layer, self.decision.runner_up) if i is not None]
        largest = max(self.layers, key=lambda stats: stats.absmax).layer
        table = Table(title="The largest channels")
        for heading in ("layer", "site"):
            table.add_column(heading)
        for heading in ("channel", "max|x|", "leads in"):
            table.add_column(heading, justify="right")
        table.add_column("largest at")
        for layer in decided or [largest]:
            for stats in (stats for stats in self.sites if stats.layer == layer):
                names = [str(layer), _SITE_NAMES[stats.site]]
                for channel in stats.channels:
                    numbers = (
                        str(channel.channel),
                        f"{channel.absmax:,.1f}",
                        f"{channel.texts} texts",
                    )
                    place = f"{channel.token!r} at {channel.position}"
                    table.add_row(*names, *numbers, escape(place))
                    names = ["", ""]
                table.add_section()
        if self.super_weight is not None:
            table.caption = (
                f"a super weight would be {list(self.super_weight)} of layer "
                f"{self.decision.layer}'s down projection"
            )
        return table

    def variation_table(self) -> Table:
        """Whether the decision depends on the texts."""
        if self.depends_on:
            caption = (
                f"the layer depends on the texts: another one from {', '.join(self.depends_on)}"
            )
        else:
            caption = "the same layer from all of them"
        table = Table(title="Does it depend on the texts?", caption=caption)
        table.add_column("from")
        table.add_column("layer", justify="right")
        table.add_column("verdict")
        table.add_column("confidence", justify="right")
        for name, decision in {"all texts": self.decision, **self.variations}.items():
            layer = "-" if decision.layer is None else str(decision.layer)
            style = "yellow" if name in self.depends_on else None
            table.add_row(name, layer, decision.verdict, f"{decision.confidence:.2f}", style=style)
        return table


def probe(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str] | None = None
) -> ProbeReport:
    """Run texts through a model and find its dominant layer.

    Args:
        model: a decoder-only model; it is set to evaluation mode.
        tokenizer: its tokenizer; it adds a start token if that is its habit.
        texts: what to run, the built-in texts if None; of each the first 96 tokens are read.

    Returns:
        The decision, the figures of each layer and site, and what other texts would decide.

    Raises:
        UserError: no text has a token, the activations are not finite, or a layer does not run on
            texts alone.
    """
    encoded = calibration_tokens(model.eval(), tokenizer, texts)
    sites = find_sites(model)
    found = run(model, encoded, LENGTHS, sites)
    absmax, kurtosis = found.profile(LENGTHS[-1])
    decision = decide(absmax, kurtosis)
    jumps = [None, *(after / before for before, after in pairwise(absmax))]
    rows = zip(range(len(sites)), absmax, kurtosis, jumps, strict=True)
    return ProbeReport(
        str(model.name_or_path),
        decision,
        [LayerStats(*row) for row in rows],
        list(_site_stats(found, sites, tokenizer)),
        list(_missing(sites)),
        dict(_variations(model, tokenizer, encoded, found)),
    )


def decide(absmax: Sequence[float], kurtosis: Sequence[float] | None = None) -> Decision:
    """Find the dominant layer from the largest |h| of each layer's output, layer 0 first.

    A layer is a candidate if max|h| rises steeply there: by `EMERGENCE_RISE` or more within the
    three layers around it, so that an emergence in several steps counts, and by `MIN_JUMP` or more
    at the layer itself. The kurtosis, if given, must rise as well, or the layer only scales all of
    the stream. Of the candidates, the dominant layer is the one which best splits the profile of
    log max|h| into low before and high from there on (the CUSUM statistic of a change in mean): a
    rise that does not last, or that a later one dwarfs, loses. The last layer is not looked at:
    nothing carries its output on, and many models rise or fall there.

    Args:
        absmax: max|h| of each layer's output, positive and finite.
        kurtosis: of each layer's output, as many.

    Returns:
        The layer, None where there is none, with the verdict, a confidence in [0, 1], the layer
        with the next largest jump, and the reason in words.

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


def _brief(decision: Decision) -> dict[str, Any]:
    return {
        "dominant": decision.layer,
        "verdict": decision.verdict,
        "runner_up": decision.runner_up,
        "confidence": decision.confidence,
    }


def calibration_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str] | None = None
) -> list[list[int]]:
    """The first tokens of texts, of the built-in ones if None: what the probe reads.

    Raises:
        UserError: no text has a token, or the tokenizer is of another model.
    """
    texts = calibration_texts() if texts is None else texts
    length = min(max_length(model), LENGTHS[-1])
    encoded = [tokenizer(text).input_ids[:length] for text in texts]
    encoded = [ids for ids in encoded if ids]
    if not encoded:
        raise UserError("the calibration texts hold no token: give texts with words in them")
    check_ids(model, tokenizer, chain(*encoded))
    return encoded


def _site_stats(
    found: Activations, sites: Sequence[Sites], tokenizer: PreTrainedTokenizerBase
) -> Iterator[SiteStats]:
    for layer, inner in enumerate(sites):
        modules: dict[Site, str | None] = {
            "block": "",
            "attention": inner.attention,
            "mlp": inner.mlp,
            "down_input": inner.down_projection,
        }
        for site, module in modules.items():
            if module is None:
                continue
            channels = tuple(
                Channel(
                    peak.channel,
                    peak.absmax,
                    peak.texts,
                    str(tokenizer.decode([peak.token])),
                    peak.position,
                )
                for peak in found.peaks(site, layer, LENGTHS[-1])
            )
            yield SiteStats(site, layer, module, *found.summary(site, layer, LENGTHS[-1]), channels)


def _missing(sites: Sequence[Sites]) -> Iterator[str]:
    names = {"attention": "attention", "mlp": "MLP", "down_projection": "single down projection"}
    for attribute, name in names.items():
        layers = [i for i, inner in enumerate(sites) if getattr(inner, attribute) is None]
        if layers:
            where = "any layer" if len(layers) == len(sites) else f"layers {str(layers)[1:-1]}"
            yield f"no {name} found in {where}"


def _variations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Sequence[Sequence[int]],
    found: Activations,
) -> Iterator[tuple[str, Decision]]:
    """Decisions from each half of the texts, fewer tokens, and with or without a start token."""
    half = len(encoded) // 2
    if half:
        yield "first half of the texts", decide(*found.profile(LENGTHS[-1], range(half)))
        rest = range(half, len(encoded))
        yield "second half of the texts", decide(*found.profile(LENGTHS[-1], rest))
    for length in LENGTHS[:-1]:
        yield f"first {length} tokens", decide(*found.profile(length))
    bos = tokenizer.bos_token_id
    if bos is None:
        return
    length = min(LENGTHS[1], max(map(len, encoded)))
    starts = all(ids[0] == bos for ids in encoded)
    changed = [ids[1:] if starts else [bos, *ids] for ids in encoded]
    changed = [ids[:length] for ids in changed if ids]
    if changed:
        outputs = run(model, changed, [length])
        name = f"first {length} tokens, {'without' if starts else 'with'} start token"
        yield name, decide(*outputs.profile(length))

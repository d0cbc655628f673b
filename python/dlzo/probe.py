"""Finding the dominant layer: the first activation-outlier layer, by inference alone.

Massive activations (arXiv 2402.17762) come out of the MLP of one layer, at the start token and the
first delimiters, and the residual stream carries them on until the last layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dlzo.activations import Activations, Site, measure
from dlzo.calibration import LENGTHS, calibration_tokens
from dlzo.decision import Decision, decide
from dlzo.models import check_kernels
from dlzo.sites import Sites, find_sites

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
                        f"{channel.texts} text{'s' if channel.texts != 1 else ''}",
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
        UserError: no text has a token, the activations are not finite, a layer does not run on
            texts alone or gives not one hidden state per token, the model changes its own weights,
            or no kernels run on its GPU.
    """
    check_kernels(model.device)
    encoded = calibration_tokens(model.eval(), tokenizer, texts)
    sites = find_sites(model)
    found = measure(model, encoded, LENGTHS, sites)
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


def _brief(decision: Decision) -> dict[str, Any]:
    return {
        "dominant": decision.layer,
        "verdict": decision.verdict,
        "runner_up": decision.runner_up,
        "confidence": decision.confidence,
    }


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
    # A tokenizer may have been given one that the model has no embedding of.
    if bos is None or bos >= model.config.get_text_config(decoder=True).vocab_size:
        return
    length = min(LENGTHS[1], max(map(len, encoded)))
    starts = all(ids[0] == bos for ids in encoded)
    changed = [ids[1:] if starts else [bos, *ids] for ids in encoded]
    changed = [ids[:length] for ids in changed if ids]
    if changed:
        outputs = measure(model, changed, [length])
        name = f"first {length} tokens, {'without' if starts else 'with'} start token"
        yield name, decide(*outputs.profile(length))

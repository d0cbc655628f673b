"""Statistics of activations: texts run through a model, with hooks at the sites of its layers."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from fractions import Fraction
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dlzo.calibration import calibration_tokens
from dlzo.errors import UserError
from dlzo.models import check_kernels, decoder_layers
from dlzo.sites import Sites, first_tensor, forward, hidden_state
from dlzo_kernels import activation_stats

# The layer's output, its attention's, its MLP's, and what goes into the MLP's down projection.
Site = Literal["block", "attention", "mlp", "down_input"]

# Texts of one length that share a forward: enough for matrix products at nearly full speed.
ROWS = 4
# The channels that are named at each site.
TOP_CHANNELS = 3


class Peak(NamedTuple):
    """The largest value of a channel.

    Attributes:
        channel: its index.
        absmax: the value, |x|.
        texts: in how many texts the channel has the largest |x| of all.
        token: id of the token that the value lies at.
        position: that token's place in its text, from 0.
    """

    channel: int
    absmax: float
    texts: int
    token: int
    position: int


class Activations:
    """Statistics of what passed each site, by text and by channel.

    They are kept as plain numbers: thousands of small tensors keep the garbage collector busy.
    """

    def __init__(self, layers: int) -> None:
        self.layers = layers
        # Of each text: largest |x|, kurtosis, channel of the largest |x|.
        self._texts: dict[tuple[Site, int, int], dict[int, tuple[float, float, int]]]
        self._texts = defaultdict(dict)
        # Of channels: largest |x|, token and position.
        self._channels: dict[tuple[Site, int], dict[int, tuple[float, int, int]]]
        self._channels = defaultdict(dict)

    def add_texts(
        self, site: Site, layer: int, x: Tensor, texts: Sequence[int], length: int
    ) -> None:
        """Takes in the first tokens of texts: x of shape (texts, tokens, channels)."""
        # To the kernel, a text is one token with very many channels.
        stats = activation_stats(x[:, :length].flatten(1), per="token")
        channels = [place % x.shape[-1] for place in stats.argmax.tolist()]
        numbers = (stats.absmax.tolist(), stats.kurtosis.tolist(), channels)
        self._texts[site, layer, length].update(zip(texts, zip(*numbers, strict=True), strict=True))

    def add_channels(self, site: Site, layer: int, x: Tensor, tokens: Tensor) -> None:
        """Takes in the channels of x, of shape (texts, tokens, channels), and their token ids."""
        stats = activation_stats(x, per="channel")
        absmax, channels = stats.absmax.topk(min(TOP_CHANNELS, x.shape[-1]))
        places = stats.argmax[channels].tolist()
        found = self._channels[site, layer]
        # A channel that is among the largest of all forwards is so in the one where its peak lies.
        for channel, value, place in zip(channels.tolist(), absmax.tolist(), places, strict=True):
            if channel not in found or value > found[channel][0]:
                row, position = divmod(place, tokens.shape[1])
                found[channel] = (value, int(tokens[row, position]), position)

    def summary(
        self, site: Site, layer: int, length: int, texts: Iterable[int] | None = None
    ) -> tuple[float, float]:
        """The largest |x| over the texts, all if None, and the mean of their kurtoses."""
        found = self._texts[site, layer, length]
        chosen = [found[text][:2] for text in (found if texts is None else texts)]
        absmax, kurtosis = torch.tensor(chosen, dtype=torch.float64).unbind(-1)
        return absmax.max().item(), kurtosis.mean().item()

    def profile(
        self, length: int, texts: Iterable[int] | None = None
    ) -> tuple[list[float], list[float]]:
        """The `summary` of each layer's output: all maxima, and all kurtoses."""
        found = [self.summary("block", layer, length, texts) for layer in range(self.layers)]
        return [absmax for absmax, _ in found], [kurtosis for _, kurtosis in found]

    def peaks(self, site: Site, layer: int, length: int) -> list[Peak]:
        """The channels with the largest |x|, largest first."""
        leaders = Counter(channel for *_, channel in self._texts[site, layer, length].values())
        found = [
            Peak(channel, absmax, leaders[channel], *place)
            for channel, (absmax, *place) in self._channels[site, layer].items()
        ]
        return sorted(found, key=lambda peak: -peak.absmax)[:TOP_CHANNELS]


@torch.inference_mode()
def measure(
    model: PreTrainedModel,
    encoded: Sequence[Sequence[int]],
    lengths: Sequence[int],
    sites: Sequence[Sites] | None = None,
) -> Activations:
    """Runs texts, given as token ids, through the decoder: one pass.

    Args:
        model: a decoder-only model.
        encoded: the texts.
        lengths: of how many of their first tokens the outputs of the layers are taken, ascending.
        sites: what else to look at in each layer, at the last of the lengths, and by channel; None
            leaves it at the outputs of the layers.
    """
    layers = decoder_layers(model)
    found = Activations(len(layers))
    for texts in _together(encoded):
        tokens = torch.tensor([encoded[text] for text in texts])
        add = partial(_add, found, tokens, texts, lengths, sites is not None)
        with ExitStack() as stack:
            for index, layer in enumerate(layers):
                inner = None if sites is None else sites[index]
                for module, hook in _hooks(layer, inner, tokens.shape, partial(add, index)):
                    stack.enter_context(module.register_forward_hook(hook))
            forward(model, tokens)
    return found


def outlier_channels(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    layers: Sequence[nn.Module],
    top: float,
) -> list[int]:
    """The channels with the largest outliers, by number.

    Args:
        model: a decoder-only model in eval mode.
        tokenizer: its tokenizer.
        layers: the decoder layers whose outputs are measured.
        top: the share of all channels, rounded up to a whole number of them.

    Raises:
        UserError: the activations are not finite or not one hidden state per token, or no kernels
            run on the model's GPU.
    """
    check_kernels(model.device)
    maxima = channel_maxima(model, calibration_tokens(model, tokenizer), layers)
    if not maxima.isfinite().all():
        raise UserError(
            "the output of a tuned layer is not finite: load the model in bfloat16 or float32, and "
            "check its weights"
        )
    # As a float, 0.07 of 100 is a little more than 7.
    count = math.ceil(Fraction(str(top)) * len(maxima))
    return sorted(maxima.argsort(descending=True, stable=True)[:count].tolist())


@torch.inference_mode()
def channel_maxima(
    model: PreTrainedModel, encoded: Sequence[Sequence[int]], layers: Sequence[nn.Module]
) -> Tensor:
    """The largest |h| of each channel in the outputs of layers, over texts given as token ids."""
    found: list[Tensor] = []

    def look(tokens: torch.Size, _module: nn.Module, _args: object, output: object) -> None:
        hidden = hidden_state(output, tokens)
        found.append(activation_stats(hidden, per="channel").absmax.cpu())

    for texts in _together(encoded):
        tokens = torch.tensor([encoded[text] for text in texts])
        with ExitStack() as stack:
            for layer in layers:
                stack.enter_context(layer.register_forward_hook(partial(look, tokens.shape)))
            forward(model, tokens)
    return torch.stack(found).amax(0)


def _add(
    found: Activations,
    tokens: Tensor,
    texts: Sequence[int],
    lengths: Sequence[int],
    by_channel: bool,
    layer: int,
    site: Site,
    x: Tensor,
) -> None:
    x = x.reshape(*tokens.shape, -1)
    for length in lengths if site == "block" else lengths[-1:]:
        found.add_texts(site, layer, x, texts, length)
    if by_channel:
        found.add_channels(site, layer, x, tokens)


def _together(encoded: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Texts that share a forward, without padding: they are of one length."""
    lengths = list(map(len, encoded))
    for length in sorted(set(lengths)):
        texts = [text for text, found in enumerate(lengths) if found == length]
        yield from (texts[i : i + ROWS] for i in range(0, len(texts), ROWS))


def _hooks(
    layer: nn.Module, inner: Sites | None, tokens: torch.Size, add: Callable[[Site, Tensor], None]
) -> Iterator[tuple[nn.Module, Callable[..., None]]]:
    """Forward hooks that take in a layer's activations, and the modules that they belong to."""

    def takes_output(site: Site) -> Callable[..., None]:
        def take(_module: nn.Module, _args: object, output: object) -> None:
            hidden = first_tensor(output)
            assert hidden is not None  # it was one when the site was found
            add(site, hidden)

        return take

    yield layer, lambda _module, _args, output: add("block", hidden_state(output, tokens))
    if inner is None:
        return
    if inner.attention is not None:
        yield layer.get_submodule(inner.attention), takes_output("attention")
    if inner.mlp is not None:
        yield layer.get_submodule(inner.mlp), takes_output("mlp")
    if inner.down_projection is not None:
        down = layer.get_submodule(inner.down_projection)
        yield down, lambda _module, args, _output: add("down_input", args[0])

"""Channels of the residual stream: which carry a layer's outliers, and what is written into them.

That a layer's top 1% outlier channels keep most of what tuning all of it gains is of
arXiv 2606.05516; it comes without code, so the definition is ours. A channel is as much of an
outlier as the largest |h| in it, over the first tokens of the probe's texts, in the output of the
layer (of several layers, in any of these). What is tuned are the weights that write into it: its
row of the attention's output projection and of the MLP's down projection, and of their biases.
"""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dlzo.errors import UserError
from dlzo.models import decoder_layers
from dlzo.sites import find_sites


def chosen_channels(setting: object) -> tuple[int, ...]:
    """The channels in a setting from anywhere, "all" or numbers; none for all.

    Raises:
        ValueError: it is neither.
    """
    if setting == "all":
        return ()
    if not isinstance(setting, list) or not all(type(channel) is int for channel in setting):
        raise ValueError("channels must be 'all' or a list of numbers")
    return tuple(setting)


def written_into(
    model: PreTrainedModel, layers: Sequence[int], part: str, channels: Sequence[int]
) -> dict[str, nn.Module]:
    """What writes into channels, by the names of the matrices in the model.

    Args:
        model: the model.
        layers: indices of its layers.
        part: "all", or what of a layer writes: "attention" or "mlp".
        channels: which.

    Returns:
        Modules of parameters that are views: to move them is to move the model.

    Raises:
        UserError: the model has no such channel, or a layer no single matrix that writes.
    """
    size = model.config.get_text_config(decoder=True).hidden_size
    if not 0 <= min(channels) <= max(channels) < size:
        raise UserError(f"channels are {str(channels)[:60]}: the model has 0 to {size - 1}")
    names = {id(module): name for name, module in model.named_modules()}
    sites = find_sites(model)
    found: dict[str, nn.Module] = {}
    for index in layers:
        layer = decoder_layers(model)[index]
        writers = {"attention": sites[index].attention, "mlp": sites[index].down_projection}
        for name in writers if part == "all" else [part]:
            writer = writers[name]
            if writer is None:
                raise UserError(
                    f"the {name} of layer {index} has no single matrix that writes into channels: "
                    "tune all channels, or another part"
                )
            matrix = layer.get_submodule(writer)
            found[names[id(matrix)]] = _views(matrix, channels)
    return found


# By matrix and name. A float32 master belongs to a tensor: a new view would not show whether others
# have written what it sees.
_kept: WeakKeyDictionary[nn.Module, dict[str, nn.Parameter]] = WeakKeyDictionary()


def _views(matrix: nn.Module, channels: Sequence[int]) -> nn.Module:
    views, kept = nn.Module(), _kept.setdefault(matrix, {})
    for name, parameter in matrix.named_parameters(recurse=False):
        outputs = parameter.ndim - 1 if isinstance(matrix, Conv1D) else 0
        for channel in channels:
            view, key = parameter.detach().narrow(outputs, channel, 1), f"{name}[{channel}]"
            if key not in kept or not kept[key].is_set_to(view):
                kept[key] = nn.Parameter(view)
            kept[key].requires_grad = parameter.requires_grad
            views.register_parameter(key, kept[key])
    return views

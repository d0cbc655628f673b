"""What a run tunes: decoder layers, a part of these or adapters in them, or the whole model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from dlzo.channels import written_into
from dlzo.config import PARTS
from dlzo.errors import UserError
from dlzo.lora import Adapters, Lora, refuse_adapters, take_out
from dlzo.models import DTYPES, check_kernels, decoder_layers, hash_tensor, layer_parts


@dataclass(frozen=True)
class Target:
    """The parameters of a model that a run tunes.

    Attributes:
        model: all of it.
        layers: indices of the tuned decoder layers, lowest first; none: the whole model is tuned,
            embeddings and output embeddings too, or the adapters of all layers.
        part: what of these layers: "all", "attention" or "mlp".
        lora: of the adapters that are tuned alone: the target puts them into the model.
        channels: those into which what is tuned writes, lowest first; none: all of these layers.

    Raises:
        UserError: the model has no such layer or channel, the layer no such part, or no adapter
            fits.
    """

    model: PreTrainedModel
    layers: tuple[int, ...]
    part: str = "all"
    lora: Lora | None = None
    channels: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        count = len(decoder_layers(self.model))
        for layer in self.layers:
            if not 0 <= layer < count:
                raise UserError(f"layer is {layer}: the model has layers 0 to {count - 1}")
        if list(self.layers) != sorted(set(self.layers)):
            raise UserError(f"layers are {self.layers}: give each once, the lowest first")
        if self.part not in PARTS:
            raise UserError(f"part is {self.part!r}: choose {', '.join(PARTS)}")
        if self.part != "all" and not self.layers:
            raise UserError(f"part is {self.part!r}: only decoder layers have it, name one")
        if list(self.channels) != sorted(set(self.channels)):
            raise UserError(f"channels are {self.channels}: give each once, the lowest first")
        if self.channels and not self.layers:
            raise UserError("channels are given and no layer: only decoder layers write into them")
        _ = self.modules

    def check_tunable(self) -> None:
        """Raises UserError unless steps can be taken on it: it may be loaded and replaced alone."""
        if self.lora is None:
            refuse_adapters(self.model)
        tuned = {name: p for name, p in self.parameters.items() if p.requires_grad}
        if not tuned:
            raise UserError(
                "nothing of what is tuned requires a gradient, so all of it is frozen: call "
                "requires_grad_(True) on the model"
            )
        for device in {parameter.device for parameter in tuned.values()}:
            check_kernels(device)
        # Adapters are float32 in any model.
        dtypes = {"the model": self.model.dtype, **{name: p.dtype for name, p in tuned.items()}}
        for name, dtype in dtypes.items():
            if dtype not in DTYPES.values():
                raise UserError(
                    f"{name} has dtype {dtype}: load the model in one of {', '.join(DTYPES)}"
                )
        for name, parameter in tuned.items():
            if not parameter.is_meta and not parameter.isfinite().all():
                raise UserError(
                    f"{name} holds values that are not finite: repair it, or load the model in "
                    "another dtype"
                )

    @property
    def decoder_layers(self) -> list[nn.Module]:
        """The decoder layers that are tuned, in part or in whole."""
        layers = decoder_layers(self.model)
        return [layers[i] for i in self.layers]

    @cached_property
    def adapters(self) -> Adapters | None:
        """The adapters, if it is these that are tuned."""
        if self.lora is None:
            return None
        return Adapters(self.model, self.decoder_layers or decoder_layers(self.model), self.lora)

    @cached_property
    def modules(self) -> list[nn.Module]:
        """What holds the tuned parameters; their streams of noise are numbered through it."""
        if self.adapters is not None:
            return [*self.adapters.matrices]
        if self.channels:
            return list(self._views.values())
        if not self.layers:
            return [self.model]
        if self.part == "all":
            return self.decoder_layers
        return [
            layer.get_submodule(name)
            for layer in self.decoder_layers
            for name in layer_parts(layer)[self.part]
        ]

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters by their full names in the model, frozen ones too."""
        if self.channels:
            return {
                f"{matrix}.{name}": view
                for matrix, views in self._views.items()
                for name, view in views.named_parameters()
            }
        return {name: p for name, p in self.model.named_parameters() if id(p) in self._streams}

    def stream(self, name: str) -> int:
        """The stream of noise of the parameter of that name."""
        return self._streams[id(self.parameters[name])]

    def fingerprint(self) -> str:
        """SHA-256 of the weights as they are now; adapters with what they stand beside."""
        return weights_fingerprint(self.modules if self.adapters is None else self.adapters.modules)

    def weights(self) -> list[torch.Tensor]:
        """A copy of the weights as they are now."""
        return [parameter.detach().clone() for parameter in self.parameters.values()]

    @torch.no_grad()
    def copy_to(self, weights: Iterable[torch.Tensor]) -> None:
        """Copies the weights into `weights`."""
        for parameter, kept in zip(self.parameters.values(), weights, strict=True):
            kept.copy_(parameter)

    @torch.no_grad()
    def restore(self, weights: Iterable[torch.Tensor]) -> None:
        """Copies `weights` back."""
        for parameter, kept in zip(self.parameters.values(), weights, strict=True):
            parameter.copy_(kept)

    @contextmanager
    def undone_by_error(self) -> Iterator[Target]:
        """Takes the adapters out of the model again where the `with` ends in an error."""
        try:
            yield self
        except BaseException:
            if self.adapters is not None:
                take_out(self.model)
            raise

    @cached_property
    def _views(self) -> dict[str, nn.Module]:
        return written_into(self.model, self.layers, self.part, self.channels)

    @cached_property
    def _streams(self) -> dict[int, int]:
        own = dict.fromkeys(id(p) for module in self.modules for p in module.parameters())
        return {parameter: i for i, parameter in enumerate(own)}


def describe(run: Mapping[str, Any]) -> str:
    """What is tuned, in words: "layer 11", "the MLP of layers 5 and 11", "LoRA on layer 11".

    Args:
        run: its metrics or its adapter's configuration: `layers`, `part`, `method`, `channels`.
    """
    layers, lora = run["layers"], run.get("method") == "lora"
    part, channels = run.get("part", "all"), run.get("channels", "all")
    if not layers:
        return "LoRA on all layers" if lora else "all parameters"
    numbers = " and ".join(filter(None, (", ".join(map(str, layers[:-1])), str(layers[-1]))))
    which = f"layer{'s' if len(layers) > 1 else ''} {numbers}"
    if lora:
        return f"LoRA on {which}"
    if part != "all":
        which = f"the {'MLP' if part == 'mlp' else part} of {which}"
    return which if channels == "all" else f"{len(channels)} channels of {which}"


def weights_fingerprint(modules: Iterable[nn.Module]) -> str:
    """SHA-256 over the names, types, shapes and bytes of the parameters of modules."""
    digest = hashlib.sha256()
    for module in modules:
        for name, parameter in module.named_parameters():
            if not parameter.is_meta:  # whose values are loaded for each forward
                hash_tensor(digest, name, parameter)
    return digest.hexdigest()

"""The tuned layer's inputs, kept from step to step: what lies below the layer never changes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from dlzo.errors import UserError
from dlzo.files import replace_file
from dlzo.models import decoder_layers, hash_tensor
from dlzo.scoring.layout import Tokens
from dlzo_kernels import __version__
from dlzo_kernels.backends import roundings


class PrefixCache:
    """Hidden states by token sequence: in memory up to a budget, in files beyond it.

    What is in never leaves: with texts in random order each is asked for once an epoch, so no other
    policy would hit more often.

    Args:
        memory_bytes: the most memory for hidden states.
        folder: where those beyond it are written, and found again by later runs; made if it is
            missing; None keeps none.

    Raises:
        UserError: the folder cannot be made.
    """

    def __init__(self, memory_bytes: int, folder: str | Path | None = None) -> None:
        self.memory_bytes = memory_bytes
        self.folder = None if folder is None else Path(folder)
        self.used_bytes = 0
        self._fingerprint = ""
        self._kept: dict[Tokens, tuple[Tensor, Tensor]] = {}
        self._files: dict[Tokens, Path] = {}
        if self.folder is not None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise self._unusable(error) from error

    def bind(self, fingerprint: str) -> None:
        """Says which frozen weights the hidden states come from; others' are forgotten."""
        if fingerprint != self._fingerprint:
            self._fingerprint, self._kept, self._files, self.used_bytes = fingerprint, {}, {}, 0

    def __contains__(self, tokens: Tokens) -> bool:
        return tokens in self._kept or tokens in self._files

    def find(self, tokens: Tokens, neighbours: str) -> bool:
        """Whether the cache has a sequence, or its folder as it was computed among these."""
        if tokens not in self._kept and self.folder is not None:
            path = self._path(tokens, neighbours)
            self._files.pop(tokens, None)
            if path.is_file():
                self._files[tokens] = path
        return tokens in self

    def has_room(self, nbytes: int) -> bool:
        """Whether so many bytes more would be kept."""
        return self.folder is not None or self.used_bytes + nbytes <= self.memory_bytes

    def put(self, places: Mapping[Tokens, Tensor], hidden: Tensor, neighbours: str) -> None:
        """Keeps the hidden states of sequences, shared ones once in memory, where there is room.

        Args:
            places: the sequences, and which hidden states are those of their tokens: int64.
            hidden: shape (tokens of all, hidden size).
            neighbours: what names the other sequences of their forward, on which bits depend.

        Raises:
            UserError: the folder cannot be written.
        """
        if self.used_bytes + hidden.nbytes <= self.memory_bytes:
            self._kept |= {tokens: (hidden, place) for tokens, place in places.items()}
            self.used_bytes += hidden.nbytes
        elif self.folder is not None:
            for tokens, place in places.items():
                self._files[tokens] = self._path(tokens, neighbours)
                self._write(self._files[tokens], hidden[place])

    def get(self, tokens: Tokens) -> Tensor | None:
        """The hidden states of a sequence, shape (tokens, hidden size); None if they are not there.

        Raises:
            UserError: its file is damaged.
        """
        if (path := self._files.get(tokens)) is not None:
            return self._read(path)
        if tokens not in self._kept:
            return None
        hidden, place = self._kept[tokens]
        return hidden[place]

    def _path(self, tokens: Tokens, neighbours: str) -> Path:
        assert self.folder is not None
        text = f"{self._fingerprint} {neighbours} {tokens}"
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()}.safetensors"

    def _write(self, path: Path, hidden: Tensor) -> None:
        try:
            replace_file(path, lambda partial: save_file({"hidden": hidden}, partial))
        except (OSError, SafetensorError) as error:
            raise self._unusable(error) from error

    def _unusable(self, error: Exception) -> UserError:
        return UserError(
            f"the prefix cache {str(self.folder)!r} cannot be written ({error}): free some space "
            "or choose another folder"
        )

    def _read(self, path: Path) -> Tensor | None:
        try:
            return load_file(path)["hidden"]
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, KeyError) as error:
            raise UserError(
                f"{str(path)!r} of the prefix cache cannot be read ({error}): delete it"
            ) from error


class FrozenWeights:
    """Everything of a model that its tuned layer's input can depend on."""

    def __init__(self, model: PreTrainedModel, layer: nn.Module) -> None:
        self._model = model
        self._layer = layer
        self._seen: list[tuple[int, int]] = []
        self._fingerprint = ""

    def fingerprint(self) -> str:
        """SHA-256 of the weights, the configuration and all that rounding depends on.

        That is the device, its instruction sets, the number of threads and the releases.

        It is computed anew when a weight has been written by an operation or replaced; writing
        through `Tensor.data` goes unseen, as in autograd.
        """
        tensors = list(self._tensors())
        seen = [(t.data_ptr(), 0 if t.is_inference() else t._version) for _, t in tensors]
        if seen != self._seen:
            self._fingerprint = self._digest(tensors)
            self._seen = seen
        return self._fingerprint

    def untracked(self) -> str | None:
        """The name of a weight that does not count its writes, an inference tensor; None if none.

        What `fingerprint` gives would be stale when it is written.
        """
        return next((name for name, tensor in self._tensors() if tensor.is_inference()), None)

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        layers = list(decoder_layers(self._model))
        own = layers.index(self._layer)
        above = {id(module) for layer in layers[own:] for module in layer.modules()}
        above -= {id(module) for layer in layers[:own] for module in layer.modules()}
        for prefix, module in self._model.named_modules():
            if id(module) in above:
                continue
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    yield f"{prefix}.{name}", parameter
            # What a checkpoint has beside parameters, such as the biases that choose experts.
            for name, buffer in module._buffers.items():
                if buffer is not None and name not in module._non_persistent_buffers_set:
                    yield f"{prefix}.{name}", buffer

    def _digest(self, tensors: list[tuple[str, Tensor]]) -> str:
        config = json.dumps(self._model.config.to_diff_dict(), sort_keys=True, default=str)
        # All of these may round sums otherwise.
        attention = self._model.config._attn_implementation
        device, releases = self._model.device, (torch.__version__, __version__)
        rounding = device.type, roundings(device), torch.get_num_threads(), *releases
        digest = hashlib.sha256(f"{config} {attention} {rounding}".encode())
        for name, tensor in {id(t): (name, t) for name, t in tensors}.values():  # tied ones once
            hash_tensor(digest, name, tensor)
        return digest.hexdigest()

"""Adapters: one tuned decoder layer on disk, bound to the base model it was tuned in.

An adapter is one safetensors file, its tensors named as PEFT names them, with its configuration as
JSON in the file's metadata: so the two cannot get out of step.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from dlzo.errors import UserError
from dlzo.files import parse_versioned, replace_file
from dlzo.models import decoder_layers

FORMAT = "dlzo-layer"
VERSION = 2
WEIGHTS_FILE = "adapter_model.safetensors"
# As PEFT names the tensors of its adapters.
PREFIX = "base_model.model."
_FIELDS = {"base_model": str, "base_fingerprint": str, "dtype": str, "layer": int}


def dtype_name(model: PreTrainedModel) -> str:
    """The name of the model's dtype, such as "bfloat16"."""
    return str(model.dtype).removeprefix("torch.")


def layer_fingerprint(layer: nn.Module) -> str:
    """SHA-256 over the names, types, shapes and bytes of a layer's parameters."""
    digest = hashlib.sha256()
    for name, parameter in layer.named_parameters():
        tensor = parameter.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def save_adapter(
    path: str | Path,
    model: PreTrainedModel,
    layer_index: int,
    *,
    base_fingerprint: str,
    info: Mapping[str, Any],
) -> None:
    """Writes a decoder layer as it is now to the folder `path`, whole or not at all.

    Args:
        path: Folder of the adapter; made if it is missing.
        model: The model that holds the tuned layer.
        layer_index: Which decoder layer, from 0.
        base_fingerprint: `layer_fingerprint` of the layer before it was tuned.
        info: Further JSON values for the configuration, such as the task.

    Raises:
        OSError: It cannot be written; what was there is as it was.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        **info,
        "version": VERSION,
        "base_model": model.name_or_path,
        "base_fingerprint": base_fingerprint,
        "layer": layer_index,
        "dtype": dtype_name(model),
    }
    tensors = {
        PREFIX + name: parameter.detach().cpu().contiguous()
        for name, parameter in layer_parameters(model, layer_index).items()
    }

    def write(partial: Path) -> None:
        try:
            save_file(tensors, partial, {FORMAT: json.dumps(config)})
        except SafetensorError as error:
            # A full disk, for one.
            raise OSError(str(error)) from error

    replace_file(folder / WEIGHTS_FILE, write)


def load_adapter(model: PreTrainedModel, path_or_hub_id: str | Path) -> dict[str, Any]:
    """Puts a tuned layer into `model`; returns the adapter's configuration.

    Args:
        model: The adapter's base model.
        path_or_hub_id: Folder that holds the adapter, or its OWNER/NAME on the Hugging Face hub.

    Raises:
        UserError: the adapter is missing, damaged or made for another base model; the model is
            left as it was.
    """
    path = _find(path_or_hub_id)
    config, tensors = _read(path)
    dtype = dtype_name(model)
    if config["dtype"] != dtype:
        raise UserError(
            f"adapter {str(path)!r} is for a {config['dtype']} model and this one is {dtype}: "
            f"load the model in {config['dtype']}"
        )
    layers = decoder_layers(model)
    layer = config["layer"]
    if not 0 <= layer < len(layers):
        raise UserError(
            f"adapter {str(path)!r} tunes layer {layer} and the model has {len(layers)} layers: "
            f"load its base model, {config['base_model']!r}"
        )
    parameters = {PREFIX + name: p for name, p in layer_parameters(model, layer).items()}
    _check_tensors(path, tensors, parameters)
    if layer_fingerprint(layers[layer]) != config["base_fingerprint"]:
        raise UserError(
            f"adapter {str(path)!r} was tuned from other weights of layer {layer} than this "
            f"model's: load its base model, {config['base_model']!r}"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    return config


def layer_parameters(model: PreTrainedModel, layer_index: int) -> dict[str, nn.Parameter]:
    """A decoder layer's parameters by their full names in the model."""
    own = {id(parameter) for parameter in decoder_layers(model)[layer_index].parameters()}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in own}


def read_config(path: str | Path) -> dict[str, Any]:
    """The configuration of the adapter in a folder.

    Raises:
        UserError: the adapter is missing or damaged.
    """
    with _opened(_find(path)) as (config, _):
        return config


def _find(path_or_hub_id: str | Path) -> Path:
    name = str(path_or_hub_id)
    if Path(name).is_dir():
        return Path(name) / WEIGHTS_FILE
    try:
        # A mistyped folder costs no look-up on the hub.
        if "/" not in name:
            raise ValueError(f"{name!r} is no OWNER/NAME")
        return Path(hf_hub_download(name, WEIGHTS_FILE))
    # The hub's errors, and what it raises for a name that can be none of its own.
    except (OSError, ValueError) as error:
        raise UserError(
            f"adapter {name!r} is not a folder and cannot be fetched from the Hugging Face hub: "
            "check the name or the network"
        ) from error


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with _opened(path) as (config, file):
        return config, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@contextmanager
def _opened(path: Path) -> Iterator[tuple[dict[str, Any], Any]]:
    """The configuration in a safetensors file, and the open file."""
    try:
        with safe_open(path, framework="pt") as file:
            yield _checked((file.metadata() or {}).get(FORMAT), path), file
    except (OSError, SafetensorError) as error:
        raise UserError(f"adapter {str(path)!r} cannot be read: {error}") from error


def _checked(text: str | None, path: Path) -> dict[str, Any]:
    """The configuration in a text from anywhere."""
    if text is None:
        raise UserError(f"{str(path)!r} is not a dlzo adapter: its metadata has no {FORMAT!r}")
    return parse_versioned(text, path, VERSION, _FIELDS, "train it again")


def _check_tensors(
    path: Path, tensors: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]
) -> None:
    differing = sorted(tensors.keys() ^ parameters.keys())
    if differing:
        where = "the adapter" if differing[0] in tensors else "the model"
        raise UserError(f"{str(path)!r} does not fit the model: only {where} has {differing[0]!r}")
    for name, parameter in parameters.items():
        tensor = tensors[name]
        if (tensor.shape, tensor.dtype) != (parameter.shape, parameter.dtype):
            raise UserError(
                f"{str(path)!r} does not fit the model: {name!r} is {tuple(tensor.shape)} "
                f"{tensor.dtype}, in the model {tuple(parameter.shape)} {parameter.dtype}"
            )
        if not tensor.isfinite().all():
            raise UserError(f"{str(path)!r} has a value in {name!r} that is not finite")

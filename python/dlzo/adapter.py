"""Adapters: one tuned decoder layer on disk, bound to the base model it was tuned in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from dlzo.errors import UserError
from dlzo.files import replace_file
from dlzo.models import decoder_layers

FORMAT = "dlzo-layer"
VERSION = 1
WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"


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
    """Writes a decoder layer as it is now to the folder `path`, each file whole or not at all.

    Args:
        path: Folder of the adapter; made if it is missing.
        model: The model that holds the tuned layer.
        layer_index: Which decoder layer, from 0.
        base_fingerprint: `layer_fingerprint` of the layer before it was tuned.
        info: Further JSON values for the configuration, such as the task.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        **info,
        "format": FORMAT,
        "version": VERSION,
        "base_model": model.name_or_path,
        "base_fingerprint": base_fingerprint,
        "layer": layer_index,
        "dtype": dtype_name(model),
    }
    tensors = {
        name: parameter.detach().cpu().contiguous()
        for name, parameter in _layer_parameters(model, layer_index).items()
    }
    replace_file(folder / WEIGHTS_FILE, lambda partial: save_file(tensors, partial))
    replace_file(
        folder / CONFIG_FILE,
        lambda partial: partial.write_text(json.dumps(config, indent=2) + "\n"),
    )


def load_adapter(model: PreTrainedModel, path: str | Path) -> dict[str, Any]:
    """Puts the tuned layer of the adapter in folder `path` into `model`; returns its configuration.

    Raises:
        UserError: the adapter is missing, damaged or made for another base model; the model is
            left as it was.
    """
    folder = Path(path)
    config = _read_config(folder / CONFIG_FILE)
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
    parameters = _layer_parameters(model, layer)
    tensors = _read_tensors(folder / WEIGHTS_FILE)
    _check_tensors(folder / WEIGHTS_FILE, tensors, parameters)
    if layer_fingerprint(layers[layer]) != config["base_fingerprint"]:
        raise UserError(
            f"adapter {str(path)!r} was tuned from other weights of layer {layer} than this "
            f"model's: load its base model, {config['base_model']!r}"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    return config


def _layer_parameters(model: PreTrainedModel, layer_index: int) -> dict[str, nn.Parameter]:
    """The layer's parameters by their full names in the model."""
    own = {id(parameter) for parameter in decoder_layers(model)[layer_index].parameters()}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in own}


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{str(path.parent)!r} is not an adapter: {error}") from error
    except ValueError as error:
        raise UserError(f"{str(path)!r} is damaged ({error}): train it again") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise UserError(f"{str(path)!r} is not the configuration of a dlzo adapter")
    if config.get("version") != VERSION:
        raise UserError(
            f"{str(path)!r} has format version {config.get('version')!r} and this dlzo reads "
            f"version {VERSION}: train it again or use the dlzo that wrote it"
        )
    fields = {"base_model": str, "base_fingerprint": str, "dtype": str, "layer": int}
    for field, kind in fields.items():
        if type(config.get(field)) is not kind:
            raise UserError(f"{str(path)!r} has no valid {field!r}: train it again")
    return config


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{str(path)!r} cannot be read ({error}): train it again") from error


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

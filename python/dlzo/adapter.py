"""Adapters: what was tuned of a model on disk, bound to the base model it was tuned in.

An adapter is one safetensors file, its tensors named as PEFT names them, with its configuration as
JSON in the file's metadata: so the two cannot get out of step. Beside LoRA adapters lies PEFT's own
configuration, the same throughout a run, with which PEFT loads them too.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from dlzo.channels import chosen_channels
from dlzo.config import MAX_RANK
from dlzo.errors import UserError
from dlzo.files import parse_versioned, replace_file, replace_text, user_path
from dlzo.lora import NAME, Lora
from dlzo.models import HUB_TIMEOUT_S, base_model, dtype_name, sole_use
from dlzo.target import Target, weights_fingerprint

_log = logging.getLogger("dlzo")

FORMAT = "dlzo-layer"
VERSION = 3
WEIGHTS_FILE = "adapter_model.safetensors"
PEFT_FILE = "adapter_config.json"
# As PEFT names the tensors of its adapters.
PREFIX = "base_model.model."
_FIELDS = {"base_model": str, "base_fingerprint": str, "dtype": str, "layers": list, "part": str}


def save_adapter(
    path: str | Path, target: Target, *, base_fingerprint: str, info: Mapping[str, Any]
) -> None:
    """Writes what is tuned, as it is now, to the folder `path`, whole or not at all.

    Args:
        path: folder of the adapter; made if it is missing.
        target: what is tuned.
        base_fingerprint: `fingerprint` of the target before it was tuned.
        info: further JSON values for the configuration, such as the task.

    Raises:
        OSError: it cannot be written; what was there is as it was.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        **info,
        "version": VERSION,
        "base_model": target.model.name_or_path,
        "base_fingerprint": base_fingerprint,
        "layers": target.layers,
        "part": target.part,
        "channels": list(target.channels) or "all",
        "dtype": dtype_name(target.model.dtype),
    }
    if target.lora is not None and target.adapters is not None:
        config["lora"] = asdict(target.lora)
        text = json.dumps(target.adapters.settings, indent=2) + "\n"
        replace_text(folder / PEFT_FILE, text)
    tensors = {
        name: parameter.detach().cpu().contiguous()
        for name, parameter in _parameters(target).items()
    }

    def write(partial: Path) -> None:
        try:
            save_file(tensors, partial, {FORMAT: json.dumps(config)})
        except SafetensorError as error:
            # A full disk, for one.
            raise OSError(str(error)) from error

    replace_file(folder / WEIGHTS_FILE, write)


def load_adapter(model: PreTrainedModel, path_or_hub_id: str | Path) -> dict[str, Any]:
    """Puts what was tuned into `model`; returns the adapter's configuration.

    Where other weights of the model are not those of the adapter's run, a warning is logged.

    Args:
        model: the adapter's base model.
        path_or_hub_id: folder that holds the adapter, or its OWNER/NAME on the Hugging Face hub.

    Raises:
        UserError: the adapter is missing, damaged or made of other weights, or the model is in
            training; it is left as it was.
    """
    path = _find(path_or_hub_id)
    config, tensors = _read(path)
    _check_dtype(path, config, model.dtype)
    with sole_use(model):
        target = _target(path, config, model)
        parameters = _parameters(target)
        with target.undone_by_error():
            _check_tensors(path, tensors, parameters)
            _check_base(path, config, target)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[name])
    return config


def check_adapter(path_or_hub_id: str | Path, dtype: torch.dtype) -> Path:
    """What can be told of an adapter without its model, before that is loaded.

    Returns:
        The folder that holds it; of a hub id, where it was fetched to.

    Raises:
        UserError: it is missing, damaged or for a model of another dtype.
    """
    path = _find(path_or_hub_id)
    with _opened(path) as (config, _):
        _check_dtype(path, config, dtype)
    return path.parent


def read_config(path: str | Path) -> dict[str, Any]:
    """The configuration of the adapter in a folder.

    Raises:
        UserError: the adapter is missing or damaged.
    """
    with _opened(_find(path)) as (config, _):
        return config


def _target(path: Path, config: Mapping[str, Any], model: PreTrainedModel) -> Target:
    """What an adapter tunes of a model."""
    lora = Lora(**config["lora"]) if "lora" in config else None
    try:
        channels = chosen_channels(config.get("channels", "all"))
        return Target(model, tuple(config["layers"]), config["part"], lora, channels)
    except UserError as error:
        raise UserError(
            f"adapter {str(path)!r} does not fit the model ({error}): load "
            f"{base_model(config['base_model'])}"
        ) from error


def _check_dtype(path: Path, config: Mapping[str, Any], dtype: torch.dtype) -> None:
    if config["dtype"] != dtype_name(dtype):
        raise UserError(
            f"adapter {str(path)!r} is for a {config['dtype']} model and this one is "
            f"{dtype_name(dtype)}: load the model in {config['dtype']}"
        )


def _check_base(path: Path, config: Mapping[str, Any], target: Target) -> None:
    """Refuses other weights of what is tuned; of others in the model it warns."""
    if target.fingerprint() != config["base_fingerprint"]:
        raise UserError(
            f"adapter {str(path)!r} was tuned from other weights than this model's: load "
            f"{base_model(config['base_model'])}"
        )
    # Earlier releases said nothing of weights beside the tuned ones.
    whole = config.get("model_fingerprint")
    if whole is not None and whole != weights_fingerprint([target.model]):
        # With adapters of several layers in one model it is meant.
        _log.warning(
            "adapter %r was tuned in a model whose other weights are not those of this one: "
            "for the figures of its run load %s",
            *(str(path), base_model(config["base_model"])),
        )


def _parameters(target: Target) -> dict[str, nn.Parameter]:
    """What is tuned, by its names in a file."""
    inner = re.compile(rf"(?<=\.lora_[AB])\.{NAME}(?=\.)")
    return {PREFIX + inner.sub("", name): p for name, p in target.parameters.items()}


def _find(path_or_hub_id: str | Path) -> Path:
    name = str(path_or_hub_id)
    if name and (folder := user_path(name)).exists():
        if not folder.is_dir():
            raise UserError(f"adapter {name!r} is a file: give the folder of {WEIGHTS_FILE}")
        return folder / WEIGHTS_FILE
    try:
        # A mistyped folder costs no look-up on the hub.
        if "/" not in name:
            raise ValueError(f"{name!r} is no OWNER/NAME")
        cached_only = not _is_on_hub(name)
        return Path(hf_hub_download(name, WEIGHTS_FILE, local_files_only=cached_only))
    # The hub's errors, and what it raises for a name that can be none of its own.
    except (OSError, ValueError) as error:
        raise UserError(
            f"adapter {name!r} is not a folder and cannot be fetched from the Hugging Face hub: "
            "check the name or the network"
        ) from error


def _is_on_hub(name: str) -> bool:
    """Whether the hub is there and has it: one request tells, where a download would retry."""
    try:
        HfApi().model_info(name, timeout=HUB_TIMEOUT_S)
    except (HTTPError, OfflineModeIsEnabled):
        return False
    return True


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
        raise UserError(
            f"adapter {str(path)!r} cannot be read ({error}): give the folder of a run, or train "
            "it again"
        ) from error


def _checked(text: str | None, path: Path) -> dict[str, Any]:
    """The configuration in a text from anywhere."""
    if text is None:
        raise UserError(f"{str(path)!r} is not a dlzo adapter: its metadata has no {FORMAT!r}")
    remedy = "rebuild it from its journal by `dlzo replay`, or train it again"
    config = parse_versioned(text, path, VERSION, _FIELDS, remedy)
    if not all(type(layer) is int for layer in config["layers"]):
        raise UserError(f"{str(path)!r} has no valid 'layers': {remedy}")
    try:
        chosen_channels(config.get("channels", "all"))
    except ValueError as error:
        raise UserError(f"{str(path)!r} has no valid 'channels': {remedy}") from error
    if "lora" in config and not _is_lora(config["lora"]):
        raise UserError(f"{str(path)!r} has no valid 'lora': {remedy}")
    return config


def _is_lora(values: object) -> bool:
    if not isinstance(values, dict) or values.keys() != {"rank", "seed"}:
        return False
    rank, seed = values["rank"], values["seed"]
    return type(rank) is type(seed) is int and 1 <= rank <= MAX_RANK and 0 <= seed < 1 << 63


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

"""What a journal's header says of the model that it belongs to, and whether that is there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from dlzo.channels import chosen_channels
from dlzo.errors import UserError
from dlzo.journal import Reader
from dlzo.lora import Lora
from dlzo.models import dtype_name
from dlzo.records import Header, Parameter
from dlzo.rule import rank_in
from dlzo.target import Target
from dlzo_kernels import NOISE_VERSION, __version__

_VOLATILE = ("_name_or_path", "transformers_version", "dtype")
# Of a header's settings, what an adapter says too.
_TOLD = ("task", "method", "eps", "batch_size", "model_fingerprint")


def base_fields(target: Target) -> dict[str, Any]:
    """The fields of a journal's header that tell of the untuned model."""
    model = target.model
    return {
        "noise_version": NOISE_VERSION,
        "dtype": dtype_name(model.dtype),
        "layers": target.layers,
        "parameters": tuple(
            Parameter(name, dtype_name(p.dtype), tuple(p.shape), target.stream(name))
            for name, p in target.parameters.items()
            if p.requires_grad
        ),
        "config_fingerprint": _config_fingerprint(model),
        "base_fingerprint": target.fingerprint(),
        "base_model": model.name_or_path,
        "library_version": __version__,
    }


def fitting_target(reader: Reader, model: PreTrainedModel) -> Target:
    """What a journal tunes of a model; one of another model is refused, by what differs.

    Raises:
        UserError: it does not fit `model` as it is now.
    """
    header = reader.header
    lora = Lora(rank_in(header), header.seed) if header.settings.get("method") == "lora" else None
    try:
        channels = chosen_channels(header.settings.get("channels", "all"))
    except ValueError as error:
        raise UserError("the journal has invalid channels: do not use it") from error
    try:
        part = header.settings.get("part", "all")
        target = Target(model, header.layers, part, lora, channels)
    except UserError as error:
        raise UserError(
            f"journal {str(reader.path)!r} does not fit the model ({error}): load its base model, "
            f"{header.base_model!r}"
        ) from error
    with target.undone_by_error():
        # Neither the name of the model nor the release of dlzo moves a bit.
        unbound = ("base_model", "library_version")
        found = {name: v for name, v in base_fields(target).items() if name not in unbound}
        if differing := differences(header, found):
            raise UserError(
                f"journal {str(reader.path)!r} does not fit the model: {differing}; "
                f"load its base model, {header.base_model!r}, untuned and in {header.dtype}"
            )
    return target


def differences(header: Header, expected: Mapping[str, Any]) -> str:
    """The fields and settings of a header that are not as expected, in words; empty if all are."""
    found = _with_settings({name: getattr(header, name) for name in expected})
    expected = _with_settings(expected)
    return ", ".join(
        _difference(name, found.get(name), value)
        for name in dict.fromkeys((*expected, *found))
        if found.get(name) != (value := expected.get(name))
    )


def adapter_info(header: Header, step: int) -> dict[str, Any]:
    """What an adapter with the weights after a step says of its run."""
    # Journals of earlier releases say less.
    told = {name: header.settings[name] for name in _TOLD if name in header.settings}
    return told | {"lr": header.lr, "seed": header.seed, "step": step}


def _difference(name: str, found: Any, expected: Any) -> str:
    if name == "parameters":
        first = min(set(found) ^ set(expected))
        only = "it" if first in found else "the model"
        return f"its parameters differ: only {only} tunes {first.name!r} of {first[1:]}"
    remark = " (a setting was changed after loading?)" if name == "config_fingerprint" else ""
    return f"its {name.replace('_', ' ')} is {_short(found)}, not {_short(expected)}{remark}"


def _with_settings(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a header, and its settings beside them."""
    plain = {name: value for name, value in fields.items() if name != "settings"}
    return fields.get("settings", {}) | plain


def _config_fingerprint(model: PreTrainedModel) -> str:
    settings = model.config.to_diff_dict()
    kept = {name: value for name, value in settings.items() if name not in _VOLATILE}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:21]}..."

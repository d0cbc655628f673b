"""What a journal's header says of its run and model, and whether a given run or model is that."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from transformers import PreTrainedModel

from dlzo.channels import chosen_channels
from dlzo.config import TrainConfig
from dlzo.errors import UserError
from dlzo.journal import Reader, header_text, setting_error
from dlzo.lora import Lora
from dlzo.models import base_model, dtype_name
from dlzo.records import Header, Parameter
from dlzo.rule import rank_in
from dlzo.target import Target, weights_fingerprint
from dlzo.tasks import Task
from dlzo_kernels import NOISE_VERSION, __version__

_log = logging.getLogger("dlzo")

# `save_pretrained` sets the architectures of a model that was made by its configuration.
_VOLATILE = ("_name_or_path", "transformers_version", "dtype", "architectures")
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


def header_of(target: Target, config: TrainConfig, task: Task, data_fingerprint: str) -> Header:
    """The header of a run's journal; the target is untuned.

    Raises:
        UserError: it is larger than a reader takes.
    """
    fingerprint = weights_fingerprint([target.model])
    header = Header(
        **base_fields(target),
        data_fingerprint=data_fingerprint,
        directions=config.directions,
        lr=config.given_lr,
        seed=config.seed,
        settings=_settings(config, task) | {"model_fingerprint": fingerprint},
    )
    header_text(header)  # before there is a folder of the run
    return header


def check_same_run(reader: Reader, header: Header, task: Task) -> None:
    """Raises UserError if a journal is of another run than one with this header would be."""
    # Another release of dlzo may go on with the run: its noise is checked by its version, and a
    # setting that the first one did not know is the default.
    settings = _settings(TrainConfig(task.name), task) | reader.header.settings
    # Journals of earlier releases say nothing of weights beside the tuned ones.
    settings.setdefault("model_fingerprint", header.settings["model_fingerprint"])
    found = replace(reader.header, settings=settings)
    free = ["sync_steps", "sync_seconds"]
    # Where prefixes lie moves no bit. Whether there is a folder does: what does not fit into memory
    # is computed with each batch where there is none.
    if None not in (settings["prefix_cache_dir"], header.settings["prefix_cache_dir"]):
        free.append("prefix_cache_dir")
    # Nor does the name of the model matter, but its weights.
    unbound: dict[str, Any] = {
        "library_version": found.library_version,
        "base_model": found.base_model,
        "settings": header.settings | {name: settings[name] for name in free},
    }
    if differing := differences(found, vars(replace(header, **unbound))):
        raise UserError(
            f"journal {str(reader.path)!r} is of another model, task or data than there are now: "
            f"{differing}; restore them or start the run again"
        )


def fitting_target(reader: Reader, model: PreTrainedModel) -> Target:
    """What a journal tunes of a model; one of another model is refused, by what differs.

    Another configuration is warned of: it moves no weight.

    Raises:
        UserError: it does not fit `model` as it is now.
    """
    header = reader.header
    lora = Lora(rank_in(reader), header.seed) if header.settings.get("method") == "lora" else None
    try:
        channels = chosen_channels(header.settings.get("channels", "all"))
    except ValueError as error:
        raise setting_error(reader, "channels") from error
    try:
        part = header.settings.get("part", "all")
        target = Target(model, header.layers, part, lora, channels)
    except UserError as error:
        raise UserError(
            f"journal {str(reader.path)!r} does not fit the model ({error}): load "
            f"{base_model(header.base_model)}"
        ) from error
    with target.undone_by_error():
        # Neither the name of the model, nor its configuration, nor the release of dlzo moves a bit.
        unbound = ("base_model", "config_fingerprint", "library_version")
        found = base_fields(target)
        bound = {name: value for name, value in found.items() if name not in unbound}
        if differing := differences(header, bound):
            raise UserError(
                f"journal {str(reader.path)!r} does not fit the model: {differing}; "
                f"load {base_model(header.base_model)}, untuned and in {header.dtype}"
            )
        config = {"config_fingerprint": found["config_fingerprint"]}
        if differing := differences(header, config):
            _log.warning(
                "journal %r is of a model of other settings: %s; the weights are those of the run",
                str(reader.path),
                differing,
            )
    return target


def differences(header: Header, expected: Mapping[str, Any], other: str = "the model") -> str:
    """The fields and settings of a header that are not as expected, in words; empty if all are.

    Args:
        header: of a journal.
        expected: fields of a header.
        other: what they are of.
    """
    found = _with_settings({name: getattr(header, name) for name in expected})
    expected = _with_settings(expected)
    return ", ".join(
        _difference(name, found.get(name), value, other)
        for name in dict.fromkeys((*expected, *found))
        if found.get(name) != (value := expected.get(name))
    )


def adapter_info(header: Header, step: int) -> dict[str, Any]:
    """What an adapter with the weights after a step says of its run."""
    # Journals of earlier releases say less.
    told = {name: header.settings[name] for name in _TOLD if name in header.settings}
    return told | {"lr": header.lr, "seed": header.seed, "step": step}


def _settings(config: TrainConfig, task: Task) -> dict[str, Any]:
    """The settings that have no field of their own in a header.

    With the fingerprint of its examples, a task's name, loss and metric say all that it does.
    """
    own = ("layer", "directions", "lr", "seed")
    settings = {name: value for name, value in asdict(config).items() if name not in own}
    return settings | {"task": task.name, "loss": task.loss, "metric": task.metric}


def _difference(name: str, found: Any, expected: Any, other: str) -> str:
    if name == "parameters":
        odd = set(found) ^ set(expected)
        if not odd:
            return "its parameters differ: they have another order, or some are repeated"
        first = min(odd)
        only = "it" if first in found else other
        return f"its parameters differ: only {only} tunes {first.name!r} of {first[1:]}"
    says = f"its {name.replace('_', ' ')} is {_short(found)}, not {_short(expected)}"
    if name == "config_fingerprint":
        says += " (a setting was changed after loading, or transformers is of another release?)"
    return says


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

"""LoRA adapters (arXiv 2106.09685), put into a model by PEFT, to be tuned in place of its weights.

Beside a matrix W, x W^T becomes x W^T + 2 (x A^T) B^T, in float32: A is (rank, inputs), B (outputs,
rank). As in MeZO they are those of the query and the value projections, and alpha is twice the
rank. A begins as noise v1 of the variance 1 / (3 inputs), PEFT's own, and B as zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import check_peft_version

from dlzo.errors import UserError
from dlzo.models import check_kernels
from dlzo.sampler import step_seed
from dlzo_kernels import perturb_

ALPHA = 2  # for each rank
MIN_PEFT = "0.20"
NAME = "default"  # of the adapters in a model, which PEFT leaves out in a file
_QUERY_AND_VALUE = {"q_proj", "v_proj"}


@dataclass(frozen=True)
class Lora:
    """What the adapters of a run are made of.

    Attributes:
        rank: of all of them.
        seed: of the run.

    Raises:
        UserError: PEFT is not installed, or too old.
    """

    rank: int
    seed: int

    def __post_init__(self) -> None:
        check_peft()


def check_peft() -> None:
    """Raises UserError unless there is a PEFT that is new enough."""
    try:
        check_peft_version(MIN_PEFT)
    except ValueError as error:
        raise UserError(
            f"LoRA needs PEFT {MIN_PEFT} or newer: pip install 'dlzo-kernels[lora]'"
        ) from error


class Adapters:
    """The adapters in a model, which it gets by this; till they are tuned it computes the same.

    Args:
        model: the model, without adapters so far.
        layers: its decoder layers that get them.
        lora: what they are made of.

    Attributes:
        settings: PEFT's configuration of them, as in adapter_config.json.
        matrices: A and B of each in turn, in the model's order.

    Raises:
        UserError: the model has adapters, the layers have no matrices that are known to PEFT, or
            no kernels run on its GPU.
    """

    def __init__(self, model: PreTrainedModel, layers: Iterable[nn.Module], lora: Lora) -> None:
        refuse_adapters(model)
        check_kernels(model.device)
        names = _projections(model, layers)
        self.settings: dict[str, Any] = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": model.name_or_path,
            "r": lora.rank,
            "lora_alpha": ALPHA * lora.rank,
            "target_modules": names,
            # How GPT-2 keeps its matrices.
            "fan_in_fan_out": isinstance(model.get_submodule(names[0]), Conv1D),
        }
        _put_in(model, self.settings)
        wrapped: list[Any] = [model.get_submodule(name) for name in names]
        self._bases: list[nn.Linear | Conv1D] = [each.base_layer for each in wrapped]
        self.matrices: list[nn.Linear] = [
            m[NAME] for each in wrapped for m in (each.lora_A, each.lora_B)
        ]
        self._draw(lora.seed)

    @property
    def modules(self) -> list[nn.Module]:
        """The matrices, and what they stand beside."""
        return [*self._bases, *self.matrices]

    def _draw(self, seed: int) -> None:
        """Makes each A noise, and each B zero."""
        seed = step_seed(seed, 0)  # no step has this number
        for stream, matrix in enumerate(self.matrices):
            device = self._bases[stream // 2].weight.device
            weight = torch.zeros(matrix.weight.shape, dtype=torch.float32, device=device)
            if stream % 2 == 0:
                scale = math.sqrt(1 / (3 * matrix.in_features))
                perturb_(weight, seed, scale, stream=stream)
            matrix.weight = nn.Parameter(weight)


def refuse_adapters(model: PreTrainedModel) -> None:
    """Raises UserError if a model holds adapters already."""
    if getattr(model, "peft_config", None):
        raise UserError(f"this {type(model).__name__} has adapters already: load it anew")


def take_out(model: PreTrainedModel, *, merge: bool = False) -> None:
    """Leaves a model without adapters: as it was, or with them added to its weights, if `merge`."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            if merge:
                module.merge()
            model.set_submodule(name, module.base_layer)
    del model.peft_config
    model._hf_peft_config_loaded = False


def _put_in(model: PreTrainedModel, settings: Mapping[str, Any]) -> None:
    """Has PEFT put adapters into a model whose own parameters stay as trainable as they were."""
    # Imported late: not everybody has it, and it is slow.
    from peft import LoraConfig, inject_adapter_in_model

    required = [(p, p.requires_grad) for p in model.parameters()]
    # What PEFT draws is replaced.
    with torch.random.fork_rng(devices=[]):
        # Not by the model's add_adapter, which may ask for a PEFT that is not out yet.
        inject_adapter_in_model(LoraConfig(**settings), model, NAME)
    model._hf_peft_config_loaded = True  # save_pretrained then knows of them
    for parameter, requires_grad in required:
        parameter.requires_grad_(requires_grad)


def _projections(model: PreTrainedModel, layers: Iterable[nn.Module]) -> list[str]:
    """Names of the matrices in these layers that get adapters."""
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as BY_FAMILY

    inside = {id(module) for layer in layers for module in layer.modules()}
    names = [
        name
        for name, module in model.named_modules()
        if id(module) in inside and isinstance(module, nn.Linear | Conv1D)
    ]
    family = model.config.get_text_config(decoder=True).model_type
    for wanted in (_QUERY_AND_VALUE, set(BY_FAMILY.get(family, ()))):
        if found := [name for name in names if name.rpartition(".")[2] in wanted]:
            return found
    raise UserError(
        f"PEFT knows no matrices for LoRA in these layers of {type(model).__name__}: choose "
        "another method"
    )

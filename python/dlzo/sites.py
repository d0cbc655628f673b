"""Where to look inside the decoder layers of any model: attention, MLP and down projection."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Sized
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from dlzo.errors import UserError
from dlzo.models import decoder_layers, layer_parts
from dlzo.products import fast_products


@dataclass(frozen=True)
class Sites:
    """Names of submodules of one decoder layer, None where there is no such thing.

    Attributes:
        attention: its output is the attention's (or what mixes tokens in its stead).
        mlp: its output is the MLP's.
        down_projection: the last matrix of the MLP; its input is of interest.
    """

    attention: str | None
    mlp: str | None
    down_projection: str | None


@torch.inference_mode()
def find_sites(model: PreTrainedModel) -> list[Sites]:
    """The sites of each decoder layer, by what a forward of two tokens calls.

    Attention and MLP are those of `layer_parts`. The last matrix called within each gives its
    output: some add the residual stream to it inside the child (Bloom). The MLP may be several
    children of one matrix each (OPT, BERT), one behind the other; several of more (experts beside
    a shared MLP, inputs of each layer beside it) have no one output. An MLP of several experts has
    no one down projection; its own output is taken.

    Raises:
        UserError: the model does not run a layer on a text alone, or changes its own weights.
    """
    layers = decoder_layers(model)
    hidden_size = model.config.get_text_config(decoder=True).hidden_size
    calls: list[dict[str, bool]] = [{} for _ in layers]

    def record(layer: int, name: str, _module: nn.Module, _args: Any, output: Any) -> None:
        output = first_tensor(output)
        calls[layer][name] = output is not None and output.numel() == tokens.numel() * hidden_size

    tokens = torch.zeros(1, 2, dtype=torch.long)
    with _ReadOnly(model), ExitStack() as stack:
        for index, layer in enumerate(layers):
            for name, module in layer.named_modules():
                if name and any(parameter.ndim >= 2 for parameter in module.parameters()):
                    hook = partial(record, index, name)
                    stack.enter_context(module.register_forward_hook(hook))
        forward(model, tokens)
    check_reached(model, calls)
    return [_sites(layer, called) for layer, called in zip(layers, calls, strict=True)]


def check_reached(model: PreTrainedModel, seen: Sequence[Sized]) -> None:
    """Raises UserError that names the layers a forward did not run.

    `seen` has what each layer recorded.
    """
    if missed := [index for index, of_layer in enumerate(seen) if not of_layer]:
        raise UserError(
            f"{type(model).__name__} does not run layers {missed} on a text alone: its layers "
            "cannot be compared, choose one of the others with --layer"
        )


def first_tensor(output: Any) -> Tensor | None:
    """What a layer or a part of one passes on, of all that it gives out."""
    if isinstance(output, tuple | list) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None


def hidden_state(output: Any, tokens: torch.Size) -> Tensor:
    """What a decoder layer passes on, of shape (texts, tokens, hidden size).

    Args:
        output: all that it gives out.
        tokens: the shape (texts, tokens) of what the model was given.

    Raises:
        UserError: it is no tensor, or not one hidden state per token (Gemma 3n has several).
    """
    if (hidden := first_tensor(output)) is None:
        raise UserError(
            f"a decoder layer gives a {type(output).__name__}, no tensor: choose another model"
        )
    if hidden.shape[:-1] != tokens:
        raise UserError(
            f"a decoder layer gives {tuple(hidden.shape)} for tokens of shape {tuple(tokens)}, not "
            "one hidden state per token: choose another model"
        )
    return hidden


def forward(model: PreTrainedModel, tokens: Tensor) -> None:
    """Runs the decoder alone, without the logits, on token ids of shape (texts, tokens)."""
    # Offloaded weights lie on the meta device; the hooks that bring them in move the inputs too.
    device = "cpu" if model.device.type == "meta" else model.device
    with fast_products(model):
        model.base_model(input_ids=tokens.to(device), use_cache=False)


@torch.inference_mode()
def check_keeps_weights(model: PreTrainedModel) -> None:
    """Raises UserError before a forward writes to the weights, as where RWKV halves some of them.

    What is tuned of such a model would fit no other copy of it.
    """
    with _ReadOnly(model):
        forward(model, torch.zeros(1, 1, dtype=torch.long))


class _ReadOnly(TorchDispatchMode):
    """Refuses what would write to the weights of a model."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.name = type(model).__name__
        storages = [weight.untyped_storage() for weight in model.parameters()]
        # Kept, for an offloaded model replaces its weights: their addresses would come again.
        self.storages = {storage._cdata: storage for storage in storages}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """What torch.compile made runs as it is, in which a write goes unseen: flex_attention."""
        return True

    def __torch_dispatch__(
        self,
        op: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given = dict(zip((a.name for a in op._schema.arguments), args, strict=False))
        given |= kwargs or {}
        written = [given.get(a.name) for a in op._schema.arguments if a.is_write]
        for value in tree_leaves(written):
            # Quantised weights, and those on the meta device, have no address of their own.
            if isinstance(value, Tensor) and value.untyped_storage()._cdata in self.storages:
                raise UserError(
                    f"{self.name} changes its own weights as it runs, so that what is tuned of it "
                    "could not be loaded again: choose another model"
                )
        return op(*args, **(kwargs or {}))


def _sites(layer: nn.Module, called: dict[str, bool]) -> Sites:
    """Sites by the modules called, in order, and whether each gives one hidden state a token."""
    try:
        parts = layer_parts(layer)
    except UserError:
        return Sites(None, None, None)
    attention, mlp = (_last_child(layer, parts[part], called) for part in ("attention", "mlp"))
    if mlp is None:
        return Sites(_last_matrix(layer, attention, called), None, None)
    # Experts lie in parameters of three dimensions.
    experts = any(parameter.ndim > 2 for parameter in layer.get_submodule(mlp).parameters())
    down = None if experts else _last_matrix(layer, mlp, called)
    whole = mlp if called[mlp] else None
    return Sites(_last_matrix(layer, attention, called), down or whole, down)


def _last_child(layer: nn.Module, part: Sequence[str], called: Iterable[str]) -> str | None:
    """The child that gives the output of a part; None where several could."""
    children = [name for name in called if name in part]
    several = any(_matrices(layer.get_submodule(name)) > 1 for name in children)
    return children[-1] if children and (len(children) == 1 or not several) else None


def _matrices(module: nn.Module) -> int:
    """How many it holds; it may be one itself, with adapters inside."""
    return 1 if _is_matrix(module) else sum(p.ndim > 1 for p in module.parameters())


def _is_matrix(module: nn.Module) -> bool:
    return getattr(getattr(module, "weight", None), "ndim", 0) == 2


def _last_matrix(layer: nn.Module, child: str | None, called: dict[str, bool]) -> str | None:
    matrices = [
        name
        for name, fits in called.items()
        if fits
        and child is not None
        and f"{name}.".startswith(f"{child}.")
        and _is_matrix(layer.get_submodule(name))
    ]
    return matrices[-1] if matrices else None

"""Context managers that replace a module's forward: skip, stop, repeat, run at some positions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from dlzo.errors import UserError

State = Callable[[], AbstractContextManager[object]]
Beside = tuple[None, ...] | list[None]  # what a layer gives beside the hidden state, left empty


class ReachedLayerError(Exception):
    """Ends a forward at a layer; carries the layer's input."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Lets the module compute something else."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def under_states(
    layer: nn.Module, states: Sequence[State], hidden: Tensor | None
) -> AbstractContextManager[None]:
    """Makes `layer` map a batch to its outputs under all states, one after the other.

    Args:
        layer: the tuned decoder layer.
        states: each puts the layer's weights into one state.
        hidden: what the layer sees in place of its input; None leaves its input.
    """
    forward, calls = layer.forward, count(1)

    def under_each(*args: Any, **kwargs: Any) -> Any:
        if next(calls) > 1:
            raise UserError(
                "the tuned layer runs more than once in a forward: its input cannot be given, nor "
                "its states run side by side"
            )
        shared = [name for name, value in kwargs.items() if isinstance(value, MutableMapping)]
        if shared and len(states) > 1:
            raise UserError(
                f"the tuned layer shares {shared[0]!r} with other layers, so that its states "
                "cannot run side by side: choose another model"
            )
        if hidden is not None:
            args, kwargs = _with_input(hidden, args, kwargs)
        outputs = []
        for state in states:
            with state():
                outputs.append(forward(*args, **kwargs))
        return _stack(outputs)

    return replaced_forward(layer, under_each)


def only_at(
    module: nn.Module, rows: int, row: Tensor, column: Tensor, multiple_of: int
) -> AbstractContextManager[None]:
    """Makes a position-wise `module` compute the given positions only, with zeros elsewhere.

    Args:
        module: maps tensors of shape (states * rows, length, hidden size) to one such tensor.
        rows: the rows of one state.
        row: int64, of each position that is computed, its row under one state.
        column: int64, its place in the row.
        multiple_of: how many are computed is a multiple of this; some are then computed twice.
    """
    forward = module.forward
    filled = torch.arange(len(row) + -len(row) % multiple_of, device=row.device) % len(row)

    def at_some(*inputs: Tensor) -> Tensor:
        chosen = (x.unflatten(0, (-1, rows))[:, row[filled], column[filled]] for x in inputs)
        computed = forward(*chosen)[:, : len(row)]
        outputs = computed.new_zeros(*inputs[0].shape[:-1], computed.shape[-1])
        outputs.unflatten(0, (-1, rows))[:, row, column] = computed
        return outputs

    return replaced_forward(module, at_some)


def computed_once(module: nn.Module) -> AbstractContextManager[None]:
    """Makes `module` give what it first computed at each further call."""
    forward = module.forward
    outputs: list[Any] = []

    def once(*args: Any, **kwargs: Any) -> Any:
        if not outputs:
            outputs.append(forward(*args, **kwargs))
        return outputs[0]

    return replaced_forward(module, once)


def stopped_at(layer: nn.Module) -> AbstractContextManager[None]:
    """Makes `layer` raise ReachedLayerError with its input."""

    def stop(*args: Any, **kwargs: Any) -> Any:
        raise ReachedLayerError(_input_in(args, kwargs))

    return replaced_forward(layer, stop)


def passed_by(layer: nn.Module, beside: Beside | None) -> AbstractContextManager[None]:
    """Makes `layer` give back its input, with what it gives beside it; None: a tensor alone."""

    def pass_on(*args: Any, **kwargs: Any) -> Any:
        hidden = _input_in(args, kwargs)
        outputs: list[Any] = [hidden, *(beside or ())]
        return hidden if beside is None else type(beside)(outputs)

    return replaced_forward(layer, pass_on)


def _input_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """A decoder layer's input among its arguments, where it comes first or by name."""
    return args[0] if args else kwargs["hidden_states"]


def _with_input(
    hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    hidden = hidden.to(_input_in(args, kwargs).device)
    return ((hidden, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": hidden})


def _stack(outputs: Sequence[Any]) -> Any:
    """Joins outputs of a layer, tensors or tuples of tensors, in the batch dimension."""
    first = outputs[0]
    if isinstance(first, Tensor):
        return torch.cat(list(outputs)) if len(outputs) > 1 else first
    if isinstance(first, tuple | list):
        return type(first)([_stack(parts) for parts in zip(*outputs, strict=True)])
    if all(output is None for output in outputs):
        return None
    raise UserError(
        f"a decoder layer gives a {type(first).__name__}, not a tensor: choose another model"
    )

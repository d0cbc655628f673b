"""One forward of a pack: the log-probabilities of its scored tokens under states of a layer."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from dlzo.errors import UserError
from dlzo.models import decoder_layers
from dlzo.products import fast_products
from dlzo.scoring.attention import attend_within
from dlzo.scoring.forward import (
    Beside,
    ReachedLayerError,
    State,
    computed_once,
    only_at,
    passed_by,
    replaced_forward,
    stopped_at,
    under_states,
)
from dlzo.scoring.layout import Pack
from dlzo.scoring.norms import by_kernel
from dlzo.scoring.plan import Readout

# Of the float32 logits that exist at once; their 16-bit ones and the terms of their normaliser add
# one and a half times as much.
LOGIT_BYTES = 1 << 26


class Runner:
    """Runs packs through a model, with the shortcuts that it is given.

    Attributes:
        norms: modules that `dlzo_kernels.rms_norm` computes, with their epsilons.
        last_mlp: computed at the positions that are read, and left out elsewhere; None for none.
        below: layers passed by where the tuned layer's input is given, and what they give beside
            the hidden state.
        attention_problems: why attentions within trees so far were not by tree_attention; with an
            empty one where some were.
    """

    def __init__(self, model: PreTrainedModel, layer: nn.Module | None) -> None:
        self.model = model
        self.layer = layer
        self.norms: dict[nn.Module, float] = {}
        self.last_mlp: nn.Module | None = None
        self.below: dict[nn.Module, Beside | None] = {}
        self.attention_problems: set[str] = set()
        self._head = model.get_output_embeddings()
        self._body = _body(model, self._head)

    @property
    def head_is_linear(self) -> bool:
        """Whether logits can be had for some token ids alone."""
        return _is_linear(self._head)

    @property
    def length_multiple(self) -> int:
        """What the number of positions should be a multiple of."""
        # For each number of rows of a 16-bit matrix, torch compiles a kernel on CPUs, and keeps it.
        return 16 if self.model.dtype.itemsize == 2 else 1

    def log_probs(
        self,
        pack: Pack,
        readout: Readout,
        states: Sequence[State],
        normalised: bool,
        hidden: Tensor | None,
    ) -> Tensor:
        """Log-probabilities of the scored tokens on the CPU: shape (states, scored tokens).

        Args:
            pack: the input.
            readout: where its scored tokens lie.
            states: of the tuned layer; none: the weights as they are.
            normalised: without it they lack a constant for each position and state, and the option
                tokens' rows of the output embeddings are enough, if these are linear.
            hidden: what the tuned layer sees, as of `layer_input`; None where it is computed.
        """
        vocabulary = readout.target.unique()
        state_count = max(1, len(states))
        with ExitStack() as stack:
            if self.last_mlp is not None:
                rows, multiple = len(pack.inputs["input_ids"]), self.length_multiple
                places = readout.row, readout.column
                stack.enter_context(only_at(self.last_mlp, rows, *places, multiple))
            if self.layer is not None and (states or hidden is not None):
                stack.enter_context(under_states(self.layer, states or [nullcontext], hidden))
            if hidden is not None:
                for layer, beside in self.below.items():
                    stack.enter_context(passed_by(layer, beside))
            most = len(readout.row)
            if self._body is not None:
                most = min(most, self._most_positions(state_count, len(vocabulary), normalised))
                if most < len(readout.row):
                    stack.enter_context(computed_once(self._body))
            parts = [
                self._log_probs(pack, part, state_count, vocabulary, normalised)
                for part in readout.split(most)
            ]
        return torch.cat(parts, dim=-1).cpu()[:, readout.order(most)]

    def _log_probs(
        self, pack: Pack, readout: Readout, states: int, vocabulary: Tensor, normalised: bool
    ) -> Tensor:
        """`log_probs` of some positions, whose logits exist at once."""
        with self._head_at(pack, readout, states, vocabulary, normalised):
            logits = self._forward(pack).logits
        if logits.shape[:-1] != (1, states * len(readout.row)):
            raise unsupported(self.model, "does not apply its output embeddings once to all tokens")
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logits = logits[0].unflatten(0, (states, -1))
        if not normalised:
            column = torch.searchsorted(vocabulary, readout.target)
            return logits[:, readout.position, column]
        normaliser = logits.logsumexp(-1)[:, readout.position]
        return logits[:, readout.position, readout.target] - normaliser

    def _most_positions(self, states: int, vocabulary: int, normalised: bool) -> int:
        """How many positions' logits exist at once."""
        if normalised:
            vocabulary = self.model.config.get_text_config(decoder=True).vocab_size
        return max(1, LOGIT_BYTES // (4 * states * vocabulary))

    def layer_input(self, pack: Pack) -> Tensor:
        """What the tuned layer sees, on the CPU: shape (rows, length, hidden size)."""
        assert self.layer is not None  # there is no cache without one
        with stopped_at(self.layer):
            try:
                self._forward(pack)
            except ReachedLayerError as reached:
                return reached.hidden.cpu()
        raise unsupported(self.model, "does not run the tuned layer")

    def _forward(self, pack: Pack) -> Any:
        inputs = {name: tensor.to(self.model.device) for name, tensor in pack.inputs.items()}
        within: AbstractContextManager[None] = nullcontext()
        if pack.trees is not None:
            within = attend_within(self.model, pack.trees, self.attention_problems)
        with within, by_kernel(self.norms), fast_products(self.model):
            return self.model(**inputs, use_cache=False)

    def _head_at(
        self, pack: Pack, readout: Readout, states: int, vocabulary: Tensor, normalised: bool
    ) -> AbstractContextManager[None]:
        """Lets the model apply its head to the read positions only, and sharper.

        The logits have shape (1, states * positions, vocabulary size), those of the token ids in
        `vocabulary` computed in float32 at least: bfloat16 rounds a logit of 16 to a multiple of
        1/8, more than a step changes it. All others are left out if not `normalised`.
        """
        head, own_forward = self._head, self._head.forward
        shape = (states * len(pack.inputs["input_ids"]), pack.inputs["input_ids"].shape[1])

        def logits_at(hidden: Tensor) -> Tensor:
            if hidden.shape[:2] != shape:
                raise unsupported(self.model, "does not keep one hidden state per token and state")
            hidden = hidden.unflatten(0, (states, -1))[:, readout.row, readout.column]
            hidden = hidden.flatten(0, 1)[None]
            if not _is_linear(head):
                return own_forward(hidden)
            hidden = hidden.to(head.weight.device)  # of several GPUs another one, perhaps
            dtype = torch.promote_types(hidden.dtype, torch.float32)
            bias = None if head.bias is None else head.bias[vocabulary].to(dtype)
            with torch.autocast(hidden.device.type, enabled=False):
                exact = F.linear(hidden.to(dtype), head.weight[vocabulary].to(dtype), bias)
            if not normalised:
                return exact
            logits = own_forward(hidden).to(dtype)
            logits[..., vocabulary] = exact
            return logits

        return replaced_forward(head, logits_at)


def unsupported(model: PreTrainedModel, what: str) -> UserError:
    """The error for a model that cannot be scored because of what it does."""
    return UserError(f"{type(model).__name__} {what}: choose a decoder-only model")


def _body(model: PreTrainedModel, head: nn.Module | None) -> nn.Module | None:
    """The module that runs the decoder layers; None if it has the head too, or none is known."""
    try:
        layers = decoder_layers(model)
    except UserError:
        return None
    body = next(module for module in model.modules() if layers in module.children())
    return None if head in list(body.modules()) else body


def _is_linear(head: nn.Module | None) -> TypeGuard[nn.Linear]:
    """Whether output embeddings are a product and a bias: some scale what comes of it."""
    return isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward

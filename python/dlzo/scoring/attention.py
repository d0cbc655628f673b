"""Attention within trees: the sequences of a packed row never see each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel

from dlzo.scoring.layout import Tree

NAME = "dlzo_tree"
_trees: ContextVar[Sequence[Tree]] = ContextVar("trees")
# What an attention may be called with beyond this module's own parameters without another result.
_WITHOUT_EFFECT = {"is_causal", "output_attentions", "position_ids", "use_cache"}


class UnsupportedAttentionError(Exception):
    """An attention does more than softmax(q k) v with a window or a soft cap."""


@contextmanager
def attend_within(model: PreTrainedModel, trees: Sequence[Tree]) -> Iterator[None]:
    """Lets each attention of the model see a row of these trees, end to end, each by itself."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    before = [config._attn_implementation for config in configs]
    token = _trees.set(trees)
    try:
        for config in configs:
            config._attn_implementation = NAME
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation = implementation
        _trees.reset(token)


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: query (batch, heads, tokens, head size).

    Returns:
        (batch, tokens, heads, head size), and no attention weights.

    Raises:
        UnsupportedAttentionError: the model's attention has a term that is unknown here.
    """
    unknown = [name for name, value in kwargs.items() if value is not None]
    unknown = sorted(set(unknown) - _WITHOUT_EFFECT)
    if attention_mask is not None or unknown:
        raise UnsupportedAttentionError(", ".join(unknown) or "attention_mask")
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    batch, heads, length, _ = query.shape
    out = query.new_empty(batch, length, heads, value.shape[-1])
    start = 0
    for tree in _trees.get():
        span = slice(start, start + len(tree.tokens))
        parts = (part[:, :, span] for part in (query, key, value))
        out[:, span] = _attend(*parts, tree, scaling, sliding_window, softcap).transpose(1, 2)
        start = span.stop
    return out, None


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tree: Tree,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    windowed = window is not None and window < tree.height
    if tree.is_chain and not windowed and softcap is None:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    mask = (tree.ancestors_within(window) if windowed else tree.ancestors).to(query.device)
    if softcap is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    weights = softcap * torch.tanh(query @ key.mT * scale / softcap)
    weights = weights.masked_fill(~mask, -torch.inf).softmax(-1, dtype=torch.float32)
    return weights.to(value.dtype) @ value


AttentionInterface.register(NAME, tree_attention)

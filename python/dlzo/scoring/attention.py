"""Attention within trees: the sequences of a packed row never see each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel

from dlzo.scoring.layout import Tree
from dlzo_kernels import tree_attention
from dlzo_kernels.ops.tree_attention import why_no_kernel

NAME = "dlzo_tree"
# What an attention may be called with beyond this module's own parameters without another result.
_WITHOUT_EFFECT = {
    *("is_causal", "output_attentions", "output_router_logits", "position_ids", "use_cache")
}


# Of a configuration: how many tokens are seen at most. By masks that are not made here: the chunks
# of Llama 4, and the keys that DeepSeek V3.2 chooses; and by windows.
CHUNKS = ("attention_chunk_size", "index_topk")
WINDOWS = ("sliding_window", "attention_window_size")


class UnsupportedAttentionError(Exception):
    """An attention does more than softmax(q k) v with a window or a soft cap."""


@dataclass(frozen=True)
class _Row:
    """Trees end to end, of each token the place of the one before it, and what is noted."""

    trees: Sequence[Tree]
    parents: Tensor
    problems: set[str]


_row: ContextVar[_Row] = ContextVar("row")


@contextmanager
def attend_within(
    model: PreTrainedModel, trees: Sequence[Tree], problems: set[str]
) -> Iterator[None]:
    """Lets each attention of the model see a row of these trees, end to end, each by itself.

    Of each attention `problems` gets why it was not by tree_attention; "" where it was.
    """
    found: dict[int, Any] = {
        id(m.config): m.config for m in model.modules() if hasattr(m, "config")
    }
    configs = found.values()
    before = [config._attn_implementation for config in configs]
    token = _row.set(_Row(trees, _parents(trees), problems))
    try:
        for config in configs:
            config._attn_implementation = NAME
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation = implementation
        _row.reset(token)


def _parents(trees: Sequence[Tree]) -> Tensor:
    """Of each token of the row, where the token before it in its sequences lies; -1 for none."""
    parents: list[int] = []
    for tree in trees:
        start = len(parents)
        parents += [start + parent if parent >= 0 else -1 for parent in tree.parents]
    return torch.tensor(parents, device="cpu")


def attention_within_trees(
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
    # Some mixtures of experts window by a mask alone, which is not made here.
    if sliding_window is None and "output_router_logits" in kwargs and _is_windowed(module):
        raise UnsupportedAttentionError("sliding_window")
    row = _row.get()
    terms: dict[str, Any] = {"scale": scaling, "window": sliding_window, "softcap": softcap}
    problem = why_no_kernel(query, value)
    row.problems.add(problem)
    if not problem:
        # Under autocast, what was rotated is in float32.
        query, key = query.to(value.dtype), key.to(value.dtype)
        out = tree_attention(query, key, value, row.parents, **terms)
        return out.transpose(1, 2), None
    return _tree_by_tree(query, key, value, row.trees, **terms), None


def hiding_setting(model: PreTrainedModel, names: Sequence[str], length: int) -> str | None:
    """The first of these settings that hides tokens of such a text, in words; None if none does."""
    config = model.config.get_text_config(decoder=True)
    for name in names:
        most = getattr(config, name, None)
        if most is not None and most < length:
            return f"{type(model).__name__} has {name} {most}"
    return None


def _is_windowed(attention: nn.Module) -> bool:
    """Whether the configuration has a window for this layer's attention."""
    config, index = getattr(attention, "config", None), getattr(attention, "layer_idx", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and index is not None and kinds[index] == "full_attention":
        return False
    window = getattr(config, "sliding_window", None)
    return window is not None and getattr(config, "use_sliding_window", True)


def _tree_by_tree(
    query: Tensor, key: Tensor, value: Tensor, trees: Sequence[Tree], **terms: Any
) -> Tensor:
    """Where there is no kernel of tree_attention: torch's attention for each tree."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    batch, heads, length, _ = query.shape
    out = query.new_empty(batch, length, heads, value.shape[-1])
    start = 0
    for tree in trees:
        span = slice(start, start + len(tree.tokens))
        q, k, v = (part[:, :, span] for part in (query, key, value))
        out[:, span] = _attend(q, k, v, tree, **terms).transpose(1, 2)
        start = span.stop
    return out


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tree: Tree,
    scale: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    windowed = window is not None and window < tree.height
    if tree.is_chain and not windowed and softcap is None:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    mask = (tree.ancestors if window is None else tree.ancestors_within(window)).to(query.device)
    if softcap is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    weights = softcap * torch.tanh(query @ key.mT * scale / softcap)
    weights = weights.masked_fill(~mask, -torch.inf).softmax(-1, dtype=torch.float32)
    return weights.to(value.dtype) @ value


AttentionInterface.register(NAME, attention_within_trees)

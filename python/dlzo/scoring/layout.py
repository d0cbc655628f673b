"""How the sequences of a batch lie in the rows of a forward, shared prefixes only once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import takewhile
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

Tokens = tuple[int, ...]
Item = TypeVar("Item")
# Plans lie there, whatever device torch was told to make tensors on.
on_cpu = partial(torch.tensor, device="cpu")


@dataclass(frozen=True, eq=False)
class Tree:
    """Sequences that share prefixes: each token once, its parent before it.

    Attributes:
        tokens: all tokens; a sequence's own tokens follow those of the sequence before it.
        paths: of each sequence, where its tokens lie: int64, one entry a token, ascending.
        parents: of each token, where the token before it in its sequences lies; -1 for the first.
        depths: of each token, how many come before it in its sequences.
    """

    tokens: Tokens
    paths: dict[Tokens, Tensor]
    parents: tuple[int, ...]
    depths: tuple[int, ...]

    @cached_property
    def is_chain(self) -> bool:
        """Whether no token has two successors, so that plain causal attention is right."""
        return all(parent == i - 1 for i, parent in enumerate(self.parents))

    @cached_property
    def height(self) -> int:
        """The length of the longest sequence."""
        return max(self.depths) + 1

    @cached_property
    def ancestors(self) -> Tensor:
        """Whether a token is another one's ancestor or itself: bool, the descendants in rows."""
        mask = torch.eye(len(self.tokens), dtype=torch.bool, device="cpu")
        for i, parent in enumerate(self.parents):
            if parent >= 0:
                mask[i] |= mask[parent]
        return mask

    def ancestors_within(self, window: int) -> Tensor:
        """The same for the last `window` tokens of a sequence, the descendant among them."""
        depths = on_cpu(self.depths)
        return self.ancestors & (depths[:, None] - depths < window)


def grow_trees(sequences: Iterable[Tokens], hidden_size: int) -> list[Tree]:
    """Trees of the distinct sequences, in the order of their tokens.

    A sequence joins the tree before it where that saves work: a shared token saves about
    24 * hidden_size^2 operations in a layer, but every pair of tokens in one tree costs attention
    8 * hidden_size, and several times that in time.
    """
    trees: list[list[tuple[Tokens, int]]] = []
    size = 0
    previous: Tokens = ()
    for tokens in sorted(set(sequences)):
        shared = _common_prefix(previous, tokens)
        new = len(tokens) - shared
        if trees and shared and size * new <= shared * hidden_size:
            trees[-1].append((tokens, shared))
            size += new
        else:
            trees.append([(tokens, 0)])
            size = len(tokens)
        previous = tokens
    return [_grow(members) for members in trees]


def _common_prefix(a: Tokens, b: Tokens) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def _grow(members: list[tuple[Tokens, int]]) -> Tree:
    """The tree of sequences that share a number of tokens with the one before them."""
    tokens: list[int] = []
    parents: list[int] = []
    paths: dict[Tokens, Tensor] = {}
    path: list[int] = []
    for sequence, shared in members:
        path = path[:shared]
        for token in sequence[shared:]:
            parents.append(path[-1] if path else -1)
            path.append(len(tokens))
            tokens.append(token)
        paths[sequence] = on_cpu(path)
    depths: list[int] = []
    for parent in parents:
        depths.append(depths[parent] + 1 if parent >= 0 else 0)
    return Tree(tuple(tokens), paths, tuple(parents), tuple(depths))


@dataclass(frozen=True)
class Pack:
    """The input of one forward.

    Attributes:
        inputs: int64 tensors of shape (rows, length) for the model.
        places: row and columns of each sequence's tokens.
        trees: the trees that lie end to end in the only row; None where each sequence has a row of
            its own, padded on the right.
    """

    inputs: dict[str, Tensor]
    places: dict[Tokens, tuple[int, Tensor]]
    trees: tuple[Tree, ...] | None

    @property
    def positions(self) -> int:
        """How many positions a layer computes, padding included."""
        return self.inputs["input_ids"].numel()


def pack_trees(trees: Sequence[Tree], row_tokens: int, multiple_of: int = 1) -> Iterator[Pack]:
    """Trees end to end, as they come, in packs of at most `row_tokens`, or of one tree.

    A tree of no sequence fills a pack up to a multiple of `multiple_of` tokens.
    """
    for group in _groups(trees, _total_tokens, row_tokens):
        if missing := -_total_tokens(group) % multiple_of:
            chain = tuple(range(missing))
            group.append(Tree((0,) * missing, {}, (-1, *chain[:-1]), chain))
        places: dict[Tokens, tuple[int, Tensor]] = {}
        start = 0
        for tree in group:
            places |= {sequence: (0, path + start) for sequence, path in tree.paths.items()}
            start += len(tree.tokens)
        inputs = {
            "input_ids": on_cpu([[token for tree in group for token in tree.tokens]]),
            "position_ids": on_cpu([[depth for tree in group for depth in tree.depths]]),
        }
        yield Pack(inputs, places, tuple(group))


def pad_rows(sequences: Iterable[Tokens], row_tokens: int) -> Iterator[Pack]:
    """One row for each distinct sequence, those of like length together, padded on the right.

    A causal model never sees padding on the right, so no mask is needed.
    """
    by_length = sorted(set(sequences), key=lambda tokens: (len(tokens), tokens))
    for group in _groups(by_length, _padded_tokens, row_tokens):
        places = {
            tokens: (row, torch.arange(len(tokens), device="cpu"))
            for row, tokens in enumerate(group)
        }
        padded = pad_sequence([*map(on_cpu, group)], batch_first=True)
        yield Pack({"input_ids": padded}, places, None)


def _total_tokens(group: Sequence[Tree]) -> int:
    return sum(len(tree.tokens) for tree in group)


def _padded_tokens(group: Sequence[Tokens]) -> int:
    return len(group) * max(map(len, group))


def _groups(
    items: Iterable[Item], size: Callable[[Sequence[Item]], int], limit: int
) -> Iterator[list[Item]]:
    """Splits the items, in order, into groups whose size is at most the limit, or of one item."""
    group: list[Item] = []
    for item in items:
        if group and size([*group, item]) > limit:
            yield group
            group = []
        group.append(item)
    if group:
        yield group

"""Plans: how a batch is scored, and where its scored tokens lie."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count

from torch import Tensor

from dlzo.scoring.encoding import EncodedExample
from dlzo.scoring.layout import Pack, Tokens, on_cpu


@dataclass(frozen=True)
class Readout:
    """Where the scored tokens of a pack lie: int64 tensors.

    `row` and `column` give the distinct positions whose output is read; the other three, with one
    entry a token, its position among these, its id and the number of its option in the batch.
    """

    row: Tensor
    column: Tensor
    position: Tensor
    target: Tensor
    option: Tensor

    def split(self, most: int) -> Iterator[Readout]:
        """Parts of at most so many positions, each with their tokens."""
        for first in range(0, len(self.row), most):
            some = slice(first, first + most)
            tokens = self.position // most == first // most
            position = self.position[tokens] - first
            of_tokens = position, self.target[tokens], self.option[tokens]
            yield Readout(self.row[some], self.column[some], *of_tokens)

    def order(self, most: int) -> Tensor:
        """Of each token, its place among those of `split`, end to end."""
        return (self.position // most).argsort(stable=True).argsort()


@dataclass(frozen=True)
class Plan:
    """How a batch is scored; made by `Scorer.plan`, good for any number of steps.

    Attributes:
        batch: the examples.
        packs: the inputs of the forwards, one each.
        readouts: where the scored tokens of each pack lie.
        normalised: whether losses take all rows of the output embeddings, for the normaliser over
            the vocabulary; without it the option tokens' rows are enough.
        notes: what is shared, and what this model does not allow.
    """

    batch: tuple[EncodedExample, ...]
    packs: tuple[Pack, ...]
    readouts: tuple[Readout, ...]
    normalised: bool
    notes: tuple[str, ...]

    @property
    def positions(self) -> int:
        """Positions that a layer computes under one state, padding included."""
        return sum(pack.positions for pack in self.packs)

    @property
    def padded_positions(self) -> int:
        """Positions of the plain loop: a row for each option's whole text, all padded alike."""
        lengths = [
            len(example.sequences[option.sequence]) + 1
            for example in self.batch
            for option in example.options
        ]
        return max(lengths) * len(lengths)

    def explain(self) -> str:
        """What is computed, and what is shared, in a few lines."""
        tokens = sum(len(tokens) for pack in self.packs for tokens in pack.places)
        options = sum(len(example.options) for example in self.batch)
        head = sum(len(readout.row) for readout in self.readouts)
        rows = "all rows" if self.normalised else "the option tokens' rows"
        sequences = sum(len(pack.places) for pack in self.packs)
        return "\n".join(
            (
                f"examples: {len(self.batch)}, options: {options}, "
                f"distinct sequences: {sequences}, their tokens: {tokens}",
                f"forwards: {len(self.packs)}, positions: {self.positions}, of a plain padded "
                f"batch: {self.padded_positions}",
                f"output embeddings: {rows}, positions: {head}",
                *self.notes,
            )
        )


def plan_of(
    batch: Sequence[EncodedExample],
    packs: Iterable[Pack],
    *,
    normalised: bool = True,
    notes: Iterable[str] = (),
) -> Plan:
    """The plan for a batch whose sequences lie in these packs."""
    packs = tuple(packs)
    return Plan(tuple(batch), packs, tuple(_readouts(batch, packs)), normalised, tuple(notes))


def _readouts(batch: Sequence[EncodedExample], packs: Sequence[Pack]) -> Iterator[Readout]:
    """Where each pack's scored tokens lie; options are numbered through the batch, in order."""
    number = count()
    options: dict[Tokens, list[tuple[int, tuple[int, ...]]]] = {}
    for example in batch:
        for sequence, targets in example.options:
            options.setdefault(example.sequences[sequence], []).append((next(number), targets))
    for pack in packs:
        scored = [
            (row, column, target, option)
            for tokens, (row, columns) in pack.places.items()
            for option, targets in options[tokens]
            for column, target in zip(columns[-len(targets) :].tolist(), targets, strict=True)
        ]
        places = {(row, column): None for row, column, _, _ in scored}
        index = {place: i for i, place in enumerate(places)}
        row, column = on_cpu(list(places)).unbind(-1)
        position = on_cpu([index[row, column] for row, column, _, _ in scored])
        yield Readout(row, column, position, *on_cpu(scored)[:, 2:].unbind(-1))


def gold_of(batch: Sequence[EncodedExample]) -> Tensor:
    """The number of each example's right option, int64."""
    return on_cpu([example.gold for example in batch])


def has_one_token_options(batch: Iterable[EncodedExample]) -> bool:
    """Whether the options of each example are single tokens at one position.

    Then their common normaliser has no effect on choices, nor on the loss over options.
    """
    return all(
        len(example.sequences) == 1 and all(len(o.targets) == 1 for o in example.options)
        for example in batch
    )


def ids_in(batch: Iterable[EncodedExample]) -> Iterator[int]:
    """All token ids of a batch."""
    for example in batch:
        yield from chain(*example.sequences, *(option.targets for option in example.options))

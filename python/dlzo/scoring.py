"""Scoring runtime: the losses of a batch of examples with no padding, no wasted logits or layers.

Everything here is exact: the same losses as a plain loop over single sequences, to rounding.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, count
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dlzo.errors import UserError
from dlzo.tasks import Example

if TYPE_CHECKING:
    from dlzo_kernels import ZOStep

# MeZO's limit: longer texts lose their beginning.
MAX_LENGTH = 2048
# Attention over a packed row grows with its square, the rest of the layer with its length.
ROW_TOKENS = 256


class Option(NamedTuple):
    """One option: `targets` follow the last `len(targets)` tokens of sequence number `sequence`."""

    sequence: int
    targets: tuple[int, ...]


@dataclass(frozen=True)
class EncodedExample:
    """The distinct token sequences that score an example's options, and which are the options'.

    A sequence is a text without its last token, which predicts nothing; so options of one token
    share one sequence, the prompt.
    """

    sequences: tuple[tuple[int, ...], ...]
    options: tuple[Option, ...]
    gold: int


class _ScoredToken(NamedTuple):
    """A token to score: at `column` of its sequence's output, for option number `option`."""

    column: int
    target: int
    option: int


class _Sequence(NamedTuple):
    tokens: tuple[int, ...]
    scored: list[_ScoredToken]


@dataclass(frozen=True)
class _Rows:
    """The input of one forward, and where its scored tokens lie: int64 tensors, one entry each."""

    inputs: dict[str, Tensor]
    row: Tensor
    column: Tensor
    target: Tensor
    option: Tensor


class Scorer:
    """Scores examples with a causal language model, under one or two states of a tuned layer.

    Sequences are packed into one row with restarting position ids where the architecture keeps
    them apart, else set in rows of their own, padded on the right, where a causal model never sees
    the padding.

    Args:
        model: Any decoder-only transformers model; it is set to evaluation mode.
        tokenizer: Its tokenizer.
        layer: The tuned decoder layer, needed by `two_point_losses` only.
        row_tokens: The most tokens in one forward, unless a single sequence is longer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        layer: nn.Module | None = None,
        *,
        row_tokens: int = ROW_TOKENS,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.layer = layer
        self.row_tokens = row_tokens
        self.max_length = max_length(model)
        self.packed = _keeps_packed_sequences_apart(model)

    def encode(self, examples: Sequence[Example]) -> list[EncodedExample]:
        """The examples as tokens, by MeZO's rule: texts are stripped of spaces only.

        Raises:
            UserError: an option has no token of its own, or leaves none of the prompt.
        """
        return [self._encode(example) for example in examples]

    def _encode(self, example: Example) -> EncodedExample:
        prompt_length = len(self.tokenizer(example.prompt.strip(" ")).input_ids)
        sequences: dict[tuple[int, ...], int] = {}
        options = []
        for option in example.options:
            tokens = self.tokenizer((example.prompt + option).strip(" ")).input_ids
            length = len(tokens) - prompt_length
            if not 0 < length < min(len(tokens), self.max_length):
                raise UserError(
                    f"option {option!r} of the prompt {example.prompt[:60]!r} takes {length} of "
                    f"{len(tokens)} tokens: option and prompt need at least one each, and the "
                    f"option fewer than {self.max_length}"
                )
            tokens = truncate(tokens, self.max_length, self.tokenizer)
            sequence = sequences.setdefault(tuple(tokens[:-1]), len(sequences))
            options.append(Option(sequence, tuple(tokens[-length:])))
        return EncodedExample(tuple(sequences), tuple(options), example.gold)

    def scores(self, batch: Sequence[EncodedExample]) -> Tensor:
        """The options' mean log-probabilities.

        Shape (examples, most options of an example), on the CPU, float32 (float64 for a float64
        model), -inf where an example has fewer options.
        """
        return self._scores(batch, states=1)[0]

    def evaluate(self, batch: Sequence[EncodedExample]) -> tuple[float, float]:
        """(accuracy, loss): share of right argmaxes, and mean cross-entropy over options.

        Of equal scores the first option counts.
        """
        scores = self.scores(batch)
        hits = scores.argmax(dim=-1) == _gold(batch)
        return hits.double().mean().item(), _cross_entropy(scores, batch)

    def two_point_losses(
        self, step: ZOStep, batch: Sequence[EncodedExample]
    ) -> tuple[float, float]:
        """The batch's loss under `step.plus()` and under `step.minus()`.

        One forward: what lies below the tuned layer runs once, the tuned layer under both states,
        and what lies above runs on the two states side by side in the batch dimension.
        """
        with _under_both_states(self.layer, step):
            plus, minus = self._scores(batch, states=2)
        return _cross_entropy(plus, batch), _cross_entropy(minus, batch)

    @torch.inference_mode()
    def _scores(self, batch: Sequence[EncodedExample], states: int) -> Tensor:
        """`scores` under one state or two: shape (states, examples, options)."""
        option_count = sum(len(example.options) for example in batch)
        groups = self._group(_sequences(batch))
        rows = [self._lay_out(group) for group in groups]
        log_probs = torch.cat([self._log_probs(row, states) for row in rows], dim=-1)
        option = torch.cat([row.option for row in rows])
        sums = log_probs.new_zeros(states, option_count).index_add_(1, option, log_probs)
        means = sums / torch.bincount(option, minlength=option_count)
        width = max(len(example.options) for example in batch)
        present = torch.tensor([[i < len(e.options) for i in range(width)] for e in batch])
        scores = means.new_full((states, *present.shape), -torch.inf)
        scores[:, present] = means
        return scores

    def _group(self, sequences: list[_Sequence]) -> Iterator[list[_Sequence]]:
        """Splits the sequences, in order, into groups of at most `row_tokens` input tokens."""
        group: list[_Sequence] = []
        for sequence in sequences:
            lengths = [len(member.tokens) for member in (*group, sequence)]
            size = sum(lengths) if self.packed else max(lengths) * len(lengths)
            if group and size > self.row_tokens:
                yield group
                group = []
            group.append(sequence)
        yield group

    def _lay_out(self, group: list[_Sequence]) -> _Rows:
        lengths = [len(sequence.tokens) for sequence in group]
        if self.packed:
            starts = [
                (0, end - length) for end, length in zip(accumulate(lengths), lengths, strict=True)
            ]
            inputs = {
                "input_ids": torch.tensor([[t for s in group for t in s.tokens]]),
                "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
            }
        else:
            starts = [(row, 0) for row in range(len(group))]
            inputs = {"input_ids": pad_sequence([torch.tensor(s.tokens) for s in group], True)}
        places = [
            (row, start + token.column, token.target, token.option)
            for (row, start), sequence in zip(starts, group, strict=True)
            for token in sequence.scored
        ]
        inputs = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
        return _Rows(inputs, *torch.tensor(places).unbind(-1))

    def _log_probs(self, rows: _Rows, states: int) -> Tensor:
        """Log-probabilities of the scored tokens on the CPU: shape (states, scored tokens)."""
        targets = rows.target.repeat(states).to(self.model.device)
        with self._head_at_scored_positions(rows, states, targets.unique()):
            logits = self.model(**rows.inputs, use_cache=False).logits
        if logits.shape[:-1] != (1, len(targets)):
            raise self._unsupported("does not apply its output embeddings once to all tokens")
        logits = logits[0].to(torch.promote_types(logits.dtype, torch.float32))
        return -F.cross_entropy(logits, targets, reduction="none").cpu().unflatten(0, (states, -1))

    @contextmanager
    def _head_at_scored_positions(
        self, rows: _Rows, states: int, vocabulary: Tensor
    ) -> Iterator[None]:
        """Lets the model apply its head to the scored positions only, and sharper.

        The head sees a hidden state of shape (1, states * scored tokens, hidden size). In a 16-bit
        model it returns float32 logits, those of the token ids in `vocabulary` computed in float32:
        bfloat16 rounds a logit of 16 to a multiple of 1/8, more than a step changes it.
        """
        length = rows.inputs["input_ids"].shape[1]

        def keep_scored(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            (hidden,) = args
            if hidden.shape[:2] != (states * len(rows.inputs["input_ids"]), length):
                raise self._unsupported("does not keep one hidden state per token and state")
            by_state = hidden.unflatten(0, (states, -1))
            return (by_state[:, rows.row, rows.column].flatten(0, 1)[None],)

        def sharpen(head: nn.Module, args: tuple[Tensor], logits: Tensor) -> Tensor:
            if logits.dtype.itemsize > 2 or not isinstance(head, nn.Linear):
                return logits
            bias = None if head.bias is None else head.bias[vocabulary].float()
            logits = logits.float()
            logits[..., vocabulary] = F.linear(
                args[0].float(), head.weight[vocabulary].float(), bias
            )
            return logits

        head = self.model.get_output_embeddings()
        handles = [head.register_forward_pre_hook(keep_scored), head.register_forward_hook(sharpen)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _unsupported(self, what: str) -> UserError:
        return UserError(f"{type(self.model).__name__} {what}: choose a decoder-only model")


def max_length(model: PreTrainedModel) -> int:
    """The most tokens of a text: MeZO's limit, or the model's own where that is lower."""
    return min(MAX_LENGTH, getattr(model.config, "max_position_embeddings", MAX_LENGTH))


def truncate(tokens: list[int], length: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The last `length` tokens; as in MeZO, a beginning-of-sequence token stays in front."""
    if len(tokens) <= length:
        return tokens
    kept = int(tokens[0] == tokenizer.bos_token_id)
    return tokens[:kept] + tokens[len(tokens) - length + kept :]


def _sequences(batch: Sequence[EncodedExample]) -> list[_Sequence]:
    """All sequences of the batch; options are numbered through the batch, in order."""
    sequences: list[_Sequence] = []
    number = count()
    for example in batch:
        own = [_Sequence(tokens, []) for tokens in example.sequences]
        for option in example.options:
            tokens, scored = own[option.sequence]
            column = len(tokens) - len(option.targets)
            option_number = next(number)
            scored += [
                _ScoredToken(column + i, target, option_number)
                for i, target in enumerate(option.targets)
            ]
        sequences += own
    return sequences


def _gold(batch: Sequence[EncodedExample]) -> Tensor:
    return torch.tensor([example.gold for example in batch])


def _cross_entropy(scores: Tensor, batch: Sequence[EncodedExample]) -> float:
    return F.cross_entropy(scores, _gold(batch)).item()


@torch.inference_mode()
def _keeps_packed_sequences_apart(model: PreTrainedModel) -> bool:
    """Whether restarting position ids alone keep the sequences of a row from each other.

    Exact in any dtype: another first sequence must leave each bit of the second one's logits.
    """
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    half = torch.arange(8, device=model.device)

    def second_half(first_token: int) -> Tensor:
        tokens = torch.cat((torch.full_like(half, first_token), half))[None]
        positions = torch.cat((half, half))[None]
        return model(tokens, position_ids=positions, use_cache=False).logits[:, len(half) :]

    return torch.equal(second_half(0), second_half(1))


@contextmanager
def _under_both_states(layer: nn.Module, step: ZOStep) -> Iterator[None]:
    """Makes `layer` map a batch to its outputs under step.plus() followed by step.minus()."""
    own = vars(layer).get("forward")
    forward = layer.forward

    def both(*args: Any, **kwargs: Any) -> Any:
        shared = [name for name, value in kwargs.items() if isinstance(value, MutableMapping)]
        if shared:
            raise UserError(
                f"the tuned layer shares {shared[0]!r} with other layers, so that its two states "
                "cannot run side by side: choose another model"
            )
        with step.plus():
            plus = forward(*args, **kwargs)
        with step.minus():
            minus = forward(*args, **kwargs)
        return _stack(plus, minus)

    layer.forward = both
    try:
        yield
    finally:
        if own is None:
            del layer.forward
        else:
            layer.forward = own


def _stack(plus: Any, minus: Any) -> Any:
    """Joins two outputs of a layer, a tensor or a tuple of tensors, in the batch dimension."""
    if isinstance(plus, Tensor):
        return torch.cat((plus, minus))
    if isinstance(plus, tuple):
        return tuple(_stack(*pair) for pair in zip(plus, minus, strict=True))
    if plus is None and minus is None:
        return None
    raise UserError(
        f"a decoder layer gives a {type(plus).__name__}, not a tensor: choose another model"
    )

"""The scorer: what a plan says, run through a model."""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dlzo.errors import UserError
from dlzo.models import decoder_layers, dtype_name
from dlzo.products import least_rows
from dlzo.scoring.encoding import (
    EncodedExample,
    check_ids,
    check_tokenizer,
    encode,
    max_length,
)
from dlzo.scoring.forward import State
from dlzo.scoring.layout import Pack, Tokens, grow_trees, on_cpu, pack_trees, pad_rows
from dlzo.scoring.plan import Plan, gold_of, has_one_token_options, ids_in, plan_of
from dlzo.scoring.prefix import FrozenWeights, PrefixCache
from dlzo.scoring.runner import Runner
from dlzo.scoring.trial import Trial
from dlzo.sites import check_keeps_weights
from dlzo.tasks import Example, TrainingLoss

# By bytes of a number: a product packs its weights anew each time, which many rows outweigh; with
# more than these, what lies between the products no longer fits the caches.
ROW_TOKENS = {8: 512, 4: 1024, 2: 2048}
# By model: threads wait for their turn at a forward. `sole_use`, for a whole run, refuses instead.
_turns: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()


class Scorer:
    """Scores examples with a causal language model, under any number of states of its weights.

    Where the architecture allows, the sequences of a batch lie end to end in one row, as trees of
    shared prefixes, with no padding; else in rows of their own, padded on the right, where a causal
    model never sees the padding. What lies below the tuned layer, or the lowest of several, runs
    once for all states, or comes from a cache; what lies above a single one runs on all states side
    by side, the last layer's MLP at the positions that are read. What an architecture allows is
    found by scoring a few tokens both ways.

    Args:
        model: any decoder-only transformers model; it is set to evaluation mode.
        tokenizer: its tokenizer.
        layer: the tuned decoder layer, or several; with none a state may change any weight.
        loss: "options": cross-entropy over the options' mean log-probabilities; "gold": mean
            cross-entropy over the tokens of all gold options (MeZO, arXiv 2305.17333).
        cache: keeps the tuned layer's inputs; filled by `cache_prefixes`.
        row_tokens: the most tokens in one forward, unless a single tree is larger; by default 2048
            in 16 bits, 1024 in float32.

    Attributes:
        runner: runs the packs of a plan, with the shortcuts that the model allows.
        frozen: the weights on which the tuned layer's input depends; None without a layer.
        takes_input: whether the tuned layer's input can be given.
        mlp_problem: why the last layer's MLP runs at all positions; None where it does not.
        trees_problem: why sequences are padded; None where they are packed.
        states_problem: why states take turns; None where they run side by side.
        cache_problem: why nothing is cached; None where it is.

    Raises:
        UserError: the loss is not known, weights are not in memory, a tuned layer is outside the
            model or not run on a text alone, or the model looks at later tokens or changes its own
            weights.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        layer: nn.Module | Sequence[nn.Module] = (),
        *,
        loss: TrainingLoss = "options",
        cache: PrefixCache | None = None,
        row_tokens: int | None = None,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.layers = [layer] if isinstance(layer, nn.Module) else list(layer)
        self.layer = self._lowest_layer()
        if loss not in get_args(TrainingLoss):
            raise UserError(f"loss is {loss!r}: choose {' or '.join(get_args(TrainingLoss))}")
        if any(parameter.is_meta for parameter in model.parameters()):
            raise UserError(
                f"weights of this {type(model).__name__} are loaded for each forward, and scoring "
                "needs all of them in memory: load it on one device"
            )
        self.loss = loss
        self.row_tokens = row_tokens or ROW_TOKENS[model.dtype.itemsize]
        self.max_length = max_length(model)
        self.runner = Runner(model, self.layer)
        self.cache: PrefixCache | None = None
        self.takes_input = False
        self.mlp_problem: str | None = None
        self.trees_problem: str | None = None
        self.states_problem: str | None = None
        self.cache_problem: str | None = (
            "no cache was given" if cache is None else "no layer is tuned by itself"
        )
        self._turn = _turns.setdefault(model, threading.RLock())
        self._hidden_size = model.config.get_text_config(decoder=True).hidden_size
        self._itemsize = model.dtype.itemsize  # of hidden states: some models add up in float32
        self.frozen = None if self.layer is None else FrozenWeights(model, self.layer)
        with self._turn:
            check_keeps_weights(model)
            Trial(self).set_shortcuts(cache)

    def encode(self, examples: Sequence[Example]) -> list[EncodedExample]:
        """The examples as tokens, by MeZO's rule: texts are stripped of spaces only.

        Raises:
            UserError: an option has no token of its own, or leaves none of the prompt; or the
                tokenizer puts a token behind each text, or is of another model.
        """
        check_tokenizer(self.tokenizer)
        encoded = [encode(self.tokenizer, example, self.max_length) for example in examples]
        check_ids(self.model, self.tokenizer, ids_in(encoded))
        return encoded

    def plan(self, batch: Sequence[EncodedExample]) -> Plan:
        """How the batch will be scored. Sequences in the cache get packs of their own.

        Raises:
            UserError: the batch is empty.
        """
        if not batch:
            raise UserError("the batch to be scored is empty: give at least one example")
        sequences = {tokens for example in batch for tokens in example.sequences}
        cache = self._bound_cache()
        cached = {tokens for tokens in sequences if cache is not None and tokens in cache}
        packs = (*self.lay_out(cached), *self.lay_out(sequences - cached))
        shortened = self.loss == "options" and self.runner.head_is_linear
        normalised = not (shortened and has_one_token_options(batch))
        return plan_of(batch, packs, normalised=normalised, notes=self._notes(len(cached)))

    def lay_out(self, sequences: set[Tokens]) -> Iterator[Pack]:
        """Packs of the sequences: trees end to end, or a row for each where they see each other."""
        if self.trees_problem is None:
            trees = grow_trees(sequences, self._hidden_size)
            return pack_trees(trees, self.row_tokens, self.runner.length_multiple)
        return pad_rows(sequences, self.row_tokens)

    def scores(self, plan: Plan, states: Sequence[State] = ()) -> Tensor:
        """The options' mean log-probabilities under each state, or under the weights as they are.

        Shape (states, examples, most options of an example), on the CPU, float32 (float64 for a
        float64 model), -inf where an example has fewer options.
        """
        return self._scores(plan, states, normalised=True)

    def losses(self, plan: Plan, states: Sequence[State] = ()) -> list[float]:
        """The batch's loss under each state, or under the weights as they are."""
        sums, weight = self.loss_sums(plan, states)
        return [total / weight for total in sums]

    def loss_sums(self, plan: Plan, states: Sequence[State] = ()) -> tuple[list[float], int]:
        """The loss as a sum under each state, and what it is to be divided by.

        The sum goes over examples for the loss "options", over tokens for "gold"; so the parts of a
        batch add up.
        """
        return self._loss_sums(self._scores(plan, states, plan.normalised), plan)

    def evaluate(self, plan: Plan) -> tuple[int, float, int]:
        """(hits, sum, weight): how often the gold option scores best, and `loss_sums`.

        Of equal scores the first option counts.
        """
        scores = self._scores(plan, (), plan.normalised)
        hits = scores[0].argmax(dim=-1) == gold_of(plan.batch)
        (total,), weight = self._loss_sums(scores, plan)
        return int(hits.sum()), total, weight

    @torch.inference_mode()
    def cache_prefixes(
        self, examples: Sequence[EncodedExample], needed: Sequence[EncodedExample] | None = None
    ) -> None:
        """Puts the tuned layer's inputs for these examples into the cache, while there is room.

        The same examples leave the same bits in a new cache, whatever was scored before; its folder
        gives only what was computed among the same neighbours.

        Args:
            examples: what decides the bits, and for what there is room.
            needed: those of them that will be scored, all if None; a forward without any of them is
                left out, and its room left free.

        Raises:
            UserError: the cache's folder cannot be written.
        """
        with self._turn:
            cache = self._bound_cache()
            if cache is None:
                return
            sequences = {tokens for example in examples for tokens in example.sequences}
            left = sequences
            if needed is not None:
                left = {tokens for example in needed for tokens in example.sequences}
            skipped = 0  # bytes
            for pack in self.lay_out(sequences):
                names = repr((pack.inputs["input_ids"].tolist(), list(pack.places)))
                neighbours = hashlib.sha256(names.encode()).hexdigest()
                missing = [tokens for tokens in pack.places if not cache.find(tokens, neighbours)]
                if not missing:
                    continue
                positions, places = _positions_of(missing, pack)
                nbytes = len(positions) * self._hidden_size * self._itemsize
                if not cache.has_room(skipped + nbytes):
                    break
                if left.isdisjoint(missing):
                    skipped += nbytes
                    continue
                hidden = self.runner.layer_input(pack).flatten(0, 1)[positions]
                self._itemsize = hidden.itemsize  # known from the first trial on
                cache.put(places, hidden, neighbours)

    def _loss_sums(self, scores: Tensor, plan: Plan) -> tuple[list[float], int]:
        gold = gold_of(plan.batch)
        scores = scores.double()
        if self.loss == "options":
            sums = [F.cross_entropy(by_example, gold, reduction="sum") for by_example in scores]
            return [total.item() for total in sums], len(gold)
        tokens = on_cpu([len(e.options[e.gold].targets) for e in plan.batch])
        means = scores.gather(-1, gold.expand(len(scores), -1)[..., None])[..., 0]
        return (-(means * tokens).sum(-1)).tolist(), int(tokens.sum())

    def _notes(self, cached: int) -> Iterator[str]:
        if self.trees_problem is None:
            yield "packed without padding, shared prefixes once"
            for problem in sorted(self.runner.attention_problems):
                by = f"torch, tree by tree: {problem}" if problem else "dlzo_kernels.tree_attention"
                yield f"attention by {by}"
        else:
            yield f"padded on the right, nothing shared: {self.trees_problem}"
        if self.mlp_problem is None:
            yield "the last layer's MLP at the positions that are read"
        else:
            yield f"the last layer's MLP at all positions: {self.mlp_problem}"
        norms = len(self.runner.norms)
        yield f"{norms} RMS norms by dlzo_kernels.rms_norm, others as the model has them"
        if self.model.device.type == "cpu" and least_rows(self.model.dtype) < math.inf:
            dtype = dtype_name(self.model.dtype)
            yield f"matrix products in float32: torch's {dtype} ones are slower on this processor"
        if self.layer is None:
            return
        if self.states_problem is None:
            yield "tuned layer under each state; above it the states side by side"
        else:
            yield f"one state after the other: {self.states_problem}"
        if self.cache_problem is None:
            yield f"layers below the tuned one: from the cache for {cached} sequences, else once"
        else:
            yield f"layers below the tuned one: not cached: {self.cache_problem}"

    @torch.inference_mode()
    def _scores(self, plan: Plan, states: Sequence[State], normalised: bool) -> Tensor:
        """`scores`; if not `normalised`, less a constant for each example and state."""
        with self._turn:
            cache = self._bound_cache()
            if states and (self.layer is None or self.states_problem is not None):
                log_probs = self._one_after_the_other(plan, states, normalised, cache)
            else:
                inputs = (self._cached_input(pack, cache) for pack in plan.packs)
                log_probs = self._log_probs(plan, states, normalised, inputs)
        option = torch.cat([readout.option for readout in plan.readouts])
        option_count = sum(len(example.options) for example in plan.batch)
        sums = log_probs.new_zeros(len(log_probs), option_count).index_add_(1, option, log_probs)
        means = sums / torch.bincount(option, minlength=option_count)
        width = max(len(example.options) for example in plan.batch)
        present = on_cpu([[i < len(e.options) for i in range(width)] for e in plan.batch])
        scores = means.new_full((len(means), *present.shape), -torch.inf)
        scores[:, present] = means
        return scores

    def _one_after_the_other(
        self,
        plan: Plan,
        states: Sequence[State],
        normalised: bool,
        cache: PrefixCache | None,
    ) -> Tensor:
        """`_log_probs` with each state entered once, and the lowest layer's input shared by all."""
        inputs = [self._cached_input(pack, cache) for pack in plan.packs]
        if self.takes_input:
            inputs = [
                self.runner.layer_input(pack) if hidden is None else hidden
                for pack, hidden in zip(plan.packs, inputs, strict=True)
            ]
        each = []
        for state in states:
            with state():
                each.append(self._log_probs(plan, (), normalised, inputs))
        return torch.cat(each)

    def _log_probs(
        self,
        plan: Plan,
        states: Sequence[State],
        normalised: bool,
        inputs: Iterable[Tensor | None],
    ) -> Tensor:
        """Log-probabilities of the scored tokens on the CPU: shape (states, scored tokens).

        `inputs` has what the lowest tuned layer sees in each pack, None where it is computed.
        """
        each = [
            self.runner.log_probs(pack, readout, states, normalised, hidden)
            for pack, readout, hidden in zip(plan.packs, plan.readouts, inputs, strict=True)
        ]
        return torch.cat(each, dim=-1)

    def _bound_cache(self) -> PrefixCache | None:
        """The cache, holding nothing of other weights than there are now."""
        if self.cache is not None and self.frozen is not None:
            self.cache.bind(self.frozen.fingerprint())
        return self.cache

    def _cached_input(self, pack: Pack, cache: PrefixCache | None) -> Tensor | None:
        """The tuned layer's input if all of it is cached: shape (rows, length, hidden size)."""
        if cache is None:
            return None
        shape, hidden = (*pack.inputs["input_ids"].shape, self._hidden_size), None
        for tokens, (row, columns) in pack.places.items():
            cached = cache.get(tokens)
            if cached is None:
                return None
            if hidden is None:
                hidden = cached.new_zeros(shape)  # some models add up in float32
            hidden[row, columns] = cached
        return hidden

    def _lowest_layer(self) -> nn.Module | None:
        several = len(self.layers) > 1
        known = list(decoder_layers(self.model) if several else self.model.modules())
        for layer in self.layers:
            if layer not in known:
                raise UserError(
                    f"the tuned layer is a {type(layer).__name__} outside the model: give one of "
                    "its decoder layers"
                )
        return min(self.layers, key=known.index, default=None)


def _positions_of(sequences: Sequence[Tokens], pack: Pack) -> tuple[Tensor, dict[Tokens, Tensor]]:
    """The positions that hold tokens of the sequences, shared ones once, and which each has."""
    length = pack.inputs["input_ids"].shape[1]
    found = (pack.places[tokens] for tokens in sequences)
    each = torch.cat([row * length + columns for row, columns in found])
    positions, each = each.unique(return_inverse=True)
    places = each.split([*map(len, sequences)])
    return positions, dict(zip(sequences, places, strict=True))

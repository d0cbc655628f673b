"""The scorer: what a plan says, run through a model."""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, TypeGuard, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dlzo.errors import UserError
from dlzo.models import decoder_layers, dtype_name, layer_parts, sharing_module
from dlzo.products import fast_products, least_rows
from dlzo.scoring.attention import (
    CHUNKS,
    WINDOWS,
    UnsupportedAttentionError,
    attend_within,
    hides_tokens,
)
from dlzo.scoring.encoding import (
    EncodedExample,
    Option,
    check_ids,
    check_tokenizer,
    encode,
    max_length,
)
from dlzo.scoring.forward import (
    Beside,
    ReachedLayerError,
    State,
    only_at,
    passed_by,
    replaced_forward,
    stopped_at,
    under_states,
)
from dlzo.scoring.layout import Pack, Tokens, grow_trees, on_cpu, pack_trees, pad_rows
from dlzo.scoring.norms import by_kernel, rms_norms
from dlzo.scoring.plan import Plan, Readout, gold_of, ids_in, plan_of
from dlzo.scoring.prefix import FrozenWeights, PrefixCache
from dlzo.tasks import Example, TrainingLoss

# By bytes of a number: a product packs its weights anew each time, which many rows outweigh; with
# more than these, what lies between the products no longer fits the caches.
ROW_TOKENS = {8: 512, 4: 1024, 2: 2048}
# How far two ways to the same mean log-probability may lie apart by rounding, by bytes of a number.
_CLOSE = {8: 1e-6, 4: 1e-3, 2: 0.3}
# What the many models raise where they are led off their beaten track.
_LED_ASTRAY = (
    *(UnsupportedAttentionError, UserError, RuntimeError, ValueError, TypeError),
    *(LookupError, AttributeError),
)
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
        self.cache: PrefixCache | None = None
        self.mlp_problem: str | None = None
        self.trees_problem: str | None = None
        self.states_problem: str | None = None
        self.cache_problem: str | None = "no cache was given"
        self._turn = _turns.setdefault(model, threading.RLock())
        self._hidden_size = model.config.get_text_config(decoder=True).hidden_size
        self._head = model.get_output_embeddings()
        self._last_mlp: nn.Module | None = None
        self._norms: dict[nn.Module, float] = {}
        self._takes_input = False
        self._frozen = None if self.layer is None else FrozenWeights(model, self.layer)
        self._below: dict[nn.Module, Beside | None] = {}
        with self._turn:
            self._find_what_is_allowed(cache)

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
        """How the batch will be scored. Sequences in the cache get packs of their own."""
        sequences = {tokens for example in batch for tokens in example.sequences}
        cache = self._bound_cache()
        cached = {tokens for tokens in sequences if cache is not None and tokens in cache}
        packs = (*self._lay_out(cached), *self._lay_out(sequences - cached))
        return plan_of(batch, packs, self._notes(len(cached)))

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
        return self._loss_sums(self._scores(plan, states, self._needs_normaliser(plan)), plan)

    def evaluate(self, plan: Plan) -> tuple[int, float, int]:
        """(hits, sum, weight): how often the gold option scores best, and `loss_sums`.

        Of equal scores the first option counts.
        """
        scores = self._scores(plan, (), self._needs_normaliser(plan))
        hits = scores[0].argmax(dim=-1) == gold_of(plan.batch)
        (total,), weight = self._loss_sums(scores, plan)
        return int(hits.sum()), total, weight

    @torch.inference_mode()
    def cache_prefixes(self, examples: Sequence[EncodedExample]) -> None:
        """Puts the tuned layer's inputs for these examples into the cache, while there is room.

        The same examples leave the same bits in a new cache, whatever was scored before; its folder
        gives only what was computed among the same neighbours.

        Raises:
            UserError: the cache's folder cannot be written.
        """
        with self._turn:
            cache = self._bound_cache()
            if cache is None:
                return
            sequences = {tokens for example in examples for tokens in example.sequences}
            for pack in self._lay_out(sequences):
                names = repr((pack.inputs["input_ids"].tolist(), list(pack.places)))
                neighbours = hashlib.sha256(names.encode()).hexdigest()
                missing = [tokens for tokens in pack.places if not cache.find(tokens, neighbours)]
                values = sum(map(len, missing)) * self._hidden_size
                if not cache.has_room(values * self.model.dtype.itemsize):
                    break
                if not missing:
                    continue
                hidden = self._layer_input(pack)
                for tokens in missing:
                    row, columns = pack.places[tokens]
                    cache.put(tokens, hidden[row, columns], neighbours)

    def _needs_normaliser(self, plan: Plan) -> bool:
        return self.loss == "gold" or not plan.one_token_options

    def _loss_sums(self, scores: Tensor, plan: Plan) -> tuple[list[float], int]:
        gold = gold_of(plan.batch)
        scores = scores.double()
        if self.loss == "options":
            sums = [F.cross_entropy(by_example, gold, reduction="sum") for by_example in scores]
            return [total.item() for total in sums], len(gold)
        tokens = on_cpu([len(e.options[e.gold].targets) for e in plan.batch])
        means = scores.gather(-1, gold.expand(len(scores), -1)[..., None])[..., 0]
        return (-(means * tokens).sum(-1)).tolist(), int(tokens.sum())

    def _lay_out(self, sequences: set[Tokens]) -> Iterator[Pack]:
        if self.trees_problem is None:
            trees = grow_trees(sequences, self._hidden_size)
            return pack_trees(trees, self.row_tokens, self._length_multiple)
        return pad_rows(sequences, self.row_tokens)

    @property
    def _length_multiple(self) -> int:
        # For each number of rows of a 16-bit matrix, torch compiles a kernel on CPUs, and keeps it.
        return 16 if self.model.dtype.itemsize == 2 else 1

    def _notes(self, cached: int) -> Iterator[str]:
        if self.trees_problem is None:
            yield "packed without padding, shared prefixes once"
        else:
            yield f"padded on the right, nothing shared: {self.trees_problem}"
        if self.mlp_problem is None:
            yield "the last layer's MLP at the positions that are read"
        else:
            yield f"the last layer's MLP at all positions: {self.mlp_problem}"
        yield f"{len(self._norms)} RMS norms by dlzo_kernels.rms_norm, others as the model has them"
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
        if self._takes_input:
            inputs = [
                self._layer_input(pack) if hidden is None else hidden
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
        parts = zip(plan.packs, plan.readouts, inputs, strict=True)
        each = [self._pack_log_probs(*part[:2], states, normalised, part[2]) for part in parts]
        return torch.cat(each, dim=-1)

    def _pack_log_probs(
        self,
        pack: Pack,
        readout: Readout,
        states: Sequence[State],
        normalised: bool,
        hidden: Tensor | None,
    ) -> Tensor:
        # Without the normaliser, the option tokens' rows of the output embeddings are enough.
        restricted = not normalised and _is_linear(self._head)
        vocabulary, column = readout.target.unique(return_inverse=True)
        state_count = max(1, len(states))
        with ExitStack() as stack:
            stack.enter_context(self._head_at(pack, readout, state_count, vocabulary, restricted))
            if self._last_mlp is not None:
                rows, multiple = len(pack.inputs["input_ids"]), self._length_multiple
                places = readout.row, readout.column
                stack.enter_context(only_at(self._last_mlp, rows, *places, multiple))
            if self.layer is not None and (states or hidden is not None):
                stack.enter_context(under_states(self.layer, states or [nullcontext], hidden))
            if hidden is not None:
                for layer, beside in self._below.items():
                    stack.enter_context(passed_by(layer, beside))
            logits = self._forward(pack).logits
        if logits.shape[:-1] != (1, state_count * len(readout.row)):
            raise self._unsupported("does not apply its output embeddings once to all tokens")
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logits = logits[0].unflatten(0, (state_count, -1))
        found = logits[:, readout.position, column if restricted else readout.target]
        if not restricted:
            found = found - logits.logsumexp(-1)[:, readout.position]
        return found.cpu()

    def _head_at(
        self, pack: Pack, readout: Readout, states: int, vocabulary: Tensor, restricted: bool
    ) -> AbstractContextManager[None]:
        """Lets the model apply its head to the read positions only, and sharper.

        The logits have shape (1, states * positions, vocabulary size), those of the token ids in
        `vocabulary` computed in float32 at least: bfloat16 rounds a logit of 16 to a multiple of
        1/8, more than a step changes it. `restricted` leaves all others out.
        """
        head, own_forward = self._head, self._head.forward
        shape = (states * len(pack.inputs["input_ids"]), pack.inputs["input_ids"].shape[1])

        def logits_at(hidden: Tensor) -> Tensor:
            if hidden.shape[:2] != shape:
                raise self._unsupported("does not keep one hidden state per token and state")
            hidden = hidden.unflatten(0, (states, -1))[:, readout.row, readout.column]
            hidden = hidden.flatten(0, 1)[None]
            if not _is_linear(head):
                return own_forward(hidden)
            hidden = hidden.to(head.weight.device)  # of several GPUs another one, perhaps
            dtype = torch.promote_types(hidden.dtype, torch.float32)
            bias = None if head.bias is None else head.bias[vocabulary].to(dtype)
            with torch.autocast(hidden.device.type, enabled=False):
                exact = F.linear(hidden.to(dtype), head.weight[vocabulary].to(dtype), bias)
            if restricted:
                return exact
            logits = own_forward(hidden).to(dtype)
            logits[..., vocabulary] = exact
            return logits

        return replaced_forward(head, logits_at)

    def _forward(self, pack: Pack) -> Any:
        inputs = {name: tensor.to(self.model.device) for name, tensor in pack.inputs.items()}
        trees = attend_within(self.model, pack.trees) if pack.trees is not None else nullcontext()
        with trees, by_kernel(self._norms), fast_products(self.model):
            return self.model(**inputs, use_cache=False)

    def _layer_input(self, pack: Pack) -> Tensor:
        """What the tuned layer sees: shape (rows, length, hidden size)."""
        assert self.layer is not None  # there is no cache without one
        with stopped_at(self.layer):
            try:
                self._forward(pack)
            except ReachedLayerError as reached:
                return reached.hidden.cpu()
        raise self._unsupported("does not run the tuned layer")

    def _bound_cache(self) -> PrefixCache | None:
        """The cache, holding nothing of other weights than there are now."""
        if self.cache is not None and self._frozen is not None:
            self.cache.bind(self._frozen.fingerprint())
        return self.cache

    def _cached_input(self, pack: Pack, cache: PrefixCache | None) -> Tensor | None:
        """The tuned layer's input if all of it is cached: shape (rows, length, hidden size)."""
        if cache is None:
            return None
        shape = (*pack.inputs["input_ids"].shape, self._hidden_size)
        hidden = torch.zeros(shape, dtype=self.model.dtype, device="cpu")
        for tokens, (row, columns) in pack.places.items():
            cached = cache.get(tokens)
            if cached is None:
                return None
            hidden[row, columns] = cached
        return hidden

    @torch.inference_mode()
    def _find_what_is_allowed(self, cache: PrefixCache | None) -> None:
        """Scores a few tokens in the plainest way and in the better ones."""
        first, second = self._trial_text(range(12)), self._trial_text((*range(8), *range(20, 26)))
        batch = _two_options(first, second)
        plain = plan_of(batch, pad_rows((first, second), row_tokens=1))
        expected = self._first_scores(plain)
        side_by_side = plan_of(batch, pad_rows((first, second), row_tokens=64))
        # What is not finite is told by what is scored.
        if expected.isfinite().all() and self._problem(side_by_side, (), expected) is not None:
            raise self._unsupported("looks at the tokens after a position or at other rows")
        self._norms = rms_norms(self.model)
        if self._problem(plain, (), expected) is not None:
            self._norms = {}
        self.mlp_problem = self._find_last_mlp(plain, expected)
        best = plan_of(batch, self._lay_out({first, second}))
        self.trees_problem = (
            hides_tokens(self.model, CHUNKS, self.max_length)
            or self._problem(best, (), expected)
            or self._leak()
        )
        if self.layer is not None:
            self._find_what_states_allow(cache, {first, second}, batch, expected)

    def _find_what_states_allow(
        self,
        cache: PrefixCache | None,
        sequences: set[Tokens],
        batch: Sequence[EncodedExample],
        expected: Tensor,
    ) -> None:
        """Whether states run side by side, and over an input that is given."""
        if (name := sharing_module(self.model, self.layers)) is not None:
            # A state would change more of the model than the tuned layers.
            shared = f"{name} shares weights with a tuned layer"
            self.states_problem, self.cache_problem = shared, shared
            return
        best = plan_of(batch, self._lay_out(sequences))
        if len(self.layers) > 1:
            self.states_problem = f"{len(self.layers)} layers are tuned"
        else:
            self.states_problem = self._problem(best, (nullcontext, nullcontext), expected)
            if self.trees_problem is not None and self.states_problem is None:
                # The model's mask has the rows of one state; short texts have none.
                self.states_problem = hides_tokens(self.model, WINDOWS + CHUNKS, self.max_length)
        if cache is not None or self.states_problem is not None:
            problem = self._find_whether_it_takes_an_input(best, expected)
            self._takes_input = problem is None
            self.cache = cache if problem is None else None
            self.cache_problem = problem if cache is not None else self.cache_problem

    def _first_scores(self, plan: Plan) -> Tensor:
        """The scores of the weights as they are, by way of all tuned layers."""
        reached: set[nn.Module] = set()
        with ExitStack() as stack:
            for layer in self.layers:
                hook = layer.register_forward_hook(lambda layer, *_: reached.add(layer))
                stack.enter_context(hook)
            expected = self._scores(plan, (), normalised=True)
        for name, module in self.model.named_modules():
            if module in self.layers and module not in reached:
                raise UserError(
                    f"{type(self.model).__name__} does not run {name} on a text alone: tune "
                    "another layer"
                )
        return expected

    def _trial_text(self, tokens: Iterable[int]) -> Tokens:
        """Tokens that the model has: one of letters may have few."""
        config = self.model.config.get_text_config(decoder=True)
        return tuple(token % config.vocab_size for token in tokens)

    def _find_last_mlp(self, plan: Plan, expected: Tensor) -> str | None:
        """Why the last layer's MLP cannot be left out where nothing is read; None if it can."""
        try:
            last = decoder_layers(self.model)[-1]
            names = layer_parts(last)["mlp"]
        except UserError as error:
            return str(error)
        if len(names) > 1:
            return f"{type(last).__name__} has it in parts ({', '.join(names)})"
        self._last_mlp = mlp = last.get_submodule(names[0])
        problem = self._problem(plan, (), expected)
        # In 16 bits what is seen of it elsewhere could pass for rounding.
        if problem is None and self._sees_elsewhere(mlp, plan):
            problem = f"{type(last).__name__} mixes tokens after it"
        if problem is not None:
            self._last_mlp = None
        return problem

    def _sees_elsewhere(self, mlp: nn.Module, plan: Plan) -> bool:
        """Whether the bits depend on the last MLP's output where it is left out."""
        zeros = self._scores(plan, (), normalised=True)

        def fill(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            return torch.where((output == 0).all(-1, keepdim=True), 1, output)

        with mlp.register_forward_hook(fill):
            return not torch.equal(zeros, self._scores(plan, (), normalised=True))

    def _leak(self) -> str | None:
        """Whether a tree sees another one: then its bits change with the other's."""
        scores = []
        for token in (0, 1):
            # At the first place all that follow see it, at the last it is next to the second text.
            first = self._trial_text((token, *range(2, 12), token))
            second = self._trial_text(range(12, 0, -1))
            packs = pack_trees(grow_trees((first, second), hidden_size=0), row_tokens=64)
            # Other targets would change which logits are sharp.
            options = (Option(0, second[-4:]), Option(1, second[-4:]))
            batch = [EncodedExample((first, second), options, gold=0)]
            scores.append(self._scores(plan_of(batch, packs), (), True)[0, 0, 1])
        same = torch.equal(*scores)
        return None if same else f"{type(self.model).__name__} lets packed texts see each other"

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

    def _find_whether_it_takes_an_input(self, plan: Plan, expected: Tensor) -> str | None:
        """Why the tuned layer's input cannot be given, as from a cache; None if it can."""
        layers = list(decoder_layers(self.model))
        below = layers[: layers.index(self.layer)] if self.layer in layers else []
        if not below:
            return "no decoder layer lies below the tuned one"

        def note(layer: nn.Module, _: Any, output: Any) -> None:
            self._below[layer] = _beside(output)

        with ExitStack() as stack:
            for layer in below:
                stack.enter_context(layer.register_forward_hook(note))
            self._scores(plan, (), normalised=True)
        self.cache = PrefixCache(memory_bytes=1 << 30)
        try:
            self.cache_prefixes(plan.batch)
        except _LED_ASTRAY as error:
            return self._refusal(error)
        return self._problem(plan, (nullcontext,), expected)

    def _problem(self, plan: Plan, states: Sequence[State], expected: Tensor) -> str | None:
        """How the plan's scores differ from those expected, None if they do not."""
        try:
            found = self._scores(plan, states, normalised=True)
        except _LED_ASTRAY as error:
            return self._refusal(error)
        distance = (found - expected).abs().max().item()
        if distance <= _CLOSE[self.model.dtype.itemsize]:
            return None
        return f"{type(self.model).__name__} would score otherwise, by {distance:.1g}"

    def _refusal(self, error: Exception) -> str:
        return f"{type(self.model).__name__} does not allow it ({error})"

    def _unsupported(self, what: str) -> UserError:
        return UserError(f"{type(self.model).__name__} {what}: choose a decoder-only model")


def _is_linear(head: nn.Module | None) -> TypeGuard[nn.Linear]:
    """Whether output embeddings are a product and a bias: some scale what comes of it."""
    return isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward


def _beside(output: Any) -> Beside | None:
    """What stands beside the hidden state in a decoder layer's output, left empty; None if bare."""
    if not isinstance(output, tuple | list):
        return None
    return type(output)([None] * (len(output) - 1))


def _two_options(first: Tokens, second: Tokens) -> list[EncodedExample]:
    """An example with two options, the ends of two sequences."""
    options = (Option(0, first[-4:]), Option(1, second[-4:]))
    return [EncodedExample((first, second), options, gold=0)]

"""What a model allows: each shortcut is tried on a few tokens, and kept where scores stay the same.

Nothing is known of any architecture by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dlzo.errors import UserError
from dlzo.models import decoder_layers, layer_parts, sharing_module
from dlzo.scoring.attention import CHUNKS, WINDOWS, UnsupportedAttentionError, hiding_setting
from dlzo.scoring.encoding import EncodedExample, Option
from dlzo.scoring.forward import Beside, State
from dlzo.scoring.layout import Pack, Tokens, grow_trees, on_cpu, pack_trees, pad_rows
from dlzo.scoring.norms import rms_norms
from dlzo.scoring.plan import Plan, plan_of
from dlzo.scoring.prefix import PrefixCache
from dlzo.scoring.runner import unsupported
from dlzo_kernels import LaunchError

if TYPE_CHECKING:
    from dlzo.scoring.scorer import Scorer

# How far two ways to the same mean log-probability may lie apart by rounding, by bytes of a number.
_CLOSE = {8: 1e-6, 4: 1e-3, 2: 0.3}
# How many times the change by another text's rounding is more than rounding.
_MORE_THAN_ROUNDING = 10
# What the many models raise where they are led off their beaten track.
_LED_ASTRAY = (
    *(UnsupportedAttentionError, UserError, RuntimeError, ValueError, TypeError),
    *(LookupError, AttributeError),
)
# Among these, what the machine raises, of which a model can do nothing.
_OF_THE_MACHINE = (torch.OutOfMemoryError, torch.AcceleratorError, LaunchError)


class Trial:
    """Scores two short texts in the plainest way, for better ones to be held against.

    Args:
        scorer: a new one, that takes no shortcut yet.

    Raises:
        UserError: the model cannot be scored, or does not run a tuned layer.
    """

    def __init__(self, scorer: Scorer) -> None:
        self.scorer, self.model = scorer, scorer.model
        self.texts = self._text(range(12)), self._text((*range(8), *range(20, 26)))
        self.batch = self._ends_of(*self.texts)
        self.plain = plan_of(self.batch, pad_rows(self.texts, row_tokens=1))
        self.name = type(self.model).__name__
        self.expected = self._first_scores()

    @torch.inference_mode()
    def set_shortcuts(self, cache: PrefixCache | None) -> None:
        """Lets the scorer take the shortcuts that keep its scores, and tells it why not others.

        Raises:
            UserError: the model looks at later tokens.
        """
        scorer, runner = self.scorer, self.scorer.runner
        # What is not finite is told by what is scored.
        if self.expected.isfinite().all() and self._looks_elsewhere():
            raise unsupported(self.model, "looks at the tokens after a position or at other rows")
        # Before the norms are others than those of what is expected.
        position_problem = self._position_problem()
        runner.norms = rms_norms(self.model)
        if self._score_problem(self.plain) is not None:
            runner.norms = {}
        scorer.mlp_problem = self._last_mlp_problem()
        scorer.trees_problem = (
            hiding_setting(self.model, CHUNKS, scorer.max_length)
            or position_problem
            or self._score_problem(self._best())
            or self._leak_problem()
        )
        if scorer.layer is not None:
            self._set_state_shortcuts(cache)

    def _text(self, tokens: Iterable[int]) -> Tokens:
        """Ordinary tokens that the model has: one of letters may have few.

        Its first ones are special or reserved: rounding to 16 bits moves the scores of such a text
        by as much as another forward would.
        """
        size = self.model.config.get_text_config(decoder=True).vocab_size
        return tuple((size // 8 + token) % size for token in tokens)

    def _ends_of(self, *texts: Tokens) -> list[EncodedExample]:
        """An example with the ends of texts for options, all of the same few tokens.

        A text's own last ones would do no better than its attention: strong embeddings that are
        tied to the output give a token itself all probability, whatever lies beside it.
        """
        targets = self._text(range(30, 34))
        return [EncodedExample(texts, tuple(Option(i, targets) for i in range(len(texts))), 0)]

    def _first_scores(self) -> Tensor:
        """The scores of the weights as they are, by way of all tuned layers."""
        layers = self.scorer.layers
        reached: set[nn.Module] = set()
        with ExitStack() as stack:
            for layer in layers:
                hook = layer.register_forward_hook(lambda layer, *_: reached.add(layer))
                stack.enter_context(hook)
            expected = self.scorer.scores(self.plain)
        for name, module in self.model.named_modules():
            if module in layers and module not in reached:
                raise UserError(
                    f"{self.name} does not run {name} on a text alone: tune another layer"
                )
        return expected

    def _best(self) -> Plan:
        """The plan of the texts by what is known to be allowed so far."""
        return plan_of(self.batch, self.scorer.lay_out(set(self.texts)))

    def _score_problem(self, plan: Plan, states: Sequence[State] = ()) -> str | None:
        """Why the plan's scores are not those expected; None if they are."""
        try:
            found = self.scorer.scores(plan, states)
        except _LED_ASTRAY as error:
            return self._refusal(error)
        distance = (found - self.expected).abs().max().item()
        if distance <= _CLOSE[self.model.dtype.itemsize]:
            return None
        return f"{self.name} would score otherwise, by {distance:.1g}"

    def _refusal(self, error: Exception) -> str:
        """What a model raised as a reason; errors of the machine are raised again."""
        if isinstance(error, _OF_THE_MACHINE):
            raise error
        return f"{self.name} does not allow it ({error})"

    def _looks_elsewhere(self) -> bool:
        """Whether a text's scores depend on the tokens after it or on other rows."""
        if self._score_problem(plan_of(self.batch, _in_rows(self.texts))) is not None:
            return True
        tails = [(self._text(range(start, start + 2)),) for start in (20, 40)]
        return not self._is_rounding(self._change_beside(tails, _in_front))

    def _position_problem(self) -> str | None:
        """Why positions cannot be given, as to packed texts; None if they can."""
        text = self.texts[0]
        packs = [replace(pack, trees=None) for pack in _in_trees([text])]
        try:
            found = self.scorer.scores(plan_of(self._ends_of(text), packs))
        except _LED_ASTRAY as error:
            return self._refusal(error)
        # In 16 bits scores at other positions could pass for those expected.
        if self._is_rounding((found - self.expected)[0, 0, 0].abs().item()):
            return None
        return f"{self.name} does not count positions from 0"

    def _last_mlp_problem(self) -> str | None:
        """Why the last layer's MLP cannot be left out where nothing is read; None if it can."""
        try:
            last = decoder_layers(self.model)[-1]
            names = layer_parts(last)["mlp"]
        except UserError as error:
            return str(error)
        if len(names) > 1:
            return f"{type(last).__name__} has it in parts ({', '.join(names)})"
        self.scorer.runner.last_mlp = mlp = last.get_submodule(names[0])
        problem = self._score_problem(self.plain)
        # In 16 bits what is seen of it elsewhere could pass for rounding.
        if problem is None and self._sees_elsewhere(mlp):
            problem = f"{type(last).__name__} mixes tokens after it"
        if problem is not None:
            self.scorer.runner.last_mlp = None
        return problem

    def _sees_elsewhere(self, mlp: nn.Module) -> bool:
        """Whether the bits depend on the last MLP's output where it is left out."""
        zeros = self.scorer.scores(self.plain)

        def fill(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            return torch.where((output == 0).all(-1, keepdim=True), 1, output)

        with mlp.register_forward_hook(fill):
            return not torch.equal(zeros, self.scorer.scores(self.plain))

    def _leak_problem(self) -> str | None:
        """Why texts cannot share a row, where one sees what lies beside it; None if they can."""
        # At the first place all that follow see it, at the last it is next to the second text.
        same = [self._text((token, *range(2, 12), token)) for token in (0, 1)]
        # Behind a text of another length, places in the row are not taken for positions; what then
        # lies behind keeps the row's length.
        six, twelve = (self._text(range(14, 14 + length)) for length in (6, 12))
        others = [*((other, six) for other in same), (self._text(range(2, 8)), twelve)]
        if self._is_rounding(self._change_beside(others, _in_trees)):
            return None
        return f"{self.name} scores a packed text otherwise with what lies beside it"

    def _is_rounding(self, change: float) -> bool:
        """Whether a score that should keep its bits changes by rounding alone."""
        return change == 0 or change <= _MORE_THAN_ROUNDING * self._rounding

    @cached_property
    def _rounding(self) -> float:
        """How far a text's score moves with texts in rows of their own, which nobody sees.

        Experts take the tokens of all texts at once, and round otherwise with how many these are.
        """
        alone = [(self._text(range(start, start + 12)),) for start in range(0, 48, 6)]
        one_ulp = torch.finfo(self.expected.dtype).eps * self.expected.abs().max().item()
        return max(self._change_beside(alone, _in_rows), one_ulp)

    def _change_beside(
        self,
        others: Iterable[Sequence[Tokens]],
        lay_out: Callable[[Sequence[Tokens]], Iterable[Pack]],
    ) -> float:
        """How far a text's score moves with which other ones are in its forward."""
        text = self._text(range(12, 0, -1))
        scores = []
        for beside in others:
            plan = plan_of(self._ends_of(text, *beside), lay_out((text, *beside)))
            scores.append(self.scorer.scores(plan)[0, 0, 0])
        return (torch.stack(scores) - scores[0]).abs().max().item()

    def _set_state_shortcuts(self, cache: PrefixCache | None) -> None:
        """Lets states run side by side, and over an input that is given, or tells why not."""
        scorer, tuned = self.scorer, self.scorer.layers
        if (name := sharing_module(self.model, tuned)) is not None:
            # A state would change more of the model than the tuned layers.
            shared = f"{name} shares weights with a tuned layer"
            scorer.states_problem, scorer.cache_problem = shared, shared
            return
        if len(tuned) > 1:
            scorer.states_problem = f"{len(tuned)} layers are tuned"
        else:
            scorer.states_problem = self._score_problem(self._best(), (nullcontext, nullcontext))
            if scorer.trees_problem is not None and scorer.states_problem is None:
                # The model's mask has the rows of one state; short texts have none.
                names = WINDOWS + CHUNKS
                scorer.states_problem = hiding_setting(self.model, names, scorer.max_length)
        if cache is not None or scorer.states_problem is not None:
            problem = self._input_problem()
            scorer.takes_input = problem is None
            scorer.cache = None
            if cache is not None:
                scorer.cache_problem = problem or self._write_problem()
                scorer.cache = cache if scorer.cache_problem is None else None

    def _input_problem(self) -> str | None:
        """Why the tuned layer's input cannot be given, as from a cache; None if it can."""
        layers = list(decoder_layers(self.model))
        lowest = self.scorer.layer
        below = layers[: layers.index(lowest)] if lowest in layers else []
        if not below:
            return "no decoder layer lies below the tuned one"

        def note(layer: nn.Module, _: Any, output: Any) -> None:
            self.scorer.runner.below[layer] = _beside(output)

        best = self._best()
        try:
            with ExitStack() as stack:
                for layer in below:
                    stack.enter_context(layer.register_forward_hook(note))
                self.scorer.scores(best)
            self.scorer.cache = PrefixCache(memory_bytes=1 << 30)
            self.scorer.cache_prefixes(self.batch)
        except _LED_ASTRAY as error:
            return self._refusal(error)
        return self._score_problem(best, (nullcontext,))

    def _write_problem(self) -> str | None:
        """Why a weight below the tuned layer could be written unseen; None if none could."""
        assert self.scorer.frozen is not None  # or nothing could be given
        hidden = self.scorer.frozen.untracked()
        if hidden is None:
            return None
        return f"{hidden} was made in inference mode, where nothing tells that it was written"


def _beside(output: Any) -> Beside | None:
    """What stands beside the hidden state in a decoder layer's output, left empty; None if bare."""
    if not isinstance(output, tuple | list):
        return None
    return type(output)([None] * (len(output) - 1))


def _in_trees(texts: Sequence[Tokens]) -> Iterator[Pack]:
    return pack_trees(grow_trees(texts, hidden_size=0), row_tokens=64)


def _in_rows(texts: Sequence[Tokens]) -> Iterator[Pack]:
    return pad_rows(texts, row_tokens=64)


def _in_front(texts: Sequence[Tokens]) -> Iterator[Pack]:
    """The first text, with the others behind it in its row."""
    row = on_cpu([[token for text in texts for token in text]])
    yield Pack({"input_ids": row}, {texts[0]: (0, torch.arange(len(texts[0]), device="cpu"))}, None)

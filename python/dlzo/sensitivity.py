"""How strong and how stable each layer's zeroth-order signal is, and how its effect grows.

Dominant-layer fine-tuning (arXiv 2606.05516) is explained there by two properties of the dominant
layer: high sensitivity to perturbations, and a place early in the residual stream, so that effects
propagate and accumulate through the later layers. This measures both for every layer.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dlzo.config import check_eps
from dlzo.errors import UserError
from dlzo.models import decoder_layers, dtype_name, sharing_module, sole_use
from dlzo.sampler import batch_of, step_seed
from dlzo.scoring import EncodedExample, Scorer
from dlzo.scoring.layout import Pack, pad_rows
from dlzo.scoring.scorer import ROW_TOKENS
from dlzo.sites import check_reached, forward, hidden_state
from dlzo.target import Target
from dlzo.tasks import Example, Task, get_task, load_split
from dlzo_kernels import zo_step


@dataclass(frozen=True)
class LayerSensitivity:
    """What was measured of one decoder layer.

    Attributes:
        layer: its index, from 0.
        signal: standard deviation over seeds of (L(+) - L(-)) / (2 eps), the projected gradient of
            a two-point step; the mean over batches. To first order in eps it is the norm of the
            layer's gradient.
        sign_stability: share of the pairs of batches on which L(+) - L(-) of one seed has the same
            sign; the mean over seeds. 0.5 is chance, 1 a direction that all batches agree on.
        growth: relative L2 change of the hidden state under +eps z, behind this layer and behind
            each later one; the mean over the tokens of the first batch, for the first seed.
    """

    layer: int
    signal: float
    sign_stability: float
    growth: list[float]


@dataclass(frozen=True)
class SensitivityReport:
    """The sensitivity of a model's layers on a task, and how it was measured."""

    model: str
    task: str
    dtype: str
    seeds: int
    batches: int
    batch_size: int
    eps: float
    seed: int
    layers: list[LayerSensitivity]

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return asdict(self)

    def table(self) -> Table:
        """The report as a table, the row with the strongest signal highlighted."""
        table = Table(
            title=escape(f"{self.model}: {self.task}, {self.dtype}, eps {self.eps:g}"),
            caption=f"{self.seeds} seeds, {self.batches} batches of {self.batch_size}; change: of "
            "the hidden state under +eps z, relative",
        )
        headings = ("layer", "signal", "sign stability", "change behind it", "at the end", "growth")
        for heading in headings:
            table.add_column(heading, justify="right")
        strongest = max(self.layers, key=lambda found: found.signal)
        for found in self.layers:
            first, last = found.growth[0], found.growth[-1]
            table.add_row(
                str(found.layer),
                f"{found.signal:.3g}",
                f"{found.sign_stability:.2f}",
                f"{first:.2e}",
                f"{last:.2e}",
                f"{last / first:.2f}x" if first else "",
                style="bold reverse green" if found is strongest else None,
            )
        return table


def check_sensitivity(
    task: str | Path,
    data_dir: str | Path,
    *,
    seeds: int,
    batches: int,
    batch_size: int,
    eps: float,
    seed: int,
) -> tuple[Task, Sequence[Example]]:
    """What can be told of a measurement without a model; arguments as of `sensitivity`.

    Returns:
        The task, and its training examples as they are scored.

    Raises:
        UserError: the task or its data cannot be used, or a number is out of its range.
    """
    for name, value, least in (
        ("seeds", seeds, 2),
        ("batches", batches, 2),
        ("batch_size", batch_size, 1),
        ("seed", seed, 0),
    ):
        if value < least:
            raise UserError(f"{name} is {value}: give at least {least}")
    check_eps(eps)
    definition = get_task(task)
    examples = definition.drawn(load_split(definition, data_dir, "train"))
    if batches * batch_size > len(examples):
        raise UserError(
            f"{batches} batches of {batch_size} share examples, of which the task has "
            f"{len(examples)} to train on: give fewer or smaller batches"
        )
    return definition, examples


def sensitivity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str | Path,
    data_dir: str | Path,
    *,
    layers: Sequence[int] | None = None,
    seeds: int = 8,
    batches: int = 4,
    batch_size: int = 16,
    eps: float = 1e-3,
    seed: int = 0,
    on_layer: Callable[[LayerSensitivity], None] = lambda _: None,
) -> SensitivityReport:
    """Measures decoder layers by two-point differences on a task's training examples.

    The weights are as before afterwards, bit for bit; a layer's figures do not depend on which
    other ones are measured.

    Args:
        model: a decoder-only model in eval mode, better in float32: in 16 bits much of the
            difference drowns in rounding.
        tokenizer: its tokenizer.
        task: name of the task, or path of a .yaml file that describes it.
        data_dir: folder of its train.jsonl.
        layers: which decoder layers; None for all.
        seeds: perturbations of each layer.
        batches: on which each of them is scored; no two share an example.
        batch_size: examples in a batch.
        eps: size of the perturbation.
        seed: of the perturbations and batches, which are those of a training run with it.
        on_layer: called with each layer's figures.

    Raises:
        UserError: the task or its data cannot be used, a number is out of its range, or the model
            cannot be scored, or its layers do not give one hidden state per token.
    """
    definition, examples = check_sensitivity(
        task, data_dir, seeds=seeds, batches=batches, batch_size=batch_size, eps=eps, seed=seed
    )
    chosen = range(len(decoder_layers(model))) if layers is None else layers
    if not chosen:
        raise UserError("layers is empty: give at least one, or None for all")
    for index in chosen:
        Target(model, (index,)).check_tunable()
    zs = [step_seed(seed, step) for step in range(1, seeds + 1)]
    found = []
    with sole_use(model):
        encoded = Scorer(model, tokenizer, loss=definition.loss).encode(examples)
        drawn = [batch_of(encoded, seed, step, batch_size) for step in range(1, batches + 1)]
        before = _hidden_states(model, drawn[0])
        for index in chosen:
            with _measured(model, index) as layer:
                scorer = Scorer(model, tokenizer, layer, loss=definition.loss)
                differences = [_differences(scorer, batch, zs, eps) for batch in drawn]
                with zo_step(layer, zs[0], eps, 0.0).plus():
                    after = _hidden_states(model, drawn[0])
            signal = fmean(stdev(batch) for batch in differences) / (2 * eps)
            growth = list(map(_relative_change, before[index:], after[index:]))
            found.append(LayerSensitivity(index, signal, _sign_stability(differences), growth))
            on_layer(found[-1])
    return SensitivityReport(
        str(model.name_or_path),
        definition.name,
        dtype_name(model.dtype),
        seeds,
        batches,
        batch_size,
        eps,
        seed,
        found,
    )


@contextmanager
def _measured(model: PreTrainedModel, index: int) -> Iterator[nn.Module]:
    """Puts a copy into a layer's place: `zo_step` keeps a float32 master while weights live.

    Of a layer that shares weights with others a copy would not move those: it is measured itself.
    """
    layers = decoder_layers(model)
    original = layers[index]
    if sharing_module(model, [original]) is not None:
        yield original
        return
    layers[index] = copy.deepcopy(original)
    try:
        yield layers[index]
    finally:
        layers[index] = original


def _differences(
    scorer: Scorer, batch: Sequence[EncodedExample], seeds: Sequence[int], eps: float
) -> list[float]:
    """L(+) - L(-) of each seed."""
    steps = [zo_step(scorer.layers, seed, eps, 0.0) for seed in seeds]
    states = [state for step in steps for state in (step.plus, step.minus)]
    losses = scorer.losses(scorer.plan(batch), states)
    if not all(map(math.isfinite, losses)):
        raise UserError(
            f"a loss is not finite under a perturbation of eps {eps}: give a smaller one"
        )
    return [plus - minus for plus, minus in zip(losses[::2], losses[1::2], strict=True)]


def _sign_stability(differences: Sequence[Sequence[float]]) -> float:
    """Share of pairs of batches (rows) on which a seed's (column's) differences agree in sign."""
    pairs = [
        first * second > 0
        for of_seed in zip(*differences, strict=True)
        for first, second in combinations(of_seed, 2)
    ]
    return sum(pairs) / len(pairs)


@torch.inference_mode()
def _hidden_states(model: PreTrainedModel, batch: Sequence[EncodedExample]) -> list[Tensor]:
    """The output of each decoder layer on the CPU: shape (tokens of the batch, hidden size)."""
    layers = decoder_layers(model)
    found: list[list[Tensor]] = [[] for _ in layers]

    def record(index: int, pack: Pack, _layer: nn.Module, _args: Any, output: Any) -> None:
        hidden = hidden_state(output, pack.inputs["input_ids"].shape)
        rows = [hidden[row, columns] for row, columns in pack.places.values()]
        found[index].append(torch.cat(rows).cpu())

    sequences = (s for example in batch for s in example.sequences)
    for pack in pad_rows(sequences, ROW_TOKENS[model.dtype.itemsize]):
        with ExitStack() as stack:
            for index, layer in enumerate(layers):
                hook = layer.register_forward_hook(partial(record, index, pack))
                stack.enter_context(hook)
            forward(model, pack.inputs["input_ids"])
    check_reached(model, found)
    return [torch.cat(parts) for parts in found]


def _relative_change(before: Tensor, after: Tensor) -> float:
    """Mean over tokens of |after - before| / |before|, with L2 norms over the channels."""
    before, after = before.double(), after.double()
    return ((after - before).norm(dim=-1) / before.norm(dim=-1)).mean().item()

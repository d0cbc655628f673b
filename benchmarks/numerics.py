"""How much of L(+) - L(-) drowns in rounding, by layer, eps and arithmetic.

    python benchmarks/numerics.py --data DIR

DIR holds train.jsonl in the form of SST-2. For each layer and eps, and a number of seeds, the
difference of the two losses of one batch is taken in several arithmetics. The reference is float32
throughout (its own rounding is some 1e-7 of the loss); all start from the same bfloat16 weights of
SmolLM2-135M-Instruct (de-quantised Q4_1). Lands in results/numerics.csv; what is there is kept.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from results import RESULTS, append, read_rows
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from dlzo.models import decoder_layers, load_model
from dlzo.sampler import batch_of, step_seed
from dlzo.scoring import PrefixCache, Scorer, State
from dlzo.tasks import get_task, load_split
from dlzo_kernels import zo_step

NUMERICS = RESULTS / "numerics.csv"
LAYERS = (11, 5)
EPSILONS = (1e-3, 1e-4, 1e-2, 3e-3, 3e-4)
SEEDS = 8
BATCH_SIZE = 16
FIELDS = ("layer", "eps", "arithmetic", "signal_rms", "error_rms", "share", "wrong_signs", "seeds")

Difference = Callable[[float, int], float]


class Arithmetics:
    """L(+) - L(-) of one batch for one layer, in each arithmetic."""

    def __init__(self, data: Path) -> None:
        self.task = get_task("sst2")
        rows = load_split(self.task, data, "train")
        self.examples = batch_of(rows, 0, 1, BATCH_SIZE)
        self.bfloat16, self.tokenizer = load_model("smollm2", dtype=torch.bfloat16)
        self.float32, _ = load_model("smollm2", dtype=torch.bfloat16)
        self.float32.float()

    def differences(self, layer: int) -> dict[str, Difference]:
        bf16, f32 = self.bfloat16, self.float32
        return {
            "float32": self._by_scorer(f32, layer),
            "float32, perturbed weights rounded to bfloat16": self._by_scorer(
                f32, layer, rounded=True
            ),
            "float32 sums, bfloat16 products": self._by_scorer(f32, layer, autocast=True),
            "bfloat16, option logits in float32": self._by_scorer(bf16, layer),
            "bfloat16 throughout": self._by_plain_logits(bf16, layer),
        }

    def _by_scorer(
        self, model: PreTrainedModel, layer: int, *, rounded: bool = False, autocast: bool = False
    ) -> Difference:
        tuned = decoder_layers(model)[layer]
        around = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
        scorer = Scorer(model, self.tokenizer, tuned, cache=PrefixCache(1 << 30))
        encoded = scorer.encode(self.examples)
        with around:
            scorer.cache_prefixes(encoded)

        def difference(eps: float, seed: int) -> float:
            step = zo_step(tuned, seed, eps, 0.0)
            states = [_rounded(tuned, s) if rounded else s for s in (step.plus, step.minus)]
            with around:
                plus, minus = scorer.losses(scorer.plan(encoded), states)
            return plus - minus

        return difference

    def _by_plain_logits(self, model: PreTrainedModel, layer: int) -> Difference:
        """The plain loop's arithmetic: logits, too, rounded to bfloat16."""
        tuned = decoder_layers(model)[layer]
        scorer = Scorer(model, self.tokenizer, tuned)
        encoded = scorer.encode(self.examples)
        gold = torch.tensor([example.gold for example in encoded])

        @torch.inference_mode()
        def loss() -> float:
            scores = []
            for example in encoded:
                logits = model(torch.tensor([example.sequences[0]]), use_cache=False).logits[0, -1]
                scores.append(logits[[option.targets[0] for option in example.options]])
            return F.cross_entropy(torch.stack(scores).float(), gold).item()

        def difference(eps: float, seed: int) -> float:
            step = zo_step(tuned, seed, eps, 0.0)
            with step.plus():
                plus = loss()
            with step.minus():
                minus = loss()
            return plus - minus

        return difference


def _rounded(layer: nn.Module, state: State) -> State:
    """The state with its weights rounded to bfloat16; the state itself puts them back."""

    @contextmanager
    def rounded() -> Iterator[None]:
        with state():
            with torch.no_grad():
                for parameter in layer.parameters():
                    parameter.copy_(parameter.bfloat16())
            yield

    return rounded


def rms(values: list[float]) -> float:
    return torch.tensor(values, dtype=torch.float64).square().mean().sqrt().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    arithmetics = Arithmetics(parser.parse_args().data)
    done = {(row["layer"], row["eps"]) for row in read_rows(NUMERICS)}
    for layer in LAYERS:
        differences = arithmetics.differences(layer)
        for eps in EPSILONS:
            if (str(layer), str(eps)) in done:
                continue
            found = {
                name: [difference(eps, step_seed(1, seed)) for seed in range(SEEDS)]
                for name, difference in differences.items()
            }
            truth = found["float32"]
            rows = []
            for name, values in list(found.items())[1:]:
                errors = [a - b for a, b in zip(values, truth, strict=True)]
                wrong = sum(a * b <= 0 for a, b in zip(values, truth, strict=True))
                row = (layer, eps, name, f"{rms(truth):.3e}", f"{rms(errors):.3e}")
                row += (f"{rms(errors) / rms(truth):.3f}", wrong, SEEDS)
                rows.append(dict(zip(FIELDS, row, strict=True)))
            append(NUMERICS, FIELDS, rows)


if __name__ == "__main__":
    main()

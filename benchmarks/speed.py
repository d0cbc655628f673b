"""A zeroth-order step of one layer against MeZO's step on the whole model, on the nine tasks.

    python benchmarks/speed.py --data DIR

DIR holds a folder for each task with its train.jsonl. The model is SmolLM2-135M-Instruct
(de-quantised Q4_1), the batch 16 rows in the order that training draws them, another one in each
round. A round runs every variant in turn, one that takes less than ten seconds three times, of
which the median counts; nothing else may be running. A round is run for every task before the next
one. Each time is appended to results/speed.csv and not measured again on the same processor, so a
run that was stopped goes on; the table (results/speed_table.csv) and the figure, which shows the
file's first processor, are made of what is there. Without --data nothing is measured.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from matplotlib.figure import Figure
from mezo import (
    Batch,
    batch_loss,
    encode_batch,
    inference,
    mezo_step,
    our_step,
    perturb_with_kernels,
)
from results import RESULTS, ROOT, append, markdown, matching, read_rows, write_rows
from timing import Call, processor, seconds
from transformers import PreTrainedModel

from dlzo.models import decoder_layers, load_model, parse_dtype
from dlzo.sampler import batch_of, step_seed
from dlzo.scoring import PrefixCache, Scorer
from dlzo.tasks import Example, get_task, load_split
from dlzo_kernels import zo_step

TIMES, TABLE = RESULTS / "speed.csv", RESULTS / "speed_table.csv"
FIGURE = ROOT / "docs" / "speed.png"
TASKS = ("copa", "sst2", "wsc", "rte", "cb", "boolq", "squad", "multirc", "drop")
DTYPES = ("bfloat16", "float32")
LAYER = 11  # of SmolLM2-135M, found by `dlzo probe`
BATCH_SIZE = 16
EPS, LR = 1e-3, 1e-6
VARIANTS = (
    *("two_inferences", "mezo", "mezo_our_kernels", "one_layer_plain_loop"),
    *("ours_cold", "ours_cached"),
)
KEY = ("processor", "dtype", "task", "round", "variant")
FIELDS = (*KEY, "ms", "positions")
group = itemgetter(*KEY[:2])
PAPER = 4.52  # the paper's best figure (COPA, LLaMA2-7B; arXiv 2606.05516)


class Contestants:
    """The variants of a step, each on the batch that it is given.

    MeZO's own and ours work on two copies of the model: MeZO's leaves its weights changed.
    """

    def __init__(self, dtype: str) -> None:
        self.plain, self.tokenizer = load_model("smollm2", dtype=parse_dtype(dtype))
        self.model, _ = load_model("smollm2", dtype=parse_dtype(dtype))
        self.layer = decoder_layers(self.model)[LAYER]

    def steps(
        self, task: str, examples: list[Example], seed: int
    ) -> Iterator[tuple[str, int, Call]]:
        """(variant, positions, step) in turn; what a step needs is made before it is handed out.

        Positions are those of tokens that a layer above the tuned one computes for one state.
        """
        training_loss = get_task(task).loss
        plain = self.plain
        batch = encode_batch(plain, self.tokenizer, examples, training_loss)
        padded = batch.input_ids.numel()
        yield "two_inferences", padded, lambda: [inference(plain, batch) for _ in range(2)]
        yield (
            "mezo",
            padded,
            lambda: mezo_step(plain, lambda: batch_loss(plain, batch), eps=EPS, lr=LR, seed=seed),
        )
        yield "mezo_our_kernels", padded, lambda: mezo_step_with_kernels(plain, batch, seed)
        yield (
            "one_layer_plain_loop",
            padded,
            lambda: zo_step(
                self.layer, seed, EPS, LR, closure=lambda: batch_loss(self.model, batch)
            ),
        )
        if training_loss == "gold":
            examples = [example.gold_only() for example in examples]
        for variant, cache in (("ours_cold", None), ("ours_cached", PrefixCache(1 << 31))):
            scorer = Scorer(self.model, self.tokenizer, self.layer, loss=training_loss, cache=cache)
            encoded = scorer.encode(examples)
            scorer.cache_prefixes(encoded)
            positions = scorer.plan(encoded).positions
            yield variant, positions, lambda: our_step(scorer, encoded, seed, EPS, LR)  # noqa: B023


def mezo_step_with_kernels(model: PreTrainedModel, batch: Batch, seed: int) -> None:
    """MeZO's four passes over all weights and two plain losses, with noise made on the fly."""
    parameters = list(model.parameters())
    perturb_with_kernels(parameters, seed, EPS)
    plus = batch_loss(model, batch)
    perturb_with_kernels(parameters, seed, -2 * EPS)
    minus = batch_loss(model, batch)
    perturb_with_kernels(parameters, seed, EPS)
    perturb_with_kernels(parameters, seed, -LR * ((plus - minus) / (2 * EPS)).item())


def measure(data: Path, tasks: Sequence[str], dtypes: Sequence[str], rounds: int) -> None:
    """Runs what is not yet in TIMES."""
    here = processor()
    measured = matching(TIMES, {"processor": here})
    done = {tuple(row[name] for name in KEY[1:]) for row in measured}
    rows = {task: load_split(get_task(task), data / task, "train") for task in tasks}
    for dtype in dtypes:
        missing = [
            (number, task)
            for number, task in itertools.product(range(1, rounds + 1), tasks)
            if not done.issuperset((dtype, task, str(number), variant) for variant in VARIANTS)
        ]
        if not missing:
            continue
        contestants = Contestants(dtype)
        warm: set[str] = set()
        for number, task in missing:
            examples = batch_of(rows[task], 0, number, BATCH_SIZE)
            steps = contestants.steps(task, examples, step_seed(0, number))
            for variant, positions, step in steps:
                if (dtype, task, str(number), variant) in done:
                    continue
                if variant not in warm:
                    step()
                    warm.add(variant)
                ms = f"{1e3 * steady_seconds(step):.1f}"
                values = here, dtype, task, number, variant, ms, positions
                append(TIMES, FIELDS, [dict(zip(FIELDS, values, strict=True))])


def steady_seconds(step: Call) -> float:
    """Of one run, or the median of three short ones, which a disturbance would show in."""
    first = seconds(step)
    return first if first > 10 else median([first, seconds(step), seconds(step)])


def tabulate() -> list[dict[str, Any]]:
    """A row for each processor, dtype and task: medians of times, and of ratios within a round."""
    rounds: dict[tuple[str, str, str], dict[str, dict[str, dict[str, str]]]] = {}
    for row in read_rows(TIMES):
        key = row["processor"], row["dtype"], row["task"]
        rounds.setdefault(key, {}).setdefault(row["round"], {})[row["variant"]] = row
    processors = list(dict.fromkeys(processor for processor, _, _ in rounds))

    def place(key: tuple[str, str, str]) -> tuple[int, int, int]:
        return processors.index(key[0]), DTYPES.index(key[1]), TASKS.index(key[2])

    return [
        dict(zip(KEY, key, strict=False)) | summary(whole)
        for key in sorted(rounds, key=place)
        if (whole := [found for found in rounds[key].values() if len(found) == len(VARIANTS)])
    ]


def summary(rounds: Sequence[dict[str, dict[str, str]]]) -> dict[str, Any]:
    """Of whole rounds, each with the row of every variant."""
    times = [{name: float(row["ms"]) for name, row in found.items()} for found in rounds]
    row: dict[str, Any] = {"rounds": len(rounds)}
    for variant in VARIANTS:
        row[f"{variant}_ms"] = round(median(by_variant[variant] for by_variant in times))
    for name, over, under in (
        ("mezo_over_cold", "mezo", "ours_cold"),
        ("mezo_over_cached", "mezo", "ours_cached"),
        ("cold_over_two_inferences", "ours_cold", "two_inferences"),
        ("cached_over_two_inferences", "ours_cached", "two_inferences"),
    ):
        ratios = [by_variant[over] / by_variant[under] for by_variant in times]
        row[name] = f"{median(ratios):.2f}"
        row[f"{name}_quartiles"] = _quartiles(ratios)
    for name, variant in (("plain_positions", "mezo"), ("our_positions", "ours_cold")):
        row[name] = round(median(int(found[variant]["positions"]) for found in rounds))
    return row


def _quartiles(values: list[float]) -> str:
    if len(values) < 3:
        return f"{min(values):.2f}..{max(values):.2f}"
    low, _, high = quantiles(values, n=4)
    return f"{low:.2f}..{high:.2f}"


def readable(row: dict[str, Any]) -> dict[str, str]:
    """A row of the table as docs/speed.md has it: seconds, and ratios with their quartiles."""
    names = {
        "mezo": "MeZO's step, s",
        "mezo_our_kernels": "with our kernels",
        "one_layer_plain_loop": "one layer, plain loop",
        "two_inferences": "two inferences",
        "ours_cold": "our step, s",
        "ours_cached": "prefix cached",
    }
    ratios = {
        "mezo_over_cold": "MeZO / ours",
        "mezo_over_cached": "MeZO / ours, cached",
        "cold_over_two_inferences": "ours / two inferences",
        "cached_over_two_inferences": "cached / two inferences",
    }
    return {
        "task": row["task"],
        "positions, plain / ours": f"{row['plain_positions']:,} / {row['our_positions']:,}",
        **{title: f"{row[f'{name}_ms'] / 1e3:.3g}" for name, title in names.items()},
        **{
            title: row[name] + (f" ({row[f'{name}_quartiles']})" if row["rounds"] > 1 else "")
            for name, title in ratios.items()
        },
        "rounds": row["rounds"],
    }


def draw(table: list[dict[str, Any]]) -> None:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots()
    rows = [row for row in table if group(row) == (table[0]["processor"], DTYPES[0])]
    places = range(len(rows))
    for shift, name, label in ((-0.2, "cold", "prefix computed"), (0.2, "cached", "prefix cached")):
        values = [float(row[f"mezo_over_{name}"]) for row in rows]
        bars = axes.bar([place + shift for place in places], values, 0.38, label=label)
        axes.bar_label(bars, fmt="%.1f", fontsize=8)
    label = f"best published: {PAPER} (COPA, LLaMA2-7B)"
    axes.axhline(PAPER, color="tab:red", lw=1, zorder=0, label=label)
    axes.set_xticks(places, [row["task"] for row in rows])
    axes.set_ylabel("times faster than MeZO's step")
    axes.set_title(
        "One step on the dominant layer of SmolLM2-135M, bfloat16, batch 16, two CPU cores",
        loc="left",
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.25)  # room for the legend
    axes.legend(frameon=False, ncols=3, loc="upper right")
    figure.savefig(FIGURE, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    if arguments.data:
        measure(arguments.data, arguments.tasks, arguments.dtypes, arguments.rounds)
    table = tabulate()
    write_rows(TABLE, table)
    draw(table)
    for title, rows in itertools.groupby(table, group):
        print(f"\n{', '.join(title)}\n\n{markdown([readable(row) for row in rows])}")


if __name__ == "__main__":
    main()

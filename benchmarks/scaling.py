"""How the step's time and memory grow: with tokens, layer, model size and threads.

    python benchmarks/scaling.py

Random token ids, 16 sequences of one length, one option token each, so that nothing but the shape
matters; SmolLM2-135M-Instruct (de-quantised Q4_1) in bfloat16, and random Llamas of other sizes.
Variants run in turn, medians are kept; nothing else may be running. The peak memory is that of a
process of its own, once its model is loaded: of steps, and of whole runs on the demo's sentences,
evaluation and all, against two inferences of their first batch. Lands in results/scaling.csv and
docs/scaling.png; with --draw only the figure is made, of the file that is there.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from matplotlib.figure import Figure
from mezo import encode_batch, inference, our_step
from results import RESULTS, ROOT, read_rows, write_rows
from timing import Call, interleaved
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dlzo.config import TrainConfig
from dlzo.demo import demo_data
from dlzo.models import decoder_layers, load_model
from dlzo.sampler import batch_of
from dlzo.scoring import EncodedExample, PrefixCache, Scorer
from dlzo.tasks import get_task, load_split
from dlzo.trainer import train

SCALING = RESULTS / "scaling.csv"
FIGURE = ROOT / "docs" / "scaling.png"
BATCH_SIZE = 16
ROUNDS = 7
LENGTHS = (8, 16, 32, 64, 128, 256)
LAYERS = (0, 5, 11, 17, 23, 29)
# Hidden size, intermediate size, layers, heads, key-value heads.
SIZES = {
    "5M": (192, 512, 12, 3, 3),
    "30M": (384, 1024, 16, 6, 3),
    "135M": (576, 1536, 30, 9, 3),
    "0.5B": (896, 4864, 24, 14, 2),
}
FIELDS = ("figure", "x", "two_inferences", "ours_cold", "ours_cached", "unit")


def batch(length: int, vocabulary: int) -> list[EncodedExample]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (BATCH_SIZE, length), generator=generator).tolist()
    return [EncodedExample.of_texts([([*row, 1], 1), ([*row, 2], 1)], 0) for row in tokens]


def variants(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    layer: int,
    examples: list[EncodedExample],
) -> dict[str, Call]:
    rows = torch.tensor([example.sequences[0] for example in examples])
    tuned = decoder_layers(model)[layer]

    @torch.inference_mode()
    def two_inferences() -> None:
        for _ in range(2):
            model(rows)

    def ours(cache: PrefixCache | None) -> Call:
        scorer = Scorer(model, tokenizer, tuned, cache=cache)
        scorer.cache_prefixes(examples)
        return lambda: our_step(scorer, examples, seed=0, eps=1e-3, lr=1e-6)

    return {
        "two_inferences": two_inferences,
        "ours_cold": ours(None),
        "ours_cached": ours(PrefixCache(1 << 31)),
    }


def milliseconds(steps: dict[str, Call]) -> dict[str, float]:
    times = interleaved(steps, ROUNDS)
    return {name: round(1e3 * median(values), 1) for name, values in times.items()}


def random_llama(size: str) -> PreTrainedModel:
    hidden, intermediate, layers, heads, kv_heads = SIZES[size]
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config).bfloat16().eval()


def measure() -> Iterator[tuple[object, ...]]:
    model, tokenizer = load_model("smollm2")  # the random models have its vocabulary
    vocabulary = model.config.vocab_size
    for length in LENGTHS:
        found = milliseconds(variants(model, tokenizer, 11, batch(length, vocabulary)))
        yield "tokens", length * BATCH_SIZE, *found.values(), "ms"
    for layer in LAYERS:
        found = milliseconds(variants(model, tokenizer, layer, batch(32, vocabulary)))
        yield "layer", layer, *found.values(), "ms"
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found = milliseconds(variants(model, tokenizer, 11, batch(32, vocabulary)))
        yield "threads", threads, *found.values(), "ms"
    for size in SIZES:
        random = random_llama(size)
        layer = len(decoder_layers(random)) * 11 // 30
        found = milliseconds(variants(random, tokenizer, layer, batch(32, vocabulary)))
        yield "size", size, *found.values(), "ms"
    for work in WORKS:
        memory = [peak_memory(work, name) for name in FIELDS[2:5]]
        yield "peak memory", work, *memory, "MB"


def peak_memory(work: str, variant: str) -> int:
    """Of a process of its own once its model is loaded, in 10^6 bytes."""
    command = [sys.executable, __file__, "--memory-of", work, variant]
    found = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ)
    return int(found.stdout.split()[-1])


def use_memory(work: str, variant: str) -> None:
    model, tokenizer = load_model("smollm2")
    # To load takes more than to run: from here on the peak counts (Linux).
    Path("/proc/self/clear_refs").write_text("5")
    WORKS[work](model, tokenizer, variant)
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]
    print(int(peak) * 1024 // 10**6)


def take_steps(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, variant: str) -> None:
    step = variants(model, tokenizer, 11, batch(64, model.config.vocab_size))[variant]
    for _ in range(3):
        step()


def run_on_demo(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, variant: str) -> None:
    task = get_task("sst2")
    with demo_data() as data, TemporaryDirectory() as folder:
        if variant == "two_inferences":
            rows = batch_of(load_split(task, data, "train"), 0, 1, BATCH_SIZE)
            padded = encode_batch(model, tokenizer, rows, task.loss)
            for _ in range(2):
                inference(model, padded)
            return
        cache = 0 if variant == "ours_cold" else 1000
        config = TrainConfig("sst2", layer=11, steps=20, eval_every=10, prefix_cache_mb=cache)
        train(model, tokenizer, config, data, Path(folder) / "out")


WORKS = {"steps of 16 x 64 tokens": take_steps, "training on the demo": run_on_demo}


def draw(rows: list[dict[str, str]]) -> None:
    figures = ("tokens", "layer", "size", "threads")
    figure = Figure(figsize=(15, 3.2), layout="constrained")
    *panels, last = figure.subplots(1, len(figures) + 1)
    for axes, name in zip(panels, figures, strict=True):
        chosen = [row for row in rows if row["figure"] == name]
        for variant in FIELDS[2:5]:
            values = [float(row[variant]) for row in chosen]
            axes.plot([row["x"] for row in chosen], values, "o-", ms=4, label=variant)
        axes.set(xlabel=name, yscale="log" if name in ("tokens", "size") else "linear")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("ms")
    figure.axes[0].legend(["two inferences", "our step", "our step, cached"], frameon=False)
    memory = [row for row in rows if row["figure"] == "peak memory"]
    for i, variant in enumerate(FIELDS[2:5]):
        places = [place + 0.28 * (i - 1) for place in range(len(memory))]
        last.bar(places, [float(row[variant]) for row in memory], 0.26)
    labels = [row["x"].replace(" of ", " of\n").replace(" on ", " on\n") for row in memory]
    last.set_xticks(range(len(memory)), labels, fontsize=8)
    last.set(xlabel="peak memory", ylabel="MB")
    figure.savefig(FIGURE, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        use_memory(*arguments.memory_of)
        return
    if not arguments.draw:
        write_rows(SCALING, [dict(zip(FIELDS, row, strict=True)) for row in measure()])
    draw(read_rows(SCALING))


if __name__ == "__main__":
    main()

"""The kernels and the step on an NVIDIA GPU, against the card's limits and against MeZO's.

    python benchmarks/gpu.py

Needs a CUDA device with 40 GB, torch, triton and nvcc; made to take less than 8 minutes. First the
card's own limits (limits.cu); then each kernel of both columns on a tensor as large as a decoder
layer of LLaMA2-7B; then attention against torch's; then three exact passes over that layer against
MeZO's four over it and over the whole model; then a whole two-point step on random weights of the
shapes of LLaMA2-7B and Qwen3-8B, on batches of the lengths of four tasks. Times are medians of runs
in turn, by CUDA events; MeZO's are taken by themselves, for its weights leave no room for more.
Lands in results/gpu_<card>.json after each part.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch
import transformers
from mezo import (
    Batch,
    batch_loss,
    inference,
    mezo_step,
    our_step,
    padded,
    perturb_with_kernels,
)
from results import RESULTS, write_json
from timing import Call
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

import dlzo_kernels as dk
from dlzo.models import decoder_layers
from dlzo.scoring import EncodedExample, PrefixCache, Scorer
from dlzo.tasks import TrainingLoss
from dlzo_kernels.ops import _gpu

LAYER = 202_383_360  # parameters of a decoder layer of LLaMA2-7B
ROUNDS = 9
BATCH_SIZE = 16
# Shape of a task's batch: options of an example, tokens of a prompt, tokens of an option.
TASKS = {"SST-2": (2, 28, 1), "COPA": (2, 16, 6), "RTE": (2, 80, 1), "SQuAD": (1, 190, 5)}
EPS, LR = 1e-3, 1e-6
# Random models have no tokenizer of their own, and random tokens need none.
WORDLESS = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel()))


def milliseconds(runs: dict[str, Call], rounds: int = ROUNDS) -> dict[str, float]:
    """Medians of runs that take turns, after one each to warm up."""
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            torch.cuda._sleep(2_000_000)  # while the host prepares its launches
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize()
            times[name].append(begin.elapsed_time(end))
    return {name: median(values) for name, values in times.items()}


def limits() -> dict[str, float]:
    source = Path(__file__).with_name("limits.cu")
    with tempfile.TemporaryDirectory() as folder:
        program = f"{folder}/limits"
        subprocess.run(["nvcc", "-O3", "-arch=native", "-o", program, str(source)], check=True)
        found = subprocess.run([program], check=True, capture_output=True, text=True)
    return json.loads(found.stdout)


def kernels(copy_bytes_per_s: float) -> Iterator[dict[str, object]]:
    """Each kernel's time on a layer, its traffic, and its share of what a copy reaches."""
    master = torch.randn(LAYER, device="cuda")
    live = master.bfloat16()
    tokens = torch.randn(16 * 2048, 4096, device="cuda", dtype=torch.bfloat16)
    seeds, scales = list(range(16)), [1e-6] * 16
    runs: dict[str, tuple[Call, int]] = {
        "gaussian float32": (lambda: dk.gaussian((LAYER,), 1, device="cuda"), 4 * LAYER),
        "perturb_ float32": (lambda: dk.perturb_(master, 1, 1e-3), 8 * LAYER),
        "perturb_ bfloat16": (lambda: dk.perturb_(live, 1, 1e-3), 4 * LAYER),
        "perturb_into bfloat16": (lambda: dk.perturb_into(live, master, 1, 1e-3), 6 * LAYER),
        "accumulate_ 1": (lambda: dk.accumulate_(master, [1], [1e-6], out=live), 10 * LAYER),
        "accumulate_ 16": (lambda: dk.accumulate_(master, seeds, scales, out=live), 10 * LAYER),
        "activation_stats tensor": (lambda: dk.activation_stats(tokens), tokens.nbytes),
        "activation_stats token": (lambda: dk.activation_stats(tokens, per="token"), tokens.nbytes),
        "activation_stats channel": (
            lambda: dk.activation_stats(tokens, per="channel"),
            tokens.nbytes,
        ),
    }
    for column in _gpu.COLUMNS:
        if _gpu.why_not(column):
            continue
        _gpu.select(column)
        for name, ms in milliseconds({name: run for name, (run, _) in runs.items()}).items():
            rate = runs[name][1] / (1e-3 * ms)
            share = rate / copy_bytes_per_s
            yield {"column": column, "kernel": name, "ms": ms, "GB/s": rate / 1e9, "share": share}
    _gpu.select_best()
    noise = {"torch.normal float32": lambda: torch.normal(0, 1, (LAYER,), device="cuda")}
    for name, ms in milliseconds(noise).items():
        yield {"column": "torch", "kernel": name, "ms": ms}


def attention() -> Iterator[dict[str, object]]:
    """A row of 16 texts with the heads of LLaMA2-7B, against torch's attention of the same texts.

    One call for each text, or one for a batch of them: all of one length, nothing is padded.
    """
    heads, size = 32, 128
    for length in (32, 128, 512):
        shape = BATCH_SIZE, heads, length, size
        batch = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
        row = [x.transpose(0, 1).reshape(1, heads, -1, size) for x in batch]
        parents = torch.arange(-1, BATCH_SIZE * length - 1)
        parents[::length] = -1

        def text_by_text(batch: list[Tensor] = batch) -> None:
            for text in zip(*(x.split(1) for x in batch), strict=True):
                F.scaled_dot_product_attention(*text, is_causal=True)

        runs = {
            "tree_attention": lambda row=row, p=parents: dk.tree_attention(*row, p),
            "torch, text by text": text_by_text,
            "torch, one batch": lambda b=batch: F.scaled_dot_product_attention(*b, is_causal=True),
        }
        found = milliseconds(runs)
        products = 2 * BATCH_SIZE * heads * size * length * (length + 1)
        rate = products / (1e9 * found["tree_attention"])
        yield {"tokens of a text": length, **found, "TFLOP/s": rate}


def llama2_7b() -> PretrainedConfig:
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=4096,
    )


def qwen3_8b() -> PretrainedConfig:
    return Qwen3Config(
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
    )


def random_model(config: PretrainedConfig) -> PreTrainedModel:
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval().requires_grad_(True)


def passes(model: PreTrainedModel, layer: nn.Module) -> dict[str, float]:
    """Three exact passes over a layer, and over the model tensor by tensor, against MeZO's four."""
    every = list(model.parameters())

    losses = itertools.cycle([torch.tensor(x, device="cuda") for x in (1.1, 1.0)])

    def exact() -> None:
        dk.zo_step(layer, 1, EPS, LR, closure=lambda: next(losses))

    def mezo(parameters: list[nn.Parameter]) -> None:
        loss = torch.ones((), device="cuda")
        mezo_step(model, lambda: loss, parameters, eps=EPS, lr=LR, seed=1)

    def with_our_kernels(parameters: list[nn.Parameter]) -> None:
        for scale in (EPS, -2 * EPS, EPS, -LR):
            perturb_with_kernels(parameters, 1, scale)

    of_layer = list(layer.parameters())
    ours = milliseconds({"layer, exact": exact})
    theirs = milliseconds(
        {
            "layer, MeZO": lambda: mezo(of_layer),
            "layer, MeZO with our kernels": lambda: with_our_kernels(of_layer),
            "model, MeZO": lambda: mezo(every),
            "model, MeZO with our kernels": lambda: with_our_kernels(every),
        },
        rounds=3,
    )
    return ours | theirs


def batches(model: PreTrainedModel, task: str) -> tuple[Batch, list[EncodedExample]]:
    """One random batch, as MeZO pads it and as we encode it."""
    options, prompt_length, option_length = TASKS[task]
    vocabulary = model.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    shape = (BATCH_SIZE, prompt_length)
    prompts = torch.randint(5, vocabulary, shape, generator=generator).tolist()
    endings = [[5 + option + i for i in range(option_length)] for option in range(options)]
    examples = [[(prompt + ending, option_length) for ending in endings] for prompt in prompts]
    texts, option_lengths = zip(*itertools.chain(*examples), strict=True)
    loss: TrainingLoss = "gold" if options == 1 else "options"
    counts, gold = [options] * BATCH_SIZE, [0] * BATCH_SIZE
    batch = padded(texts, option_lengths, counts, gold, loss, model.device)
    return batch, [EncodedExample.of_texts(texts, 0) for texts in examples]


def steps(model: PreTrainedModel, layer: nn.Module) -> Iterator[dict[str, object]]:
    """A whole step of each kind on the batch of each task."""
    for task in TASKS:
        batch, encoded = batches(model, task)
        runs = {
            "two inferences": lambda: [inference(model, batch) for _ in range(2)],  # noqa: B023
            "ours, prefix computed": ours(model, layer, encoded, batch, None),
            "ours, prefix cached": ours(model, layer, encoded, batch, PrefixCache(1 << 33)),
        }
        found = milliseconds(runs)
        # Apart: it writes all weights, of which ours keeps a copy for its layer.
        found |= milliseconds({"MeZO": lambda: mezo(model, batch)}, rounds=3)  # noqa: B023
        for variant in list(runs)[1:]:
            found[f"MeZO / {variant}"] = found["MeZO"] / found[variant]
            found[f"{variant} / two inferences"] = found[variant] / found["two inferences"]
        yield {"task": task, "padded positions": batch.input_ids.numel(), **found}


def mezo(model: PreTrainedModel, batch: Batch) -> None:
    mezo_step(model, lambda: batch_loss(model, batch), eps=EPS, lr=LR, seed=1)


def ours(
    model: PreTrainedModel,
    layer: nn.Module,
    encoded: list[EncodedExample],
    batch: Batch,
    cache: PrefixCache | None,
) -> Call:
    scorer = Scorer(model, WORDLESS, layer, loss=batch.training_loss, cache=cache)
    scorer.cache_prefixes(encoded)
    return lambda: our_step(scorer, encoded, seed=1, eps=EPS, lr=LR)


def keep(results: dict[str, object], card: str) -> None:
    """Writes what there is, and prints it."""
    write_json(RESULTS / f"gpu_{card.lower().replace(' ', '_')}.json", results)
    print(json.dumps(results, indent=1), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device")
    card = torch.cuda.get_device_name()
    results: dict[str, object] = {
        "command": "python benchmarks/gpu.py",
        "card": card,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "limits": (measured := limits()),
        "kernels": list(kernels(measured["copy_bytes_per_s"])),
        "attention": list(attention()),
    }
    keep(results, card)
    for name, config in (("LLaMA2-7B", llama2_7b()), ("Qwen3-8B", qwen3_8b())):
        model = random_model(config)
        layer = decoder_layers(model)[2]  # about where the outliers of such models begin
        found: dict[str, object] = {}
        if name == "LLaMA2-7B":
            found["passes"] = passes(model, layer)
        found["steps"] = list(steps(model, layer))
        results[f"{name}, random weights"] = found
        keep(results, card)
        del model, layer
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

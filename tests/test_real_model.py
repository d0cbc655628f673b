"""SmolLM2-135M itself: the dominant layer, and a fine-tune that helps."""

from __future__ import annotations

import json
from contextlib import nullcontext

import pytest
import torch

from dlzo.calibration import calibration_texts
from dlzo.config import TrainConfig
from dlzo.demo import demo_data
from dlzo.evaluation import evaluate
from dlzo.models import decoder_layers, load_model
from dlzo.probe import probe
from dlzo.scoring import PrefixCache, Scorer
from dlzo.tasks import get_task, load_split
from dlzo.trainer import train
from plain import plain_scores


def test_the_dominant_layer_is_11(smollm2):
    report = probe(*smollm2)
    assert report.decision.layer == 11
    assert report.decision.verdict == "dominant"
    assert report.decision.runner_up in (1, 2)
    assert report.depends_on == []
    assert report.layers[11].absmax > 10_000
    assert report.layers[10].absmax < 500
    # One channel, the same in the MLP's output and in the residual stream, at the first token.
    channels = {(s.site, s.layer): s.channels[0] for s in report.sites}
    block, mlp = channels["block", 11], channels["mlp", 11]
    assert (block.channel, block.texts, block.position) == (507, len(calibration_texts()), 0)
    assert mlp.channel == 507
    json.dumps(report.to_json(), allow_nan=False)


# Where rounding could pass for another result.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_its_scorer_takes_every_shortcut(dtype):
    model, tokenizer = load_model("smollm2", dtype=dtype)
    scorer = Scorer(model, tokenizer, decoder_layers(model)[11], cache=PrefixCache(1 << 20))
    assert (scorer.trees_problem, scorer.states_problem) == (None, None)
    assert (scorer.mlp_problem, scorer.cache_problem) == (None, None)
    assert len(scorer.runner.norms) == 61


def test_its_scores_are_those_of_forwards_one_by_one():
    model, tokenizer = load_model("smollm2", dtype=torch.float32)
    with demo_data() as data:
        examples = load_split(get_task("sst2"), data, "train")[:6]
    scorer = Scorer(model, tokenizer, decoder_layers(model)[11], cache=PrefixCache(1 << 30))
    batch = scorer.encode(examples)
    expected = torch.stack([plain_scores(model, tokenizer, example) for example in examples])
    anew = scorer.scores(scorer.plan(batch), [nullcontext])[0]
    scorer.cache_prefixes(batch)
    cached = scorer.scores(scorer.plan(batch), [nullcontext])[0]
    for found in (anew, cached):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


# Of each split: what a layer gains shows in a few steps on few texts.
ROWS = {"train": 96, "validation": 48, "test": 32}


def test_a_short_fine_tune_lowers_the_validation_loss(tmp_path):
    model, tokenizer = load_model("smollm2", dtype=torch.bfloat16)
    with demo_data() as data:
        for split, count in ROWS.items():
            rows = (data / f"{split}.jsonl").read_text().splitlines(keepends=True)
            (tmp_path / f"{split}.jsonl").write_text("".join(rows[:count]))
    config = TrainConfig("sst2", layer=11, eps=1e-2, steps=24, eval_every=12)
    metrics = train(model, tokenizer, config, tmp_path, tmp_path / "out")
    untuned = metrics["history"][0]["validation_loss"]
    assert metrics["best"]["loss"] < 0.9 * untuned
    assert metrics["skipped"] == 0
    assert evaluate(model, tokenizer, "sst2", tmp_path) == metrics["test"]

"""SmolLM2-135M itself: the dominant layer, and a fine-tune that helps."""

from __future__ import annotations

import json

import torch

from dlzo.config import TrainConfig
from dlzo.demo import demo_data
from dlzo.evaluation import evaluate
from dlzo.models import load_model
from dlzo.probe import probe
from dlzo.trainer import train


def test_the_dominant_layer_is_11(smollm2):
    report = probe(*smollm2)
    assert report.decision.layer == 11
    assert report.decision.verdict == "dominant"
    assert report.layers[11].absmax > 10_000
    assert report.layers[10].absmax < 500
    json.dumps(report.to_json(), allow_nan=False)


def test_a_short_fine_tune_lowers_the_validation_loss(tmp_path):
    model, tokenizer = load_model("smollm2", dtype=torch.bfloat16)
    config = TrainConfig("sst2", layer=11, steps=40, eval_every=20)
    with demo_data() as data:
        metrics = train(model, tokenizer, config, data, tmp_path / "out")
        untuned = metrics["history"][0]["validation_loss"]
        assert metrics["best"]["loss"] < 0.9 * untuned
        assert metrics["skipped"] == 0
        assert evaluate(model, tokenizer, "sst2", data) == metrics["test"]

"""Scores in the plainest way, by transformers alone."""

from __future__ import annotations

import torch


@torch.no_grad()
def plain_scores(model, tokenizer, example):
    """One whole forward for each option, all by itself."""
    prompt = tokenizer(example.prompt.strip(" ")).input_ids
    scores = []
    for option in example.options:
        tokens = tokenizer((example.prompt + option).strip(" ")).input_ids
        log_probs = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
        places = range(len(prompt), len(tokens))
        scores.append(torch.stack([log_probs[i - 1, tokens[i]] for i in places]).mean())
    return torch.stack(scores)

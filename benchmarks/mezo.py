"""MeZO as published (arXiv 2305.17333): the baseline that the package is measured against.

Written from its description, on plain transformers: one padded batch of whole texts, all logits,
and four passes over the weights that each draw the noise anew. Weight decay is left out: the
official update adds the term for matrices even where it is 0, so this one is a little faster.
Beside it what it is compared with: its passes with our noise, and our step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dlzo.scoring import EncodedExample, Scorer, max_length, truncate
from dlzo.tasks import Example, TrainingLoss
from dlzo_kernels import perturb_, zo_step
from dlzo_kernels.step import StepResult

PAD_TO_MULTIPLE_OF = 8


@dataclass(frozen=True)
class Batch:
    """The texts of a batch, one row for each option that is scored.

    Attributes:
        input_ids: int64 of shape (rows, length), padded on the left.
        attention_mask: int64 of the same shape, 0 at the padding.
        option_lengths: int64 of shape (rows,): how many of a row's last tokens are the option.
        option_counts: rows of each example.
        gold: int64 of shape (examples,): which of an example's rows is right.
        training_loss: the loss that the batch is for.
    """

    input_ids: Tensor
    attention_mask: Tensor
    option_lengths: Tensor
    option_counts: tuple[int, ...]
    gold: Tensor
    training_loss: TrainingLoss


def encode_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    training_loss: TrainingLoss,
) -> Batch:
    """All options of all examples in one batch on the model's device, or the gold ones alone."""
    if training_loss == "gold":
        examples = [example.gold_only() for example in examples]
    limit = max_length(model)
    texts, option_lengths = [], []
    for example in examples:
        prompt = tokenizer(example.prompt.strip(" ")).input_ids
        for option in example.options:
            tokens = tokenizer((example.prompt + option).strip(" ")).input_ids
            texts.append(truncate(tokens, limit, tokenizer))
            option_lengths.append(len(tokens) - len(prompt))
    option_counts = [len(example.options) for example in examples]
    gold = [example.gold for example in examples]
    return padded(texts, option_lengths, option_counts, gold, training_loss, model.device)


def padded(
    texts: Sequence[list[int]],
    option_lengths: Sequence[int],
    option_counts: Sequence[int],
    gold: Sequence[int],
    training_loss: TrainingLoss,
    device: torch.device,
) -> Batch:
    """Texts as tokens, padded on the left; the other arguments are the fields of Batch."""
    longest = max(map(len, texts))
    padding = [longest + -longest % PAD_TO_MULTIPLE_OF - len(text) for text in texts]
    rows = list(zip(padding, texts, strict=True))
    return Batch(
        input_ids=torch.tensor([[0] * n + text for n, text in rows], device=device),
        attention_mask=torch.tensor([[0] * n + [1] * len(text) for n, text in rows], device=device),
        option_lengths=torch.tensor(option_lengths, device=device),
        option_counts=tuple(option_counts),
        gold=torch.tensor(gold, device=device),
        training_loss=training_loss,
    )


@torch.inference_mode()
def inference(model: PreTrainedModel, batch: Batch) -> Tensor:
    """All logits of the batch, shape (rows, length, vocabulary size).

    The model is told no position ids, so that it counts the positions its own way: Llama's are
    relative, OPT's leave the padding out, and GPT-2's include it, as if the text began later.
    """
    return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits


@torch.inference_mode()
def batch_loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The training loss: a scalar in the dtype of the logits, on the model's device."""
    logits = inference(model, batch)[:, :-1]
    targets = batch.input_ids[:, 1:]
    from_end = torch.arange(targets.shape[1], 0, -1, device=targets.device)
    scored = from_end <= batch.option_lengths[:, None]
    if batch.training_loss == "gold":
        targets = targets.masked_fill(~scored, -100)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    log_probs = logits.log_softmax(dim=-1).gather(-1, targets[..., None]).squeeze(-1)
    means = (log_probs * scored).sum(dim=-1) / scored.sum(dim=-1)
    by_example = pad_sequence(means.split(batch.option_counts), True, -torch.inf)
    return F.cross_entropy(by_example, batch.gold)


def mezo_step(
    model: nn.Module,
    loss: Callable[[], Tensor],
    parameters: Iterable[nn.Parameter] | None = None,
    *,
    eps: float,
    lr: float,
    seed: int,
) -> StepResult:
    """One step: w -= lr * g * z with g = (L(w + eps z) - L(w - eps z)) / (2 eps).

    Seeds torch's global generator, and draws z in the dtype and on the device of each parameter.

    Args:
        model: set to evaluation mode.
        loss: the loss of the current weights, a scalar.
        parameters: what is tuned; by default all of the model's that require grad.
        eps: size of the perturbation.
        lr: step size.
        seed: of z.
    """
    model.eval()
    if parameters is None:
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    tuned = list(parameters)
    _perturb(tuned, seed, 1, eps)
    loss_plus = loss()
    _perturb(tuned, seed, -2, eps)
    loss_minus = loss()
    projected_grad = ((loss_plus - loss_minus) / (2 * eps)).item()
    _perturb(tuned, seed, 1, eps)
    torch.manual_seed(seed)
    for parameter in tuned:
        parameter.data = parameter.data - lr * (projected_grad * _noise(parameter))
    return StepResult([loss_plus.item(), loss_minus.item(), projected_grad, True])


def _perturb(parameters: Sequence[nn.Parameter], seed: int, scale: int, eps: float) -> None:
    torch.manual_seed(seed)
    for parameter in parameters:
        parameter.data = parameter.data + scale * _noise(parameter) * eps


def _noise(parameter: nn.Parameter) -> Tensor:
    return torch.normal(
        mean=0, std=1, size=parameter.shape, device=parameter.device, dtype=parameter.dtype
    )


def perturb_with_kernels(parameters: Iterable[nn.Parameter], seed: int, scale: float) -> None:
    """A pass as MeZO's, w += scale * z, with noise that our kernels make on the fly."""
    for stream, parameter in enumerate(parameters):
        perturb_(parameter.detach(), seed, scale, stream=stream)


def our_step(
    scorer: Scorer, encoded: Sequence[EncodedExample], seed: int, eps: float, lr: float
) -> None:
    """The step of `dlzo train`."""
    step = zo_step(scorer.layer, seed, eps, lr)
    step.update(*scorer.losses(scorer.plan(encoded), [step.plus, step.minus]))

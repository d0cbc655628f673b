from __future__ import annotations

import json
from contextlib import contextmanager, nullcontext
from functools import partial
from threading import Thread
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    BartConfig,
    BertConfig,
    BlenderbotConfig,
    Gemma3Config,
    Gemma3TextConfig,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MellumConfig,
    MllamaConfig,
    MptConfig,
    OpenAIGPTConfig,
    Phi3Config,
    PhimoeConfig,
    Qwen2MoeConfig,
    ReformerConfig,
    RobertaConfig,
    WhisperConfig,
    XGLMConfig,
    XLNetConfig,
)

from dlzo.errors import UserError
from dlzo.evaluation import evaluate
from dlzo.models import decoder_layers
from dlzo.scoring import PrefixCache, Scorer, attention, max_length, norms, runner, trial
from dlzo.scoring.norms import by_kernel, rms_norms
from dlzo.scoring.trial import Trial
from dlzo.sites import find_sites
from dlzo.tasks import Example, get_task, load_split
from dlzo_kernels import LaunchError, rms_norm
from dlzo_kernels.ops import _triton
from plain import plain_scores
from runs import TOKENIZER
from tiny import CONFIGS, HYBRIDS, STREAMS, VOCABULARY, byte_tokenizer, random_model, tiny_model

SENTIMENT = (" terrible", " great")
EXAMPLES = [
    Example("a fine film , and a long one It was", SENTIMENT, 1),
    Example("bad It was", SENTIMENT, 0),
    Example("so so ! It was", SENTIMENT, 0),
    Example("It was late , so", (" she left", " he", " nobody came at all"), 2),
    Example("It was late , so late", (" indeed", " it was"), 0),
]
# In float32 the order of sums differs with the shapes: a few units in the last place of scores
# around 8.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-13}


def tolerance(family, dtype):
    # Their softmax is float32 in any dtype.
    if family in ("gemma2", "bloom"):
        return max(1e-6, TOLERANCE[dtype])
    return TOLERANCE[dtype]


class Shift:
    """States that add to and take from every weight of a layer, exactly undone."""

    def __init__(self, layer, by=1 / 16):
        self.parameters = list(layer.parameters())
        self.by = by

    @contextmanager
    def shifted(self, by):
        kept = [p.detach().clone() for p in self.parameters]
        with torch.no_grad():
            for parameter in self.parameters:
                parameter.add_(by * torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, old in zip(self.parameters, kept, strict=True):
                    parameter.copy_(old)

    @property
    def states(self):
        return [partial(self.shifted, by) for by in (self.by, -self.by, self.by / 2)]


def assert_scores_as_plain(scorer, examples=EXAMPLES, *, atol):
    """Each score is that of a forward of one option alone."""
    (scores,) = scorer.scores(scorer.plan(scorer.encode(examples)))
    assert scores.dtype == torch.promote_types(scorer.model.dtype, torch.float32)
    for found, example in zip(scores, examples, strict=True):
        expected = plain_scores(scorer.model, scorer.tokenizer, example).to(scores.dtype)
        torch.testing.assert_close(found[: len(expected)], expected, rtol=0, atol=atol)
        assert (found[len(expected) :] == -torch.inf).all()


def plain_loss(model, tokenizer, examples, loss="options"):
    scores = [plain_scores(model, tokenizer, example) for example in examples]
    if loss == "options":
        losses = [
            F.cross_entropy(s, torch.tensor(e.gold)) for s, e in zip(scores, examples, strict=True)
        ]
        return torch.stack(losses).mean().item()
    tokens = [
        len(tokenizer((e.prompt + e.options[e.gold]).strip(" ")).input_ids)
        - len(tokenizer(e.prompt.strip(" ")).input_ids)
        for e in examples
    ]
    gold = [s[e.gold].item() * n for s, e, n in zip(scores, examples, tokens, strict=True)]
    return -sum(gold) / sum(tokens)


def plain_losses(model, tokenizer, states, loss="options"):
    """Of the examples, under each state."""
    losses = []
    for state in states:
        with state():
            losses.append(plain_loss(model, tokenizer, EXAMPLES, loss))
    return losses


@pytest.mark.parametrize("row_tokens", [60, 1000])
@pytest.mark.parametrize("words", [(), SENTIMENT], ids=["bytes", "words"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("family", CONFIGS)
def test_scores_equal_one_by_one_forwards(family, dtype, words, row_tokens):
    model, tokenizer = tiny_model(family, dtype), byte_tokenizer(*words)
    scorer = Scorer(model, tokenizer, row_tokens=row_tokens)
    assert_scores_as_plain(scorer, atol=tolerance(family, dtype))


@pytest.mark.parametrize("cached", [False, True], ids=["cold", "cached"])
@pytest.mark.parametrize("loss", ["options", "gold"])
@pytest.mark.parametrize(("row_tokens", "layer_index"), [(60, 3), (1000, 0)])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("family", CONFIGS)
def test_losses_equal_plain_passes(family, dtype, row_tokens, layer_index, loss, cached):
    model, tokenizer = tiny_model(family, dtype), byte_tokenizer()
    layer = decoder_layers(model)[layer_index]
    cache = PrefixCache(1 << 20)
    scorer = Scorer(model, tokenizer, layer, loss=loss, cache=cache, row_tokens=row_tokens)
    batch = scorer.encode(EXAMPLES)
    if cached:
        scorer.cache_prefixes(batch)
    assert (cache.used_bytes > 0) == (cached and layer_index > 0)
    states = Shift(layer).states
    losses = scorer.losses(scorer.plan(batch), states)
    expected = plain_losses(model, tokenizer, states, loss)
    assert losses == pytest.approx(expected, abs=tolerance(family, dtype))
    assert abs(losses[0] - losses[1]) > 30 * tolerance(family, dtype)


@pytest.mark.parametrize("cached", [False, True], ids=["cold", "cached"])
@pytest.mark.parametrize("tuned", [(3, 1), (0, 2), ()], ids=str)
@pytest.mark.parametrize("family", CONFIGS)
def test_losses_of_several_tuned_layers_and_of_the_whole_model(family, tuned, cached):
    model, tokenizer = tiny_model(family), byte_tokenizer()
    layers = [decoder_layers(model)[i] for i in tuned]
    cache = PrefixCache(1 << 20)
    scorer = Scorer(model, tokenizer, layers, cache=cache, row_tokens=60)
    batch = scorer.encode(EXAMPLES)
    if cached:
        scorer.cache_prefixes(batch)
    assert (cache.used_bytes > 0) == (cached and tuned == (3, 1))
    calls = []
    inside = next(decoder_layers(model)[0].children())
    hook = inside.register_forward_hook(lambda *_: calls.append(0))
    states = Shift(torch.nn.ModuleList(layers) if layers else model, 1 / 64).states
    plan = scorer.plan(batch)
    losses = scorer.losses(plan, states)
    # What lies below the lowest tuned layer runs once for all states, or comes from the cache.
    runs = len(states) if tuned != (3, 1) else not cached
    assert len(calls) == runs * len(plan.packs)
    hook.remove()
    expected = plain_losses(model, tokenizer, states)
    assert losses == pytest.approx(expected, abs=1e-5)
    assert abs(losses[0] - losses[1]) > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_each_architecture_allows(dtype):
    problems = {}
    for family in CONFIGS:
        model = tiny_model(family, dtype)
        layer = decoder_layers(model)[1]
        scorer = Scorer(model, byte_tokenizer(), layer, cache=PrefixCache(1 << 20))
        found = (
            scorer.mlp_problem,
            scorer.trees_problem,
            scorer.states_problem,
            scorer.cache_problem,
        )
        problems[family] = [problem is not None for problem in found]
    # Bloom takes no attention from outside, and its biases are made for one batch size.
    assert problems.pop("bloom") == [False, True, True, False]
    # OPT keeps the matrices of its MLP in the layer itself.
    assert problems.pop("opt") == [True, False, False, False]
    assert not any(any(found) for found in problems.values())


def test_reserved_tokens_do_not_decide_what_is_allowed(monkeypatch):
    model = tiny_model()
    embed = model.model.embed_tokens.forward

    def unsteady(ids):
        embedded = embed(ids)
        return embedded + (ids < 32).unsqueeze(-1) * torch.randn_like(embedded)

    monkeypatch.setattr(model.model.embed_tokens, "forward", unsteady)
    scorer = Scorer(model, byte_tokenizer(), decoder_layers(model)[1], cache=PrefixCache(1 << 20))
    assert (scorer.trees_problem, scorer.states_problem) == (None, None)
    assert (scorer.mlp_problem, scorer.cache_problem) == (None, None)


def test_a_leak_that_could_pass_for_rounding_is_noticed(monkeypatch):
    monkeypatch.setattr(Trial, "_score_problem", lambda *_: None)
    scorer = Scorer(tiny_model("bloom"), byte_tokenizer())
    assert "what lies beside it" in scorer.trees_problem


def test_a_leak_from_the_token_before_is_noticed(monkeypatch):
    model = tiny_model()
    embed = model.model.embed_tokens.forward

    def shifted(ids):
        hidden = embed(ids)
        return hidden + F.pad(hidden, (0, 0, 1, 0))[:, :-1]

    monkeypatch.setattr(model.model.embed_tokens, "forward", shifted)
    monkeypatch.setattr(Trial, "_score_problem", lambda *_: None)
    assert "what lies beside it" in Scorer(model, byte_tokenizer()).trees_problem


def decoder_alone(config, **more):
    """Of an encoder and a decoder the latter, its embeddings tied to the output and strong."""
    common = {"vocab_size": VOCABULARY, "max_position_embeddings": 256, "is_decoder": True}
    sizes = {"d_model": 32, "encoder_layers": 3, "decoder_layers": 3, "decoder_ffn_dim": 64}
    return random_model(config(**common, **sizes, decoder_attention_heads=4, init_std=0.2, **more))


_BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "model",
    [
        # Their positions are places in the row.
        partial(decoder_alone, BartConfig),
        partial(decoder_alone, BlenderbotConfig),
        # It counts positions from behind that of padding on.
        lambda: random_model(RobertaConfig(**_BERT, is_decoder=True, initializer_range=0.05)),
    ],
    ids=["bart", "blenderbot", "roberta"],
)
def test_a_model_with_positions_of_its_own_is_not_packed(model, dtype):
    model = model().to(dtype)
    scorer = Scorer(model, byte_tokenizer())
    assert scorer.trees_problem is not None
    assert_scores_as_plain(scorer, atol=1e-5 if dtype is torch.float32 else 0.1)


def test_strong_tied_embeddings_hide_no_leak():
    layers = {"num_layers": 3, "attention_heads": 4, "ffn_dim": 64}
    model = decoder_alone(XGLMConfig, **layers)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(8)
    assert "would score otherwise" in Scorer(model, byte_tokenizer()).trees_problem


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_unit_in_the_last_place_is_no_leak(dtype, monkeypatch):
    change = 1e-6  # of scores around 8

    def beside(self, others, lay_out):
        return change if lay_out is trial._in_trees else 0.0

    monkeypatch.setattr(Trial, "_change_beside", beside)
    assert Scorer(tiny_model("llama", dtype), byte_tokenizer()).trees_problem is None
    change = 1e-4
    problem = Scorer(tiny_model("llama", dtype), byte_tokenizer()).trees_problem
    assert "what lies beside it" in problem


@pytest.mark.parametrize("leaks", [False, True])
def test_roundings_that_change_with_the_company_are_no_leak(leaks, monkeypatch):
    """As of experts, whose products have as many rows as there are tokens for them in a forward."""
    model = tiny_model()
    mlp, embed = model.model.layers[1].mlp, model.model.embed_tokens
    mlp_forward, embed_forward = mlp.forward, embed.forward

    def rounded_otherwise(hidden):
        return mlp_forward(hidden) * (1 + 1e-5 * torch.sin(1000 * hidden.sum()))

    def shifted(ids):
        hidden = embed_forward(ids)
        return hidden + F.pad(hidden, (0, 0, 1, 0))[:, :-1] / 64

    monkeypatch.setattr(mlp, "forward", rounded_otherwise)
    if leaks:
        monkeypatch.setattr(embed, "forward", shifted)
        monkeypatch.setattr(Trial, "_score_problem", lambda *_: None)
    problem = Scorer(model, byte_tokenizer()).trees_problem
    assert ("what lies beside it" in problem) if leaks else problem is None


def test_weights_shared_with_another_layer_move_there_too():
    model, tokenizer = tiny_model(), byte_tokenizer()
    layer = model.model.layers[1]
    model.model.layers[3].mlp = layer.mlp
    scorer = Scorer(model, tokenizer, layer, cache=PrefixCache(1 << 20))
    assert scorer.states_problem == "model.layers.3.mlp.gate_proj shares weights with a tuned layer"
    plan, states = scorer.plan(scorer.encode(EXAMPLES)), Shift(layer).states
    expected = plain_losses(model, tokenizer, states)
    assert scorer.losses(plan, states) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("family", HYBRIDS)
def test_a_hybrid_of_several_classes_of_layers(family):
    model, tokenizer = random_model(HYBRIDS[family]()), byte_tokenizer()
    layer = decoder_layers(model)[1]
    scorer = Scorer(model, tokenizer, layer, cache=PrefixCache(1 << 20))
    batch = scorer.encode(EXAMPLES)
    scorer.cache_prefixes(batch)
    states = Shift(layer, 1 / 64).states
    expected = plain_losses(model, tokenizer, states)
    losses = scorer.losses(scorer.plan(batch), states)
    assert losses == pytest.approx(expected, abs=1e-5)
    assert abs(losses[0] - losses[1]) > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_mixes_tokens_after_the_last_mlp_is_noticed(dtype, monkeypatch):
    model = tiny_model("llama", dtype)
    layer = model.model.layers[-1]
    forward = layer.forward

    def mixed(*args, **kwargs):
        hidden = forward(*args, **kwargs)
        # So little that in 16 bits it could pass for rounding.
        return hidden + F.pad(hidden, (0, 0, 1, 0))[:, :-1] / 64

    monkeypatch.setattr(layer, "forward", mixed)
    assert Scorer(model, byte_tokenizer()).mlp_problem is not None


def test_what_lies_below_is_keyed_by_weights_that_layers_above_share(tmp_path):
    model, tokenizer = random_model(HYBRIDS["zamba2"]()), byte_tokenizer()
    losses = []
    for shift in (0.0, 0.1):
        with torch.no_grad():
            for parameter in decoder_layers(model)[1].shared_transformer.parameters():
                parameter.add_(shift * torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
        for cache in (PrefixCache(0, tmp_path), None):
            scorer = Scorer(model, tokenizer, decoder_layers(model)[2], cache=cache)
            batch = scorer.encode(EXAMPLES)
            scorer.cache_prefixes(batch)
            losses.append(scorer.losses(scorer.plan(batch))[0])
    assert losses[::2] == pytest.approx(losses[1::2], abs=1e-5)
    assert abs(losses[0] - losses[2]) > 1e-3


def experts(config, **more):
    common = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return config(**common, **heads, num_experts_per_tok=2, initializer_range=0.2, **more)


MIXTURES = {
    "no windows": (experts(Qwen2MoeConfig, num_experts=4), True),
    "windows by a mask": (
        experts(
            Qwen2MoeConfig,
            num_experts=4,
            sliding_window=8,
            use_sliding_window=True,
            max_window_layers=1,
        ),
        False,
    ),
    "windows in some layers": (
        experts(
            MellumConfig,
            moe_intermediate_size=16,
            head_dim=8,
            num_local_experts=4,
            sliding_window=8,
            layer_types=["full_attention", "sliding_attention"],
            mlp_layer_types=["sparse"] * 2,
        ),
        True,
    ),
}


@pytest.mark.parametrize(("config", "packed"), MIXTURES.values(), ids=MIXTURES)
def test_a_mixture_of_experts_is_packed_unless_it_windows_by_a_mask(config, packed):
    scorer = Scorer(random_model(config), byte_tokenizer())
    assert (scorer.trees_problem is None) == packed
    assert_scores_as_plain(scorer, atol=1e-5)


def test_what_a_model_raises_without_the_layers_below_is_a_reason(monkeypatch):
    model, tokenizer = tiny_model(), byte_tokenizer()
    monkeypatch.setattr(Scorer, "cache_prefixes", lambda *_: {}["sliding_attention"])
    scorer = Scorer(model, tokenizer, model.model.layers[1], cache=PrefixCache(1 << 20))
    assert "does not allow it ('sliding_attention')" in scorer.cache_problem


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError, torch.AcceleratorError, LaunchError], ids=str
)
def test_what_the_machine_raises_is_no_reason(error, monkeypatch):
    def failing(*_, **__):
        raise error("of the machine")

    monkeypatch.setattr(attention, "tree_attention", failing)
    with pytest.raises(error, match="of the machine"):
        Scorer(tiny_model(), byte_tokenizer())


@pytest.mark.parametrize(
    ("says", "error"),
    [("device kernel image is invalid", LaunchError), ("out of memory", torch.OutOfMemoryError)],
)
def test_a_kernel_that_cannot_be_loaded_is_no_reason(says, error, monkeypatch):
    def load(*_):
        raise RuntimeError(f"Triton Error [CUDA]: {says}")

    kernel = type("Kernel", (), {"__getitem__": load})()
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(_triton, "_compiled", lambda *_: kernel)
    plan = _triton.Plan(None, 1, (), {})
    launch = partial(_triton.launch, [plan], torch.device("cuda"))
    monkeypatch.setattr(attention, "tree_attention", lambda *_, **__: launch())
    with pytest.raises(error, match=says):
        Scorer(tiny_model(), byte_tokenizer())


def test_layers_that_give_named_tuples_are_given_no_input():
    config = ReformerConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        attention_head_size=8,
        num_attention_heads=4,
        feed_forward_size=64,
        attn_layers=["local"] * 3,
        local_attn_chunk_length=64,
        axial_pos_embds=False,
        max_position_embeddings=256,
        is_decoder=True,
    )
    model = random_model(config)
    layer = decoder_layers(model)[1]
    scorer = Scorer(model, byte_tokenizer(), layer, cache=PrefixCache(1 << 20))
    assert "does not allow it (ReformerOutput" in scorer.cache_problem
    states = Shift(layer).states
    losses = scorer.losses(scorer.plan(scorer.encode(EXAMPLES)), states)
    assert losses == pytest.approx(plain_losses(model, byte_tokenizer(), states), abs=1e-5)


def test_an_mlp_that_mixes_tokens_is_noticed(monkeypatch):
    model = tiny_model()
    mlp = model.model.layers[-1].mlp
    forward = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda hidden: forward(hidden.roll(1, dims=1)))
    scorer = Scorer(model, byte_tokenizer())
    assert "would score otherwise" in scorer.mlp_problem
    assert "MLP at all positions" in scorer.plan(scorer.encode(EXAMPLES)).explain()


def test_a_mask_that_is_no_window_is_noticed(monkeypatch):
    model = tiny_model()
    forward = model.model.layers[0].self_attn.forward

    def with_sinks(*args, **kwargs):
        return forward(*args, **kwargs, s_aux=torch.zeros(4))

    monkeypatch.setattr(model.model.layers[0].self_attn, "forward", with_sinks)
    scorer = Scorer(model, byte_tokenizer())
    assert "s_aux" in scorer.trees_problem
    plan = scorer.plan(scorer.encode(EXAMPLES))
    assert "s_aux" in plan.explain()
    assert all(pack.trees is None for pack in plan.packs)


def test_layers_below_run_once_and_layers_above_on_all_states():
    model, tokenizer = tiny_model(), byte_tokenizer()
    layers = decoder_layers(model)
    scorer = Scorer(model, tokenizer, layers[1], cache=PrefixCache(1 << 20))
    batch = scorer.encode(EXAMPLES)
    plan = scorer.plan(batch)
    seen = []
    layers[0].mlp.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[:2])))
    layers[2].mlp.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[:2])))
    scorer.losses(plan, Shift(layers[1]).states)
    assert seen == [(1, plan.positions), (3, plan.positions)]
    scorer.cache_prefixes(batch)
    seen.clear()
    scorer.losses(scorer.plan(batch), Shift(layers[1]).states)
    assert seen == [(3, plan.positions)]


def test_shared_prefixes_are_computed_once():
    scorer = Scorer(tiny_model(), byte_tokenizer())
    plan = scorer.plan(scorer.encode(EXAMPLES[3:]))
    texts = ["It was late , so" + o for o in (" she lef", " h", " nobody came at al")]
    texts += ["It was late , so late" + o for o in (" indee", " it wa")]
    prefixes = {text[:n] for text in texts for n in range(1, len(text) + 1)}
    assert plan.positions == len(prefixes)
    assert plan.padded_positions == 5 * len("It was late , so nobody came at all")


def test_head_sees_the_scored_positions_only():
    model, tokenizer = tiny_model(), byte_tokenizer(*SENTIMENT)
    scorer = Scorer(model, tokenizer)
    batch = scorer.encode(EXAMPLES[:3])
    seen = []
    model.lm_head.register_forward_hook(lambda _, args, out: seen.append(tuple(out.shape)))
    scorer.scores(scorer.plan(batch))
    # One token each, so the common normaliser and with it all other logits can be left out.
    scorer.losses(scorer.plan(batch))
    assert seen == [(1, 3, model.config.vocab_size), (1, 3, 2)]


@pytest.mark.parametrize("layer_index", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_the_last_mlp_sees_the_scored_positions_only(family, dtype, layer_index):
    model, tokenizer = tiny_model(family, dtype), byte_tokenizer()
    layers = decoder_layers(model)
    scorer = Scorer(model, tokenizer, layers[layer_index])
    plan = scorer.plan(scorer.encode(EXAMPLES))
    inside = next(m for m in layers[-1].mlp.modules() if isinstance(m, torch.nn.Linear))
    seen = []
    inside.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:-1].numel()))
    scorer.losses(plan, Shift(layers[layer_index]).states)
    multiple = 16 if dtype == torch.bfloat16 else 1
    read = sum(len(r.row) + -len(r.row) % multiple for r in plan.readouts)
    assert sum(seen) == 3 * read
    assert read < plan.positions


def test_padded_rows_of_several_states_side_by_side(monkeypatch):
    monkeypatch.setattr(Trial, "_leak_problem", lambda _: "padded rows are tested")
    model, tokenizer = tiny_model(), byte_tokenizer()
    layer = decoder_layers(model)[1]
    scorer = Scorer(model, tokenizer, layer, row_tokens=150)
    assert (scorer.states_problem, scorer.mlp_problem) == (None, None)
    plan = scorer.plan(scorer.encode(EXAMPLES))
    assert max(len(pack.inputs["input_ids"]) for pack in plan.packs) > 1
    states = Shift(layer).states
    losses = scorer.losses(plan, states)
    assert losses == pytest.approx(plain_losses(model, tokenizer, states), abs=1e-5)


def test_a_plan_serves_many_steps():
    model, tokenizer = tiny_model(), byte_tokenizer()
    layer = decoder_layers(model)[1]
    scorer = Scorer(model, tokenizer, layer, cache=PrefixCache(1 << 20))
    batch = scorer.encode(EXAMPLES)
    plan = scorer.plan(batch)
    cold = scorer.losses(plan, Shift(layer).states)
    scorer.cache_prefixes(batch)
    assert scorer.losses(plan, Shift(layer).states) == pytest.approx(cold, abs=1e-6)
    with torch.no_grad():
        decoder_layers(model)[0].mlp.down_proj.weight.mul_(2)
    # What was cached is of other weights now.
    fresh = Scorer(model, tokenizer, layer).losses(plan, Shift(layer).states)
    assert scorer.losses(plan, Shift(layer).states) == pytest.approx(fresh, abs=1e-6)
    assert fresh != pytest.approx(cold, abs=1e-3)


def test_loss_sums_of_shares_add_up():
    model, tokenizer = tiny_model(dtype=torch.float64), byte_tokenizer()
    layer = decoder_layers(model)[1]
    for loss in ("options", "gold"):
        scorer = Scorer(model, tokenizer, layer, loss=loss)
        batch = scorer.encode(EXAMPLES)
        states = Shift(layer).states
        (a, a_weight), (b, b_weight), (whole, weight) = (
            scorer.loss_sums(scorer.plan(part), states) for part in (batch[:2], batch[2:], batch)
        )
        assert a_weight + b_weight == weight
        assert [x + y for x, y in zip(a, b, strict=True)] == pytest.approx(whole, abs=1e-12)


@pytest.mark.parametrize(
    ("dtype", "by"),
    [
        (torch.float32, "dlzo_kernels.tree_attention"),
        (torch.float64, "torch, tree by tree: tree_attention does not take torch.float64"),
    ],
    ids=str,
)
def test_a_plan_says_by_what_attention_is(dtype, by):
    scorer = Scorer(tiny_model(dtype=dtype), byte_tokenizer())
    plan = scorer.plan(scorer.encode(EXAMPLES))
    assert [note for note in plan.notes if "attention" in note] == [f"attention by {by}"]


def test_rows_of_sixteen_bit_models_have_few_lengths():
    lengths = {}
    for dtype in (torch.float32, torch.bfloat16):
        scorer = Scorer(tiny_model(dtype=dtype), byte_tokenizer())
        encoded = scorer.encode(EXAMPLES)
        plans = [scorer.plan(encoded[:n]) for n in range(1, len(encoded) + 1)]
        lengths[dtype] = [plan.positions for plan in plans]
    for exact, rounded in zip(*lengths.values(), strict=True):
        assert rounded == exact + -exact % 16


@pytest.mark.parametrize(
    ("dtype", "most"),
    [(torch.float64, 512), (torch.float32, 1024), (torch.bfloat16, 2048), (torch.float16, 2048)],
)
def test_a_forward_takes_as_many_tokens_as_the_caches_bear(dtype, most):
    scorer = Scorer(tiny_model(dtype=dtype), byte_tokenizer())
    texts = [Example(f"{i} {' '.join(map(str, range(20)))}", (" a", " b"), 0) for i in range(80)]
    packs = scorer.plan(scorer.encode(texts)).packs
    assert most - 100 < max(pack.positions for pack in packs) <= most


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_that_the_kernel_computes_are_found(dtype):
    found = {family: len(rms_norms(tiny_model(family, dtype))) for family in CONFIGS}
    # OLMo-2 rounds once, which shows in 16 bits.
    once = {"olmo2": 17} if dtype == torch.float32 else {}
    expected = {"llama": 9, "mistral": 9, "qwen3": 17, **once}
    assert {family: count for family, count in found.items() if count} == expected


class OtherNorm(torch.nn.Module):
    """Llama's but for one thing."""

    def __init__(self, change):
        super().__init__()
        self.weight, self.eps, self.change = torch.nn.Parameter(torch.ones(32)), 1e-5, change

    def forward(self, x):
        x, eps = self.change(x), self.eps
        return self.weight * (x / (x * x).mean(-1, keepdim=True).add(eps).sqrt())


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (lambda x: x, True),
        (lambda x: x - x.mean(-1, keepdim=True), False),
        (lambda x: x.abs(), False),
        (lambda x: x.clamp(max=3), False),
        (lambda x: x.double(), False),
        (lambda x: x[..., :16], False),
    ],
)
def test_a_norm_is_known_by_what_it_does(change, same):
    assert (len(rms_norms(OtherNorm(change))) == 1) == same


def test_epsilon_counts_for_what_a_norm_does():
    norm = OtherNorm(lambda x: x)
    norm.eps, norm.other = "in other hands", 1e-4
    norm.forward = None
    assert rms_norms(norm) == {}
    del norm.forward
    assert rms_norms(norm) == {}  # the eps of its formula is no number
    norm.eps = 1e-5
    assert rms_norms(norm) == {norm: 1e-5}


def test_hooks_do_not_see_the_trial_and_see_what_is_scored():
    model = tiny_model()
    seen = []
    model.model.norm.register_forward_hook(lambda *_: seen.append(1))
    assert len(rms_norms(model)) == 9
    assert seen == []
    scorer = Scorer(model, byte_tokenizer())
    plan = scorer.plan(scorer.encode(EXAMPLES))
    seen.clear()
    scorer.losses(plan)
    assert len(seen) == len(plan.packs)


def test_the_kernel_computes_the_norms(monkeypatch):
    model, calls = tiny_model(), []

    def counted(x, *rest):
        calls.append(x)
        return rms_norm(x, *rest)

    monkeypatch.setattr(norms, "rms_norm", counted)
    scorer = Scorer(model, byte_tokenizer())
    plan = scorer.plan(scorer.encode(EXAMPLES))
    calls.clear()
    scorer.losses(plan)
    assert len(calls) == 9 * len(plan.packs)
    assert "9 RMS norms by dlzo_kernels.rms_norm" in plan.explain()
    # Where the kernel computed something else, the model's own norms would stay.
    monkeypatch.setattr(norms, "rms_norm", lambda x, *_: 2 * x)
    plan = Scorer(model, byte_tokenizer()).plan(plan.batch)
    assert "0 RMS norms by dlzo_kernels.rms_norm" in plan.explain()


def test_a_float32_residual_stream_is_cached_as_it_is():
    config = MambaConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=4, state_size=4,
        initializer_range=0.2,
    )  # fmt: skip
    model = random_model(config).bfloat16()
    layer = decoder_layers(model)[2]
    scorer = Scorer(model, byte_tokenizer(), layer, cache=PrefixCache(1 << 20))
    batch = scorer.encode(EXAMPLES)
    anew = scorer.losses(scorer.plan(batch), [nullcontext])
    scorer.cache_prefixes(batch)
    plan = scorer.plan(batch)
    assert "from the cache for 11 sequences" in plan.explain()
    assert scorer.losses(plan, [nullcontext]) == anew


def test_weights_that_are_not_in_memory_are_refused():
    model = tiny_model()
    model.model.layers[3].to("meta")
    with pytest.raises(UserError, match="of this LlamaForCausalLM are loaded for each forward"):
        Scorer(model, TOKENIZER)


def test_an_empty_batch_is_refused():
    with pytest.raises(UserError, match="batch to be scored is empty"):
        Scorer(tiny_model(), TOKENIZER).plan([])


def test_plan_explains_itself():
    model, tokenizer = tiny_model(), byte_tokenizer(*SENTIMENT)
    scorer = Scorer(model, tokenizer, decoder_layers(model)[1], cache=PrefixCache(1 << 20))
    batch = scorer.encode(EXAMPLES[:3])
    scorer.cache_prefixes(batch[:2])
    text = scorer.plan(batch).explain()
    assert "examples: 3, options: 6, distinct sequences: 3, their tokens: 59" in text
    assert "forwards: 2, positions: 59, of a plain padded batch: 216" in text
    assert "the option tokens' rows, positions: 3" in text
    assert "cache for 2 sequences" in text
    text = Scorer(model, tokenizer, loss="gold").plan(batch).explain()
    assert "output embeddings: all rows, positions: 3" in text


@pytest.mark.parametrize("family", [*CONFIGS, *HYBRIDS])
def test_logits_of_few_positions_exist_at_once(family, monkeypatch):
    model = tiny_model(family) if family in CONFIGS else random_model(HYBRIDS[family]())
    layer, states = decoder_layers(model)[1], Shift(decoder_layers(model)[1], 1 / 64).states
    scorer = Scorer(model, byte_tokenizer(), layer, loss="gold", cache=PrefixCache(1 << 20))
    batch = scorer.encode(EXAMPLES)
    seen, runs = [], []
    head, inside = model.get_output_embeddings(), next(decoder_layers(model)[0].children())
    head.register_forward_hook(lambda _, __, out: seen.append(out.shape[:-1].numel()))
    inside.register_forward_hook(lambda *_: runs.append(0))
    expected = scorer.losses(scorer.plan(batch), states)
    (most, *_), once = sorted(seen, reverse=True), len(runs)
    seen.clear()
    monkeypatch.setattr(runner, "LOGIT_BYTES", 4 * VOCABULARY * len(states) * 7)
    assert scorer.losses(scorer.plan(batch), states) == pytest.approx(expected, abs=1e-5)
    assert max(seen) <= 7 * len(states) < most
    assert len(runs) == 2 * once


def test_options_of_one_token_share_the_prompt():
    scorer = Scorer(tiny_model(), byte_tokenizer(*SENTIMENT))
    (encoded,) = scorer.encode(EXAMPLES[:1])
    assert len(encoded.sequences) == 1
    assert [option.sequence for option in encoded.options] == [0, 0]
    (apart,) = Scorer(tiny_model(), byte_tokenizer()).encode(EXAMPLES[:1])
    assert len(apart.sequences) == 2


def test_autocast_leaves_the_option_logits_in_float32():
    model, tokenizer = tiny_model(), byte_tokenizer(*SENTIMENT)
    scorer = Scorer(model, tokenizer)
    plan = scorer.plan(scorer.encode(EXAMPLES[:3]))
    # The same hidden states in any arithmetic.
    model.model.norm.register_forward_hook(lambda _, args, out: torch.ones_like(out) / 3)
    expected = scorer.losses(plan)
    with torch.autocast("cpu", torch.bfloat16):
        assert scorer.losses(plan) == expected


def test_sixteen_bit_models_have_float32_logits_for_the_options():
    model = tiny_model(dtype=torch.bfloat16)
    tokenizer = byte_tokenizer(*SENTIMENT)
    scorer = Scorer(model, tokenizer)
    batch = scorer.encode(EXAMPLES[:3])
    seen = []
    model.model.norm.register_forward_hook(lambda _, args, out: seen.append(out[0].float()))
    (scores,) = scorer.scores(scorer.plan(batch))
    weights = model.lm_head.weight.detach().float()
    terrible, great = weights[tokenizer.convert_tokens_to_ids(list(SENTIMENT))]
    readout = scorer.plan(batch).readouts[0]
    expected = (seen[0] @ (great - terrible))[readout.column]
    expected = expected[readout.position[readout.option.argsort()[::2]]]
    # The model's own bfloat16 logits are off by 100 times more.
    torch.testing.assert_close(scores[:, 1] - scores[:, 0], expected, rtol=0, atol=1e-5)


def test_evaluate_counts_hits_and_sums_the_loss():
    model, tokenizer = tiny_model(), byte_tokenizer()
    scorer = Scorer(model, tokenizer)
    hits, total, weight = scorer.evaluate(scorer.plan(scorer.encode(EXAMPLES)))
    right = [plain_scores(model, tokenizer, e).argmax().item() == e.gold for e in EXAMPLES]
    assert (hits, weight) == (sum(right), len(EXAMPLES))
    assert total / weight == pytest.approx(plain_loss(model, tokenizer, EXAMPLES), abs=1e-5)


def test_spaces_only_are_stripped():
    scorer = Scorer(tiny_model(), byte_tokenizer())
    (encoded,) = scorer.encode([Example("  \tso  ", (" no \n",), 0)])
    assert encoded == scorer.encode([Example("\tso  ", (" no \n",), 0)])[0]
    tokens = scorer.tokenizer("\tso   no \n").input_ids
    assert encoded.sequences == (tuple(tokens[:-1]),)
    assert encoded.options[0].targets == tuple(tokens[3:])


@pytest.mark.parametrize("bos", [False, True])
def test_long_texts_lose_their_beginning_but_not_the_start_token(bos):
    tokenizer = byte_tokenizer("<s>")
    if bos:
        tokenizer.bos_token = "<s>"
    scorer = Scorer(tiny_model(), tokenizer)
    start = "<s>" if bos else ""
    (encoded,) = scorer.encode([Example(start + "ab" * 300, (" no",), 0)])
    expected = tokenizer(start).input_ids + tokenizer("ab" * 300 + " no").input_ids[bos - 256 :]
    assert list(encoded.sequences[0]) == expected[:-1]
    assert encoded.options[0].targets == tuple(tokenizer(" no").input_ids)


@pytest.mark.parametrize(
    "example",
    [
        Example("It was", ("",), 0),
        Example("It was", ("  ",), 0),
        Example("", (" great",), 0),
        Example("It was", (" x" * 200,), 0),
    ],
    ids=["empty option", "blank option", "empty prompt", "long option"],
)
def test_an_option_that_cannot_be_scored_is_refused(example):
    with pytest.raises(UserError, match="option "):
        Scorer(tiny_model(), byte_tokenizer()).encode([example])


def test_model_is_put_back_after_an_error():
    model = tiny_model()
    layer = decoder_layers(model)[1]
    scorer = Scorer(model, byte_tokenizer(), layer)
    plan = scorer.plan(scorer.encode(EXAMPLES))

    def failing():
        raise KeyboardInterrupt

    before = scorer.scores(plan)
    with pytest.raises(KeyboardInterrupt):
        scorer.losses(plan, [nullcontext, failing])
    assert not any("forward" in vars(module) for module in model.modules())
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(scorer.scores(plan), before)


def test_a_layer_outside_the_model_is_refused():
    with pytest.raises(UserError, match="Linear outside the model"):
        Scorer(tiny_model(), byte_tokenizer(), torch.nn.Linear(2, 2))


def test_several_layers_are_decoder_layers():
    model = tiny_model()
    with pytest.raises(UserError, match="LlamaMLP outside the model"):
        Scorer(model, byte_tokenizer(), [model.model.layers[1], model.model.layers[2].mlp])


def test_dropout_is_off():
    model = tiny_model("gpt2").train()
    scorer = Scorer(model, byte_tokenizer())
    plan = scorer.plan(scorer.encode(EXAMPLES))
    assert torch.equal(scorer.scores(plan), scorer.scores(plan))


def test_threads_take_turns_at_a_model():
    model, tokenizer = tiny_model(), byte_tokenizer()
    layers = decoder_layers(model)
    scorers = [Scorer(model, tokenizer, layers[i]) for i in (1, 2)]
    plans = [scorer.plan(scorer.encode(EXAMPLES)) for scorer in scorers]
    states = [Shift(scorer.layer).states for scorer in scorers]
    expected = [s.losses(p, st) for s, p, st in zip(scorers, plans, states, strict=True)]
    found = [[], []]

    def score(i):
        found[i] = [scorers[i].losses(plans[i], states[i]) for _ in range(20)]

    threads = [Thread(target=score, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[expected[0]] * 20, [expected[1]] * 20]


def test_a_loss_of_another_name_is_refused():
    with pytest.raises(UserError, match="loss is 'option': choose options or gold"):
        Scorer(tiny_model(), byte_tokenizer(), loss="option")


def test_a_model_of_letters_has_few_tokens():
    config = CONFIGS["llama"]()
    config.vocab_size = 5
    model = random_model(config)
    scorer = Scorer(model, byte_tokenizer(), decoder_layers(model)[1], cache=PrefixCache(10**6))
    assert scorer.trees_problem is None and scorer.cache_problem is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "config",
    [
        BertConfig(**_BERT, initializer_range=0.2),
        # So weak that it could pass for rounding.
        BertConfig(**_BERT, initializer_range=0.02),
        XLNetConfig(vocab_size=VOCABULARY, d_model=32, n_layer=2, n_head=4, d_inner=64),
        STREAMS["cpmant"](),
    ],
    ids=["bert", "weak", "xlnet", "cpmant"],
)
def test_a_model_that_sees_what_follows_is_refused(config, dtype):
    model = random_model(config).to(dtype)
    with pytest.raises(UserError, match="looks at the tokens after a position"):
        Scorer(model, byte_tokenizer())


@pytest.mark.parametrize(("chunk", "packed"), [(16, False), (256, True)])
def test_attention_in_chunks_is_packed_where_no_text_fills_one(chunk, packed):
    config = Llama4TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        intermediate_size_mlp=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        max_position_embeddings=256,
        attention_chunk_size=chunk,
        layer_types=["chunked_attention", "full_attention"],
        initializer_range=0.2,
    )
    scorer = Scorer(random_model(config), byte_tokenizer())
    assert (scorer.trees_problem is None) == packed
    assert_scores_as_plain(scorer, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_head_that_does_more_than_a_product_is_left_to_itself(dtype):
    class Scaled(nn.Linear):
        def forward(self, x):
            return 3 * super().forward(x)

    model = tiny_model("llama", dtype)
    head = Scaled(*reversed(model.lm_head.weight.shape), bias=False, dtype=dtype)
    head.weight = model.lm_head.weight
    model.lm_head = head
    scorer = Scorer(model, byte_tokenizer(*SENTIMENT))
    examples = EXAMPLES[:3]
    plan = scorer.plan(scorer.encode(examples))
    assert "output embeddings: all rows" in plan.explain()
    assert_scores_as_plain(scorer, examples, atol=1e-5 if dtype is torch.float32 else 0.3)


def test_windows_by_a_mask_are_those_of_each_state():
    config = PhimoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=256,
        sliding_window=20,  # more than the texts of the trial have, fewer than these
        initializer_range=0.2,
    )
    model = random_model(config)
    layer = decoder_layers(model)[1]
    scorer = Scorer(model, byte_tokenizer(), layer)
    states = Shift(layer).states
    losses = scorer.losses(scorer.plan(scorer.encode(EXAMPLES)), states)
    assert losses == pytest.approx(plain_losses(model, byte_tokenizer(), states), abs=1e-5)


class OneVector(nn.Module):
    """What a norm has; what it does is left to the test."""

    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6


def test_a_norm_that_takes_a_gate_is_left_to_the_model():
    class Gated(OneVector):
        def forward(self, x, gate=None):
            return rms_norm(x, self.weight, self.eps) * gate.to(x.dtype)

    assert rms_norms(nn.Sequential(Gated())) == {}


def test_a_norm_that_may_take_a_gate_is_the_kernels_without_one():
    class Gated(OneVector):
        def forward(self, x, gate=None):
            return rms_norm(x if gate is None else x * gate, self.weight, self.eps)

    norm, x = Gated(), torch.randn(3, 8)
    norms = rms_norms(nn.Sequential(norm))
    assert norms == {norm: 1e-6}
    with torch.no_grad(), by_kernel(norms):
        assert torch.equal(norm(x), rms_norm(x, norm.weight, 1e-6))
        assert torch.equal(norm(x, gate=x), rms_norm(x * x, norm.weight, 1e-6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_that_runs_twice_in_a_forward_is_given_no_input(dtype):
    model = tiny_model(dtype=dtype)
    layers = decoder_layers(model)
    own = layers[2].forward
    layers[2].forward = lambda hidden, **given: own(layers[1](hidden, **given), **given)
    scorer = Scorer(model, byte_tokenizer(), layers[1], cache=PrefixCache(1 << 20))
    plan = scorer.plan(scorer.encode(EXAMPLES))
    assert plan.explain().count("runs more than once in a forward") == 2
    states = Shift(layers[1], 0.1).states
    plain = []
    for state in states:
        with state():
            plain.append(scorer.losses(plan)[0])
    assert scorer.losses(plan, states) == plain


def test_a_layer_that_texts_do_not_reach_is_refused():
    text = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "cross_attention_layers": [1],
        "vocab_size": 260,
        "pad_token_id": None,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "attention_heads": 4,
        "num_global_layers": 1,
        "image_size": 28,
        "intermediate_layers_indices": [0],
    }
    model = random_model(MllamaConfig(text_config=text, vision_config=vision))
    layers = decoder_layers(model)
    Scorer(model, byte_tokenizer(), layers[2])
    with pytest.raises(UserError, match=r"does not run .*layers\.1 on a text alone"):
        Scorer(model, byte_tokenizer(), layers[1])
    with pytest.raises(UserError, match=r"does not run layers \[1\] on a text alone"):
        find_sites(model)


def test_layers_that_give_lists():
    model = random_model(OpenAIGPTConfig(vocab_size=260, n_embd=32, n_layer=3, n_head=4))
    layer = decoder_layers(model)[1]
    scorer = Scorer(model, byte_tokenizer(), layer, cache=PrefixCache(1 << 20))
    batch = scorer.encode(EXAMPLES)
    scorer.cache_prefixes(batch)
    assert "from the cache" in (plan := scorer.plan(batch)).explain()
    states = Shift(layer, 0.1).states
    expected = plain_losses(model, byte_tokenizer(), states)
    assert scorer.losses(plan, states) == pytest.approx(expected, abs=1e-5)
    assert find_sites(model)[1].down_projection is not None


LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 48,
    "long_factor": [2.0] * 48,
    "original_max_position_embeddings": 1024,
}


@pytest.mark.parametrize(
    ("config", "length"),
    [
        (LlamaConfig(max_position_embeddings=4096), 2048),
        (LlamaConfig(max_position_embeddings=100), 100),
        (MptConfig(max_seq_len=64), 64),
        (Gemma3Config(text_config={"max_position_embeddings": 256}), 256),
        (
            Phi3Config(
                max_position_embeddings=4096,
                original_max_position_embeddings=1024,
                rope_parameters=LONG_ROPE,
            ),
            1024,
        ),
        (LlamaConfig(max_position_embeddings=4096, rope_parameters=LONG_ROPE), 1024),
        (
            Gemma3TextConfig(
                max_position_embeddings=4096,
                rope_parameters={
                    "full_attention": LONG_ROPE,
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                },
            ),
            1024,
        ),
        (WhisperConfig(max_target_positions=64), 64),
    ],
)
def test_texts_are_no_longer_than_the_models_context(config, length):
    assert max_length(SimpleNamespace(config=config, modules=lambda: [])) == length


def test_positions_that_begin_behind_padding_are_fewer():
    config = RobertaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=66,
        pad_token_id=1,
        is_decoder=True,
    )
    model = random_model(config)
    scorer = Scorer(model, byte_tokenizer())
    assert max_length(model) == 64
    (encoded,) = scorer.encode([Example("ab" * 99, (" a", " b"), 0)])
    assert len(encoded.sequences[0]) == 63
    assert scorer.scores(scorer.plan([encoded])).isfinite().all()


def test_texts_beside_longer_ones_are_turned_as_alone():
    config = CONFIGS["llama"]()
    config.rope_parameters = LONG_ROPE | {
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 24,
    }
    model, texts = random_model(config), [Example("It " * n, (" a", " b"), 0) for n in (3, 12)]
    scorer = Scorer(model, byte_tokenizer())
    (scores,) = scorer.scores(scorer.plan(scorer.encode(texts)))
    expected = plain_scores(model, byte_tokenizer(), texts[0])
    torch.testing.assert_close(scores[0], expected, rtol=0, atol=1e-5)


def test_accuracy_of_a_gold_loss_is_a_share_of_the_examples(tmp_path):
    rows = [
        {"premise": "It fell.", "choice1": "a b c.", "choice2": "d.", "question": q, "label": i % 2}
        for i, q in enumerate(("cause", "effect") * 3)
    ]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    model, task = tiny_model(), get_task("copa")
    found = evaluate(model, TOKENIZER, "copa", tmp_path)
    scorer = Scorer(model, TOKENIZER, loss="gold")
    batch = scorer.encode(load_split(task, tmp_path, "test"))
    best = scorer.scores(scorer.plan(batch))[0].argmax(-1).tolist()
    assert found["accuracy"] == sum(b == e.gold for b, e in zip(best, batch, strict=True)) / 6 > 0

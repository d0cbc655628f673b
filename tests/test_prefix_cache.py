from __future__ import annotations

import pytest
import torch

from dlzo.errors import UserError
from dlzo.models import decoder_layers
from dlzo.scoring import PrefixCache, Scorer
from dlzo.tasks import Example
from dlzo_kernels import _C
from tiny import byte_tokenizer, tiny_model

EXAMPLES = [Example(f"{text} It was", (" bad", " good"), 0) for text in ("a", "bc", "def", "gh")]
ROW_BYTES = 32 * 4


def cached_scorer(cache, family="llama", layer=2, row_tokens=16):
    model = tiny_model(family)
    return Scorer(
        model,
        byte_tokenizer(),
        decoder_layers(model)[layer],
        cache=cache,
        row_tokens=row_tokens,
    )


def test_hidden_states_are_those_of_the_layers_input():
    cache = PrefixCache(1 << 20)
    scorer = cached_scorer(cache)
    batch = scorer.encode(EXAMPLES)
    scorer.cache_prefixes(batch)
    for tokens in {tokens for example in batch for tokens in example.sequences}:
        with torch.no_grad():
            states = scorer.model(torch.tensor([tokens]), output_hidden_states=True).hidden_states
        torch.testing.assert_close(cache.get(tokens), states[2][0], rtol=0, atol=1e-5)


def test_memory_stays_within_the_budget():
    cache = PrefixCache(40 * ROW_BYTES)
    scorer = cached_scorer(cache)
    batch = scorer.encode(EXAMPLES)
    scorer.cache_prefixes(batch)
    kept = [t for example in batch for t in example.sequences if t in cache]
    # The options of an example share its prompt.
    prefixes = {t[:length] for t in kept for length in range(1, len(t) + 1)}
    assert 0 < cache.used_bytes == len(prefixes) * ROW_BYTES <= cache.memory_bytes
    assert len(prefixes) < sum(map(len, kept))
    assert len(kept) < sum(len(example.sequences) for example in batch)


def test_what_is_cached_has_the_same_bits_in_any_order(tmp_path):
    batch = cached_scorer(None).encode(EXAMPLES)
    whole, reverse, pieces = PrefixCache(1 << 20), PrefixCache(1 << 20), PrefixCache(0, tmp_path)
    cached_scorer(whole).cache_prefixes(batch)
    cached_scorer(reverse).cache_prefixes(batch[::-1])
    cached_scorer(pieces).cache_prefixes(batch)
    lost = sorted(tmp_path.iterdir())[::2]
    for path in lost:
        path.unlink()
    cached_scorer(pieces).cache_prefixes(batch)
    for tokens in {tokens for example in batch for tokens in example.sequences}:
        assert torch.equal(whole.get(tokens), reverse.get(tokens))
        assert torch.equal(whole.get(tokens), pieces.get(tokens))


def test_beyond_the_budget_files_are_found_again_by_a_later_run(tmp_path):
    cache = PrefixCache(10 * ROW_BYTES, tmp_path / "new")
    scorer = cached_scorer(cache)
    batch = scorer.encode(EXAMPLES)
    scorer.cache_prefixes(batch)
    sequences = {tokens for example in batch for tokens in example.sequences}
    assert cache.used_bytes <= 10 * ROW_BYTES
    assert all(tokens in cache for tokens in sequences)
    later = PrefixCache(0, tmp_path / "new")
    expected = scorer.losses(scorer.plan(batch))
    written = set((tmp_path / "new").iterdir())
    scorer = cached_scorer(later)
    scorer.cache_prefixes(batch)
    assert scorer.losses(scorer.plan(batch)) == pytest.approx(expected, abs=1e-6)
    assert all(tokens in later for tokens in sequences)
    assert written == set((tmp_path / "new").iterdir())


def test_a_folder_gives_only_what_was_computed_among_the_same_neighbours(tmp_path):
    batch = cached_scorer(None).encode(EXAMPLES)
    cached_scorer(PrefixCache(0, tmp_path)).cache_prefixes(batch[1:])
    shared, alone = PrefixCache(0, tmp_path), PrefixCache(1 << 20)
    for cache in (shared, alone):
        cached_scorer(cache).cache_prefixes(batch)
    for tokens in {tokens for example in batch for tokens in example.sequences}:
        assert torch.equal(shared.get(tokens), alone.get(tokens))


@pytest.mark.parametrize("other", ["family", "layer", "weights", "buffer", "threads", "isa"])
def test_hidden_states_of_other_weights_or_roundings_are_never_used(tmp_path, monkeypatch, other):
    scorer = cached_scorer(PrefixCache(0, tmp_path))
    batch = scorer.encode(EXAMPLES)
    scorer.cache_prefixes(batch)
    written = [*tmp_path.iterdir()]
    later = PrefixCache(0, tmp_path)
    changed = {"family": {"family": "qwen3"}, "layer": {"layer": 3}}
    if other == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    if other == "isa":
        monkeypatch.setattr(_C, "selected_isa", lambda: "avx1024")
    scorer = cached_scorer(later, **changed.get(other, {}))
    if other == "buffer":
        scorer.model.model.register_buffer("bias", torch.zeros(2))
    if other == "weights":
        with torch.no_grad():
            scorer.model.model.embed_tokens.weight[-1, -1] += 1
    scorer.cache_prefixes(batch)
    assert len([*tmp_path.iterdir()]) == 2 * len(written) > 0


def test_tuning_the_layer_leaves_the_cache_good():
    cache = PrefixCache(1 << 20)
    scorer = cached_scorer(cache)
    batch = scorer.encode(EXAMPLES)
    scorer.cache_prefixes(batch)
    with torch.no_grad():
        for parameter in scorer.layer.parameters():
            parameter.mul_(1.5)
    cached = scorer.losses(scorer.plan(batch))
    cold = Scorer(scorer.model, scorer.tokenizer, scorer.layer)
    assert cached == pytest.approx(cold.losses(cold.plan(batch)), abs=1e-6)
    assert cache.used_bytes > 0


def test_a_file_that_is_gone_since_the_plan_is_not_missed(tmp_path):
    scorer = cached_scorer(PrefixCache(0, tmp_path))
    batch = scorer.encode(EXAMPLES)
    scorer.cache_prefixes(batch)
    plan = scorer.plan(batch)
    expected = scorer.losses(plan)
    for path in sorted(tmp_path.iterdir())[::2]:
        path.unlink()
    assert scorer.losses(plan) == pytest.approx(expected, abs=1e-6)


def test_a_damaged_file_is_named(tmp_path):
    scorer = cached_scorer(PrefixCache(0, tmp_path))
    batch = scorer.encode(EXAMPLES)
    scorer.cache_prefixes(batch)
    path = sorted(tmp_path.iterdir())[0]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"{path.name}.*delete it"):
        scorer.losses(scorer.plan(batch))


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"prefix cache .* cannot be written"):
        PrefixCache(0, tmp_path / "file")
    scorer = cached_scorer(PrefixCache(0, tmp_path / "gone"))
    (tmp_path / "gone").rmdir()
    with pytest.raises(UserError, match=r"prefix cache .* cannot be written"):
        scorer.cache_prefixes(scorer.encode(EXAMPLES))


@pytest.mark.parametrize("other", ["setting", "attention", "torch", "release"])
def test_hidden_states_of_other_settings_are_never_used(tmp_path, monkeypatch, other):
    scorer = cached_scorer(PrefixCache(0, tmp_path))
    batch = scorer.encode(EXAMPLES)
    scorer.cache_prefixes(batch)
    written = [*tmp_path.iterdir()]
    scorer = cached_scorer(PrefixCache(0, tmp_path))
    if other == "setting":
        scorer.model.config.rms_norm_eps = 0.5
    elif other == "attention":
        scorer.model.config._attn_implementation = "eager"
    elif other == "torch":
        monkeypatch.setattr(torch, "__version__", "0.0")
    else:
        monkeypatch.setattr("dlzo.scoring.prefix.__version__", "0.0")
    scorer.frozen._seen = []
    scorer.cache_prefixes(batch)
    assert len([*tmp_path.iterdir()]) == 2 * len(written) > 0


@pytest.mark.parametrize("write", ["in place", "replaced"])
def test_weights_below_that_were_written_since_are_seen(write):
    cache = PrefixCache(1 << 20)
    scorer = cached_scorer(cache)
    batch = scorer.encode(EXAMPLES)
    scorer.cache_prefixes(batch)
    used, norm = cache.used_bytes, decoder_layers(scorer.model)[0].input_layernorm
    with torch.no_grad():
        if write == "in place":
            norm.weight[:7] *= 3
        else:
            weight = norm.weight.clone()
            weight[:7] *= 3
            norm.weight = torch.nn.Parameter(weight)
    cold = Scorer(scorer.model, scorer.tokenizer, scorer.layer)
    expected = cold.losses(cold.plan(batch))
    assert scorer.losses(scorer.plan(batch)) == pytest.approx(expected, abs=1e-6)
    assert cache.used_bytes == 0
    scorer.cache_prefixes(batch)
    assert cache.used_bytes == used
    assert scorer.losses(scorer.plan(batch)) == pytest.approx(expected, abs=1e-6)


def test_weights_that_do_not_count_their_writes_are_not_cached():
    with torch.inference_mode():
        model = tiny_model()
    layer = decoder_layers(model)[2]
    scorer = Scorer(model, byte_tokenizer(), layer, cache=PrefixCache(1 << 20))
    assert "embed_tokens.weight was made in inference mode" in scorer.cache_problem
    batch = scorer.encode(EXAMPLES)
    scorer.cache_prefixes(batch)
    scorer.losses(scorer.plan(batch))
    with torch.inference_mode():
        decoder_layers(model)[0].mlp.down_proj.weight.mul_(3)
    cold = Scorer(model, scorer.tokenizer, layer)
    expected = cold.losses(cold.plan(batch))
    assert scorer.losses(scorer.plan(batch)) == pytest.approx(expected, abs=1e-6)

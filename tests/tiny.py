"""Tiny random models and a byte-level tokenizer, built in memory."""

from __future__ import annotations

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CpmAntConfig,
    Gemma2Config,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    GPT2Config,
    GraniteMoeSharedConfig,
    JambaConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    OlmoHybridConfig,
    OPTConfig,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Zamba2Config,
)

VOCABULARY = 260
_COMMON = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    # Far above the usual 0.02, so that attention matters in the outputs.
    "initializer_range": 0.2,
}
# Of those that derive it.
_NO_HEAD_DIM = {**_COMMON, **{k: v for k, v in _LLAMA.items() if k != "head_dim"}}
CONFIGS = {
    "llama": lambda: LlamaConfig(**_COMMON, **_LLAMA),
    "qwen3": lambda: Qwen3Config(**_COMMON, **_LLAMA),
    "mistral": lambda: MistralConfig(**_COMMON, **_LLAMA, sliding_window=8),
    "gemma2": lambda: Gemma2Config(
        **_COMMON,
        **_LLAMA,
        sliding_window=8,
        query_pre_attn_scalar=8,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=10.0,
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **_COMMON, **_LLAMA, sliding_window=8, query_pre_attn_scalar=8, sliding_window_pattern=2
    ),
    "olmo2": lambda: Olmo2Config(**_NO_HEAD_DIM),
    "phi": lambda: PhiConfig(**_NO_HEAD_DIM, partial_rotary_factor=0.5),
    "gpt2": lambda: GPT2Config(
        **_COMMON, n_embd=32, n_layer=4, n_head=4, n_positions=256, initializer_range=0.2
    ),
    "opt": lambda: OPTConfig(
        **_COMMON,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=256,
        init_std=0.2,
    ),
    # Its attention has biases by distance and takes no function from outside.
    "bloom": lambda: BloomConfig(
        **_COMMON, hidden_size=32, n_layer=4, n_head=4, initializer_range=0.2
    ),
}
# Of an MLP in several parts: experts beside one that all tokens take.
SHARED_MLP = GraniteMoeSharedConfig(
    **_COMMON,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    shared_intermediate_size=16,
    num_local_experts=4,
)
# What their layers give is not one hidden state per token.
STREAMS = {
    "gemma3n": lambda: Gemma3nTextConfig(
        **_COMMON,
        **_LLAMA,
        sliding_window=8,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCABULARY,
        laurel_rank=8,
        altup_num_inputs=2,
        num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"] * 2,
        activation_sparsity_pattern=[0.0] * 4,
    ),
    "cpmant": lambda: CpmAntConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        dim_head=8,
        dim_ff=64,
        init_std=0.2,
    ),
}
# Their decoder layers are of two classes; in Zamba 2, several share their attention.
HYBRIDS = {
    "jamba": lambda: JambaConfig(
        **_NO_HEAD_DIM, num_experts=2, attn_layer_period=2, attn_layer_offset=1, mamba_dt_rank=4
    ),
    "olmo_hybrid": lambda: OlmoHybridConfig(
        **_NO_HEAD_DIM,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"] * 2,
    ),
    "zamba2": lambda: Zamba2Config(
        **_NO_HEAD_DIM,
        mamba_ngroups=1,
        n_mamba_heads=8,
        hybrid_layer_ids=[1, 3],
        layers_block_type=["mamba", "hybrid"] * 2,
    ),
}


def tiny_model(family: str = "llama", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model of four layers, the same at each call."""
    return random_model(CONFIGS[family]()).to(dtype)


def random_model(config: PretrainedConfig) -> PreTrainedModel:
    """A random model of a configuration, the same at each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


def byte_tokenizer(*words: str) -> PreTrainedTokenizerFast:
    """One token per byte, and one for each of `words`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in words])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)

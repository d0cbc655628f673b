"""A GGUF file of a few kilobytes: a random Llama with a byte-level tokenizer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGUFWriter
from tokenizers.pre_tokenizers import ByteLevel

LAYERS, HIDDEN, FEED_FORWARD, HEADS = 2, 32, 64, 4


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """Write the file; its tensors by their names in the file, in float32."""
    words = [*sorted(ByteLevel.alphabet()), "zq", "<|end|>"]
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([1] * (len(words) - 1) + [3])
    writer.add_token_merges(["z q"])
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_unk_token_id):
        add(len(words) - 1)
    tensors = _tensors(len(words))
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def _tensors(vocabulary: int) -> dict[str, np.ndarray]:
    shapes = {"token_embd.weight": (vocabulary, HIDDEN), "output_norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        block = f"blk.{layer}."
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            shapes[f"{block}{name}.weight"] = (HIDDEN, HIDDEN)
        for name in ("ffn_gate", "ffn_up"):
            shapes[f"{block}{name}.weight"] = (FEED_FORWARD, HIDDEN)
        shapes[f"{block}ffn_down.weight"] = (HIDDEN, FEED_FORWARD)
        for name in ("attn_norm", "ffn_norm"):
            shapes[f"{block}{name}.weight"] = (HIDDEN,)
    random = np.random.default_rng(0)
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}

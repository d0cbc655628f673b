"""What the probe looks at inside a decoder layer, found by structure."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._pytree import tree_map
from transformers import (
    BertConfig,
    DeepseekV3Config,
    FalconConfig,
    Gemma4TextConfig,
    GPTJConfig,
    GPTNeoXConfig,
    MambaConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen3_5TextConfig,
    Qwen3MoeConfig,
)

from dlzo.errors import UserError
from dlzo.models import decoder_layers
from dlzo.sites import Sites, check_keeps_weights, find_sites
from tiny import CONFIGS, SHARED_MLP, random_model, tiny_model

_LLAMA = Sites("self_attn.o_proj", "mlp.down_proj", "mlp.down_proj")
EXPECTED = {
    **dict.fromkeys(("llama", "qwen3", "mistral", "gemma2", "gemma3", "olmo2"), _LLAMA),
    "phi": Sites("self_attn.dense", "mlp.fc2", "mlp.fc2"),
    "gpt2": Sites("attn.c_proj", "mlp.c_proj", "mlp.c_proj"),
    # It has no module around its MLP.
    "opt": Sites("self_attn.out_proj", "fc2", "fc2"),
    # Its attention and MLP add the residual stream themselves.
    "bloom": Sites("self_attention.dense", "mlp.dense_4h_to_h", "mlp.dense_4h_to_h"),
}


@pytest.mark.parametrize("family", CONFIGS)
def test_sites_of_each_family(family: str) -> None:
    assert find_sites(tiny_model(family)) == [EXPECTED[family]] * 4


_SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_GQA = {**_SIZES, "num_key_value_heads": 2, "intermediate_size": 48, "pad_token_id": None}
_GEMMA4 = {
    "head_dim": 8,
    "global_head_dim": 8,
    "num_global_key_value_heads": 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 64,
    "num_kv_shared_layers": 0,
    "layer_types": ["sliding_attention", "full_attention"],
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            GPTNeoXConfig(**_SIZES, intermediate_size=48),
            [Sites("attention.dense", "mlp.dense_4h_to_h", "mlp.dense_4h_to_h")] * 2,
        ),
        (
            GPTJConfig(vocab_size=64, n_embd=32, n_layer=2, n_head=4, rotary_dim=8),
            [Sites("attn.out_proj", "mlp.fc_out", "mlp.fc_out")] * 2,
        ),
        (
            FalconConfig(**_SIZES),
            [Sites("self_attention.dense", "mlp.dense_4h_to_h", "mlp.dense_4h_to_h")] * 2,
        ),
        # Experts: each has a down projection of its own.
        (
            MixtralConfig(**_GQA, num_local_experts=4, num_experts_per_tok=2),
            [Sites("self_attn.o_proj", "mlp", None)] * 2,
        ),
        (
            Qwen3MoeConfig(**_GQA, **_EXPERTS, head_dim=8, num_experts=4),
            [Sites("self_attn.o_proj", "mlp", None)] * 2,
        ),
        # The first layer is dense, the second one has experts.
        (
            DeepseekV3Config(
                **{**_GQA, "num_key_value_heads": 4},
                **_EXPERTS,
                n_routed_experts=8,
                n_group=2,
                topk_group=1,
                first_k_dense_replace=1,
                q_lora_rank=16,
                kv_lora_rank=16,
                qk_rope_head_dim=8,
                v_head_dim=8,
                qk_nope_head_dim=8,
            ),
            [_LLAMA, Sites("self_attn.o_proj", "mlp", None)],
        ),
        # Three layers of four have linear attention, whose last matrix is not defined last.
        (
            Qwen3_5TextConfig(
                **{**_GQA, "num_hidden_layers": 4},
                head_dim=8,
                linear_num_key_heads=2,
                linear_num_value_heads=4,
                linear_key_head_dim=8,
                linear_value_head_dim=8,
            ),
            [Sites("linear_attn.out_proj", "mlp.down_proj", "mlp.down_proj")] * 3 + [_LLAMA],
        ),
        # Two modules behind each other.
        (
            BertConfig(**_SIZES, intermediate_size=48, is_decoder=True),
            [Sites("attention.output.dense", "output.dense", "output.dense")] * 2,
        ),
        (SHARED_MLP, [Sites("self_attn.o_proj", None, None)] * 2),
        # What is added to the stream behind the MLP is an input of each layer.
        (
            Gemma4TextConfig(**_GQA, **_GEMMA4),
            [Sites("self_attn.o_proj", None, None)] * 2,
        ),
        # No attention and MLP, but one mixer.
        (
            MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2),
            [Sites(None, None, None)] * 2,
        ),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_sites_of_other_families(config: PretrainedConfig, expected: list[Sites]) -> None:
    assert find_sites(random_model(config)) == expected


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bloom"])
def test_attention_and_mlp_are_what_is_added_to_the_stream(family: str) -> None:
    """These families add both to the residual stream as they are: input + both = output."""
    model = tiny_model(family)
    layer, sites = decoder_layers(model)[1], find_sites(model)[1]
    seen = {}
    layer.register_forward_hook(
        lambda _module, args, output: seen.update(
            before=args[0], after=output[0] if isinstance(output, tuple) else output
        )
    )
    for name in ("attention", "mlp"):
        module = layer.get_submodule(getattr(sites, name))
        module.register_forward_hook(
            lambda _module, _args, output, name=name: seen.update({name: output})
        )
    with torch.no_grad():
        model(torch.arange(20)[None])
    assert_close(seen["before"] + seen["attention"] + seen["mlp"], seen["after"])


def test_no_hook_is_left() -> None:
    model = tiny_model()
    find_sites(model)
    assert not any(module._forward_hooks for module in model.modules())


class Wrapped(Tensor):
    """A tensor whose numbers lie in another one, as those of quantised weights do."""

    held: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        made = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.held = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op is torch.ops.aten.detach.default:
            return cls(args[0].held)
        args, kwargs = tree_map(lambda x: getattr(x, "held", x), (args, kwargs or {}))
        return op(*args, **kwargs)


@pytest.mark.parametrize("wrapped", [False, True])
@torch.inference_mode()
def test_a_model_that_writes_to_a_weight_is_refused_before(wrapped: bool) -> None:
    model = tiny_model()
    linear = decoder_layers(model)[1].mlp.up_proj
    if wrapped:
        linear.weight = nn.Parameter(Wrapped(linear.weight.detach()), requires_grad=False)
    check_keeps_weights(model)
    before = linear.weight.detach().clone()
    linear.register_forward_pre_hook(lambda module, _: module.weight.mul_(2))
    with pytest.raises(UserError, match="LlamaForCausalLM changes its own weights"):
        check_keeps_weights(model)
    assert torch.equal(linear.weight, before)


@torch.inference_mode()
def test_weights_that_are_brought_in_for_a_forward_are_not_written_to() -> None:
    model = random_model(MixtralConfig(**_GQA, num_local_experts=4, num_experts_per_tok=2))
    cpu_offload(model, execution_device=torch.device("cpu"))
    for _ in range(10):  # memory of weights that were replaced may come again
        check_keeps_weights(model)
        find_sites(model)


def test_a_model_of_compiled_attention_is_run() -> None:
    model = tiny_model()
    model.set_attn_implementation("flex_attention")
    check_keeps_weights(model)


def test_adapters_in_a_matrix_leave_it_one() -> None:
    model = tiny_model("opt")
    inject_adapter_in_model(LoraConfig(target_modules=["fc1", "fc2"]), model)
    assert find_sites(model)[0].mlp == "fc2"

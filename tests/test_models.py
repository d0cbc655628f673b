"""Loading models: what comes out is what was saved, and every broken input is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.utils import httpx
from torch import nn
from transformers import AutoModelForCausalLM, ModernBertDecoderConfig
from transformers.utils import logging

import dlzo.models
from dlzo.errors import UserError
from dlzo.models import (
    check_kernels,
    decoder_layers,
    layer_parts,
    load_gguf,
    load_model,
    parse_device,
    parse_dtype,
)
from dlzo_kernels.ops import _gpu
from tiny import CONFIGS, byte_tokenizer, random_model, tiny_model
from tiny_gguf import write_gguf


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny Llama saved with its tokenizer."""
    path = tmp_path / "tiny-llama"
    tiny_model().save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    return path


def test_parse_dtype() -> None:
    assert parse_dtype("bfloat16") is torch.bfloat16
    with pytest.raises(UserError, match=r"'int8'.*float32, bfloat16, float16"):
        parse_dtype("int8")


@pytest.mark.parametrize(
    ("family", "where"),
    [
        ("llama", "model.layers"),
        ("qwen3", "model.layers"),
        ("mistral", "model.layers"),
        ("gpt2", "transformer.h"),
        ("opt", "model.decoder.layers"),
    ],
)
def test_decoder_layers(family: str, where: str) -> None:
    model = tiny_model(family)
    assert decoder_layers(model) is model.get_submodule(where)


def test_decoder_layers_are_the_outermost_list() -> None:
    model = tiny_model()
    model.model.layers[0].experts = nn.ModuleList(nn.Linear(2, 2) for _ in model.model.layers)
    # Before the layers, and as many, but of two classes.
    model.model.embed_tokens.norms = nn.ModuleList(
        [nn.Linear(2, 2), nn.ReLU(), nn.ReLU(), nn.ReLU()]
    )
    assert decoder_layers(model) is model.model.layers


def test_decoder_layers_outside_what_a_model_calls_its_decoder() -> None:
    config = ModernBertDecoderConfig(
        vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, pad_token_id=0, bos_token_id=0, eos_token_id=0, cls_token_id=0,
        sep_token_id=0,
    )  # fmt: skip
    model = random_model(config)
    assert decoder_layers(model) is model.get_submodule("model.layers")


def test_decoder_layers_refuses_a_model_without_them() -> None:
    model = tiny_model()
    model.config.num_hidden_layers = 5
    with pytest.raises(UserError, match="LlamaForCausalLM has no list of 5 decoder layers"):
        decoder_layers(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_load_folder(folder: Path, dtype: torch.dtype, capfd: pytest.CaptureFixture[str]) -> None:
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    model, tokenizer = load_model(str(folder), dtype=dtype)
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (verbosity, bars)
    assert not model.training
    assert model.name_or_path == str(folder)
    for name, saved in tiny_model().state_dict().items():
        assert torch.equal(model.state_dict()[name], saved.to(dtype)), name
    assert tokenizer("Hi!").input_ids == byte_tokenizer()("Hi!").input_ids


def test_load_gguf_gives_an_ordinary_model(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tensors = write_gguf(tmp_path / "tiny.gguf")
    model, tokenizer = load_gguf(tmp_path / "tiny.gguf", torch.float32)
    assert capfd.readouterr() == ("", "")
    written = torch.from_numpy(tensors["blk.1.ffn_down.weight"])
    assert torch.equal(model.model.layers[1].mlp.down_proj.weight, written)
    assert len(tokenizer("abc").input_ids) == 3
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    again, _ = load_model(str(tmp_path / "saved"), dtype=torch.float32)
    assert all(torch.equal(again.state_dict()[k], v) for k, v in model.state_dict().items())


def test_load_model_takes_a_gguf_file(gguf: Path) -> None:
    model, _ = load_model(str(gguf))
    assert model.dtype == torch.bfloat16
    assert model.name_or_path == str(gguf)


def test_every_cut_of_a_gguf_is_refused(gguf: Path) -> None:
    whole = gguf.read_bytes()
    for kept in (4, 5, 24, 100, len(whole) // 4, len(whole) // 2, len(whole) - 1):
        gguf.write_bytes(whole[:kept])
        with pytest.raises(UserError, match=rf"tiny.gguf \({kept:,} bytes\) is cut off or damaged"):
            load_model(str(gguf))


@pytest.mark.parametrize("content", [b"", b"GGU", b"PK\x03\x04 a zip file"])
def test_not_a_gguf(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(UserError, match=r"model.gguf is not a GGUF file"):
        load_model(str(tmp_path / "model.gguf"))


def test_dtype_is_refused_before_loading() -> None:
    with pytest.raises(UserError, match=r"dtype 'int8' is not supported"):
        load_model("/no/such/folder", dtype=torch.int8)


def test_a_path_a_name_of_a_dtype_and_a_device_are_taken(folder: Path) -> None:
    model, _ = load_model(folder, dtype="float16", device=torch.device("cpu"))
    assert (model.name_or_path, model.dtype) == (str(folder), torch.float16)


@pytest.mark.parametrize(
    ("name", "gpus", "message"),
    [
        ("cuda", 0, "finds no GPU"),
        ("cuda:2", 2, "finds 2 GPUs"),
        *((name, 2, "not supported") for name in ("gpu", "cuda:", "cuda:x", "CPU", "meta", "")),
    ],
)
def test_device_is_refused_before_loading(
    monkeypatch: pytest.MonkeyPatch, name: str, gpus: int, message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(UserError, match=message):
        load_model("/no/such/folder", device=name)


@pytest.mark.parametrize(
    ("name", "rank", "device"),
    [
        ("cpu", "1", "cpu"),
        ("cuda", "0", "cuda:0"),
        ("cuda", "3", "cuda:1"),
        ("cuda:0", "1", "cuda:0"),
    ],
)
def test_each_rank_takes_a_gpu_of_its_own(
    monkeypatch: pytest.MonkeyPatch, name: str, rank: str, device: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", rank)
    assert parse_device(name) == torch.device(device)


@pytest.mark.parametrize(
    ("column", "message"),
    [("", r"no GPU column can run here \(cuda: none; triton: none\)"), ("cudda", "'cudda'")],
)
def test_a_gpu_without_kernels_is_told(
    monkeypatch: pytest.MonkeyPatch, column: str, message: str
) -> None:
    monkeypatch.setattr(_gpu, "_selected", [])
    monkeypatch.setattr(_gpu, "why_not", lambda column: "none")
    monkeypatch.setenv("DLZO_GPU", column)
    check_kernels(torch.device("cpu"))
    with pytest.raises(UserError, match=rf"no kernels run on 'cuda:1' \(.*{message}"):
        check_kernels(torch.device("cuda:1"))


def test_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no config.json"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ('{"model_type": "lla', r"config\.json' is not a valid JSON"),
        ('{"model_type": "martian"}', "`martian`"),
    ],
    ids=["broken", "unknown architecture"],
)
def test_a_config_that_cannot_be_used(folder: Path, config: str, says: str) -> None:
    (folder / "config.json").write_text(config)
    with pytest.raises(UserError, match=f"cannot be loaded: .*{says}"):
        load_model(str(folder))


def test_cut_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"tiny-llama' cannot be loaded: .*incomplete"):
        load_model(str(folder))


def test_missing_weights_are_not_made_up(folder: Path) -> None:
    model = tiny_model()
    state = model.state_dict()
    del state["model.layers.2.mlp.up_proj.weight"]
    model.save_pretrained(folder, state_dict=state)
    with pytest.raises(UserError, match=r"lacks 1 of its weights, model.layers.2.mlp.up_proj"):
        load_model(str(folder))


def test_missing_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match="no tokenizer that can be read"):
        load_model(str(folder))


@pytest.mark.parametrize("content", ["{", '{"version": "1.0"}', ""])
def test_broken_tokenizer(folder: Path, content: str) -> None:
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="no tokenizer that can be read"):
        load_model(str(folder))


@pytest.mark.parametrize(
    "error",
    [RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate"), MemoryError()],
)
def test_out_of_memory_names_the_need(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    config = CONFIGS["llama"]()
    config.vocab_size, config.hidden_size = 1 << 20, 1 << 10  # two matrices of 2 GiB in bfloat16
    config.save_pretrained(folder)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(UserError, match=r"weights need 4\.0 GiB in bfloat16"):
        load_model(str(folder))


def _model_info_raises(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(self: HfApi, repo_id: str, *, timeout: float) -> None:
        assert timeout <= 10
        raise error

    monkeypatch.setattr(HfApi, "model_info", fail)


UNREACHABLE = [
    httpx.ConnectError("Name or service not known"),
    httpx.ConnectTimeout("timed out"),
    OfflineModeIsEnabled("offline mode is enabled"),
]


@pytest.mark.parametrize("error", UNREACHABLE)
def test_hub_unreachable(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    _model_info_raises(monkeypatch, error)
    with pytest.raises(UserError, match=r"'some/model' is not a folder.*cannot be reached"):
        load_model("some/model")


def test_unknown_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    response = httpx.Response(404, request=httpx.Request("GET", "https://hub"))
    _model_info_raises(monkeypatch, RepositoryNotFoundError("404", response=response))
    with pytest.raises(UserError, match=r"'some/model' is not a folder.*not on the Hugging Face"):
        load_model("some/model")


@pytest.mark.parametrize("name", ["./no/such/folder", "not an id", "model.gguf/x/y"])
def test_what_is_no_hub_id(name: str) -> None:
    with pytest.raises(UserError, match="not a folder, not a GGUF file"):
        load_model(name)


@pytest.mark.parametrize("reachable", [True, False])
def test_a_cached_copy_is_used_only_if_the_hub_is_unreachable(
    folder: Path, monkeypatch: pytest.MonkeyPatch, reachable: bool
) -> None:
    if reachable:
        monkeypatch.setattr(HfApi, "model_info", lambda self, name, timeout: None)
    else:
        _model_info_raises(monkeypatch, UNREACHABLE[0])
    monkeypatch.setattr(
        dlzo.models, "try_to_load_from_cache", lambda name, file: str(folder / file)
    )
    local_only = []

    def from_pretrained(source: str, *, local_files_only: bool, **options: Any) -> None:
        assert source == "some/model"
        local_only.append(local_files_only)
        raise OSError("seen enough")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    with pytest.raises(UserError, match="seen enough"):
        load_model("some/model")
    assert local_only == [not reachable]


def test_parts_are_told_apart_by_what_they_take():
    class Mixer(nn.Linear):
        def forward(self, hidden, mask=None, cache=None):
            return super().forward(hidden)

    layer = nn.Module()
    layer.feed_forward = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    layer.mamba, layer.attention = Mixer(2, 2), Mixer(2, 2)
    assert layer_parts(layer) == {"attention": ["mamba", "attention"], "mlp": ["feed_forward"]}
    layer = nn.Module()  # where that does not tell, the first
    layer.mixer, layer.fc1, layer.fc2 = (nn.Linear(2, 2) for _ in range(3))
    assert layer_parts(layer) == {"attention": ["mixer"], "mlp": ["fc1", "fc2"]}
    del layer.fc2  # one matrix is no MLP
    with pytest.raises(UserError, match="told apart"):
        layer_parts(layer)

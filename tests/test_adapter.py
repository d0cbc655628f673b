from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dlzo.adapter import check_adapter, load_adapter, read_config, save_adapter
from dlzo.errors import UserError
from dlzo.models import HUB_TIMEOUT_S, decoder_layers
from dlzo.target import Target, weights_fingerprint
from dlzo.trainer import train
from runs import CONFIG, TOKENIZER, rewrite_config, same, state, write_data
from tiny import tiny_model

LAYER = 2


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def adapter(request, tmp_path):
    """A folder with an adapter, and the state of the model it was saved from."""
    model = tiny_model(dtype=request.param)
    model.name_or_path = "tiny"
    target = Target(model, (LAYER,))
    fingerprint = target.fingerprint()
    target.restore(1.5 * weights for weights in target.weights())
    folder = tmp_path / "deep" / "adapter"
    save_adapter(folder, target, base_fingerprint=fingerprint, info={"task": "sst2"})
    return folder, state(model)


def base(adapter):
    return tiny_model(dtype=adapter[1]["model.norm.weight"].dtype)


def change_config(folder, **changes):
    rewrite_config(folder, json.dumps(read_config(folder) | changes))


def rewrite_weights(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors, config = load_file(path), read_config(folder)
    change(tensors)
    save_file(tensors, path, {"dlzo-layer": json.dumps(config)})


def assert_refused(adapter, says, model=None):
    model = model or base(adapter)
    before = state(model)
    with pytest.raises(UserError, match=says):
        load_adapter(model, adapter[0])
    assert same(state(model), before)


def test_round_trip_is_exact(adapter):
    folder, tuned = adapter
    model = base(adapter)
    assert not same(state(model), tuned)
    config = load_adapter(model, folder)
    assert same(state(model), tuned)
    assert (config["layers"], config["task"], config["base_model"]) == ([LAYER], "sst2", "tiny")
    assert [path.name for path in folder.iterdir()] == ["adapter_model.safetensors"]


def test_an_adapter_is_fetched_by_its_hub_id(adapter, monkeypatch):
    folder, tuned = adapter
    asked = []

    def info(_, repository, timeout):
        asked.append((repository, timeout))
        if len(asked) > 2:
            raise OfflineModeIsEnabled("offline")

    def download(repository, name, local_files_only):
        asked.append((repository, name, local_files_only))
        return str(folder / name)

    monkeypatch.setattr("dlzo.adapter.HfApi.model_info", info)
    monkeypatch.setattr("dlzo.adapter.hf_hub_download", download)
    model = base(adapter)
    load_adapter(model, "someone/tuned")
    assert same(state(model), tuned)
    assert read_config("someone/tuned")["layers"] == [LAYER]  # out of reach, it is in the cache
    once, name = ("someone/tuned", HUB_TIMEOUT_S), ("someone/tuned", "adapter_model.safetensors")
    assert asked == [once, (*name, False), once, (*name, True)]


def test_weights_file_holds_the_tuned_layer_alone_by_the_names_of_peft(adapter):
    folder, tuned = adapter
    tensors = load_file(folder / "adapter_model.safetensors")
    own = {name: t for name, t in tuned.items() if name.startswith(f"model.layers.{LAYER}.")}
    assert same(tensors, {f"base_model.model.{name}": t for name, t in own.items()})


def test_fingerprint_sees_a_single_bit_and_a_name():
    layer = decoder_layers(tiny_model())[0]
    before = weights_fingerprint([layer])
    weight = layer.mlp.up_proj.weight
    with torch.no_grad():
        weight[3, 4] = torch.nextafter(weight[3, 4], torch.tensor(9.0))
    assert weights_fingerprint([layer]) != before
    same_bytes = torch.nn.Linear(2, 2, bias=False)
    renamed = torch.nn.Module()
    renamed.kernel = same_bytes.weight
    assert weights_fingerprint([renamed]) != weights_fingerprint([same_bytes])


def test_another_base_is_refused(adapter):
    model = base(adapter)
    with torch.no_grad():
        next(decoder_layers(model)[LAYER].parameters())[0] += 0.5
    assert_refused(adapter, "other weights than.*'tiny'", model)
    change_config(adapter[0], base_model="")
    assert_refused(adapter, "load its base model$", model)


def test_other_weights_beside_the_tuned_ones_are_told(adapter, caplog):
    model = base(adapter)
    model.name_or_path = "tiny"
    target = Target(model, (LAYER,))
    whole = {"model_fingerprint": weights_fingerprint([model])}
    save_adapter(adapter[0], target, base_fingerprint=target.fingerprint(), info=whole)
    load_adapter(base(adapter), adapter[0])
    assert not caplog.messages
    with torch.no_grad():
        model.get_input_embeddings().weight[0, 0] += 1
    load_adapter(model, adapter[0])
    (said,) = caplog.messages
    assert "whose other weights are not those of this one" in said and "'tiny'" in said


def test_another_dtype_is_refused(adapter):
    other = torch.float16
    assert_refused(adapter, "this one is float16", tiny_model(dtype=other))


def test_another_architecture_is_refused(adapter):
    dtype = adapter[1]["model.norm.weight"].dtype
    assert_refused(adapter, "only the adapter has", tiny_model("gpt2", dtype))


def test_a_layer_that_the_model_lacks_is_refused(adapter):
    change_config(adapter[0], layers=[4])
    assert_refused(adapter, "layer is 4: the model has layers 0 to 3.*'tiny'")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": 2}, "format version 2.*dlzo replay"),
        ({"layers": 2}, "'layers'"),
        ({"layers": [True]}, "'layers'"),
        ({"part": "head"}, "part is 'head'"),
        ({"base_fingerprint": None}, "'base_fingerprint'"),
        ({"dtype": 16}, "'dtype'"),
    ],
)
def test_bad_configuration_is_refused(adapter, change, says):
    change_config(adapter[0], **change)
    assert_refused(adapter, says)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "not a dlzo adapter"),
        ("{", r"adapter_model\.safetensors.*damaged"),
        ("[]", "not a JSON object"),
        ("[" * 100_000, "nested too deep"),
    ],
    ids=["none", "torn", "a list", "deep"],
)
def test_a_configuration_that_is_none_is_refused(adapter, text, says):
    rewrite_config(adapter[0], text)
    assert_refused(adapter, says)


def test_damaged_or_missing_files_are_refused(adapter, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = adapter[0]
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert_refused(adapter, r"adapter_model\.safetensors.*cannot be read")
    weights.unlink()
    assert_refused(adapter, r"adapter_model\.safetensors.*cannot be read")
    folder.rmdir()
    assert_refused(adapter, "is not a folder and cannot be fetched")


NAME = f"base_model.model.model.layers.{LAYER}.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda tensors: tensors.pop(NAME), "only the model has"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "only the adapter has 'extra'"),
        (lambda tensors: tensors.update({NAME: tensors[NAME].T.contiguous()}), "in the model"),
        (lambda tensors: tensors.update({NAME: tensors[NAME].double()}), "torch.float64"),
        (lambda tensors: tensors[NAME][1].fill_(torch.nan), "not finite"),
    ],
    ids=["missing", "extra", "shape", "dtype", "nan"],
)
def test_weights_that_do_not_fit_are_refused(adapter, change, says):
    rewrite_weights(adapter[0], change)
    assert_refused(adapter, says)


def test_a_failed_write_leaves_the_old_adapter(adapter, monkeypatch):
    folder = adapter[0]
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise SafetensorError("disk full")

    monkeypatch.setattr("dlzo.adapter.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_adapter(folder, Target(base(adapter), (LAYER,)), base_fingerprint="", info={})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_adapter_of_a_run_knows_the_whole_model(tmp_path, caplog):
    config = replace(CONFIG, steps=2, eval_every=1)
    train(tiny_model(), TOKENIZER, config, write_data(tmp_path / "data"), tmp_path / "out")
    load_adapter(tiny_model(), tmp_path / "out")
    assert not caplog.messages
    other = tiny_model()
    with torch.no_grad():
        other.get_input_embeddings().weight[0, 0] += 1
    load_adapter(other, tmp_path / "out")
    assert "whose other weights are not those of this one" in caplog.text


def test_a_mistyped_folder_is_not_looked_up(monkeypatch, tmp_path):
    monkeypatch.setattr("dlzo.adapter.hf_hub_download", None)
    with pytest.raises(UserError, match="is not a folder"):
        load_adapter(tiny_model(), "mistyped")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file' is a file: give the folder of adapter_model"):
        load_adapter(tiny_model(), tmp_path / "file")


def test_a_missing_adapter_costs_one_request(monkeypatch):
    def unreachable(*_, timeout):
        asked.append(timeout)
        raise HTTPError("no network")

    asked = []
    monkeypatch.setattr("dlzo.adapter.HfApi.model_info", unreachable)
    monkeypatch.setattr("huggingface_hub.file_download.get_hf_file_metadata", None)
    with pytest.raises(UserError, match="'runs/out' is not a folder and cannot be fetched"):
        check_adapter("runs/out", torch.float32)
    assert asked == [HUB_TIMEOUT_S]


def test_fingerprint_sees_shape_and_dtype():
    found = set()
    for shape, dtype in (
        ((2, 3), torch.float16),
        ((3, 2), torch.float16),
        ((2, 3), torch.bfloat16),
    ):
        module = torch.nn.Module()
        module.weight = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
        found.add(weights_fingerprint([module]))
    assert len(found) == 3


def test_what_is_told_of_an_adapter_does_not_hide_what_it_is(tmp_path):
    target = Target(tiny_model(), (2,))
    info = {"version": 9, "dtype": "int8", "layers": [0], "base_fingerprint": "x", "task": "sst2"}
    save_adapter(tmp_path, target, base_fingerprint="ab", info=info)
    config = read_config(tmp_path)
    assert (config["dtype"], config["layers"], config["task"]) == ("float32", [2], "sst2")
    assert config["base_fingerprint"] == "ab"

"""A pretended GPU: what surrounds the kernels, run with tensors that lie on the CPU but deny it.

    python tests/pretend_gpu.py

To torch and to dlzo these are CUDA tensors; they compute with tensors of the CPU that they hold. As
on a GPU, an operation that is given tensors of both devices raises. It changes torch for the rest
of the process, so test_pretend_gpu.py runs it in one of its own.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.cpp_extension import get_cxx_compiler, include_paths, library_paths
from transformers import PreTrainedModel

import dlzo_kernels.low_rank as low_rank
import dlzo_kernels.masters as masters
import dlzo_kernels.parameters as parameters
import dlzo_kernels.step as step
from dlzo.adapter import load_adapter
from dlzo.config import TrainConfig
from dlzo.errors import UserError
from dlzo.evaluation import evaluate
from dlzo.generation import generate
from dlzo.probe import probe
from dlzo.replay import replay
from dlzo.sensitivity import sensitivity
from dlzo.trainer import train
from dlzo_kernels.ops import _gpu
from dlzo_kernels.ops._parts import Operand
from runs import CONFIG, TOKENIZER, same, state, write_data
from tiny import CONFIGS, tiny_model

_aten = torch.ops.aten
# CUDA takes indices from the CPU, tree_attention the parents of tokens.
_TAKE_BOTH = {
    *(_aten.copy_.default, _aten._to_copy.default, torch.ops.dlzo.tree_attention.default),
    *(_aten.index.Tensor, _aten.index_put_.default, _aten._index_put_impl_.default),
}
_FACTORIES = (torch.zeros, torch.ones, torch.empty, torch.full, torch.arange, torch.tensor)
# Without a guard of its kind, a CPU build of torch refuses to touch a tensor of the device.
_GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, NoOpDeviceGuardImpl<DeviceType::CUDA>)
}
"""


class OnGpu(Tensor):
    """A tensor that says it is on a GPU, and computes with `held`, of the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnGpu:
        # In inference mode a view of an ordinary tensor is an ordinary one.
        with torch.inference_mode(False):
            made = Tensor._make_wrapper_subclass(
                cls,
                held.shape,
                strides=held.stride(),
                storage_offset=held.storage_offset(),
                dtype=held.dtype,
                device=torch.device("cuda", 0),
            )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if func not in _TAKE_BOTH and any(type(x) is not OnGpu and x.dim() for x in tensors):
            raise RuntimeError(f"{func} is given tensors of two devices")
        device = kwargs.get("device")
        if device is not None:
            kwargs = {**kwargs, "device": "cpu"}
        out = func(*tree_map(_held, args), **tree_map(_held, kwargs))
        if out is args[0] or (device is not None and device.type == "cpu"):
            return out
        given = {id(x.held): x for x in tensors if isinstance(x, OnGpu)}  # written in place

        def wrapped(x: Any) -> Any:
            return given.get(id(x), OnGpu(x)) if isinstance(x, Tensor) else x

        return tree_map(wrapped, out)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied: Tensor = OnGpu(self.held.clone())
        if isinstance(self, nn.Parameter):
            copied = nn.Parameter(copied, self.requires_grad)
        return memo.setdefault(id(self), copied)

    # What torch does not ask of such a class.
    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    def tolist(self) -> Any:
        return self.held.tolist()


class _Factories(TorchFunctionMode):
    """Lets factories make tensors on the GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        device = (kwargs or {}).get("device")
        if func in _FACTORIES and device is not None and torch.device(device).type == "cuda":
            return OnGpu(func(*args, **{**kwargs, "device": "cpu"}))
        return func(*args, **(kwargs or {}))


def _held(x: Any) -> Any:
    return x.held if isinstance(x, OnGpu) else x


def _to(own: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Tensor.to, which knows the way to the GPU."""

    def to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        given = [*args, kwargs.get("device"), kwargs.get("dtype")]
        given += [
            x for other in args if isinstance(other, Tensor) for x in (other.device, other.dtype)
        ]
        device = next((x for x in given if isinstance(x, str | torch.device)), None)
        if device is None or torch.device(device).type != "cuda":
            return own(tensor, *args, **kwargs)
        dtype = next((x for x in given if isinstance(x, torch.dtype)), tensor.dtype)
        tensor = own(tensor, dtype)
        return tensor if isinstance(tensor, OnGpu) else OnGpu(tensor.clone())

    return to


def _attention(own: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch's attention, which would ask for its kernels on the GPU."""

    def attention(*args: Any, **kwargs: Any) -> Tensor:
        if isinstance(args[0], OnGpu):
            return OnGpu(own(*map(_held, args), **tree_map(_held, kwargs)))
        return own(*args, **kwargs)

    return attention


def _on_held(kernel: Callable[..., None]) -> Callable[..., None]:
    """A kernel over the operands of a layer, on the tensors that they hold."""

    def run(operands: Sequence[Operand], *args: Any, **options: Any) -> None:
        held = [o._replace(out=_held(o.out), base=_held(o.base)) for o in operands]
        kernel(held, *args, **options)

    return run


def _load_guard() -> None:
    with tempfile.TemporaryDirectory() as name:
        source, library = Path(name) / "guard.cpp", Path(name) / "guard.so"
        source.write_text(_GUARD)
        include = [f"-I{path}" for path in include_paths()]
        torch_libraries = [*(f"-L{path}" for path in library_paths()), "-lc10"]
        flags = ["-std=c++20", "-shared", "-fPIC", *include]
        subprocess.run(
            [get_cxx_compiler(), *flags, source, *torch_libraries, "-o", library], check=True
        )
        torch.ops.load_library(library)


def pretend() -> None:
    _load_guard()
    # Else nn.Module.to keeps the parameters, which are of the CPU's class.
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    Tensor.to = _to(Tensor.to)
    F.scaled_dot_product_attention = _attention(F.scaled_dot_product_attention)
    _Factories().__enter__()
    step.perturb_layer = low_rank.perturb_layer = _on_held(step.perturb_layer)
    masters.accumulate_layer = _on_held(masters.accumulate_layer)
    _gpu._selected[:] = ["cuda"]
    parameters._check_parameter = lambda name, tensor: None  # it refuses subclasses
    torch.cuda.get_device_name = lambda device: "a GPU that is not there"
    gaussian = low_rank.gaussian
    low_rank.gaussian = lambda *args, device, **numbers: gaussian(*args, **numbers).to(device)


def on_gpu(family: str = "llama") -> PreTrainedModel:
    model = tiny_model(family).to("cuda")
    model.tie_weights()  # each module has parameters of its own now
    return model


def check_training(config: TrainConfig, family: str = "llama") -> None:
    """A run, its adapter and its replay give the losses of the CPU, and the bits of each other."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = write_data(folder / "data")
        here = train(tiny_model(family), TOKENIZER, config, data, folder / "here")
        there, loaded, replayed = (on_gpu(family) for _ in range(3))
        metrics = train(there, TOKENIZER, config, data, folder / "there")
        torch.testing.assert_close(metrics["test"]["loss"], here["test"]["loss"], rtol=1e-4, atol=0)
        load_adapter(loaded, folder / "there")
        until = metrics["best"]["step"]
        replay(replayed, folder / "there" / "journal.zo", folder / "again", until=until)
        assert same(state(loaded), state(there)) and same(state(replayed), state(there))
        assert evaluate(loaded, TOKENIZER, "sst2", data) == metrics["test"]


SHORT = replace(CONFIG, steps=4, eval_every=2)
METHODS = {
    "lr": {"lr": "auto"},
    "layers": {"layer": (1, 2), "directions": 2, "weight_decay": 0.1},
    "channels": {"channels": "outlier", "top": 0.1},
    "mezo": {"method": "mezo", "layer": None},
    "lozo": {"method": "lozo", "layer": None},
    "lora": {"method": "lora", "layer": None},
}


def check_methods() -> None:
    for settings in METHODS.values():
        check_training(replace(SHORT, **settings))


def check_families() -> None:
    for family in CONFIGS:
        check_training(SHORT, family)


def check_that_kernels_are_asked_for() -> None:
    """Where no column runs, that is told before there is a folder, and the model is as it was."""
    chosen, _gpu._selected[:] = [*_gpu._selected], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = write_data(folder / "data")
        for settings in ({"layer": None}, *METHODS.values()):
            model = on_gpu()
            try:
                train(model, TOKENIZER, replace(SHORT, **settings), data, folder / "run")
            except UserError as error:
                assert "no kernels run on 'cuda:0' (no GPU column can run here" in str(error)
            else:
                raise AssertionError(f"a run begins with {settings}")
            assert not (folder / "run").exists() and not hasattr(model, "peft_config")
    _gpu._selected[:] = chosen


def check_inference() -> None:
    """The probe, the sensitivity of layers and greedy answers are those of the CPU."""
    here, there = tiny_model(), on_gpu()
    assert probe(there, TOKENIZER).decision == probe(here, TOKENIZER).decision
    numbers = {"max_new_tokens": 5}
    prompts = ["abc", "abcdefgh"]
    assert generate(there, TOKENIZER, prompts, **numbers) == generate(
        here, TOKENIZER, prompts, **numbers
    )
    with tempfile.TemporaryDirectory() as name:
        data = write_data(Path(name) / "data")
        numbers = {"seeds": 2, "batches": 2, "batch_size": 4}
        signals = [
            [
                layer.signal
                for layer in sensitivity(model, TOKENIZER, "sst2", data, **numbers).layers
            ]
            for model in (here, there)
        ]
    torch.testing.assert_close(*signals, rtol=1e-3, atol=0)


if __name__ == "__main__":
    pretend()
    check_that_kernels_are_asked_for()
    check_methods()
    check_families()
    check_inference()

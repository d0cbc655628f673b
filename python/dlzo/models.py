"""Loading causal language models and finding their decoder layers."""

from __future__ import annotations

import hashlib
import io
import os
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from inspect import signature
from itertools import chain
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from gguf import GGUFReader
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import (
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from dlzo.errors import UserError
from dlzo.files import user_path
from dlzo_kernels.backends import why_no_kernels

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
DEFAULT_MODEL = "smollm2"
# What transformers raises for a broken or unknown model.
LOAD_ERRORS = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError)
# One request decides whether the hub is there; transformers alone would retry for a minute.
HUB_TIMEOUT_S = 10.0


def parse_dtype(name: str) -> torch.dtype:
    """The torch dtype called `name`: float32, bfloat16 or float16.

    Raises:
        UserError: it is none of these.
    """
    if name not in DTYPES:
        raise UserError(f"dtype {name!r} is not supported: choose one of {', '.join(DTYPES)}")
    return DTYPES[name]


def hash_tensor(digest: hashlib._Hash, name: str, tensor: torch.Tensor) -> None:
    """Takes name, dtype, shape and bytes of a tensor into a hash."""
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    flat = tensor.detach().cpu().contiguous().flatten()
    digest.update(flat.view(torch.uint8).numpy().data)


def dtype_name(dtype: torch.dtype) -> str:
    """What `parse_dtype` takes, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def parse_device(name: str) -> torch.device:
    """The torch device called `name`: cpu, cuda (of ROCm too), or cuda:1 for the second GPU.

    For `cuda`, each rank that torchrun has started on a machine gets another GPU.

    Raises:
        UserError: it is none of these, or there is no such GPU.
    """
    if name == "cpu":
        return torch.device("cpu")
    if not re.fullmatch(r"cuda(:[0-9]+)?", name):
        raise UserError(f"device {name!r} is not supported: choose cpu, cuda or cuda:1")
    if (count := torch.cuda.device_count()) == 0:
        raise UserError(f"device is {name!r} and torch finds no GPU: choose cpu")
    index = name.removeprefix("cuda").removeprefix(":")
    number = int(index or os.environ.get("LOCAL_RANK", "0"))
    if index and number >= count:
        raise UserError(f"device is {name!r} and torch finds {count} GPUs: choose one from cuda:0")
    return torch.device("cuda", number % count)


def check_kernels(device: torch.device) -> None:
    """Raises UserError where noise, steps and statistics have no kernels on a device."""
    if reason := why_no_kernels(device):
        raise UserError(f"no kernels run on {str(device)!r} ({reason}): mend that, or choose cpu")


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers of a model, layer 0 first.

    They are found by structure: the outermost ModuleList of the text decoder, or else of the base
    model, that holds `num_hidden_layers` blocks, of one class or, in a hybrid, each made of further
    modules.

    Raises:
        UserError: the model has no such list.
    """
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    # What ModernBERT calls its decoder is a part of the head.
    for module in chain(model.get_decoder().modules(), model.base_model.modules()):
        if not isinstance(module, nn.ModuleList) or len(module) != count:
            continue
        if len({type(block) for block in module}) == 1 or all(map(_is_composed, module)):
            return module
    raise UserError(
        f"{type(model).__name__} has no list of {count} decoder layers: choose another model"
    )


def _is_composed(block: nn.Module) -> bool:
    return any(True for _ in block.children())


def sharing_module(model: nn.Module, layers: Sequence[nn.Module]) -> str | None:
    """The name of a module outside these layers that holds a parameter of theirs; None if none."""
    own = {id(p) for layer in layers for p in layer.parameters()}
    paths = [f"{name}." for name, module in model.named_modules() if module in layers]
    for name, module in model.named_modules(remove_duplicate=False):
        outside = not any(f"{name}.".startswith(path) for path in paths)
        if outside and any(id(p) in own for p in module.parameters(recurse=False)):
            return name
    return None


def layer_parts(layer: nn.Module) -> dict[str, list[str]]:
    """Names of the children of a decoder layer that are its "attention" and its "mlp".

    By structure: of the children that hold matrices, those which take more than a hidden state or
    two (a mask, a cache) are the attention, or what mixes tokens in its stead, and all others are
    the MLP (in OPT two matrices by themselves). Where that does not tell, the attention is the
    first.

    Raises:
        UserError: the layer has fewer than two such children, or one matrix for an MLP.
    """
    children = {
        name: child
        for name, child in layer.named_children()
        if any(parameter.ndim >= 2 for parameter in child.parameters())
    }
    attention = [n for n, c in children.items() if len(signature(c.forward).parameters) > 2]
    if len(attention) in (0, len(children)):
        attention = list(children)[:1]
    others = [name for name in children if name not in attention]
    if sum(p.ndim > 1 for name in others for p in children[name].parameters()) < 2:
        raise UserError(
            f"{type(layer).__name__} has no attention and MLP that can be told apart: tune all of "
            "the layer"
        )
    return {"attention": attention, "mlp": others}


_in_use: WeakSet[nn.Module] = WeakSet()
_guard = threading.Lock()


@contextmanager
def sole_use(model: nn.Module) -> Iterator[None]:
    """Keeps other threads off a model whose weights are moved, or whose layers are hooked.

    Raises:
        UserError: the model is in use.
    """
    with _guard:
        if model in _in_use:
            raise UserError(
                "the model is in use by another run of this process: wait for it or load it again"
            )
        _in_use.add(model)
    try:
        yield
    finally:
        _in_use.discard(model)


def load_model(
    name_or_path: str | Path,
    *,
    dtype: torch.dtype | str = torch.bfloat16,
    device: torch.device | str = "cpu",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model, in eval mode, and its tokenizer.

    Args:
        name_or_path: a local folder, a GGUF file (its weights are de-quantised), the id of a model
            on the Hugging Face hub, or `smollm2`.
        dtype: the type of the weights, or its name: float32, bfloat16 or float16.
        device: where they lie, or its name: cpu, cuda, or cuda:1 for the second GPU.

    Raises:
        UserError: there is no such model or device, the model cannot be read, or it does not fit
            into memory.
    """
    name, dtype = str(name_or_path), parse_dtype(str(dtype).removeprefix("torch."))
    place = parse_device(str(device))
    source, options = _resolve(name)
    model, tokenizer = _load(name, source, options, dtype)
    model.name_or_path = name
    try:
        # The decorator of transformers takes `to` for a function.
        return model.to(place), tokenizer  # type: ignore[arg-type]
    except torch.OutOfMemoryError as error:
        raise _out_of_memory(name, source, options, dtype) from error


def load_gguf(path: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a GGUF file as an ordinary model: de-quantised, and free to be saved as safetensors.

    Raises:
        UserError: the file is no GGUF, is cut off, or does not fit into memory.
    """
    source, options = _resolve_gguf(path)
    return _load(str(path), source, options, dtype)


def absolute_name(name: str) -> str:
    """A model's name as it holds from any folder."""
    path = user_path(name)
    named = name not in ("", DEFAULT_MODEL)  # a model that was made of a configuration has no name
    return str(path.resolve()) if named and path.exists() else name


def base_model(name: str) -> str:
    """The base model of an adapter or a journal in words, with its name where it has one."""
    return f"its base model, {name!r}" if name else "its base model"


def _resolve(name: str) -> tuple[str, dict[str, Any]]:
    """The first argument of `from_pretrained` for a model's name, and further ones."""
    if name == DEFAULT_MODEL:
        # Imported late: the embedded model is made by load_gguf, above.
        from dlzo.smollm2 import ensure_smollm2

        return str(ensure_smollm2()), {}
    if not name:
        raise UserError("model is '': give a folder, a GGUF file, a hub id or 'smollm2'")
    path = user_path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"folder {path} has no config.json: give the folder of a saved model")
        return str(path), {}
    if path.is_file():
        return _resolve_gguf(path)
    return name, {"local_files_only": not _hub_has(name)}


def _resolve_gguf(path: Path) -> tuple[str, dict[str, Any]]:
    _check_gguf(path)
    return str(path.parent), {"gguf_file": path.name}


def _check_gguf(path: Path) -> None:
    """Refuse a broken file by its index, before the long de-quantising."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"{path} is not a GGUF file: give a model folder or a .gguf file")
    try:
        tensors = GGUFReader(path).tensors
    # What the reader stumbles over when an index or a tensor ends early.
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        size = path.stat().st_size
        raise UserError(f"{path} ({size:,} bytes) is cut off or damaged: fetch it again") from error
    if not tensors:
        raise UserError(f"{path} holds no tensors: fetch it again")


def _hub_has(name: str) -> bool:
    """Whether the hub holds the model; False if it is out of reach and a copy is cached.

    Raises:
        UserError: no such model, or neither hub nor copy.
    """
    try:
        HfApi().model_info(name, timeout=HUB_TIMEOUT_S)
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise UserError(
            f"model {name!r} is not a folder, not a GGUF file and not on the Hugging Face hub: "
            f"check the name, log in with `hf auth login` if it is private, or use {DEFAULT_MODEL}"
        ) from error
    except (HTTPError, OfflineModeIsEnabled) as error:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return False
        raise UserError(
            f"model {name!r} is not a folder or a GGUF file, and the Hugging Face hub cannot be "
            f"reached ({error}): check the path or the network, or use {DEFAULT_MODEL}"
        ) from error
    return True


def _load(
    name: str, source: str, options: dict[str, Any], dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    # Else a model with code of its own asks a question on the terminal.
    options = options | {"trust_remote_code": False}
    gguf = "gguf_file" in options
    with quiet_transformers(every_bar=gguf):
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=dtype,
                # Else the weights of a GGUF stay packed where the `kernels` package is installed.
                quantization_config=GgufConfig(dequantize=True) if gguf else None,
                output_loading_info=True,
                **options,
            )
        except (*LOAD_ERRORS, MemoryError) as error:
            if isinstance(error, MemoryError) or "not enough memory" in str(error):
                raise _out_of_memory(name, source, options, dtype) from error
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise UserError(f"model {name!r} cannot be loaded: {reason}") from error
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
        # The tokenizers library raises nothing more specific.
        except Exception as error:
            raise UserError(
                f"model {name!r} has no tokenizer that can be read: put its tokenizer.json and "
                "tokenizer_config.json beside its weights"
            ) from error
    model, info = loaded
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UserError(
            f"model {name!r} lacks {len(missing)} of its weights, {missing[0]} among them: "
            "fetch it again"
        )
    return model.eval(), tokenizer


def _out_of_memory(
    name: str, source: str, options: dict[str, Any], dtype: torch.dtype
) -> UserError:
    config = AutoConfig.from_pretrained(source, **options)
    with torch.device("meta"):
        shell = AutoModelForCausalLM.from_config(config, dtype=dtype)
    need = sum(parameter.nbytes for parameter in shell.parameters()) / 2**30
    return UserError(
        f"model {name!r} does not fit into memory: its weights need {need:.1f} GiB in "
        f"{dtype_name(dtype)}: choose bfloat16 or a smaller model"
    )


@contextmanager
def quiet_transformers(*, every_bar: bool) -> Iterator[None]:
    """No warnings and no bars of work from transformers; those of downloads stay.

    Args:
        every_bar: silence stderr too, for the bars of de-quantising and saving have no switch.
    """
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    download_bars = not are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if download_bars:
        enable_progress_bars()
    try:
        with redirect_stderr(io.StringIO()) if every_bar else nullcontext():
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()

"""The records of a journal and their bytes, without checksums; see docs/journal.md."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from dlzo.config import MAX_DIRECTIONS, as_float
from dlzo.files import parse_json_object
from dlzo.sampler import step_seed
from dlzo_kernels import update_scales

STEP, EVENT, BLOCK = 1, 2, 3
MAX_BLOCK = 4096  # steps
PREFIX = struct.Struct("<BBHI")  # kind, applied, count, step
_SEED_LR = struct.Struct("<Qd")


class Damaged(ValueError):
    """A record is torn, its checksum is wrong, or it says what no journal says."""


class Parameter(NamedTuple):
    """A tuned parameter: its full name in the model, and its stream of noise."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    stream: int


@dataclass(frozen=True)
class Header:
    """What a journal belongs to.

    Attributes:
        noise_version: of the noise contract.
        library_version: of the dlzo that wrote it.
        base_model: name or path of the base model.
        base_fingerprint: `fingerprint` of the target before it was tuned.
        config_fingerprint: SHA-256 of the base model's configuration.
        data_fingerprint: SHA-256 of the examples.
        dtype: of the model, such as "bfloat16".
        layers: indices of the tuned decoder layers, lowest first; none: the whole model is tuned.
        parameters: the tuned ones.
        directions: K, the projected gradients in each step.
        lr: learning rate; in a compact journal, of each step.
        seed: of the sampler: of the batches and of each step's perturbation.
        settings: the run's further settings: task, method, steps, ...
        compact: whether the steps lie in blocks, without what can be derived.
    """

    noise_version: int
    library_version: str
    base_model: str
    base_fingerprint: str
    config_fingerprint: str
    data_fingerprint: str
    dtype: str
    layers: tuple[int, ...]
    parameters: tuple[Parameter, ...]
    directions: int
    lr: float
    seed: int
    settings: dict[str, Any]
    compact: bool = False


class Step(NamedTuple):
    """One step, from 1.

    `losses` are plus and minus of each direction in turn; in a compact journal their mean alone,
    in float32. A step that was not `applied` moved no weight.
    """

    step: int
    seed: int
    lr: float
    gradients: tuple[float, ...]
    losses: tuple[float, ...]
    applied: bool

    @property
    def loss(self) -> float:
        """Mean of the losses."""
        return sum(self.losses) / len(self.losses)


class Event(NamedTuple):
    """What was measured after a step: JSON values under a name, such as "validation"."""

    step: int
    name: str
    values: Mapping[str, Any]


Record = Step | Event


def encode_header(header: Header) -> bytes:
    """Canonical JSON: sorted keys, no spaces."""
    return _json(asdict(header))


def decode_header(text: bytes, version: int) -> Header:
    """The header in a text from anywhere, of any format version from 1 on.

    Raises:
        ValueError: a field is missing, unknown, or of the wrong type or range.
    """
    values = parse_json_object(text)
    if version == 1 and "layer" in values:
        values["layers"] = [values.pop("layer")]
    types = {field.name: _JSON_TYPES[str(field.type)] for field in fields(Header)}
    if odd := sorted(values.keys() ^ types.keys()):
        raise ValueError(f"{'unknown' if odd[0] in values else 'missing'} field {odd[0][:60]!r}")
    for name, kind in types.items():
        if type(values[name]) is not kind:
            raise ValueError(f"{name} must be of type {kind.__name__}")
    header = Header(**values)
    if not 0 <= header.seed < 1 << 63:
        raise ValueError("seed must be at least 0 and below 2**63")
    if not all(type(layer) is int and layer >= 0 for layer in header.layers):
        raise ValueError("layers must be integers of at least 0")
    if not 1 <= header.directions <= MAX_DIRECTIONS:
        raise ValueError(f"directions must be from 1 to {MAX_DIRECTIONS}")
    if not (math.isfinite(header.lr) and header.lr >= 0):
        raise ValueError("lr must be finite and at least 0")
    parameters = tuple(map(_decode_parameter, header.parameters))
    return replace(header, layers=tuple(header.layers), parameters=parameters)


_JSON_TYPES = {
    "int": int,
    "float": float,
    "str": str,
    "bool": bool,
    "dict[str, Any]": dict,
    "tuple[int, ...]": list,
    "tuple[Parameter, ...]": list,
}


def _decode_parameter(row: object) -> Parameter:
    if isinstance(row, list) and [type(part) for part in row] == [str, str, list, int]:
        name, dtype, shape, stream = row
        if all(type(size) is int for size in shape):
            return Parameter(name, dtype, tuple(shape), stream)
    raise ValueError("a parameter must be [name, dtype, shape, stream]")


def encode(record: Record) -> bytes:
    """The bytes of a step or an event in a journal that is not compact."""
    if isinstance(record, Event):
        body = _json({**record.values, "event": record.name})
        return PREFIX.pack(EVENT, 0, len(body), record.step) + body
    count = len(record.gradients)
    numbers = struct.pack(f"<{3 * count}d", *record.losses, *record.gradients)
    prefix = PREFIX.pack(STEP, record.applied, count, record.step)
    return prefix + _SEED_LR.pack(record.seed, record.lr) + numbers


def encode_block(steps: Sequence[Step]) -> bytes:
    """The bytes of consecutive steps in a compact journal: at most MAX_BLOCK of them."""
    row = _block_row(len(steps[0].gradients))
    with np.errstate(over="ignore"):
        rows = np.array([(step.applied, step.gradients, step.loss) for step in steps], row)
    return PREFIX.pack(BLOCK, 0, len(steps), steps[0].step) + rows.tobytes()


def body_size(prefix: bytes, header: Header) -> int:
    """How many bytes follow a record's prefix.

    Raises:
        Damaged: the journal can have no such record.
    """
    kind, applied, count, _ = PREFIX.unpack(prefix)
    if kind == EVENT and not applied:
        return count
    if kind == STEP and applied <= 1 and count == header.directions and not header.compact:
        return _SEED_LR.size + 24 * count
    if kind == BLOCK and not applied and 0 < count <= MAX_BLOCK and header.compact:
        return count * _block_row(header.directions).itemsize
    raise Damaged("a record is of no known kind")


def decode(prefix: bytes, body: bytes, header: Header) -> Sequence[Record]:
    """The steps or the event in a record.

    Raises:
        Damaged: they say what no journal says.
    """
    kind, applied, count, step = PREFIX.unpack(prefix)
    if kind == EVENT:
        return [_decode_event(step, body)]
    if kind == STEP:
        seed, lr = _SEED_LR.unpack_from(body)
        numbers = struct.unpack_from(f"<{3 * count}d", body, _SEED_LR.size)
        steps = [
            Step(step, seed, lr, numbers[2 * count :], numbers[: 2 * count], bool(applied)),
        ]
    else:
        rows = np.frombuffer(body, _block_row(header.directions))
        columns = (rows[name].tolist() for name in ("applied", "gradients", "loss"))
        steps = [
            Step(
                number,
                step_seed(header.seed, number),
                header.lr,
                tuple(gradients),
                (loss,),
                bool(applied),
            )
            for number, (applied, gradients, loss) in enumerate(
                zip(*columns, strict=True), start=step
            )
        ]
    if not all(_can_be_applied(item, header) for item in steps if item.applied):
        raise Damaged("a step was applied with numbers that are out of range")
    return steps


def _can_be_applied(step: Step, header: Header) -> bool:
    """Whether its numbers are finite and leave something of the weights."""
    decay = header.settings.get("weight_decay")
    # Any other is refused with the rule.
    decay = as_float(decay) if isinstance(decay, int | float) else 0.0
    # A comparison with NaN is false.
    return (
        0 <= step.lr < math.inf
        and step.lr * decay < 1
        and all(abs(scale) < 3.4e38 for scale in update_scales(step.lr, step.gradients))
    )


def _decode_event(step: int, body: bytes) -> Event:
    try:
        values = parse_json_object(body)
    except ValueError as error:
        raise Damaged("an event is not valid JSON") from error
    name = values.pop("event", None)
    if not isinstance(name, str):
        raise Damaged("an event has no name")
    return Event(step, name, values)


@cache
def _block_row(directions: int) -> np.dtype:
    return np.dtype(
        [("applied", "u1"), ("gradients", "<f8", (directions,)), ("loss", "<f4")], align=False
    )


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()

"""Inputs that no dlzo wrote, and what its readers make of them."""

from __future__ import annotations

import re
import struct
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from random import Random

from dlzo.adapter import read_config
from dlzo.config import parse_config
from dlzo.errors import UserError
from dlzo.header import differences
from dlzo.journal import Reader
from dlzo.run import read_metrics, read_settings

CORPUS = Path(__file__).with_name("corpus")


def read_journal(path: Path) -> str | None:
    reader = Reader(path)
    differences(reader.header, vars(Reader(CORPUS / "whole" / "journal.zo").header))
    deque(reader, maxlen=0)
    return reader.damage


def read_run(path: Path) -> None:
    parse_config(read_settings(path.parent)["config"], path.parent)


def read_result(path: Path) -> None:
    read_metrics(path.parent)


def read_adapter(path: Path) -> None:
    read_config(path.parent)


# Of each kind of file, by its name.
READERS: dict[str, Callable[[Path], str | None]] = {
    "journal.zo": read_journal,
    "run.json": read_run,
    "metrics.json": read_result,
    "adapter_model.safetensors": read_adapter,
}


def outcome(path: Path) -> str:
    """What its reader says of a file, but for names, numbers and what a library's parser says.

    Any error but the documented one is a crash.
    """
    try:
        said = READERS[path.name](path) or "read"
    except UserError as error:
        said = str(error)
    said = re.sub(r"'[^']*'|\"[^\"]*\"|\S*\d\S*", "_", said)
    return re.sub(r"\(?(Error while|Expecting|Invalid control|Extra data|_ codec).*", "", said)


def sealed(*parts: bytes) -> bytes:
    """A journal of these records with right checksums, as a forger makes it."""
    data, crc = b"", 0
    for part in parts:
        crc = zlib.crc32(part, crc)
        data += part + struct.pack("<I", crc)
    return data


def parts_of(journal: Path) -> list[bytes]:
    """The header and the records of a journal, without checksums."""
    data, reader = journal.read_bytes(), Reader(journal)
    ends = [0, reader.end]
    for _ in reader:
        if reader.end != ends[-1]:
            ends.append(reader.end)
    return [data[a : b - 4] for a, b in pairwise(ends)]


def mutants(seed: Path, draw: Random) -> Iterator[bytes]:
    """Endless variations of a file; of a journal, half of them with right checksums."""
    whole = seed.read_bytes()
    parts = parts_of(seed) if seed.suffix == ".zo" else []
    while True:
        if parts and draw.random() < 0.5:
            forged = list(parts)
            number = draw.randrange(len(forged))
            forged[number] = garbled(forged[number], draw)
            if draw.random() < 0.2:
                forged.insert(draw.randrange(1, len(forged) + 1), draw.choice(parts))
            yield sealed(*forged)
        else:
            yield garbled(whole, draw)


def garbled(data: bytes, draw: Random) -> bytes:
    """The bytes after a few flips, changes, cuts, repetitions and insertions."""
    result = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 5))):
        a, b = sorted(draw.randrange(len(result) + 1) for _ in range(2))
        b = min(b, a + draw.choice((1, 4, 8, 64)))
        match draw.randrange(6):
            case 0 if result:
                result[a % len(result)] ^= 1 << draw.randrange(8)
            case 1:
                result[a:b] = draw.choice((b"\x00", b"\xff", b"\x7f")) * (b - a)
            case 2:
                del result[a:b]
            case 3:
                result[b:b] = result[a:b]
            case 4:
                result[a:a] = draw.choice(
                    (b"[" * 3000, b"-1", b"1e999", b"9" * 400, b"null", b'"', b"NaN")
                )
            case _:
                result[a:b] = draw.randbytes(b - a)
    return bytes(result)

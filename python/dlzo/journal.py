"""The journal of a run: what rebuilds the tuned weights bit for bit; see docs/journal.md."""

from __future__ import annotations

import os
import struct
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from dlzo.errors import UserError
from dlzo.files import GrowingFile, replace_file
from dlzo.records import (
    MAX_BLOCK,
    PREFIX,
    Damaged,
    Event,
    Header,
    Record,
    Step,
    body_size,
    decode,
    decode_header,
    encode,
    encode_block,
    encode_header,
)
from dlzo.sampler import step_seed

VERSION = 2  # 1 names its one layer otherwise, and is read too
MAX_HEADER = 1 << 20  # bytes
_MAGIC = b"DLZOJRNL"
_START = struct.Struct("<8sII")  # magic, version, bytes of the header
_CRC = struct.Struct("<I")


class Reader:
    """Reads a journal up to its end, or up to the first record that is torn or damaged.

    Memory is bounded by the size of one record, whatever the file says.

    Attributes:
        path: of the journal.
        header: what it belongs to.
        end: bytes from the beginning of the file to the end of the last whole record read.
        crc: the running checksum there.
        last: the last step read.
        damage: what is lost behind `end`, in a sentence; None where nothing is.

    Raises:
        UserError: it is no journal, or of another version, or its header is damaged.
    """

    damage: str | None

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self.header, self._begin = _read_header(file, path)
        except OSError as error:
            raise UserError(
                f"journal {str(path)!r} cannot be read ({error.strerror}): give the path of a "
                "journal.zo"
            ) from error
        self._rewind()

    def __iter__(self) -> Iterator[Record]:
        """The records from the first on."""
        self._rewind()
        with self.path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(self.end)
            while self.end < size:
                try:
                    records = self._read(file, size - self.end)
                except Damaged as error:
                    self.damage = (
                        f"journal {str(self.path)!r} is whole up to step {self.last}; what follows,"
                        f" {size - self.end:,} bytes from byte {self.end:,} on, is lost: {error}"
                    )
                    return
                yield from records

    def steps(self) -> Iterator[Step]:
        """The steps alone, from the first on."""
        return (record for record in self if isinstance(record, Step))

    def _rewind(self) -> None:
        self.end, self.crc = self._begin
        self.last = 0
        self.damage = None

    def _read(self, file: BinaryIO, left: int) -> Sequence[Record]:
        prefix = file.read(PREFIX.size)
        if len(prefix) < PREFIX.size:
            raise Damaged("a record is cut off")
        size = body_size(prefix, self.header)
        whole = PREFIX.size + size + _CRC.size
        if whole > left:
            raise Damaged("a record is cut off")
        body = file.read(size)
        crc = zlib.crc32(body, zlib.crc32(prefix, self.crc))
        if file.read(_CRC.size) != _CRC.pack(crc):
            raise Damaged("a checksum is wrong")
        records = decode(prefix, body, self.header)
        if records[0].step != self.last + isinstance(records[0], Step):
            raise Damaged(f"a record of step {records[0].step} follows step {self.last}")
        self.end, self.crc, self.last = self.end + whole, crc, records[-1].step
        return records


class Writer:
    """Appends to a journal from where a reader has read it to; damage behind that is cut off.

    Args:
        reader: has read the journal to its end.
        sync_steps: steps from one fsync to the next: what a power cut may take.
        sync_seconds: the most seconds from one fsync to the next, as steps come in.
    """

    def __init__(self, reader: Reader, sync_steps: int, sync_seconds: float) -> None:
        self._crc = reader.crc
        self._file = GrowingFile(reader.path, reader.end)
        self._sync_steps, self._sync_seconds = sync_steps, sync_seconds
        self._synced_step, self._synced_at = reader.last, time.monotonic()

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def append(self, record: Record) -> None:
        """Appends a record; an event is on the disk when this returns.

        Raises:
            OSError: it cannot be written.
        """
        sealed, self._crc = _seal(encode(record), self._crc)
        self._file.append(sealed)
        now = time.monotonic()
        if (
            isinstance(record, Event)
            or record.step - self._synced_step >= self._sync_steps
            or now - self._synced_at >= self._sync_seconds
        ):
            self._file.sync()
            self._synced_step, self._synced_at = record.step, now


def create(path: Path, header: Header) -> None:
    """Writes a journal that has no records yet.

    Raises:
        UserError: its header is too large.
        OSError: it cannot be written.
    """
    replace_file(path, lambda partial: partial.write_bytes(_start(header)[0]))


def header_text(header: Header) -> bytes:
    """The JSON of a header.

    Raises:
        UserError: it is larger than a reader takes.
    """
    text = encode_header(header)
    if len(text) > MAX_HEADER:
        raise UserError(
            f"the run tunes {len(header.parameters):,} tensors, more than a journal's header has "
            "room for: tune fewer layers"
        )
    return text


def setting_error(reader: Reader, name: str) -> UserError:
    """What is raised where a setting in a journal's header, which may be from anywhere, is bad."""
    value = repr(reader.header.settings.get(name))[:60]
    return UserError(
        f"journal {str(reader.path)!r} has the invalid setting {name} = {value}: take a copy of "
        "it, or use the dlzo that wrote it"
    )


def compact(source: Path, target: Path) -> None:
    """Writes a whole journal again, 13 bytes a step of one direction; its replay has the same bits.

    Raises:
        UserError: the journal is damaged or compact already, a step has a seed or an lr that is
            not the run's, or `target` exists or cannot be written.
    """
    reader = Reader(source)
    if reader.header.compact:
        raise UserError(f"journal {str(source)!r} is compact already")
    if target.exists():
        raise UserError(f"{str(target)!r} exists: choose another file")
    data, crc = _start(replace(reader.header, compact=True))

    def write(partial: Path) -> None:
        nonlocal crc
        with partial.open("wb") as file:
            file.write(data)
            for plain in _blocks(reader):
                sealed, crc = _seal(plain, crc)
                file.write(sealed)
        if reader.damage is not None:
            raise UserError(reader.damage)

    try:
        replace_file(target, write)
    except OSError as error:
        raise UserError(
            f"journal {str(target)!r} cannot be written ({error.strerror}): choose another place"
        ) from error


def _blocks(reader: Reader) -> Iterator[bytes]:
    """The records of a compact journal."""
    block: list[Step] = []
    for record in reader:
        if isinstance(record, Step):
            _check_derivable(record, reader)
            block.append(record)
        if block and (isinstance(record, Event) or len(block) == MAX_BLOCK):
            yield encode_block(block)
            block = []
        if isinstance(record, Event):
            yield encode(record)
    if block:
        yield encode_block(block)


def _check_derivable(step: Step, reader: Reader) -> None:
    seed = step_seed(reader.header.seed, step.step)
    if (step.seed, step.lr) != (seed, reader.header.lr):
        raise UserError(
            f"journal {str(reader.path)!r} cannot be compact: step {step.step} has a seed or an lr "
            "of its own"
        )


def _start(header: Header) -> tuple[bytes, int]:
    """The bytes before the first record, and the checksum after them."""
    text = header_text(header)
    return _seal(_START.pack(_MAGIC, VERSION, len(text)) + text, 0)


def _seal(plain: bytes, crc: int) -> tuple[bytes, int]:
    """A record with its checksum, which runs on from that of the record before it."""
    crc = zlib.crc32(plain, crc)
    return plain + _CRC.pack(crc), crc


def _read_header(file: BinaryIO, path: Path) -> tuple[Header, tuple[int, int]]:
    """The header, and (bytes, checksum) up to the first record."""
    start = file.read(_START.size)
    if not start.startswith(_MAGIC):
        raise UserError(f"{str(path)!r} is not a dlzo journal")
    damaged = UserError(f"journal {str(path)!r} has a damaged header: take a copy of it")
    if len(start) < _START.size:
        raise damaged
    _, version, size = _START.unpack(start)
    if not 1 <= version <= VERSION:
        raise UserError(
            f"journal {str(path)!r} has format version {version} and this dlzo reads up to "
            f"{VERSION}: use the dlzo that wrote it"
        )
    text = file.read(size) if size <= MAX_HEADER else b""
    crc = zlib.crc32(start + text)
    if len(text) != size or file.read(_CRC.size) != _CRC.pack(crc):
        raise damaged
    try:
        header = decode_header(text, version)
    except ValueError as error:
        raise UserError(f"journal {str(path)!r} has an invalid header: {error}") from error
    return header, (_START.size + size + _CRC.size, crc)

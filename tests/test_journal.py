"""The journal's bytes, and that a reader believes nothing that it has not checked."""

from __future__ import annotations

import json
import math
import os
import struct
import tracemalloc
import zlib
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dlzo.errors import UserError
from dlzo.journal import MAX_HEADER, Reader, Writer, compact, create
from dlzo.records import Event, Header, Parameter, Step
from dlzo.sampler import step_seed
from fuzz import sealed

HEADER = Header(
    noise_version=1,
    library_version="0.1.0",
    base_model="tiny",
    base_fingerprint="ab" * 32,
    config_fingerprint="cd" * 32,
    data_fingerprint="ef" * 32,
    dtype="bfloat16",
    layers=(1,),
    parameters=(Parameter("model.layers.1.mlp.up_proj.weight", "bfloat16", (64, 32), 4),),
    directions=1,
    lr=3e-4,
    seed=7,
    settings={"task": "sst2", "eps": 1e-3},
)
RECORDS = [
    Event(0, "validation", {"accuracy": 0.5, "loss": 0.69}),
    Step(1, step_seed(7, 1), 3e-4, (0.25,), (0.7, 0.6995), True),
    Step(2, step_seed(7, 2), 3e-4, (math.inf,), (math.inf, 0.7), False),
    Event(2, "validation", {"accuracy": 0.75, "loss": 0.5}),
    Step(3, step_seed(7, 3), 3e-4, (-0.5,), (0.625, 0.75), True),
]


def write(path: Path, records=RECORDS, header: Header = HEADER) -> Path:
    create(path, header)
    with Writer(Reader(path), sync_steps=10, sync_seconds=10.0) as journal:
        for record in records:
            journal.append(record)
    return path


def read(path: Path) -> tuple[list[Step | Event], str | None]:
    reader = Reader(path)
    records = list(reader)
    return records, reader.damage


@pytest.fixture
def journal(tmp_path):
    return write(tmp_path / "journal.zo")


def test_what_is_written_is_read(journal):
    reader = Reader(journal)
    assert reader.header == HEADER
    assert list(reader) == RECORDS
    assert (reader.damage, reader.last, reader.end) == (None, 3, journal.stat().st_size)
    assert [step.step for step in reader.steps()] == [1, 2, 3]


def test_bytes_are_those_of_the_document(tmp_path):
    """Written once more from docs/journal.md alone."""
    path = write(tmp_path / "journal.zo", RECORDS[:2])
    text = json.dumps(
        {
            "base_fingerprint": "ab" * 32,
            "base_model": "tiny",
            "compact": False,
            "config_fingerprint": "cd" * 32,
            "data_fingerprint": "ef" * 32,
            "directions": 1,
            "dtype": "bfloat16",
            "layers": [1],
            "library_version": "0.1.0",
            "lr": 3e-4,
            "noise_version": 1,
            "parameters": [["model.layers.1.mlp.up_proj.weight", "bfloat16", [64, 32], 4]],
            "seed": 7,
            "settings": {"eps": 1e-3, "task": "sst2"},
        },
        separators=(",", ":"),
    ).encode()
    event = b'{"accuracy":0.5,"event":"validation","loss":0.69}'
    step = struct.pack("<BBHIQdddd", 1, 1, 1, 1, step_seed(7, 1), 3e-4, 0.7, 0.6995, 0.25)
    parts = [
        struct.pack("<8sII", b"DLZOJRNL", 2, len(text)) + text,
        struct.pack("<BBHI", 2, 0, len(event), 0) + event,
        step,
    ]
    expected, content = b"", b""
    for part in parts:
        content += part
        expected += part + struct.pack("<I", zlib.crc32(content))
    assert path.read_bytes() == expected
    assert len(step) + 4 == 52


def test_every_flipped_bit_is_detected(journal, tmp_path):
    whole, broken = journal.read_bytes(), tmp_path / "broken.zo"
    for position in range(8 * len(whole)):
        data = bytearray(whole)
        data[position // 8] ^= 1 << position % 8
        broken.write_bytes(data)
        try:
            records, damage = read(broken)
        except UserError:
            continue
        assert damage is not None
        assert records == RECORDS[: len(records)] and len(records) < len(RECORDS)


def test_what_comes_before_a_torn_tail_is_used(journal, tmp_path):
    whole, torn = journal.read_bytes(), tmp_path / "torn.zo"
    reader = Reader(journal)
    ends = [reader.end] + [reader.end for _ in reader]
    for size in range(ends[0], len(whole)):
        torn.write_bytes(whole[:size])
        records, damage = read(torn)
        assert records == RECORDS[: sum(end <= size for end in ends) - 1]
        assert (damage is None) == (size in ends)


def test_what_is_lost_is_said(journal):
    journal.write_bytes(journal.read_bytes()[:-1])
    _, damage = read(journal)
    assert "is whole up to step 2" in damage and "51 bytes" in damage and "cut off" in damage


def test_a_writer_goes_on_behind_the_last_whole_record(journal):
    journal.write_bytes(journal.read_bytes()[:-9])
    reader = Reader(journal)
    assert list(reader) == RECORDS[:-1]
    with Writer(reader, 1, 0.0) as writer:
        writer.append(RECORDS[-1])
    assert read(journal) == (RECORDS, None)


@pytest.mark.parametrize(
    ("steps", "seconds", "synced_after"),
    [(3, 1e9, [3, 6, 9, 10]), (100, 1e9, [10]), (100, 0.0, [*range(1, 11), 10])],
)
def test_the_disk_is_waited_for_by_steps_by_seconds_and_at_events(
    tmp_path, monkeypatch, steps, seconds, synced_after
):
    create(tmp_path / "journal.zo", HEADER)
    synced, last = [], 0
    with Writer(Reader(tmp_path / "journal.zo"), steps, seconds) as journal:
        monkeypatch.setattr("dlzo.files.os.fsync", lambda descriptor: synced.append(last))
        for last in range(1, 11):
            journal.append(Step(last, 1, 3e-4, (0.1,), (0.7, 0.6), True))
        journal.append(Event(10, "test", {"loss": 0.5}))
    assert synced == synced_after


@pytest.mark.parametrize("order", [[0, 1, 3, 4], [0, 1, 3, 2, 4], [0, 1, 1, 2, 3, 4]], ids=str)
def test_dropped_swapped_and_repeated_records_are_detected(journal, order):
    """Each record whole in itself: the checksum runs on through all of them."""
    data, reader = journal.read_bytes(), Reader(journal)
    ends = [reader.end] + [reader.end for _ in reader]
    parts = [data[a:b] for a, b in pairwise(ends)]
    journal.write_bytes(data[: ends[0]] + b"".join(parts[i] for i in order))
    records, damage = read(journal)
    assert records == RECORDS[:2]
    assert "checksum" in damage


FLOATS = st.floats(width=64)


@st.composite
def journals(draw):
    directions = draw(st.integers(1, 4))
    records = []
    for number in range(1, draw(st.integers(0, 6)) + 1):
        gradients = draw(st.tuples(*[st.floats(-1e9, 1e9)] * directions))
        losses = draw(st.tuples(*[FLOATS] * 2 * directions))
        applied = draw(st.booleans())
        records.append(Step(number, step_seed(7, number), 3e-4, gradients, losses, applied))
        if draw(st.booleans()):
            records.append(
                Event(
                    number,
                    draw(st.sampled_from(["validation", "Prüfung"])),
                    {"loss": draw(st.floats(0, 1e300))},
                )
            )
    return replace(HEADER, directions=directions), records


@settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=60)
@given(journals())
def test_any_journal_comes_back_and_its_compact_form_moves_the_same(tmp_path, drawn):
    header, records = drawn
    path, small = write(tmp_path / "journal.zo", records, header), tmp_path / "small.zo"
    found, damage = read(path)
    # Unlike ==, repr takes NaN for NaN.
    assert repr(found) == repr(records) and damage is None
    small.unlink(missing_ok=True)
    compact(path, small)
    assert Reader(small).header == replace(header, compact=True)
    for whole, brief in zip(found, Reader(small), strict=True):
        if isinstance(whole, Event):
            assert brief == whole
        else:
            assert brief[:4] == whole[:4] and brief.applied == whole.applied
            with np.errstate(over="ignore"):
                assert repr(brief.losses) == repr((float(np.float32(whole.loss)),))


def test_journals_of_other_parameters_are_compared(run, journal, tmp_path):
    first = HEADER.parameters[0]
    more = (first, first._replace(name="w"))
    both = write(tmp_path / "both.zo", header=replace(HEADER, parameters=more))
    code, text, _ = run("journal", "diff", journal, both)
    assert code == 1 and f"only {both} tunes 'w'" in text
    turned = write(tmp_path / "turned.zo", header=replace(HEADER, parameters=more[::-1]))
    code, text, _ = run("journal", "diff", both, turned)
    assert code == 1 and "its parameters differ: they have another order" in text


def test_sizes(tmp_path):
    steps = [Step(n, step_seed(7, n), 3e-4, (0.1,), (0.7, 0.6), True) for n in range(1, 20_001)]
    path, small = write(tmp_path / "journal.zo", steps), tmp_path / "small.zo"
    compact(path, small)
    assert path.stat().st_size < 1_300_000
    assert small.stat().st_size < 16 * 20_000
    assert [step.gradients for step in Reader(small).steps()] == [(0.1,)] * 20_000


def test_a_compact_journal_is_refused_where_steps_are_not_the_runs(journal, tmp_path):
    own_lr = write(tmp_path / "lr.zo", [Step(1, step_seed(7, 1), 1e-4, (0.1,), (0.7, 0.6), True)])
    own_seed = write(tmp_path / "seed.zo", [Step(1, 5, 3e-4, (0.1,), (0.7, 0.6), True)])
    for path in (own_lr, own_seed):
        with pytest.raises(UserError, match="step 1 has a seed or an lr of its own"):
            compact(path, tmp_path / "small.zo")
    compact(journal, tmp_path / "small.zo")
    with pytest.raises(UserError, match="compact already"):
        compact(tmp_path / "small.zo", tmp_path / "smaller.zo")
    with pytest.raises(UserError, match="exists"):
        compact(journal, tmp_path / "small.zo")
    journal.write_bytes(journal.read_bytes()[:-1])
    with pytest.raises(UserError, match="whole up to step 2"):
        compact(journal, tmp_path / "other.zo")
    assert not (tmp_path / "other.zo").exists()


def header_part(**changes) -> bytes:
    text = json.dumps(asdict(HEADER) | changes).encode()
    return struct.pack("<8sII", b"DLZOJRNL", 2, len(text)) + text


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "not a dlzo journal"),
        (b"PK\x03\x04 and so on", "not a dlzo journal"),
        (b"DLZOJRNL\x01", "damaged header"),
        (struct.pack("<8sII", b"DLZOJRNL", 0, 0), "format version 0"),
        (struct.pack("<8sII", b"DLZOJRNL", 3, 0), "format version 3"),
        (struct.pack("<8sII", b"DLZOJRNL", 1, 0xFFFFFFFF), "damaged header"),
        (sealed(struct.pack("<8sII", b"DLZOJRNL", 1, 2) + b"[]"), "not a JSON object"),
        (sealed(struct.pack("<8sII", b"DLZOJRNL", 1, 2) + b"{}"), "missing field"),
        (sealed(struct.pack("<8sII", b"DLZOJRNL", 1, 90_000) + b"[" * 90_000), "nested too deep"),
        (sealed(header_part(extra=1)), "unknown field 'extra'"),
        (sealed(header_part(layers=1)), "layers must be of type list"),
        (sealed(header_part(layers=[True])), "layers must be integers"),
        (sealed(header_part(layers=[-1])), "layers must be integers of at least 0"),
        (sealed(header_part(layer=1)), "unknown field 'layer'"),
        (sealed(header_part(seed=1 << 63)), "seed must be"),
        (sealed(header_part(directions=0)), "directions must be"),
        (sealed(header_part(lr=math.nan)), "lr must be finite"),
        (sealed(header_part(parameters=[["w", "float32", ["3"], 0]])), "a parameter must be"),
        (sealed(header_part(parameters=["w"])), "a parameter must be"),
    ],
)
def test_headers_that_are_none_are_refused(tmp_path, data, says):
    path = tmp_path / "journal.zo"
    path.write_bytes(data)
    with pytest.raises(UserError, match=says):
        Reader(path)


def test_a_header_that_no_reader_would_take_is_not_written(tmp_path):
    with pytest.raises(UserError, match="tunes 20,000 tensors"):
        create(tmp_path / "journal.zo", replace(HEADER, parameters=HEADER.parameters * 20_000))
    assert not any(tmp_path.iterdir())


def step_part(
    number: int, *, applied: int = 1, count: int = 1, gradient: float = 0.1, lr: float = 3e-4
) -> bytes:
    return struct.pack("<BBHIQdddd", 1, applied, count, number, 5, lr, 0.7, 0.6, gradient)


@pytest.mark.parametrize(
    ("part", "says"),
    [
        (step_part(2), "a record of step 2 follows step 0"),
        (step_part(1, applied=2), "no known kind"),
        (step_part(1, count=0xFFFF), "no known kind"),
        (step_part(1, gradient=math.nan), "out of range"),
        (step_part(1, gradient=1e300), "out of range"),
        (step_part(1, gradient=0.0, lr=math.nan), "out of range"),
        (step_part(1, lr=-3e-4), "out of range"),
        (struct.pack("<BBHI", 9, 0, 0, 1), "no known kind"),
        (struct.pack("<BBHI", 3, 0, 0xFFFF, 1), "no known kind"),
        (struct.pack("<BBHI", 2, 0, 9, 0) + b"[1, 2, 3]", "not valid JSON"),
        (struct.pack("<BBHI", 2, 0, 2, 0) + b"{}", "no name"),
        (struct.pack("<BBHI", 2, 0, 13, 4) + b'{"event":"x"}', "step 4 follows step 0"),
    ],
)
def test_forged_records_are_damage(tmp_path, part, says):
    path = tmp_path / "journal.zo"
    path.write_bytes(sealed(header_part(), part))
    records, damage = read(path)
    assert records == [] and says in damage


def test_a_step_that_would_decay_everything_is_damage(tmp_path):
    path = tmp_path / "journal.zo"
    header = header_part(settings={**HEADER.settings, "weight_decay": 0.1})
    path.write_bytes(sealed(header, step_part(1, lr=10.0)))
    records, damage = read(path)
    assert records == [] and "out of range" in damage


def test_a_lying_count_takes_no_memory(tmp_path):
    """A block that would be two gigabytes, in a file of a few hundred bytes."""
    path = tmp_path / "journal.zo"
    block = struct.pack("<BBHI", 3, 0, 4096, 1)
    path.write_bytes(sealed(header_part(directions=0xFFFF, compact=True), block))
    records, damage = read(path)
    assert records == [] and "cut off" in damage
    assert MAX_HEADER == 1 << 20


def test_a_write_that_takes_a_part_is_gone_on_with(tmp_path, monkeypatch):
    write_some = os.write
    monkeypatch.setattr("dlzo.files.os.write", lambda d, data: write_some(d, bytes(data)[:5]))
    assert read(write(tmp_path / "journal.zo")) == (RECORDS, None)


def test_seconds_are_counted_from_the_last_wait(tmp_path, monkeypatch):
    create(tmp_path / "journal.zo", HEADER)
    now, synced, last = [0.0], [], 0
    monkeypatch.setattr("dlzo.journal.time.monotonic", lambda: now[0])
    with Writer(Reader(tmp_path / "journal.zo"), 100, 3.0) as journal:
        monkeypatch.setattr("dlzo.files.os.fsync", lambda descriptor: synced.append(last))
        for last in range(1, 11):
            now[0] = float(last)
            journal.append(Step(last, 1, 3e-4, (0.1,), (0.7, 0.6), True))
    assert synced == [3, 6, 9]


@pytest.mark.parametrize(
    ("compact", "part"),
    [
        (False, struct.pack("<BBHI", 2, 1, 13, 0) + b'{"event":"x"}'),
        (True, struct.pack("<BBHI", 3, 0, 0, 1)),
        (True, struct.pack("<BBHI", 3, 1, 1, 1) + bytes(13)),
        (True, step_part(1)),
        (False, struct.pack("<BBHI", 3, 0, 1, 1) + bytes(13)),
    ],
    ids=["event applied", "empty block", "block applied", "step in compact", "block in plain"],
)
def test_records_of_another_kind_are_damage(tmp_path, compact, part):
    path = tmp_path / "journal.zo"
    path.write_bytes(sealed(header_part(compact=compact), part))
    records, damage = read(path)
    assert records == [] and "no known kind" in damage


def test_a_lying_header_takes_no_memory(tmp_path):
    path = tmp_path / "journal.zo"
    path.write_bytes(struct.pack("<8sII", b"DLZOJRNL", 2, 0xFFFFFFFF) + b"{}")
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="damaged header"):
            Reader(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 24
    finally:
        tracemalloc.stop()

"""Nothing is lost: runs killed, disks filled, bytes garbled, and one long run.

    python benchmarks/reliability.py --kills 50 --faults all --fuzz 1000000 --long 20000

A part is left out where its option is. All runs are on a tiny random model, on one thread; the
figures land in benchmarks/results/reliability.json, each part beside those that are there.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from results import RESULTS, ROOT, write_json

sys.path.insert(0, str(ROOT / "tests"))

from dlzo import files
from dlzo.config import TrainConfig
from dlzo.errors import UserError
from dlzo.journal import Reader, compact
from dlzo.metrics import HistoryEntry
from dlzo.models import decoder_layers
from dlzo.rule import rule_of
from dlzo.trainer import resume, train
from fuzz import CORPUS, mutants, outcome
from runs import CONFIG, TOKENIZER, FaultyOs, Killed, result, write_data
from tiny import tiny_model

FAULTS = ("disk full", "killed", "tmpfs")
SHORT = replace(CONFIG, steps=6, eval_every=2, sync_steps=3)
PAGE = 4096  # bytes: a tmpfs is filled by the page


def go_on(config: TrainConfig, data: Path, out: Path) -> None:
    """Starts the run in `out`, or takes it up."""
    if (out / "run.json").exists():
        resume(tiny_model(), TOKENIZER, out)
    else:
        train(tiny_model(), TOKENIZER, config, data, out)


def kills(count: int, config: TrainConfig, work: Path) -> dict[str, Any]:
    """Runs that are killed at random moments until they are through, all with one result."""
    data, draw = write_data(work / "data"), random.Random(0)
    started = time.monotonic()
    go_on(config, data, work / "whole")
    seconds, whole = time.monotonic() - started, result(work / "whole")
    killed_at: list[int] = []
    runs = 0
    while len(killed_at) < count:
        runs += 1
        out = work / f"run-{runs}"
        while not (out / "metrics.json").exists():
            child = _fork(lambda out=out: go_on(config, data, out))
            time.sleep(draw.uniform(0, seconds))
            os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
            assert status in (0, signal.SIGKILL), "a run failed by itself"
            if status == signal.SIGKILL:
                killed_at.append(_steps_done(out))
        assert result(out) == whole, out
    return {"kills": len(killed_at), "runs": runs, "killed_after_step": sorted(killed_at)}


def _fork(work: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return child


def _steps_done(out: Path) -> int:
    if not (out / "journal.zo").exists():
        return 0
    reader = Reader(out / "journal.zo")
    return sum(1 for _ in reader.steps())


def faults(kind: str, work: Path) -> dict[str, Any]:
    """The n-th write, fsync, rename or cut fails, for each n; then the run goes on."""
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) if kind == "disk full" else Killed()
    data = write_data(work / "data")
    go_on(SHORT, data, work / "whole")
    whole = result(work / "whole")
    for number in range(10_000):
        out, files.os = work / str(number), FaultyOs(number, error)
        with suppress(UserError, Killed):
            go_on(SHORT, data, out)
        through, files.os = files.os.left >= 0, os
        go_on(SHORT, data, out)
        assert result(out) == whole, out
        if through:
            return {"calls_failed_in_turn": number}
    raise AssertionError("the run never got through")


def fill_tmpfs(work: Path) -> dict[str, Any]:
    """Runs on a file system of n pages, for each n until one is enough; it grows, and they go on.

    It is mounted in a namespace of its own, which needs no root.
    """
    command = ["unshare", "--user", "--map-root-user", "--mount", sys.executable, __file__]
    done = subprocess.run(
        [*command, "--tmpfs", str(work)], check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def _in_namespace(work: Path) -> dict[str, Any]:
    data, disk = write_data(work / "data"), work / "disk"
    go_on(SHORT, data, work / "whole")
    whole = result(work / "whole")
    disk.mkdir()
    reasons: Counter[str] = Counter()
    for pages in range(1, 10_000):
        _mount("-t", "tmpfs", "-o", f"size={PAGE * pages}", "tmpfs", str(disk))
        out, stopped = disk / "out", False
        try:
            go_on(SHORT, data, out)
        except (UserError, OSError) as error:
            stopped = "No space left on device" in str(error)
            assert stopped, error
            reasons["resumable" if (out / "run.json").exists() else "not begun"] += 1
        _mount("-o", f"remount,size={1 << 24}", str(disk))
        go_on(SHORT, data, out)
        assert result(out) == whole, pages
        subprocess.run(["umount", str(disk)], check=True)
        if not stopped:
            return {"sizes": pages - 1, **reasons}
    raise AssertionError("the run never got through")


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def fuzz(count: int, work: Path) -> dict[str, Any]:
    """Garbled files to every reader; one input for each new outcome goes to tests/corpus."""
    known = {outcome(path) for path in CORPUS.glob("*/*")}
    outcomes: Counter[str] = Counter()
    draw = random.Random(0)
    seeds = sorted(CORPUS.glob("whole*/*"))
    streams = [(seed.name, mutants(seed, draw)) for seed in seeds]
    for number in range(count):
        name, stream = streams[number % len(streams)]
        data, path = next(stream), work / name
        path.write_bytes(data)
        found = outcome(path)
        outcomes[found] += 1
        if found not in known and len(data) < 2048:
            known.add(found)
            kept = CORPUS / f"broken-{len(known):02}" / name
            kept.parent.mkdir()
            kept.write_bytes(data)
    return {
        "inputs": count,
        "kinds_of_refusal": len(outcomes) - ("read" in outcomes),
        "read": outcomes["read"],
    }


def long(steps: int, dtype: torch.dtype, work: Path) -> dict[str, Any]:
    """One long run: memory, the journal's size, and the live layer against its replay."""
    data, model = write_data(work / "data"), tiny_model(dtype=dtype)
    layer = decoder_layers(model)[CONFIG.layer]
    live: list[torch.Tensor] = []
    rss: dict[int, int] = {}

    def on_progress(entry: HistoryEntry) -> None:
        if entry["step"] in (1000, 4000, steps):
            rss[entry["step"]] = _rss_bytes()
        if entry["step"] == steps:
            live.extend(parameter.detach().clone() for parameter in layer.parameters())

    config = replace(CONFIG, steps=steps, lr=1e-4, eval_every=1000)
    train(model, TOKENIZER, config, data, work / "out", on_progress=on_progress)
    journal, small = work / "out" / "journal.zo", work / "small.zo"
    compact(journal, small)
    for path in (journal, small):
        replayed = decoder_layers(tiny_model(dtype=dtype))[CONFIG.layer]
        rule_of(config).replay(replayed, Reader(path).steps())
        assert all(map(torch.equal, live, replayed.parameters())), path
    return {
        "steps": steps,
        "rss_mb_at_step": {step: size / 1e6 for step, size in rss.items()},
        "journal_bytes": journal.stat().st_size,
        "compact_bytes": small.stat().st_size,
        "replay_equals_live": True,
    }


def _rss_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, help="how many times to kill a run")
    parser.add_argument("--kill-steps", type=int, default=200, help="steps of the runs to kill")
    parser.add_argument("--faults", choices=(*FAULTS, "all"))
    parser.add_argument("--fuzz", type=int, help="how many garbled files to read")
    parser.add_argument("--long", type=int, help="steps of the long run")
    parser.add_argument("--out", type=Path, default=RESULTS / "reliability.json")
    parser.add_argument("--tmpfs", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.tmpfs:
        print(json.dumps(_in_namespace(options.tmpfs)))
        return
    parts: dict[str, Callable[[Path], dict[str, Any]]] = {}
    if options.kills:
        config = replace(CONFIG, steps=options.kill_steps)
        parts["kill -9"] = lambda work: kills(options.kills, config, work)
    for kind in FAULTS:
        if options.faults in (kind, "all"):
            parts[kind] = fill_tmpfs if kind == "tmpfs" else lambda work, k=kind: faults(k, work)
    if options.fuzz:
        parts["fuzz"] = lambda work: fuzz(options.fuzz, work)
    if options.long:
        for dtype in (torch.float32, torch.bfloat16):
            name = f"long, {str(dtype).removeprefix('torch.')}"
            parts[name] = lambda work, dtype=dtype: long(options.long, dtype, work)
    for name, part in parts.items():
        with tempfile.TemporaryDirectory() as folder:
            found = part(Path(folder))
        print(name, json.dumps(found), flush=True)
        results = json.loads(options.out.read_text()) if options.out.exists() else {}
        write_json(options.out, {**results, name: found})


if __name__ == "__main__":
    main()

"""Data-parallel runs: the ranks that torchrun starts, of which each scores its share of a batch.

What goes over the wire is a few float64 sums of losses per evaluation: each rank then does the
same update by itself. Without torchrun there is one rank, and every function here is local.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dlzo.errors import UserError

# A rank that dies is noticed at once, by its closed connections; one that hangs, after this.
TIMEOUT = timedelta(minutes=10)

T = TypeVar("T")


def rank() -> int:
    """Which rank this process is; 0 owns the folder of the run."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def joined() -> Iterator[None]:
    """Joins the ranks that torchrun has started, if it has, for the time of a `with`."""
    # A scheduler may set the one without the other.
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE") or 1) == 1:
        yield
        return
    with _reaching_all():
        # Beside a GPU torch would take nccl alone, and what is sent lies on the CPU.
        dist.init_process_group("gloo", timeout=TIMEOUT)
    ended: SystemExit | None = None
    try:
        try:
            yield
        except SystemExit as error:  # as a command ends when all went well
            if error.code:
                raise
            ended = error
        # A rank that left early would look dead to those that are still sending.
        with _reaching_all():
            dist.barrier()
        if ended is not None:
            raise ended
    finally:
        dist.destroy_process_group()


def share_of(items: Sequence[T]) -> Sequence[T]:
    """Every size-th item: what this rank takes of what all share; of few items, maybe none."""
    return items[rank() :: size()]


def quotients(sums: Sequence[float], weights: Sequence[float]) -> list[float]:
    """Each sum over all ranks by its weight over all ranks: the same bits on all of them.

    A weight of 0 is one that another rank has. One all-reduce, in float64.
    """
    both = torch.tensor([sums, weights], dtype=torch.float64, device="cpu")
    if size() > 1:
        with _reaching_all():
            dist.all_reduce(both)
    return (both[0] / both[1]).tolist()


def from_first_rank(make: Callable[[], T]) -> T:
    """What `make` returns, or raises as a UserError, on rank 0, where alone it is called."""
    if size() == 1:
        return make()
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = make()
        except UserError as error:
            outcome[1] = error
    with _reaching_all():
        dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def check_equal(digest: Callable[[], str], what: str) -> None:
    """Compares a SHA-256 over the ranks; with one rank it is not even made.

    Raises:
        UserError: it is not the same on all; the odd ranks are named.
    """
    if size() == 1:
        return
    own = torch.frombuffer(bytearray.fromhex(digest()), dtype=torch.uint8)
    found = [torch.empty_like(own) for _ in range(size())]
    with _reaching_all():
        dist.all_gather(found, own)
    digests = [bytes(each.tolist()) for each in found]
    usual = Counter(digests).most_common(1)[0][0]
    odd = [str(i) for i, each in enumerate(digests) if each != usual]
    if odd:
        raise UserError(f"{what} on rank {', '.join(odd)} differs from that on the other ranks")


@contextmanager
def _reaching_all() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"another rank has died or cannot be reached ({reason}): start all of them again, with "
            "--resume if the run had begun"
        ) from error

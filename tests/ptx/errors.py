"""What a kernel can do wrong on the simulator: one exception per kind of fault."""

from __future__ import annotations


class PtxError(Exception):
    """Any fault; the message names the statement."""


class Unsupported(PtxError):
    """A statement outside the simulated subset, or one whose result IEEE 754 does not define."""


class BadLaunch(PtxError):
    """Arguments, grid or block that do not fit the kernel."""


class OutOfBounds(PtxError):
    """An access outside every buffer, or past the end of one."""


class Misaligned(PtxError):
    """An address that is no multiple of the size of its access."""


class Uninitialised(PtxError):
    """A read of shared or local memory that nobody has written."""


class Race(PtxError):
    """Two threads use the same memory, one of them writes, and no barrier orders them."""


class Deadlock(PtxError):
    """Threads that wait at a barrier or in a loop for what never comes."""


class InactiveLane(PtxError):
    """A warp instruction that takes from a lane that does not execute it."""

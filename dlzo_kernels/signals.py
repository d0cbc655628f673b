"""Signals held back while a layer is half written."""

from __future__ import annotations

import signal
import threading
from _signal import getsignal  # that of `signal` makes an enumeration of each answer: 18 us a step
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

_SIGNALS = signal.valid_signals()


class Held:
    """Delays signals to the end of the block, Ctrl-C too, but for user code in it (`lifted`).

    So a layer is never left half written. Only handlers in Python are stood in for: they run
    between any two instructions of the main thread, whatever its signal mask says.

    Args:
        file: of the code that opens the block; its frames are no user code.
    """

    def __init__(self, file: str) -> None:
        self._files = {file, __file__, contextmanager.__code__.co_filename}
        self._handlers: dict[int, Callable[[int, FrameType | None], object]] = {}
        self._late: list[int] = []
        self._is_open = self._is_lifted = False

    def __enter__(self) -> Held:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                handler = getsignal(number)
                if callable(handler):
                    self._handlers[number] = handler
                    signal.signal(number, self._handle)
        self._is_open = True
        return self

    def __exit__(self, *_: object) -> None:
        # First of all: from here on a signal may raise, and whoever is still in place passes it on.
        self._is_open = False
        for number, handler in self._handlers.items():
            if signal.getsignal(number) == self._handle:  # unless user code has set its own
                signal.signal(number, _still_open(number, handler))
        with ExitStack() as late:  # which goes on where one raises
            for number in reversed(self._late):
                late.callback(signal.raise_signal, number)

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Lets signals through, late ones first, until one of them raises."""
        self._is_lifted = True
        try:
            while self._late:
                self._pass_on(self._late.pop(0), None)
            yield
        finally:
            self._is_lifted = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # In the frames of `with` itself an exception could pass the restoring by.
        in_user_code = frame is None or frame.f_code.co_filename not in self._files
        if self._is_open and not (self._is_lifted and in_user_code):
            self._late.append(number)
        else:
            self._pass_on(number, frame)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        lifted, self._is_lifted = self._is_lifted, False
        self._handlers[number](number, frame)
        self._is_lifted = lifted


def _still_open(number: int, handler: Any) -> Any:
    """The handler itself, or what is behind it where its block was left before this one."""
    while isinstance(held := getattr(handler, "__self__", None), Held) and not held._is_open:
        handler = held._handlers[number]
    return handler

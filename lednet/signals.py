"""Ending a program cleanly when it receives a signal."""

import contextlib
import signal
import time
from collections.abc import Iterator
from types import FrameType

STOP_SIGNALS = (
    signal.SIGTERM,
    signal.SIGINT,
    *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []),  # the terminal was closed
)

REPEAT_SECONDS = 2
"""A second signal within this time is taken for the same one: a scheduler's signal reaches a
process both directly and through `torchrun`."""


class StopRequest:
    """Records `STOP_SIGNALS`. A later signal ends the process at once.

    Attributes:
        number: number of the first signal; 0 before it.
    """

    def __init__(self) -> None:
        self.number = 0
        self._received = 0.0

    def _record(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.number:
            self.number, self._received = number, now
        elif now - self._received > REPEAT_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Record signals while the block runs, instead of ending (main thread only).

        Signals that are ignored stay so: SIGHUP with `nohup`, SIGINT in background jobs.
        """
        before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        before = {n: handler for n, handler in before.items() if handler != signal.SIG_IGN}
        for number in before:
            signal.signal(number, self._record)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

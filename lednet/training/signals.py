"""Stopping between two steps instead of within one."""

import contextlib
import signal
import time
from collections.abc import Iterator
from types import FrameType

from lednet.data.loaders import STOP_SIGNALS
from lednet.distributed import DistributedContext

SAVE = 1
"""`CheckpointTimer.poll` returns it when only a checkpoint is due; signals have higher numbers."""

PATIENCE = 2
"""Seconds within which another signal is the same once more: a scheduler's reaches a process both
by itself and through `torchrun`."""

AGREE_EVERY = 20
"""Steps between two questions to the other processes on GPUs, where each one makes them wait."""


class TrainingStopped(Exception):
    """The run has been saved, because a signal asked for its end.

    Attributes:
        exit_status: 143 after SIGTERM, 130 after SIGINT (128 + the signal's number).
    """

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_status = 128 + number


class StopRequest:
    """Whether SIGTERM or SIGINT has come; a later one ends the process at once.

    Attributes:
        number: of the signal; 0 before there is one.
    """

    def __init__(self) -> None:
        self.number = 0
        self._came = 0.0

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.number:
            self.number, self._came = number, now
        elif now - self._came > PATIENCE:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Note signals, instead of ending at once, while the block runs (main thread only)."""
        before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class CheckpointTimer:
    """Says between two steps whether a checkpoint is due, or the end.

    All processes get the same answer.

    Args:
        every_steps: steps between checkpoints; 0 for no such rule.
        every_minutes: minutes between checkpoints; 0 for no such rule.
    """

    def __init__(
        self,
        world: DistributedContext,
        request: StopRequest,
        every_steps: int = 0,
        every_minutes: float = 0,
    ):
        self.world, self.request = world, request
        self.every_steps, self.every_minutes = every_steps, every_minutes
        self._saved = time.monotonic()

    def poll(self, step: int) -> int:
        """0, `SAVE`, or the number of the signal that asks for the end.

        Args:
            step: number of the step that is done, 1 for the first of all.
        """
        due = bool(self.every_steps) and step % self.every_steps == 0
        late = time.monotonic() - self._saved > 60 * self.every_minutes > 0
        asked = due or self.world.device.type != "cuda" or step % AGREE_EVERY == 0
        if self.world.size > 1 and not asked:
            return 0
        order = self.world.all_reduce_max(self.request.number or (SAVE if due or late else 0))
        if order:
            self._saved = time.monotonic()
        return order

    def stop(self) -> int:
        """Number of the signal that asks for the end, or 0."""
        return self.world.all_reduce_max(self.request.number)

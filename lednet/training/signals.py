"""Stopping on signals, and the times at which checkpoints are saved."""

import contextlib
import enum
import signal
import time
from collections.abc import Iterator
from types import FrameType

from lednet.data.loaders import STOP_SIGNALS
from lednet.distributed import DistributedContext

REPEAT_SECONDS = 2
"""A second signal within this time is taken for the same one: a scheduler's signal reaches a
process both directly and through `torchrun`."""

SYNC_STEPS = 20
"""Steps between two exchanges of the decision on GPUs, where each exchange makes them wait."""


class Action(enum.IntEnum):
    """What to do after an optimizer step. The larger action of all processes is taken."""

    CONTINUE = 0
    SAVE = 1
    STOP = 2


class TrainingStopped(Exception):
    """A signal asked the run to stop, and it has been saved.

    Attributes:
        exit_status: 143 after SIGTERM, 130 after SIGINT (128 plus the number of the signal).
    """

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_status = 128 + number


class StopRequest:
    """Records SIGTERM and SIGINT. A later signal ends the process at once.

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
        """Record signals while the block runs, instead of ending (main thread only)."""
        before = {number: signal.signal(number, self._record) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class CheckpointTimer:
    """Decides after each optimizer step whether to save a checkpoint or stop.

    The decision is reduced over all processes.

    Args:
        world: all processes.
        request: signals of this process.
        every_steps: steps between checkpoints; 0 for no such rule.
        every_minutes: minutes between checkpoints; 0 for no such rule.

    Attributes:
        signal: number of the signal that stops the run, once it is known to all processes; or 0.
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
        self.signal = 0
        self._saved = time.monotonic()

    def poll(self, step: int) -> Action:
        """The action after a step.

        Args:
            step: number of the finished step, counted from 1 over the whole run.
        """
        due = bool(self.every_steps) and step % self.every_steps == 0
        late = time.monotonic() - self._saved > 60 * self.every_minutes > 0
        synchronized = due or self.world.device.type != "cuda" or step % SYNC_STEPS == 0
        if self.world.size > 1 and not synchronized:
            return Action.CONTINUE
        # Numbers of signals are larger than that of a checkpoint.
        decision = self.world.all_reduce_max(self.request.number or int(due or late))
        if decision:
            self._saved = time.monotonic()
        if decision > Action.SAVE:
            self.signal = decision
        return Action(min(decision, Action.STOP))

    def stop_signal(self) -> int:
        """Number of the signal that asks any of the processes to stop, or 0."""
        self.signal = self.world.all_reduce_max(self.request.number)
        return self.signal

"""The times at which a run saves checkpoints, and stops."""

import enum
import signal
import time

from lednet.distributed import DistributedContext
from lednet.signals import StopRequest

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
        exit_status: 128 plus the number of the signal: 143 after SIGTERM, 130 after SIGINT, 129
            after SIGHUP.
    """

    def __init__(self, number: int):
        verb = "interrupted" if number == signal.SIGINT else "stopped"
        super().__init__(f"{verb} by {signal.Signals(number).name}")
        self.exit_status = 128 + number


class CheckpointTimer:
    """Decides after each optimizer step whether to save a checkpoint or stop.

    The decision is reduced over all processes.

    Args:
        dist_context: all processes.
        request: signals of this process.
        every_steps: steps between checkpoints; 0 for no such rule.
        every_minutes: minutes between checkpoints; 0 for no such rule.

    Attributes:
        signal: number of the signal that stops the run, once it is known to all processes; or 0.
    """

    def __init__(
        self,
        dist_context: DistributedContext,
        request: StopRequest,
        every_steps: int = 0,
        every_minutes: float = 0,
    ):
        self.dist_context, self.request = dist_context, request
        self.every_steps, self.every_minutes = every_steps, every_minutes
        self.signal = 0
        self._saved = time.monotonic()

    def poll(self, step: int) -> Action:
        """The action after `step`, which is counted from 1 over the whole run."""
        context = self.dist_context
        due = bool(self.every_steps) and step % self.every_steps == 0
        late = time.monotonic() - self._saved > 60 * self.every_minutes > 0
        synchronized = due or context.device.type != "cuda" or step % SYNC_STEPS == 0
        if context.size > 1 and not synchronized:
            return Action.CONTINUE
        # Numbers of signals begin at 1; Action.SAVE is smaller than any of them plus that.
        request = self.request.number + Action.SAVE if self.request.number else int(due or late)
        decision = context.all_reduce_max(request)
        if decision:
            self._saved = time.monotonic()
        if decision > Action.SAVE:
            self.signal = decision - Action.SAVE
        return Action(min(decision, Action.STOP))

    def stop_signal(self) -> int:
        """Number of the signal that asks any of the processes to stop, or 0."""
        self.signal = self.dist_context.all_reduce_max(self.request.number)
        return self.signal

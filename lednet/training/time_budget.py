"""Training for a fixed time: the schedule follows the share of the time that has passed."""

import time
from collections.abc import Sequence

from lednet.distributed import DistributedContext
from lednet.training.signals import SYNC_STEPS


class TimeBudget:
    """Wall-clock time of a run, divided among its stages.

    Args:
        dist_context: all processes; the slowest one's time counts.
        minutes: for the whole run, validation included; None for no limit.
        costs: relative costs of the stages, in proportion to which they share the time. A stage
            that takes longer leaves less to the next ones.
    """

    def __init__(
        self,
        dist_context: DistributedContext,
        minutes: float | None = None,
        costs: Sequence[float] = (1.0,),
    ):
        self.dist_context = dist_context
        self.limit = None if minutes is None else 60 * minutes
        self.costs = list(costs)
        self._start = time.monotonic()

    def add(self, seconds: float) -> None:
        """Count time that earlier processes of the run have used."""
        self._start -= seconds

    @property
    def elapsed(self) -> float:
        """Seconds that the run has taken, before and after resuming."""
        return time.monotonic() - self._start

    def stage(self, number: int, start: float) -> "StageClock | None":
        """The clock of a stage; None without a limit.

        Args:
            number: number of the stage, from 0.
            start: value of `elapsed` when the stage began.
        """
        if self.limit is None:
            return None
        share = sum(self.costs[: number + 1]) / sum(self.costs)
        return StageClock(self, start, share * self.limit)


class StageClock:
    """Measures how much of a stage's time has passed.

    Args:
        start, end: start and end of the stage, in seconds of the budget.
    """

    def __init__(self, budget: TimeBudget, start: float, end: float):
        self.budget, self.start, self.end = budget, start, end
        self.validation = 0.0
        self._validated = False
        self._share = 0.0

    def expect_validation(self, seconds: float) -> None:
        """Reserve this time for the last validation, until one has been timed."""
        if not self._validated:
            self.validation = seconds

    def validated(self, seconds: float) -> None:
        """Reserve as much time for the last validation as the longest one took."""
        self.validation = max(self.validation, seconds) if self._validated else seconds
        self._validated = True

    def share(self, step: int = 0) -> float:
        """Share of the training time that has passed, 0 to 1; the same in all processes.

        Args:
            step: on several GPUs, processes compare their clocks only every `SYNC_STEPS` steps.
        """
        context = self.budget.dist_context
        if context.size > 1 and context.device.type == "cuda" and step % SYNC_STEPS:
            return self._share
        training = max(self.end - self.validation - self.start, 1e-3)
        share = min(1.0, max(0.0, (self.budget.elapsed - self.start) / training))
        self._share = context.all_reduce_max(round(share * 1_000_000)) / 1_000_000  # of integers
        return self._share

"""Stand-ins for parts that tests do not exercise, and checks that tests share."""

import subprocess

from lednet.training.loggers import EpochSummary


class Result(subprocess.CompletedProcess):
    """A finished script with its text output."""

    def assert_error(self, *words: str) -> None:
        """It ended with status 2 and an error of one line that contains all `words`."""
        assert self.returncode == 2, self.stdout + self.stderr
        errors = [line for line in self.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and "Traceback" not in self.stderr, self.stderr
        for word in words:
            assert word in errors[0]


class FakeLoggerBackend:
    """A `LoggerBackend` that keeps the summaries.

    Args:
        fails_at: "open", or the number of the call of `log`, from 1, that raises an error.
    """

    failure = "fake backend failed"

    def __init__(self, fails_at: int | str | None = None):
        self.fails_at = fails_at
        self.summaries: list[EpochSummary] = []

    def open(self) -> None:
        self._fail_at("open")

    def log(self, summary: EpochSummary) -> None:
        self._fail_at(len(self.summaries) + 1)
        self.summaries.append(summary)

    def _fail_at(self, moment: int | str) -> None:
        if moment == self.fails_at:
            raise OSError(0, "out of paper")

"""Progress bars, and plain lines of progress where the output is not a terminal."""

import math
import sys
from collections.abc import Callable, Iterable, Sized
from typing import Any

from tqdm import tqdm

MIN_INTERVAL = 30.0
"""Seconds between two lines of progress in a file."""


class _ProgressLines(tqdm):
    """A bar that writes whole lines, for log files; the last state is not repeated at the end."""

    @staticmethod
    def status_printer(file: Any) -> Callable[[str], None]:
        def write(line: str) -> None:
            if line:
                file.write(line + "\n")
                file.flush()

        return write

    def close(self) -> None:
        if not self.disable:
            self.disable = True
            self._decr_instances(self)  # type: ignore[attr-defined]  # not in tqdm's stubs


def progress_bar(
    iterable: Iterable | None = None, *, total: int | None = None, lines: int = 20, **options: Any
) -> tqdm:
    """A `tqdm` bar on stderr. If stderr is not a terminal, it writes lines instead.

    A line has the percentage, the rate and the remaining time. Lines are at least `MIN_INTERVAL`
    seconds apart, so short work writes none.

    Args:
        lines: approximate maximum number of lines.
        options: of `tqdm`.
    """
    if total is None and iterable is not None:
        total = len(iterable) if isinstance(iterable, Sized) else None
    options = {"leave": False, "dynamic_ncols": True, **options}
    if sys.stderr.isatty():
        return tqdm(iterable, total=total, **options)
    unit = options.get("unit", "it")
    units = {"B": "B", "batch": "batches"}.get(unit, f"{unit}s")
    line = f"{{desc}}: {{n_fmt}} {units}, {{rate_fmt}}"
    if total:
        line = f"{{desc}}: {{percentage:.0f}}% of {{total_fmt}} {units}, {{rate_fmt}}, "
        line += "{remaining} left{postfix}"
    options |= {
        "dynamic_ncols": False, "ncols": 100, "bar_format": line, "delay": MIN_INTERVAL,
        "mininterval": MIN_INTERVAL, "maxinterval": math.inf,
        "miniters": max(1, (total or 0) // (lines + 1)),
    }  # fmt: skip
    return _ProgressLines(iterable, total=total, **options)

"""Results of single images, kept as they come: an interrupted run goes on."""

import json
import os
import reprlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lednet.errors import UserError

_DAMAGED = (
    ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError
)  # fmt: skip
"""What code that expects another line raises."""


class ProgressLog:
    """Files `progress-<rank>.jsonl` in a folder: the settings, then a line an image.

    What all processes wrote, however many there were, is read once, at the start. Threads may
    share a journal.

    Args:
        folder: made with the first line.
        settings: everything that the results depend on; plain JSON values.
        rank: of this process among those that write.
        check: is given each entry that is read, and fails on one that is damaged.

    Attributes:
        entries: lines found at the start, by the image's name.

    Raises:
        UserError: the folder holds results of other settings, or a file of it is damaged.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        settings: dict[str, Any],
        rank: int = 0,
        check: Callable[[dict[str, Any]], object] = lambda entry: None,
    ):
        self.folder = Path(folder)
        self.settings = json.loads(json.dumps(settings))  # as they are read again: no tuples
        self.path = self.folder / f"progress-{rank}.jsonl"
        self.entries: dict[str, dict] = {}
        self._begun = False
        self._lock = threading.Lock()
        for path in sorted(self.folder.glob("progress-*.jsonl")):
            try:
                first, *rest = list(_whole_lines(path)) or [self.settings]
                self._require_same_settings(first)
                for entry in rest:
                    check(entry)
                    self.entries[str(entry["name"])] = entry
            except _DAMAGED as error:
                raise UserError(
                    f"{path} is damaged: add --overwrite to begin anew, or choose another --out"
                ) from error

    def _require_same_settings(self, found: dict[str, Any]) -> None:
        for key in self.settings | found:
            if self.settings.get(key) != found.get(key):
                other, ours = (reprlib.repr(told.get(key)) for told in (found, self.settings))
                raise UserError(
                    f"{self.folder} holds results with {key} {other}, not {ours}: add "
                    "--overwrite to begin anew, or choose another --out"
                )

    def add(self, entry: dict[str, Any]) -> None:
        """Append one image's line, with its "name"; it is on disk when this returns."""
        with self._lock:
            self._append(entry)

    def _append(self, entry: dict[str, Any]) -> None:
        try:
            lines = [entry]
            if not self._begun:
                self.folder.mkdir(parents=True, exist_ok=True)
                lines = [entry] if _cut_torn_end(self.path) else [self.settings, entry]
                self._begun = True
            with open(self.path, "ab") as file:
                file.write(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(
                f"cannot write {self.path}: {error.strerror}; free some space, and the same "
                "command goes on"
            ) from error

    @staticmethod
    def clear(folder: str | os.PathLike) -> None:
        """Forget what was kept in `folder`."""
        for path in Path(folder).glob("progress-*.jsonl"):
            path.unlink()


def _whole_lines(path: Path) -> Iterator[dict]:
    """Lines that were written to their end; the last one may be torn."""
    for line in path.read_bytes().splitlines(keepends=True):
        if line.endswith(b"\n"):
            yield json.loads(line)


def _cut_torn_end(path: Path) -> int:
    """Cut a file behind its last whole line; returns the length that is left."""
    if not path.exists():
        return 0
    whole = path.read_bytes().rfind(b"\n") + 1
    os.truncate(path, whole)
    return whole

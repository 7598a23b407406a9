"""Results of single images, stored as they are computed, to resume an interrupted run."""

import json
import os
import reprlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lednet.errors import UserError


class ProgressLog:
    """Files `progress-<rank>.jsonl` in a folder: a line of settings, then one line per image.

    At the start, the files of all processes of earlier runs are read. Threads may share a log.

    Args:
        folder: folder of the files. It is created with the first entry.
        settings: everything that the results depend on, as JSON values.
        rank: rank of this process, which writes one file.
        check: called with each entry that is read. Raises an exception if it is damaged.

    Attributes:
        entries: entries that were read, by image name.

    Raises:
        UserError: The folder holds results of other settings, or a file is damaged.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        settings: dict[str, Any],
        rank: int = 0,
        check: Callable[[dict[str, Any]], object] = lambda entry: None,
    ):
        self.folder = Path(folder)
        self.settings = json.loads(json.dumps(settings))  # tuples become lists, as in the files
        self.path = self.folder / f"progress-{rank}.jsonl"
        self.entries: dict[str, dict] = {}
        self._opened = False
        self._lock = threading.Lock()
        for path in sorted(self.folder.glob("progress-*.jsonl")):
            try:
                lines = [json.loads(line) for line in _complete_lines(path).splitlines()]
                self._require_same_settings(lines[0] if lines else self.settings)
                for entry in lines[1:]:
                    check(entry)
                    self.entries[str(entry["name"])] = entry
            except (UserError, OSError):
                raise
            except Exception as error:  # depends on where the code expects another value
                raise UserError(
                    f"{path} is damaged: add --overwrite to start over, or choose another --out"
                ) from error

    def _require_same_settings(self, found: dict[str, Any]) -> None:
        for key in self.settings | found:
            if self.settings.get(key) != found.get(key):
                theirs, ours = (reprlib.repr(s.get(key)) for s in (found, self.settings))
                raise UserError(
                    f"{self.folder} holds results with {key} {theirs}, not {ours}: add "
                    "--overwrite to start over, or choose another --out"
                )

    def add(self, entry: dict[str, Any]) -> None:
        """Append the entry of one image. It is on disk when this returns.

        Args:
            entry: JSON values, with the image's "name".

        Raises:
            UserError: The file cannot be written.
        """
        with self._lock:
            try:
                if not self._opened:
                    self._open()
                self._append(entry)
            except OSError as error:
                raise UserError(
                    f"cannot write {self.path}: {error.strerror}; free some space, then repeat "
                    "the command to resume"
                ) from error

    def _open(self) -> None:
        """Remove the incomplete last line that a killed process may have left."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path.touch()
        complete = len(_complete_lines(self.path))
        os.truncate(self.path, complete)
        if not complete:
            self._append(self.settings)
        self._opened = True

    def _append(self, value: dict[str, Any]) -> None:
        with open(self.path, "ab") as file:
            file.write(json.dumps(value).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    @staticmethod
    def clear(folder: str | os.PathLike) -> None:
        """Delete the progress files in `folder`."""
        for path in Path(folder).glob("progress-*.jsonl"):
            path.unlink()


def _complete_lines(path: Path) -> bytes:
    """The content of a file up to its last line break."""
    content = path.read_bytes()
    return content[: content.rfind(b"\n") + 1]

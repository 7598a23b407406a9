"""Standard output and error that do not end a program."""

import contextlib
import errno
import os
import stat
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast


class _LastingStream:
    """A text stream that drops its output once nobody can receive it.

    That is so when a terminal has been closed, or the next program of a pipe has ended.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._drop(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        """Send further output nowhere; raises an `error` of a disk, which would lose results."""
        number = self._stream.fileno()
        if stat.S_ISREG(os.fstat(number).st_mode) or error.errno not in (errno.EPIPE, errno.EIO):
            raise error
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), number)


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """Within the block, standard output and error can be written whatever happens to them.

    Output is dropped when the terminal or pipe has been closed. Letters that the encoding of the
    stream lacks are written as codes, for example with `LC_ALL=C`.
    """
    before = sys.stdout, sys.stderr
    for stream in before:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = (
        cast(TextIO, _LastingStream(stream)) if stream else stream for stream in before
    )
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream:
                stream.flush()
        sys.stdout, sys.stderr = before

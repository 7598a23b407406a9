"""The exception for errors that a user can correct, and how scripts report it."""

import contextlib
import errno
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

from lednet.streams import lasting_output

EXIT_STATUS = 2
INTERRUPTED = 130


class UserError(Exception):
    """Bad input or set-up: one sentence that names the object and the next step.

    A data loader's worker process wraps the message in a traceback, of which only the last
    sentence is kept.
    """

    def __init__(self, message: str):
        super().__init__(message.rsplit("UserError: ", 1)[-1].strip())


def raise_if_problems(problems: Sequence[str], limit: int = 3) -> None:
    """Raise a `UserError` of the first `limit` sentences if there are `problems`."""
    if problems:
        more = [f"and {len(problems) - limit} more"] if len(problems) > limit else []
        raise UserError(". ".join([*problems[:limit], *more]))


def shared_memory_error(error: Exception) -> UserError | None:
    """A `UserError` if `error` of PyTorch or multiprocessing says that /dev/shm is full."""
    text = str(error)
    full = "shared memory(shm)" in text or "Bus error" in text
    if isinstance(error, OSError) and error.errno == errno.ENOSPC and os.path.isdir("/dev/shm"):
        full = shutil.disk_usage("/dev/shm").free < 2**20
    if not full:
        return None
    return UserError(
        "/dev/shm is too small for the loading processes: load in one process with --num-workers "
        "0, or make it larger (docker run --shm-size=8g)"
    )


def memory_error(error: Exception) -> UserError | None:
    """A `UserError` if `error` of Python, NumPy or PyTorch says that the memory is full."""
    text = str(error)
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in text:
        place = "memory"
    elif "out of memory" in text:
        place = "memory of the GPU"
    else:
        return None
    return UserError(
        f"the {place} is full: reduce --batch-size, --height and --width, or --num-workers, or "
        "stop other programs that use it (docs/troubleshooting.md#out-of-memory)"
    )


def exit_when_interrupted() -> None:
    """Exit at SIGINT with status 130 and no traceback, before `exit_on_user_error` begins."""

    def stop(number: int, frame: FrameType | None) -> None:
        os.write(2, b"interrupted\n")
        os._exit(INTERRUPTED)

    _handle_sigint(stop)


def _handle_sigint(handler: Callable[[int, FrameType | None], None]) -> None:
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as in background jobs of a shell
        signal.signal(signal.SIGINT, handler)


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Print a `UserError` as `error: sentence` to standard error and exit with status 2.

    Memory that is full is reported likewise. An interrupt from the keyboard exits with status 130,
    as shells expect; child processes end without a message. Within the block, output that cannot
    be written is dropped; see `lednet.streams`.
    """
    process = os.getpid()

    def interrupt(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:
            os._exit(0)  # for any other status, PyTorch raises an error in the main process
        raise KeyboardInterrupt

    with lasting_output():
        _handle_sigint(interrupt)
        try:
            yield
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(INTERRUPTED)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(EXIT_STATUS)
        except (RuntimeError, OSError, MemoryError) as error:
            if full := shared_memory_error(error) or memory_error(error):
                print(f"error: {full}", file=sys.stderr)
                sys.exit(EXIT_STATUS)
            raise
        finally:
            _handle_sigint(signal.default_int_handler)

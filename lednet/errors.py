"""The exception for errors that a user can correct, and how scripts report it."""

import contextlib
import sys
from collections.abc import Iterator, Sequence

EXIT_STATUS = 2


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


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Print a `UserError` as `error: sentence` to standard error and exit with status 2.

    An interrupt from the keyboard exits with status 130, as shells expect.
    """
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_STATUS)

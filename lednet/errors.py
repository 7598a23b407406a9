"""One exception for everything a user can mend, and the way scripts report it."""

import contextlib
import sys
from collections.abc import Iterator, Sequence

EXIT_STATUS = 2


class UserError(Exception):
    """Bad input or set-up: one sentence that names the thing and the next step.

    A data loader's worker process wraps the message of what it raises in a
    traceback; only the sentence at its end is kept.
    """

    def __init__(self, message: str):
        super().__init__(message.rsplit("UserError: ", 1)[-1].strip())


def raise_if_problems(problems: Sequence[str], limit: int = 3) -> None:
    """Report what went wrong beside work that went on.

    Raises:
        UserError: there are `problems`, sentences of which the first ones are told.
    """
    if problems:
        more = len(problems) - limit
        told = [*problems[:limit], *([f"and {more} more"] if more > 0 else [])]
        raise UserError(". ".join(told))


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Print a `UserError` as `error: sentence` on standard error and exit with status 2.

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

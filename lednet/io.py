"""Files that are either whole or absent."""

import contextlib
import json
import os
import re
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any, TypeVar

import yaml

from lednet.errors import UserError

MAX_YAML = 256 * 2**10
"""Bytes of what is written by hand: 254 classes take a tenth; parsing slows down with size."""


@contextlib.contextmanager
def write_atomically(path: str | os.PathLike, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`, moved over `path` when the block ends well.

    Nothing is left behind when the block fails; an existing file stays as it was.
    The temporary name keeps the suffix, so that libraries which choose a format
    by it still do.

    Args:
        durable: also when the power fails right after. Waiting for the disk takes some
            milliseconds, too many for thousands of files that can be made again.

    Raises:
        UserError: the folder cannot be written, or the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if durable:
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; "
            "free some space or choose another folder"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def write_folder_atomically(path: str | os.PathLike) -> Iterator[Path]:
    """`write_atomically` for a folder: what is filled in the block takes the place of `path`."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; remove it or choose another folder"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def require_space(folder: Path, needed: int, what: str, flag: str) -> None:
    """Refuse to begin what would not fit on the disk of `folder`, which need not be there yet.

    Args:
        needed: bytes.
        what, flag: that needs them, and that names the folder, for the message.

    Raises:
        UserError: the disk has less.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise UserError(
            f"{what} needs {needed / 1e9:.1f} GB, and the disk of {folder} has "
            f"{free / 1e9:.1f} GB left: free some, or choose another {flag}"
        )


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files of processes that were killed inside `write_atomically`.

    Nobody else may be writing to `folder`.
    """
    for path in folder.iterdir():
        if re.fullmatch(r"\..+\.\d+(\.\w+)?", path.name):
            path.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write `text` to `path`, atomically."""
    with write_atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write `value` to `path` as indented JSON, atomically. NaN is refused by `json`."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_between_marks(path: str | os.PathLike, script: str, text: str) -> None:
    """Replace what `script` has written into the page at `path` by `text`.

    Raises:
        UserError: the page does not hold both marks, in order.
    """
    marks = f"<!-- {script} writes from here -->", "<!-- to here -->"
    path = Path(path)
    content = path.read_text(encoding="utf-8") if path.is_file() else ""
    start = content.find(marks[0])
    end = content.find(marks[1], max(start, 0))
    if not 0 <= start < end:
        raise UserError(f"{path} has no line `{marks[0]}` with `{marks[1]}` below: add them")
    before = content[: start + len(marks[0])]
    write_text(path, f"{before}\n\n{text.strip()}\n\n{content[end:]}")


def plain_values(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as JSON can hold them: paths become text."""
    return {key: str(v) if isinstance(v, Path) else v for key, v in options.items()}


def read_json(path: str | os.PathLike) -> Any:
    """Parse the JSON file at `path`.

    Raises:
        UserError: no such file, or not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}; correct or remove it") from error


class _PlainLoader(yaml.SafeLoader):
    """YAML of trees alone: a few aliases of aliases stand for more than any memory holds."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has aliases (*name), which are not taken")
        return super().compose_node(parent, index)


def read_yaml(path: str | os.PathLike) -> Any:
    """Parse the YAML or JSON file at `path`, without aliases, of at most `MAX_YAML` bytes.

    Raises:
        UserError: no such file, too large, or not YAML.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_YAML + 1)
        if len(content) > MAX_YAML:
            raise UserError(
                f"{path} is over {MAX_YAML >> 10} KiB, too large to be read: shorten it"
            )
        return yaml.load(content.decode(), Loader=_PlainLoader)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path") from error
    except UserError:
        raise
    except Exception as error:  # a tag such as !!timestamp before another word raises anything
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        reason = " ".join(str(getattr(error, "problem", None) or error).split())
        raise UserError(f"{path} is neither YAML nor JSON ({reason}{where}): correct it") from error


LIMIT = "LEDNET_MAX_PIXELS"
"""Environment variable: pixels above which no image is decoded."""


DEFAULT_LIMIT = 100_000_000


def max_pixels() -> int:
    """Pixels that an image may have.

    Raises:
        UserError: the environment variable is no number.
    """
    told = os.environ.get(LIMIT, str(DEFAULT_LIMIT))
    if not (told.isdecimal() and told.isascii() and len(told) < 19 and int(told)):
        raise UserError(f"{LIMIT} is {told!r}: give a number of pixels")
    return int(told)


Result = TypeVar("Result")


def map_ordered(
    pool: Executor, jobs: Iterable[Callable[[], Result]], ahead: int
) -> Iterator[Result]:
    """Results of `jobs` in their order, at most `ahead` of them begun before they are needed."""
    pending: deque[Future] = deque()
    for job in jobs:
        pending.append(pool.submit(job))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()

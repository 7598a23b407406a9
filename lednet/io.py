"""Atomic writing, and safe reading of JSON and YAML."""

import contextlib
import json
import os
import re
import shutil
import sys
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any, TypeVar

import yaml

from lednet.errors import UserError
from lednet.files import decode_text, read_text

MAX_YAML = 256 * 2**10
"""Largest YAML file in bytes: 254 classes take a tenth of it, and parsing is slow."""

LIMIT = "LEDNET_MAX_PIXELS"
"""Environment variable: number of pixels above which no image is decoded."""
DEFAULT_LIMIT = 100_000_000

Result = TypeVar("Result")


def process_command(processes: int = 1) -> list[str]:
    """The words of the command that started this process: of a script or of `lednet COMMAND`.

    Args:
        processes: number of processes that torchrun started.
    """
    launcher = ["torchrun", f"--nproc-per-node={processes}"] if processes > 1 else []
    program, *arguments = sys.argv
    if program.startswith("lednet "):
        return [*launcher, *(["-m"] * bool(launcher)), *program.split(), *arguments]
    return [*(launcher or ["python"]), program, *arguments]


@contextlib.contextmanager
def write_atomically(path: str | os.PathLike, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`, renamed to `path` after the block.

    If the block fails, the temporary file is removed and an existing file is kept. The temporary
    name has the same suffix, from which some libraries choose a format.

    Args:
        durable: wait until the data is on disk (fsync), so that it survives a power failure. It
            takes some milliseconds per file.

    Raises:
        UserError: the folder cannot be written to, or the disk is full.
    """
    path = Path(path)
    with _temporary(path, "free some space") as temporary:
        yield temporary
        if durable:
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)


@contextlib.contextmanager
def write_folder_atomically(path: str | os.PathLike) -> Iterator[Path]:
    """`write_atomically` for a folder: the folder filled in the block replaces `path`."""
    path = Path(path)
    with _temporary(path, "remove it") as temporary:
        temporary.mkdir()
        yield temporary
        if path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)


def temporary_path(path: Path) -> Path:
    """The name that a file has while it is written: longer, in the same folder."""
    return path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")


def nearest_existing(path: Path) -> Path:
    """`path`, or the nearest of its parent folders that exists."""
    return next(p for p in (path, *path.absolute().parents) if p.exists())


@contextlib.contextmanager
def _temporary(path: Path, advice: str) -> Iterator[Path]:
    temporary = temporary_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"cannot write {path}: {reason}; {advice} or choose another folder"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink()


def require_writable(
    path: str | os.PathLike | None, suffixes: Collection[str] = (), folder: bool = False
) -> None:
    """Check before the work that a file, or with `folder` a folder, can be written to `path`.

    Args:
        path: its folders may be missing; None passes.
        suffixes: of formats that can be written, with the dot; empty for any.

    Raises:
        UserError: it cannot be written, or has another suffix.
    """
    if path is None:
        return
    path = Path(path)
    if suffixes and path.suffix.lower() not in suffixes:
        raise UserError(
            f"cannot write {path}: the format is chosen by the suffix, which is none of "
            f"{', '.join(suffixes)}; give the file one of them"
        )
    try:
        if path.is_dir() and not folder:
            raise UserError(f"cannot write {path}: it is a folder; give the name of a file")
        existing = nearest_existing(path if folder else path.parent)
    except OSError as error:  # a name is too long, or a folder above cannot be searched
        reason = f"cannot write {path}: {error.strerror}; choose another name or folder"
        raise UserError(reason) from error
    if not existing.is_dir():
        raise UserError(f"cannot write {path}: {existing} is a file; choose another folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"cannot write {path}: {existing} is read-only; choose another folder")


def require_space(folder: Path, needed: int, what: str, flag: str) -> None:
    """Check that the disk of `folder`, which may not exist yet, has `needed` bytes left.

    Args:
        what, flag: what needs the space, and the flag that names the folder, for the message.

    Raises:
        UserError: the disk has less.
    """
    free = shutil.disk_usage(nearest_existing(folder)).free
    if needed > free:
        raise UserError(
            f"{what} needs {needed / 1e9:.1f} GB, and the disk of {folder} has "
            f"{free / 1e9:.1f} GB left: free some, or choose another {flag}"
        )


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files of killed processes; no other process may be writing to `folder`."""
    for path in folder.iterdir():
        if re.fullmatch(r"\..+\.\d+(\.\w+)?", path.name):
            path.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write `text` to `path`, atomically. Bytes of file names that are not UTF-8 become codes."""
    with write_atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write `value` to `path` as indented JSON, atomically; NaN is a `ValueError`."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_between_marks(path: str | os.PathLike, script: str, text: str) -> None:
    """Replace the text between the marks of `script` in the Markdown page at `path`.

    Raises:
        UserError: the page does not contain both marks, in order.
    """
    marks = f"<!-- {script} writes from here -->", "<!-- to here -->"
    path = Path(path)
    content = path.read_text(encoding="utf-8") if path.is_file() else ""
    before, start, rest = content.partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not (start and end):
        raise UserError(f"{path} has no line `{marks[0]}` with `{marks[1]}` below: add them")
    write_text(path, f"{before}{start}\n\n{text.strip()}\n\n{end}{after}")


def plain_values(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options in JSON's types: paths become strings."""
    return {key: str(v) if isinstance(v, Path) else v for key, v in options.items()}


def read_json(path: str | os.PathLike) -> Any:
    """Parse a JSON file.

    Raises:
        UserError: the file is missing or not JSON.
    """
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}; correct or remove it") from error


class _TextLoader(yaml.BaseLoader):
    """Loads every value as the text that is written.

    Refuses aliases, which expand to more than the memory holds, and keys that are given twice,
    which would silently lose their first value.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has aliases (*name), which are not supported")
        return super().compose_node(parent, index)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        _require_single([str(key.value) for key, _ in node.value])
        return node


def _require_single(keys: list[str]) -> None:
    doubled = [key for key, count in Counter(keys).items() if count > 1]
    if doubled:
        raise yaml.YAMLError(f"it has the key {doubled[0]!r} twice")


def _json_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _require_single([key for key, _ in pairs])
    return dict(pairs)


def read_yaml(path: str | os.PathLike) -> Any:
    """Parse a YAML or JSON file of at most `MAX_YAML` bytes, without aliases.

    Numbers and unquoted words (`no`, `null`, `1_000`) are returned as the text in the file. JSON's
    true, false and null keep their types.

    Raises:
        UserError: the file is missing, too large, not YAML, or not UTF-8.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_YAML + 1)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path") from error
    if len(content) > MAX_YAML:
        raise UserError(f"{path} is over {MAX_YAML >> 10} KiB, too large to be read: shorten it")
    decoded = decode_text(content, path)
    try:
        if decoded.lstrip().startswith(("{", "[")):  # YAML does not accept JSON's tabs
            with contextlib.suppress(json.JSONDecodeError):
                return json.loads(
                    decoded, object_pairs_hook=_json_object, parse_int=str, parse_float=str,
                    parse_constant=str,
                )  # fmt: skip
        return yaml.load(decoded, Loader=_TextLoader)
    except Exception as error:  # parsers raise errors of many types
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        reason = " ".join(str(getattr(error, "problem", None) or error).split())
        next_step = "correct it"
        if "escape" in reason:
            next_step = "write / or \\\\ instead of \\"
        elif "'\\t'" in reason:
            next_step = "use spaces instead of tabs"
        raise UserError(
            f"{path} is neither YAML nor JSON ({reason}{where}): {next_step}"
        ) from error


def max_pixels() -> int:
    """Largest number of pixels of an image.

    Raises:
        UserError: the environment variable `LIMIT` is not a positive number.
    """
    value = os.environ.get(LIMIT, str(DEFAULT_LIMIT))
    if not re.fullmatch("[0-9]{1,18}", value) or int(value) == 0:
        raise UserError(f"{LIMIT} is {value!r}: give a number of pixels")
    return int(value)


def map_ordered(
    pool: Executor, jobs: Iterable[Callable[[], Result]], ahead: int
) -> Iterator[Result]:
    """Run `jobs` in `pool` and yield their results in order, at most `ahead` of them in advance."""
    pending: deque[Future] = deque()
    for job in jobs:
        pending.append(pool.submit(job))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()

"""Find input files by path, folder or pattern."""

import glob
from collections.abc import Iterable, Iterator
from pathlib import Path

from lednet.data.imagefolder import SUFFIXES
from lednet.errors import UserError


def find_inputs(
    sources: Iterable[str | Path], out: Path, suffixes: tuple[str, ...] = SUFFIXES
) -> dict[str, Path]:
    """Input files by the names of their results.

    The name is the path without suffix, relative to the folder that was given, or to the part of
    a pattern before the first wildcard. Folders are searched recursively. Hidden files, and files
    inside `out`, are left out.

    Args:
        sources: files of any suffix, folders, and patterns such as "city/**/*.png".
        out: folder of the results.
        suffixes: suffixes to include from folders and patterns.

    Raises:
        UserError: A source does not exist or has no such files, `out` is one of the folders, or
            two files have the same name.
    """
    inputs: dict[str, Path] = {}
    for source in map(str, sources):
        for name, path in _find_files(source, out, suffixes):
            if inputs.setdefault(name, path).resolve() != path.resolve():
                raise UserError(
                    f"{inputs[name]} and {path} would have the same result files: rename one of "
                    "them"
                )
    return inputs


def _find_files(source: str, out: Path, suffixes: tuple[str, ...]) -> Iterator[tuple[str, Path]]:
    """Yield the name and path of each file of one source."""
    folder = Path(source)
    if folder.is_file():
        yield folder.stem, folder
        return
    if folder.is_dir():
        paths: Iterable[Path] = folder.rglob("*")
    elif glob.has_magic(source):
        paths = map(Path, glob.glob(source, recursive=True))
        folder = next(parent for parent in folder.parents if not glob.has_magic(str(parent)))
    else:
        raise UserError(f"no file or folder {source}: check the path")
    results, parent = out.resolve(), folder.resolve()
    if results == parent:
        raise UserError(f"--out {out} is the folder of the inputs: choose another one")
    inside = results.is_relative_to(parent)
    found = [
        path
        for path in sorted(paths)
        if path.suffix.lower() in suffixes
        and not path.name.startswith(".")
        and not (inside and path.resolve().is_relative_to(results))
        and path.is_file()
    ]
    if not found:
        raise UserError(f"{source} holds no images ({', '.join(suffixes)}): check the path")
    for path in found:
        yield path.relative_to(folder).with_suffix("").as_posix(), path

"""Files to predict, by the names that people give: a file, a folder, a pattern."""

import glob
from collections.abc import Iterable, Iterator
from pathlib import Path

from lednet.data.imagefolder import SUFFIXES
from lednet.errors import UserError


def find_inputs(
    sources: Iterable[str | Path], out: Path, suffixes: tuple[str, ...] = SUFFIXES
) -> dict[str, Path]:
    """Input files by the names that their results begin with.

    A name is the path below the folder that was named, or below the part of a pattern that has
    no wildcard, without its suffix; sub-folders are searched. Hidden files, and what lies in
    an `out` inside a folder, are no inputs.

    Args:
        sources: files of any suffix, folders, and patterns such as "city/**/*.png".
        out: folder of the results.
        suffixes: of the files to take from folders and patterns.

    Raises:
        UserError: a source holds nothing or is not there, `out` is one of the folders, or two
            files would have the same results.
    """
    inputs: dict[str, Path] = {}
    for source in map(str, sources):
        for name, path in _files_of(source, out, suffixes):
            if inputs.setdefault(name, path).resolve() != path.resolve():
                raise UserError(
                    f"{inputs[name]} and {path} would have the same result files: rename one of "
                    "them"
                )
    return inputs


def _files_of(source: str, out: Path, suffixes: tuple[str, ...]) -> Iterator[tuple[str, Path]]:
    """Name and path of each file that one source stands for."""
    folder = Path(source)
    if folder.is_file():
        yield folder.stem, folder
        return
    if folder.is_dir():
        paths: Iterable[Path] = folder.rglob("*")
    elif any(sign in source for sign in "*?["):
        paths = map(Path, glob.glob(source, recursive=True))
        fixed = next(i for i, part in enumerate(folder.parts) if any(c in part for c in "*?["))
        folder = Path(*folder.parts[:fixed])
    else:
        raise UserError(f"no file or folder {source}: check the path")
    results = out.resolve()
    if results == folder.resolve():
        raise UserError(f"--out {out} is the folder of the inputs: choose another one")
    inside = folder.resolve() in results.parents
    found = False
    for path in sorted(paths):
        skipped = path.name.startswith(".") or (inside and results in path.resolve().parents)
        if path.suffix.lower() in suffixes and not skipped and path.is_file():
            found = True
            yield path.relative_to(folder).with_suffix("").as_posix(), path
    if not found:
        raise UserError(f"{source} holds no images ({', '.join(suffixes)}): check the path")

"""Find input files by path, folder or pattern."""

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

from lednet.data.pairs import list_examples
from lednet.errors import UserError
from lednet.files import IMAGE_SUFFIXES, find_files, match_files, split_pattern, unused_images

logger = logging.getLogger(__name__)


def find_inputs(
    sources: Iterable[str | Path], out: Path, suffixes: tuple[str, ...] = IMAGE_SUFFIXES
) -> dict[str, Path]:
    """Input files by the names of their results.

    The name is the path without suffix, relative to the folder that was given, or to the existing
    folder at the beginning of a pattern. Folders are searched as in `lednet.files.find_files`.
    Files inside `out` are left out; images of other formats are logged.

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
        for name, path in _find_source(source, out, suffixes):
            if inputs.setdefault(name, path).resolve() != path.resolve():
                raise UserError(
                    f"{inputs[name]} and {path} would have the same result files: rename one of "
                    "them"
                )
    return inputs


def _find_source(source: str, out: Path, suffixes: tuple[str, ...]) -> Iterator[tuple[str, Path]]:
    """Yield the name and path of each file of one source."""
    folder = Path(source)
    if folder.is_file():
        yield folder.stem, folder
        return
    if folder.is_dir():
        paths = find_files(folder)
    elif pattern := split_pattern(source):
        folder = pattern[0]
        paths = match_files(*pattern)
    else:
        raise UserError(f"no file or folder {source}: check the path")
    results, parent = out.resolve(), folder.resolve()
    if results == parent:
        raise UserError(f"--out {out} is the folder of the inputs: choose another one")
    if results.is_relative_to(parent):
        paths = [path for path in paths if not path.resolve().is_relative_to(results)]
    found = [path for path in paths if path.suffix.lower() in suffixes]
    unused = list_examples(path.name for path in unused_images(paths, set(found)))
    if not found:
        other = f", but {unused}" if unused else ""
        raise UserError(f"{source} holds no images ({', '.join(suffixes)}){other}: check the path")
    if unused:
        logger.warning("%s: image files of other formats are not used: %s", source, unused)
    for path in found:
        yield path.relative_to(folder).with_suffix("").as_posix(), path

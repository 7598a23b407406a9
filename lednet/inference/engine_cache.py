"""Exported networks of backends that run files, kept on disk between runs.

Exporting takes seconds, opening an exported file a fraction of one. A cached file belongs to one
network, input size, format, and version of each package; changing any of them exports again.
"""

import contextlib
import hashlib
import logging
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

import lednet
from lednet.errors import UserError
from lednet.exporting.common import ExportedModel, ExportOptions, RunOptions
from lednet.exporting.formats import FORMATS
from lednet.exporting.wrappers import EndToEndModel
from lednet.io import write_folder_atomically

logger = logging.getLogger(__name__)

MAX_FILES = 20
"""Cached networks, about 4 MB each; the ones that were not used for longest are deleted."""
_STEM = "network"

Shape = tuple[int, int, int]


def cache_folder() -> Path:
    """$LEDNET_CACHE, or lednet in $XDG_CACHE_HOME (usually ~/.cache)."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("LEDNET_CACHE") or Path(base) / "lednet")


def cache_entry(graph: EndToEndModel, format: str, shape: Shape) -> Path:
    """Folder of a network's cached file.

    Args:
        format: a key of `FORMATS`.
        shape: (N, H, W) of the images.
    """
    digest = hashlib.sha256()
    packages = ("torch", *FORMATS[format].packages)
    versions = [lednet.__version__, *(f"{name} {version(name)}" for name in packages)]
    digest.update(repr((graph, graph.output, format, shape, versions)).encode())
    for name, value in graph.state_dict().items():
        digest.update(name.encode() + value.cpu().numpy().tobytes())
    return cache_folder() / "engines" / digest.hexdigest()[:32]


def is_cached(graph: EndToEndModel, format: str, shape: Shape) -> bool:
    return cache_entry(graph, format, shape).is_dir()


def open_exported(
    graph: EndToEndModel, format: str, shape: Shape, options: RunOptions, cache: bool = True
) -> ExportedModel:
    """Open the cached file of `graph`; it is exported first if there is none.

    Processes may share the cache: an entry is a folder that is renamed when it is complete.

    Args:
        cache: False neither reads nor writes the cache.
    """
    row = FORMATS[format]
    entry = cache_entry(graph, format, shape)
    file = entry / f"{_STEM}{row.suffix}"
    if cache and file.is_file():
        with contextlib.suppress(UserError):  # damaged, or an option that no file can have
            exported = row.load(file, options)
            os.utime(entry)
            return exported
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        temporary = folder / file.name
        row.write(graph, temporary, ExportOptions(shape))
        exported = row.load(temporary, options)
        if cache and entry.is_dir():
            logger.warning("%s was damaged, and is written again", file)
        if cache:
            _keep(folder, entry)
        return exported


def _keep(folder: Path, entry: Path) -> None:
    """Copy the files of `folder` into a cache entry, and delete old entries."""
    try:
        entry.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with write_folder_atomically(entry) as staging:
            shutil.copytree(folder, staging, dirs_exist_ok=True)
        entries = [path for path in entry.parent.iterdir() if not path.name.startswith(".")]
        for path in sorted(entries, key=lambda path: path.stat().st_mtime)[:-MAX_FILES]:
            shutil.rmtree(path, ignore_errors=True)
    except (OSError, UserError) as error:  # full, not writable, or written by another process
        logger.warning("the exported network is not kept: %s", error)

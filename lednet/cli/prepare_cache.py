"""Flags and steps of the scripts that decode a data set into a cache.

This module is quick to import: it does not import PyTorch.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lednet.cli.common import add_num_workers_flag, usable_cpus

if TYPE_CHECKING:
    from lednet.data.cache import CacheableDataset


def add_cache_flags(parser: argparse.ArgumentParser, default: str) -> None:
    """--cache, --num-workers, --rebuild and --verify.

    Args:
        default: folder that is written without --cache, for the help text.
    """
    add = parser.add_argument
    add("--cache", type=Path, metavar="DIR", help=f"folder to write (default: {default})")
    add_num_workers_flag(parser, usable_cpus(), "decoding processes; 0 decodes in the main process")
    text = "replace a cache of other options or other library versions"
    add("--rebuild", action="store_true", help=text)
    text = "write nothing: compare a finished cache with its checksums"
    add("--verify", action="store_true", help=text)


def build_or_verify(
    args: argparse.Namespace,
    splits: Mapping[str, "CacheableDataset"],
    script: Path,
    parser: argparse.ArgumentParser,
    flags: Sequence[str],
) -> None:
    """Build the cache at --cache and open it, or with --verify compare its checksums.

    Args:
        splits: the data of each split, by the name of its subfolder.
        script, parser, flags: of the command that error messages name.
    """
    from lednet.data.cache import CachedDataset, build_cache, command_line

    if not args.verify:
        build_cache(args.cache, splits, args.num_workers, args.rebuild)
    command = command_line(script, vars(args), vars(parser.parse_args([])), flags)
    for name, source in splits.items():
        cached = CachedDataset(args.cache / name, source, command)
        if args.verify:
            cached.verify()

"""Time utils/check_dataset.py on thousands of pairs against reading and decoding their files.

    python benchmarks/doctor.py --datadir /data/cityscapes --json benchmarks/results/doctor.json

Makes --pairs pairs out of the finely annotated images below --datadir, each moved sideways by
another distance and written anew, so that no two files are the same; a tenth are val. Then, with
the same number of processes and with none of the files in memory: their bytes read ("read"), the
pictures decoded ("decoded"), the whole check ("checked"). 5,000 Cityscapes pairs take 13 GB of
disk for as long as it runs, and a quarter of an hour on two cores.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from lednet.data.cityscapes import cityscapes_pairs
from lednet.data.pairs import require_file
from lednet.device import describe_device
from lednet.errors import UserError, exit_on_user_error
from lednet.io import write_json
from lednet.training.run_dir import environment
from lednet.validation.checks import validate_dataset
from lednet.validation.splits import open_splits

ROOT = Path(__file__).resolve().parents[1]


class Copy(NamedTuple):
    """A picture to make: `source`, moved to the right by `shift` pixels, at `path`."""

    source: Path
    shift: int
    path: Path


def plan(datadir: Path, root: Path, pairs: int) -> list[Copy]:
    """The images and labels of the tree at `root`; val is made of val alone."""
    copies = []
    for split, count in (("val", pairs // 10), ("train", pairs - pairs // 10)):
        sources = cityscapes_pairs(datadir, split)
        city = "toytown" if split == "train" else "toyville"
        for i in range(count):
            source = sources[i % len(sources)]
            # All shifts of one source differ, and none is that of another's round.
            shift = 1 + 7 * (i // len(sources))
            name = f"{city}_{i:06d}_000019"
            for kind, path, end in (
                ("leftImg8bit", require_file(source.image, "images"), "leftImg8bit"),
                ("gtFine", require_file(source.label, "labels"), "gtFine_labelIds"),
            ):
                copies.append(Copy(path, shift, root / kind / split / city / f"{name}_{end}.png"))
    return copies


def make(copy: Copy) -> None:
    pixels = np.roll(np.asarray(Image.open(copy.source)), copy.shift, axis=1)
    with copy.path.open("wb") as file:
        Image.fromarray(pixels).save(file, format="PNG", compress_level=1)
        file.flush()
        os.fsync(file.fileno())  # what is not on disk yet cannot be taken out of memory


def forget(path: Path) -> None:
    """Take the file's pages out of the system's memory."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(path: Path) -> int:
    return len(path.read_bytes())


def decode(path: Path) -> None:
    with Image.open(path) as image:
        image.load()


def time_of(work: Callable[[], Any], paths: list[Path]) -> tuple[float, float]:
    """Seconds, and CPU seconds of all processes, with the files on disk only."""
    for path in paths:
        forget(path)
    start, cpu = time.perf_counter(), os.times()
    work()
    now = os.times()
    spent = sum(now[i] - cpu[i] for i in range(4))  # user and system, own and children's
    return time.perf_counter() - start, spent


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # fmt: off
    parser.add_argument("--datadir", type=Path, required=True, help="Cityscapes, or a part of it")
    parser.add_argument("--pairs", type=int, default=5000, help="to make and check (5000)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="(one a core)")
    parser.add_argument("--scratch", type=Path, metavar="DIR",
                        help="where the pairs are made (the system's temporary folder)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    # fmt: on
    return parser


def main() -> None:
    args = build_parser().parse_args()
    if args.pairs < 10 or args.workers < 1:
        raise UserError("give at least 10 --pairs and one of the --workers")
    with tempfile.TemporaryDirectory(dir=args.scratch) as name:
        root = Path(name) / "cityscapes"
        copies = plan(args.datadir, root, args.pairs)
        for folder in {copy.path.parent for copy in copies}:
            folder.mkdir(parents=True)
        paths = [copy.path for copy in copies]
        with multiprocessing.Pool(args.workers) as pool:
            for _ in tqdm(pool.imap_unordered(make, copies, 4), "make", len(copies), unit="file"):
                pass
        size = sum(path.stat().st_size for path in paths)

        def in_pool(work: Callable[[Path], object]) -> None:
            with multiprocessing.Pool(args.workers) as pool:
                for _ in tqdm(pool.imap_unordered(work, paths, 4), work.__name__, len(paths)):
                    pass

        def check() -> None:
            splits, findings = open_splits("cityscapes", root)
            validate_dataset(root, splits, findings, args.workers)

        ways = {
            "read": lambda: in_pool(read),
            "decoded": lambda: in_pool(decode),
            "checked": check,
        }
        rows = {}
        for way, work in ways.items():
            seconds, cpu = time_of(work, paths)
            rows[way] = {
                "seconds": seconds,
                "pairs_per_second": args.pairs / seconds,
                "mb_per_second": size / 1e6 / seconds,
                "cpu_ms_per_pair": 1000 * cpu / args.pairs,
            }
            print(
                f"{way:8} {args.pairs / seconds:8.1f} pairs/s  {size / 1e6 / seconds:7.0f} MB/s  "
                f"CPU {1000 * cpu / args.pairs:.0f} ms a pair"
            )
    if args.json:
        record = {
            "command": " ".join(["python", "benchmarks/doctor.py", *sys.argv[1:]]),
            "device": describe_device(torch.device("cpu")),
            "environment": environment(ROOT),
            "pairs": args.pairs,
            "workers": args.workers,
            "megabytes": size / 1e6,
            "results": rows,
        }
        write_json(args.json, record)


if __name__ == "__main__":
    with exit_on_user_error():
        main()

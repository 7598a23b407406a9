"""Time utils/check_dataset.py on thousands of pairs, against reading and decoding their files.

    python benchmarks/doctor.py --datadir /data/cityscapes --json benchmarks/results/doctor.json

Makes --pairs pairs from the finely annotated images below --datadir, each shifted sideways by
another distance and encoded anew, so that no two files are equal; a tenth are val. Then, with
the same number of processes and none of the files in the page cache: their bytes are read
("read"), their pixels decoded ("decoded"), the whole check run ("checked"). 5,000 Cityscapes
pairs take 13 GB of temporary disk space, and a quarter of an hour on two cores.
"""

import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from benchmarks._common import make_parser, print_row, write_record
from lednet.data.cityscapes import cityscapes_pairs
from lednet.data.pairs import require_file
from lednet.errors import UserError, exit_on_user_error
from lednet.validation.checks import validate_dataset
from lednet.validation.splits import open_splits


class ShiftedCopy(NamedTuple):
    """A file to make: `source`, shifted to the right by `shift` pixels."""

    source: Path
    shift: int
    path: Path


def plan(datadir: Path, root: Path, pairs: int) -> Iterator[ShiftedCopy]:
    """The images and labels of the tree at `root`; those of val come from val."""
    for split, count in (("val", pairs // 10), ("train", pairs - pairs // 10)):
        sources = cityscapes_pairs(datadir, split)
        for i in range(count):
            source = sources[i % len(sources)]
            shift = 1 + 7 * (i // len(sources))  # different for all copies of a source
            for file, what in ((source.image, "images"), (source.label, "labels")):
                file = require_file(file, what)
                path = root / file.relative_to(datadir)
                yield ShiftedCopy(file, shift, path.with_name(f"{i:06d}_{path.stem}.png"))


def make(copy: ShiftedCopy) -> None:
    pixels = np.roll(np.asarray(Image.open(copy.source)), copy.shift, axis=1)
    with copy.path.open("wb") as file:
        Image.fromarray(pixels).save(file, format="PNG", compress_level=1)
        file.flush()
        os.fsync(file.fileno())  # only pages that are on disk can be dropped from the cache


def read(path: Path) -> None:
    path.read_bytes()


def decode(path: Path) -> None:
    with Image.open(path) as image:
        image.load()


def time_cold(work: Callable[[], object], paths: list[Path]) -> tuple[float, float]:
    """Seconds, and CPU seconds of all processes, with none of the files in the page cache."""
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    start, before = time.perf_counter(), os.times()
    work()
    seconds, after = time.perf_counter() - start, os.times()
    return seconds, sum(after[:4]) - sum(before[:4])  # user and system, own and children's


def main() -> None:
    parser = make_parser(__doc__, "--json")
    # fmt: off
    parser.add_argument("--datadir", type=Path, required=True, help="Cityscapes, or a part of it")
    parser.add_argument("--pairs", type=int, default=5000, help="pairs to check (default: 5000)")
    parser.add_argument("--num-workers", "--workers", type=int, default=os.cpu_count() or 1,
                        help="processes (default: one per core)")
    parser.add_argument("--scratch", type=Path, metavar="DIR",
                        help="where the pairs are made (default: the system's temporary folder)")
    # fmt: on
    args = parser.parse_args()
    workers = args.num_workers
    if args.pairs < 10 or workers < 1:
        raise UserError("too few --pairs or --num-workers: give 10 pairs and 1 process or more")
    with tempfile.TemporaryDirectory(dir=args.scratch) as name:
        root = Path(name) / "cityscapes"
        copies = list(plan(args.datadir, root, args.pairs))
        for folder in {copy.path.parent for copy in copies}:
            folder.mkdir(parents=True)

        def in_pool(work: Callable, items: list) -> None:
            with multiprocessing.Pool(workers) as pool:
                for _ in tqdm(pool.imap_unordered(work, items, 4), work.__name__, len(items)):
                    pass

        def check() -> None:
            splits, issues = open_splits("cityscapes", root)
            validate_dataset(root, splits, issues, workers)

        in_pool(make, copies)
        paths = [copy.path for copy in copies]
        megabytes = sum(path.stat().st_size for path in paths) / 1e6
        rows = {}
        for way, work in (
            ("read", lambda: in_pool(read, paths)),
            ("decoded", lambda: in_pool(decode, paths)),
            ("checked", check),
        ):
            seconds, cpu = time_cold(work, paths)
            rows[way] = {
                "seconds": seconds,
                "pairs_per_second": args.pairs / seconds,
                "mb_per_second": megabytes / seconds,
                "cpu_ms_per_pair": 1000 * cpu / args.pairs,
            }
            print_row({"way": way} | rows[way])
    results = {"pairs": args.pairs, "workers": workers, "megabytes": megabytes, "results": rows}
    write_record(args.json, torch.device("cpu"), results)


if __name__ == "__main__":
    with exit_on_user_error():
        main()

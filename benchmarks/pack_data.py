"""Make data sets small enough to travel to another machine.

    python benchmarks/pack_data.py --datadir cityscapes=/data/cityscapes --golden /data/golden \\
        --exclude "*.pth.tar" --out /tmp/packed --limit-mib 48

Each NAME=DIR becomes OUT/NAME: images as lossy WebP; PNG files of one channel, which are labels,
compressed further without loss; other files copied. --golden, reference outputs, becomes
OUT/golden without loss. The same command resumes an interrupted run.
"""

import contextlib
import os
import struct
import zlib
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from fnmatch import fnmatchcase
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from lednet.data.image_io import open_header, open_image, read_image, to_rgb
from lednet.errors import UserError, exit_on_user_error
from lednet.files import IMAGE_SUFFIXES
from lednet.io import read_json, write_atomically, write_json


class Job(NamedTuple):
    """A file to pack; an "image" may lose detail, a "label" or "other" file may not."""

    source: Path
    target: Path
    kind: str
    quality: int


def to_webp(job: Job) -> bytes:
    """The pixels as stored, with the EXIF data that contains their orientation."""
    image, buffer = open_image(job.source), BytesIO()
    pixels, exif = Image.fromarray(to_rgb(image, upright=False)), image.info.get("exif", b"")
    pixels.save(buffer, "WEBP", quality=job.quality, method=6, exif=exif)
    return buffer.getvalue()


def unfiltered_png(grey: np.ndarray) -> bytes:
    """A PNG of (H, W) uint8 without row filters, which is smaller for labels than Pillow's."""
    rows = np.pad(grey, ((0, 0), (1, 0))).tobytes()  # a 0 in front of each: no filter
    header = struct.pack(">2I5B", *grey.shape[::-1], 8, 0, 0, 0, 0)
    chunks = (b"IHDR" + header, b"IDAT" + zlib.compress(rows, 9), b"IEND")
    framed = (struct.pack(f">I{len(c)}sI", len(c) - 4, c, zlib.crc32(c)) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def smaller(source: Path) -> bytes:
    """The file, or a smaller one with equal arrays or grey values."""
    content, buffer = source.read_bytes(), BytesIO()
    if source.suffix.lower() == ".npz":
        with contextlib.suppress(Exception), np.load(source) as arrays:
            np.savez_compressed(buffer, **arrays)
            return min(content, buffer.getvalue(), key=len)
    elif source.suffix.lower() == ".png" and (image := open_image(source)).mode == "L":
        made = unfiltered_png(np.array(image))
        if open_image(BytesIO(made)) == image:
            return min(content, made, key=len)
    return content


def pack(job: Job) -> None:
    """Write the target, unless it has the modification time of the source and is up to date."""
    time = job.source.stat().st_mtime_ns
    if not job.target.is_file() or job.target.stat().st_mtime_ns != time:
        content = to_webp(job) if job.kind == "image" else smaller(job.source)
        with write_atomically(job.target, durable=False) as temporary:
            temporary.write_bytes(content)
            os.utime(temporary, ns=(time, time))


def kind_of(path: Path) -> str:
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        return "other"
    modes = ("1", "L", "P", "I", "I;16")  # of labels
    with contextlib.suppress(Exception), open_header(path) as image:
        return "label" if image.format == "PNG" and image.mode in modes else "image"
    return "image"  # damaged, as decoding it will say


def plan(args: Namespace) -> Iterator[Job]:
    """The files to pack.

    Raises:
        UserError: a folder does not exist, or two files would get the same name.
    """
    golden = [("golden", args.golden)] if args.golden else []
    sources: dict[Path, Path] = {}
    for name, folder in [*(text.rpartition("=")[::2] for text in args.datadir), *golden]:
        root = Path(folder).resolve()
        if not folder or not root.is_dir() or args.out.resolve().is_relative_to(root):
            raise UserError(f"{folder} is no folder, or --out is inside: choose another one")
        for path in sorted(path for path in root.rglob("*") if path.is_file()):
            inner = path.relative_to(root)
            if any(fnmatchcase(f"/{inner}", f"*/{p}") for p in (".*", *args.exclude)):
                continue
            kind = "other" if folder == args.golden else kind_of(path)
            target = args.out / (name or root.name) / inner
            target = target.with_suffix(".webp") if kind == "image" else target
            if sources.setdefault(target, path) != path:
                raise UserError(f"{path} and {sources[target]} would be one file: keep one of them")
            yield Job(path, target, kind, args.quality)


def mib(paths: Iterable[Path]) -> float:
    return sum(path.stat().st_size for path in paths) / 2**20


def psnr(job: Job) -> float:
    original, packed = (read_image(path).astype(float) for path in (job.source, job.target))
    return 10 * np.log10(255**2 / max(np.mean((original - packed) ** 2), 1e-5))


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    # fmt: off
    parser.add_argument("--datadir", nargs="+", default=[], metavar="NAME=DIR")
    parser.add_argument("--golden", metavar="DIR", help="reference outputs, packed without loss")
    parser.add_argument("--exclude", nargs="+", default=[], metavar="PATTERN", help='"*.zip"')
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--quality", type=int, default=80, help="of WebP, 1 to 100 (default: 80)")
    parser.add_argument("--limit-mib", type=float, default=float("inf"), help="limit of --out")
    # fmt: on
    args = parser.parse_args()
    jobs, record = list(plan(args)), args.out / ".packed.json"
    options = [args.datadir, args.golden, args.exclude, args.quality]
    if not jobs or not 1 <= args.quality <= 100:
        raise UserError("nothing to do: name files to pack, and a --quality of 1 to 100")
    if any(args.out.glob("*")) and not (record.is_file() and read_json(record) == options):
        raise UserError(f"{args.out} holds other files, or of other options: name another --out")
    write_json(record, options)
    with ProcessPoolExecutor() as pool:
        work = pool.map(pack, jobs, chunksize=4)
        list(tqdm(work, "packing", len(jobs), unit="file", dynamic_ncols=True))
        for kind in ("other", "label", "image"):
            files = [job for job in jobs if job.kind == kind]
            before, after = mib(job.source for job in files), mib(job.target for job in files)
            print(f"{len(files):,} {kind} files: {before:.2f} MiB, now {after:.2f}")
        total, sample = mib(job.target for job in jobs), files[:: len(files) // 100 + 1]  # images
        print(f"{total:.2f} MiB in {args.out}")
        if sample:
            print(f"mean PSNR {np.mean([*pool.map(psnr, sample)]):.2f} dB in {len(sample)} images")
        if total > args.limit_mib:

            def size(quality: int) -> float:
                tried = pool.map(to_webp, [job._replace(quality=quality) for job in sample])
                return sum(map(len, tried)) / 2**20

            kept = max(0, args.limit_mib - total + after) * mib(job.target for job in sample)
            best = bisect_left(range(1, args.quality), kept / max(after, 1e-9), key=size)
            advice = f"--quality {best}" if best else "--exclude"
            raise UserError(f"{args.out} has {total:.2f} MiB: try {advice} and another --out")


if __name__ == "__main__":
    with exit_on_user_error():
        main()

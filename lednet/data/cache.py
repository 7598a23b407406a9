"""Pairs at working size, decoded once: memory-mapped shards on disk.

A cache is a folder with one folder for each split:

    train/manifest.json    what the shards hold, of which files, with checksums
    train/000000.npy       (n, 4, H, W) uint8: red, green, blue and the class index

What is read from it is what `SegmentationDataset` gives with `resize_transform`, bit for
bit. A shard is written beside its name and moved into place, then the manifest with it:
a build that was stopped, at any moment and in any way, goes on where it was.
"""

import hashlib
import json
import os
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from lednet.data.datasets import SegmentationDataset, count_classes
from lednet.data.labels import LabelScheme
from lednet.data.pairs import Pair
from lednet.data.transforms import resize_transform
from lednet.errors import UserError
from lednet.files import read_json, write_atomically, write_text

VERSION = 1
MANIFEST = "manifest.json"
SHARD_PAIRS, MOST_SHARDS = 64, 256
"""Pairs in a shard, or more where that would make too many: each is an open file."""

DATA_FLAGS = (
    "dataset", "datadir", "annotations", "labels", "classes", "val_every", "height", "width",
    "cache",
)  # fmt: skip
"""Flags, as `argparse` names their values, that training and building have in common."""

Stamp = list[str | int]
"""Of a pair: image, its bytes and time of change in ns, label, its bytes and time."""


class CachedDataset(SegmentationDataset):
    """A split read from its cache, in place of the `SegmentationDataset` it was built of.

    Opening compares the manifest with the data set (names, sizes and times of its files,
    its classes), the shards' lengths with the manifest, and the first pair with its files
    read anew: other versions of the libraries may decode or resize otherwise.

    Args:
        folder: of the split, inside the cache.
        source: the split as it lies on disk.
        size: (height, width) in pixels.
        command: builds the cache; for messages.

    Raises:
        UserError: there is no such cache, or it is not (any more) what `source` gives.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        source: SegmentationDataset,
        size: tuple[int, int],
        command: str,
    ):
        super().__init__(source.pairs, source.scheme, resize_transform(size))
        self.folder, self.command = Path(folder), command
        self._maps: dict[int, np.ndarray] = {}
        if not (self.folder / MANIFEST).is_file():
            raise UserError(f"no cache in {folder}: build it with `{command}`")
        self.manifest = read_json(self.folder / MANIFEST)
        if other := _other_option(self.manifest, source.scheme, size):
            self._refuse(f"the cache in {folder} differs in its {other}", " --rebuild")
        shards = self.manifest["shards"]
        if len(shards) < self.manifest["total"]:
            self._refuse(f"the cache in {folder} is unfinished")
        built = [stamp for shard in shards.values() for stamp in shard["stamps"]]
        if change := _change(built, _stamps(self.pairs)):
            self._refuse(f"{change} since the cache in {folder} was built")
        for name, shard in shards.items():
            path = self.folder / name
            found = path.stat().st_size if path.is_file() else 0
            if found != shard["bytes"]:
                self._refuse(f"{path} has {found} of its {shard['bytes']} bytes")
        if not all(map(torch.equal, self[0], self.prepare(*self.read(0)))):
            image = self.pairs[0].image
            self._refuse(f"{image} is now read otherwise than into {folder}", " --rebuild")

    def _refuse(self, reason: str, flag: str = "") -> NoReturn:
        raise UserError(f"{reason}: bring the cache up to date with `{self.command}{flag}`")

    def verify(self) -> None:
        """Read all shards and compare their checksums.

        Raises:
            UserError: a shard is damaged.
        """
        for name, shard in tqdm(self.manifest["shards"].items(), "verifying", unit="shard"):
            if _checksum(self.folder / name) != shard["checksum"]:
                self._refuse(f"{self.folder / name} is damaged")

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        number, row = divmod(range(len(self))[index], self.manifest["shard_pairs"])
        if number not in self._maps:  # each process maps for itself
            self._maps[number] = np.load(self.folder / _shard_name(number), mmap_mode="r")
        planes = torch.from_numpy(np.array(self._maps[number][row]))
        return planes[:3], planes[3]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}  # pickled, a map would be its whole file

    def count_pixels(self, workers: int = 4) -> np.ndarray:
        """As counted in the label files, at their size, when the cache was built."""
        return np.sum([shard["counts"] for shard in self.manifest["shards"].values()], axis=0)


def build_cache(
    folder: str | os.PathLike,
    splits: Mapping[str, SegmentationDataset],
    size: tuple[int, int],
    workers: int = 0,
    rebuild: bool = False,
    shard_pairs: int = SHARD_PAIRS,
) -> None:
    """Write the shards that are missing, damaged or out of date; shows a progress bar.

    Args:
        folder: of the cache, made if need be.
        splits: the data of each split, by the name of its folder.
        size: (height, width) in pixels.
        workers: decoding processes; 0 decodes in this one.
        rebuild: keep nothing of a cache that is there.

    Raises:
        UserError: a file of the data set is damaged, `folder` holds something else, or the
            disk is too small for what is to come. Finished shards stay.
    """
    folder = Path(folder)
    builds = [
        _Build(folder / name, source, size, rebuild, shard_pairs) for name, source in splits.items()
    ]
    needed = sum(len(build.missing) for build in builds) * 4 * size[0] * size[1]
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"the cache needs {needed / 1e9:.1f} GB, and the disk of {folder} has "
            f"{free / 1e9:.1f} GB left: free some, or choose another --cache"
        )
    for build in builds:
        build.run(workers)


def command_line(script: Path, options: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """The command that gives `script` those of `DATA_FLAGS` that are not at their defaults."""
    words = ["python", str(script)]
    for name in DATA_FLAGS:
        if options[name] != defaults[name]:
            words += [f"--{name.replace('_', '-')}", str(options[name])]
    return shlex.join(words)


class _Build:
    """One split's way to its shards.

    Attributes:
        stamps: what belongs into each shard.
        manifest: names the shards that are there.
        missing: indices of the pairs whose shards are not.
    """

    def __init__(
        self,
        folder: Path,
        source: SegmentationDataset,
        size: tuple[int, int],
        rebuild: bool,
        shard_pairs: int,
    ):
        self.folder, self.source, self.size = folder, source, size
        step = max(shard_pairs, -(-len(source) // MOST_SHARDS))
        stamps = _stamps(source.pairs)
        starts = range(0, len(stamps), step)
        self.stamps = {_shard_name(i // step): stamps[i : i + step] for i in starts}
        there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        if MANIFEST not in there and not all(name.startswith(".") for name in there):
            raise UserError(f"{folder} holds something else: choose another --cache")
        kept = {} if rebuild else self._sound_shards()
        self.manifest = {
            **_options(source.scheme, size),
            "shard_pairs": step,
            "total": len(self.stamps),
            "shards": kept,
        }
        self.missing = [i for i in range(len(stamps)) if _shard_name(i // step) not in kept]
        self._write_manifest()
        for name in there - {MANIFEST, *kept}:  # also what a killed build left half-written
            if name.endswith((".npy", ".json")):
                (folder / name).unlink()

    def _sound_shards(self) -> dict[str, dict[str, Any]]:
        """Entries of the manifest whose shards are up to date and undamaged."""
        if not (self.folder / MANIFEST).is_file():
            return {}
        manifest = read_json(self.folder / MANIFEST)
        if other := _other_option(manifest, self.source.scheme, self.size):
            raise UserError(
                f"the cache in {self.folder} differs in its {other}: choose another --cache, "
                "or add --rebuild to replace it"
            )
        sound = {}
        for name, shard in tqdm(manifest["shards"].items(), "checking", unit="shard", leave=False):
            path, stamps = self.folder / name, self.stamps.get(name)
            up_to_date = shard["stamps"] == stamps and path.is_file()
            if up_to_date and _checksum(path) == shard["checksum"]:
                sound[name] = shard
        return sound

    def run(self, workers: int) -> None:
        """Decode what is missing, in order and in parallel, and write it."""
        total, kept = len(self.source), len(self.source) - len(self.missing)
        loader = DataLoader(
            _Decoded(self.source, self.size),
            batch_size=None,
            sampler=self.missing,
            num_workers=workers,
        )
        with tqdm(total=total, initial=kept, desc=self.folder.name, unit="pair") as bar:
            pairs = iter(loader) if self.missing else iter(())
            for name in sorted(self.stamps.keys() - self.manifest["shards"].keys()):
                self._write_shard(name, pairs, bar)
                self._write_manifest()

    def _write_shard(self, name: str, pairs: Iterator[tuple[Tensor, Tensor]], bar: tqdm) -> None:
        """Write the next pairs one by one, as numpy.save would all at once."""
        path, stamps = self.folder / name, self.stamps[name]
        counts = torch.zeros(self.source.scheme.num_classes + 1, dtype=torch.int64)
        shape = (len(stamps), 4, *self.size)
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        with write_atomically(path) as temporary, open(temporary, "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for planes, counted in islice(pairs, len(stamps)):
                file.write(planes.numpy())
                counts += counted
                bar.update()
        self.manifest["shards"][name] = {
            "bytes": path.stat().st_size,
            "checksum": _checksum(path),
            "counts": counts.tolist(),
            "stamps": stamps,
        }

    def _write_manifest(self) -> None:
        self.manifest["shards"] = dict(sorted(self.manifest["shards"].items()))
        write_text(self.folder / MANIFEST, json.dumps(self.manifest) + "\n")


class _Decoded(Dataset):
    """Each pair as its shard holds it, and its pixels of each class at full size."""

    def __init__(self, source: SegmentationDataset, size: tuple[int, int]):
        self.source = SegmentationDataset(source.pairs, source.scheme, resize_transform(size))

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = self.source.read(index)
        counts = torch.from_numpy(count_classes(label, self.source.scheme))
        small, small_label = self.source.prepare(image, label)
        return torch.cat((small, small_label[None])), counts


def _shard_name(number: int) -> str:
    return f"{number:06d}.npy"


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]


def _options(scheme: LabelScheme, size: tuple[int, int]) -> dict[str, Any]:
    """What decides on the content of the shards besides the files, as JSON gives it back."""
    return {
        "version": VERSION,
        "size": list(size),
        "classes": list(scheme.classes),
        "label values": sorted(map(list, scheme.file_ids.items())),
    }


def _other_option(
    manifest: Mapping[str, Any], scheme: LabelScheme, size: tuple[int, int]
) -> str | None:
    """The first option in which a manifest differs from what is wanted."""
    for name, wanted in _options(scheme, size).items():
        found = manifest.get(name)
        if found != wanted:
            return name + (f" ({found}, not {wanted})" if name in ("version", "size") else "")
    return None


def _stamps(pairs: Sequence[Pair]) -> list[Stamp]:
    """Tell each pair's files from changed ones; names are relative, so the data may move."""
    files = [[path for path in pair if path] for pair in pairs]
    root = os.path.commonpath([path.parent for both in files for path in both])
    stamps = []
    for both in files:
        stamp: Stamp = []
        for path in both:
            try:
                status = path.stat()
            except OSError as error:
                raise UserError(f"cannot read {path}: {error.strerror}; restore it") from error
            stamp += [path.relative_to(root).as_posix(), status.st_size, status.st_mtime_ns]
        stamps.append(stamp)
    return stamps


def _change(old: Sequence[Stamp], new: Sequence[Stamp]) -> str | None:
    """What happened to the first file that is not in the same state in both lists."""
    before, after = ({stamp[0]: stamp for stamp in stamps} for stamps in (old, new))
    for name in sorted(before.keys() | after.keys()):
        if name not in after:
            return f"{name} is gone"
        if name not in before:
            return f"{name} is new"
        for i in (0, 3):
            if before[name][i : i + 3] != after[name][i : i + 3]:
                return f"{after[name][i]} has changed"
    return None if list(old) == list(new) else "the order of the files has changed"

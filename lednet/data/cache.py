"""Samples at working size, decoded once: memory-mapped shards on disk.

A cache is a folder with one folder for each split:

    train/manifest.json    what decides on the content, and the number of shards
    train/000000.npy       (n, C, H, W) uint8, what the `CacheableDataset` encodes n samples to
    train/000000.json      the files they are of, their facts, and a checksum

What is read from it is what the source gives, bit for bit. A shard is written beside its name
and moved into place, then its JSON file with it: a build that was stopped, at any moment and
in any way, goes on where it was. Opening and building hold one shard's entries at a time:
ImageNet has 1.3 million.
"""

import contextlib
import hashlib
import json
import math
import os
import reprlib
import shlex
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from lednet.data.dataset import PairDataset
from lednet.data.pairs import Sample
from lednet.errors import UserError
from lednet.io import read_json, require_space, write_atomically, write_text

VERSION = 2
MANIFEST = "manifest.json"
SHARD_PAIRS, MOST_SHARDS = 64, 256
"""Pairs in a shard, or more where that would make too many: each is an open file."""

SEGMENTATION_FLAGS = (
    "dataset", "datadir", "annotations", "labels", "classes", "val_every", "val_names",
    "with_val", "height", "width", "cache",
)  # fmt: skip
CLASSIFICATION_FLAGS = ("datadir", "cache", "stored_size")
"""Flags, as `argparse` names their values, that training and building have in common."""

Fingerprint = list[str | int]
"""Of a pair: image, its bytes and time of change in ns, then label, its bytes and time."""


class CacheableDataset(Protocol):
    """A `PairDataset` that can be cached: its samples are each time the same.

    Attributes:
        encoded_shape: (C, H, W) of what `encode` gives.
    """

    @property
    def pairs(self) -> Sequence[Sample]: ...

    @property
    def encoded_shape(self) -> tuple[int, int, int]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]: ...

    def cache_options(self) -> dict[str, Any]:
        """What decides on the encoded samples besides the files, as JSON gives it back."""
        ...

    def encode(self, index: int) -> tuple[Tensor, list[int]]:
        """A sample as uint8 planes, contiguous, and some integers: its facts."""
        ...

    def decode(self, planes: Tensor, facts: list[int]) -> tuple[Tensor, Tensor]:
        """From what `encode` gave of it, the very sample."""
        ...


class CachedDataset(PairDataset):
    """A split read from its cache, in place of the source it was built of.

    Opening compares the cache with the source (names, sizes and times of its files, its
    options) and the shards' lengths, and reads the first sample's files anew: other versions
    of the libraries may decode or resize otherwise.

    Args:
        folder: of the split, inside the cache.
        source: the split as it lies on disk.
        command: builds the cache; for messages.

    Attributes:
        facts: (len, k) int64, those of each sample; of label maps, the pixels of each class.
        classes: of a source of images in folders of classes.

    Raises:
        UserError: there is no such cache, or it is not (any more) what `source` gives.
    """

    def __init__(self, folder: str | os.PathLike, source: CacheableDataset, command: str):
        self.folder, self.source, self.command = Path(folder), source, command
        self.pairs = source.pairs
        if hasattr(source, "scheme"):
            self.scheme = source.scheme
        if hasattr(source, "classes"):
            self.classes: Sequence[str] = source.classes
        self._maps: dict[int, np.ndarray] = {}
        if not (self.folder / MANIFEST).is_file():
            raise UserError(f"no cache in {folder}: build it with `{command}`")
        self._manifest = _read_manifest(self.folder)
        if other := _other_option(self._manifest, source):
            self._refuse(f"the cache in {folder} differs in its {other}", " --rebuild")
        for key in ("shards", "shard_pairs"):
            count = self._manifest.get(key)
            if not isinstance(count, int) or count < 1:
                self._refuse(f"{self.folder / MANIFEST} is damaged", " --rebuild")
        files, facts = _FileFingerprints(source.pairs), []
        for number, entry in enumerate(self._entries()):
            start = number * self._manifest["shard_pairs"]
            if entry["stamps"] != files.stamps(start, start + self._manifest["shard_pairs"]):
                self._refuse_files(files)
            path = self.folder / _shard_name(number)
            found = path.stat().st_size if path.is_file() else 0
            if found != entry["bytes"]:
                self._refuse(f"{path} has {found} of its {entry['bytes']} bytes")
            facts.append(np.array(entry["facts"], dtype=np.int64))
        planes, first_facts = source.encode(0)
        for number, rows in enumerate(facts):
            if rows.shape[1] != len(first_facts):
                self._refuse(f"{self.folder / _entry_name(number)} is damaged")
        self.facts = np.concatenate(facts)
        if len(self.facts) < len(source):
            self._refuse_files(files)
        if self.facts[0].tolist() != first_facts or not torch.equal(self._planes(0), planes):
            image = self.pairs[0].image
            self._refuse(f"{image} is now read otherwise than into {folder}", " --rebuild")

    def _refuse(self, reason: str, flag: str = "") -> NoReturn:
        raise UserError(f"{reason}: bring the cache up to date with `{self.command}{flag}`")

    def _refuse_files(self, files: "_FileFingerprints") -> NoReturn:
        built = [stamp for entry in self._entries() for stamp in entry["stamps"]]
        change = _change(built, files.stamps(0, len(self)))
        self._refuse(f"{change} since the cache in {self.folder} was built")

    def _entries(self) -> Iterator[dict[str, Any]]:
        """What the JSON file of each shard holds."""
        for number in range(self._manifest["shards"]):
            path = self.folder / _entry_name(number)
            if not path.is_file():
                self._refuse(f"the cache in {self.folder} is unfinished")
            entry = _read_entry(path)
            if entry is None:
                self._refuse(f"{path} is damaged")
            yield entry

    def verify(self) -> None:
        """Read all shards and compare their checksums.

        Raises:
            UserError: a shard is damaged.
        """
        shards = tqdm(self._entries(), "verifying", self._manifest["shards"], unit="shard")
        for number, entry in enumerate(shards):
            path = self.folder / _shard_name(number)
            if _checksum(path, entry["facts"]) != entry["checksum"]:
                self._refuse(f"{path} is damaged")

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        index = range(len(self))[index]
        return self.source.decode(self._planes(index), self.facts[index].tolist())

    def _planes(self, index: int) -> Tensor:
        number, row = divmod(index, self._manifest["shard_pairs"])
        if number not in self._maps:  # each process maps for itself
            self._maps[number] = self._map(number)
        return torch.from_numpy(np.array(self._maps[number][row]))

    def _map(self, number: int) -> np.ndarray:
        path, step = self.folder / _shard_name(number), self._manifest["shard_pairs"]
        shape = (len(range(len(self))[number * step :][:step]), *self.source.encoded_shape)
        with contextlib.suppress(Exception):  # a parser, on bytes of any kind
            planes = np.lib.format.open_memmap(path, mode="r")
            if planes.dtype == np.uint8 and planes.shape == shape:
                return planes
        self._refuse(f"{path} is damaged")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}  # pickled, a map would be its whole file

    def count_label(self, index: int) -> np.ndarray:
        return self.facts[index]

    def class_counts(self, workers: int = 4) -> np.ndarray:
        """As counted in the label files, at their size, when the cache was built."""
        return self.facts


def build_cache(
    folder: str | os.PathLike,
    splits: Mapping[str, CacheableDataset],
    workers: int = 0,
    rebuild: bool = False,
    shard_pairs: int = SHARD_PAIRS,
) -> None:
    """Write the shards that are missing, damaged or out of date; shows a progress bar.

    Args:
        folder: of the cache, made if need be.
        splits: the data of each split, by the name of its folder.
        workers: decoding processes; 0 decodes in this one.
        rebuild: keep nothing of a cache that is there.

    Raises:
        UserError: a file of the data set is damaged, `folder` holds something else, or the
            disk is too small for what is to come. Finished shards stay.
    """
    folder = Path(folder)
    builds = [
        _Build(folder / name, source, rebuild, shard_pairs) for name, source in splits.items()
    ]
    needed = sum(build.bytes_to_come for build in builds)
    require_space(folder, needed, "the cache", "--cache")
    for build in builds:
        build.run(workers)


def command_line(
    script: Path,
    options: Mapping[str, Any],
    defaults: Mapping[str, Any],
    flags: Sequence[str] = SEGMENTATION_FLAGS,
) -> str:
    """The command that gives `script` those of `flags` that are not at their defaults."""
    words = ["python", str(script)]
    for name in flags:
        if options[name] != defaults[name]:
            words.append(f"--{name.replace('_', '-')}")
            if options[name] is not True:  # not a switch
                words.append(str(options[name]))
    return shlex.join(words)


class _Build:
    """One split's way to its shards."""

    def __init__(self, folder: Path, source: CacheableDataset, rebuild: bool, shard_pairs: int):
        self.folder, self.source, self.files = folder, source, _FileFingerprints(source.pairs)
        self.step = max(shard_pairs, math.ceil(len(source) / MOST_SHARDS))
        count = math.ceil(len(source) / self.step)
        there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        if MANIFEST not in there and not all(name.startswith(".") for name in there):
            raise UserError(f"{folder} holds something else: choose another --cache")
        sound = [] if rebuild or MANIFEST not in there else self._sound_shards(count)
        self.missing = sorted(set(range(count)) - set(sound))
        # Before the manifest tells otherwise of them. Also what a killed build left half-written.
        kept = {MANIFEST, *map(_shard_name, sound), *map(_entry_name, sound)}
        for name in there - kept:
            if name.endswith((".npy", ".json")):
                (folder / name).unlink()
        manifest = {**_options(source), "shard_pairs": self.step, "shards": count}
        write_text(folder / MANIFEST, json.dumps(manifest) + "\n")

    def _sound_shards(self, count: int) -> list[int]:
        """Those of the first `count` shards that are there, up to date and undamaged."""
        if other := _other_option(_read_manifest(self.folder), self.source):
            raise UserError(
                f"the cache in {self.folder} differs in its {other}: choose another --cache, "
                "or add --rebuild to replace it"
            )
        numbers = tqdm(range(count), "checking", unit="shard", leave=False)
        return list(filter(self._is_sound, numbers))

    def _is_sound(self, number: int) -> bool:
        path, entry_path = self.folder / _shard_name(number), self.folder / _entry_name(number)
        if not path.is_file() or not entry_path.is_file():
            return False
        entry, indices = _read_entry(entry_path), self._indices(number)
        if entry is None or entry["bytes"] != path.stat().st_size:
            return False
        up_to_date = entry["stamps"] == self.files.stamps(indices.start, indices.stop)
        return up_to_date and entry["checksum"] == _checksum(path, entry["facts"])

    def _indices(self, number: int) -> range:
        """Of the samples that belong into a shard."""
        return range(len(self.source))[number * self.step : (number + 1) * self.step]

    @property
    def bytes_to_come(self) -> int:
        samples = sum(len(self._indices(number)) for number in self.missing)
        return samples * math.prod(self.source.encoded_shape)

    def run(self, workers: int) -> None:
        """Decode what is missing, in order and in parallel, and write it."""
        indices = [index for number in self.missing for index in self._indices(number)]
        loader = DataLoader(
            _Encoded(self.source, self.files),
            batch_size=None,
            sampler=indices,
            num_workers=workers,
        )
        total = len(self.source)
        with tqdm(
            total=total, initial=total - len(indices), desc=self.folder.name, unit="image"
        ) as bar:
            samples = iter(loader) if indices else iter(())
            for number in self.missing:
                self._write_shard(number, samples, bar)

    def _write_shard(
        self, number: int, samples: Iterator[tuple[Fingerprint, Tensor, list[int]]], bar: tqdm
    ) -> None:
        """Write the next samples one by one, as numpy.save would all at once."""
        path, length = self.folder / _shard_name(number), len(self._indices(number))
        stamps, facts = [], []
        shape = (length, *self.source.encoded_shape)
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        with write_atomically(path) as temporary, open(temporary, "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for stamp, planes, its_facts in islice(samples, length):
                file.write(planes.numpy().data)
                stamps.append(stamp)
                facts.append(its_facts)
                bar.update()
        entry = {
            "bytes": path.stat().st_size,
            "checksum": _checksum(path, facts),
            "facts": facts,
            "stamps": stamps,
        }
        write_text(self.folder / _entry_name(number), json.dumps(entry) + "\n")


class _Encoded(Dataset):
    """Each sample as its shard holds it, with its facts and the stamp of its files."""

    def __init__(self, source: CacheableDataset, files: "_FileFingerprints"):
        self.source, self.files = source, files

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Fingerprint, Tensor, list[int]]:
        stamp = self.files.stamps(index, index + 1)[0]  # a later change shall be noticed
        return stamp, *self.source.encode(index)


def _shard_name(number: int) -> str:
    return f"{number:06d}.npy"


def _entry_name(number: int) -> str:
    return f"{number:06d}.json"


def _read_manifest(folder: Path) -> dict[str, Any]:
    """What the manifest in `folder` holds; nothing where it is damaged."""
    try:
        manifest = read_json(folder / MANIFEST)
    except UserError:
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _read_entry(path: Path) -> dict[str, Any] | None:
    """What the JSON file of a shard holds; None where it is damaged."""
    try:
        entry = read_json(path)
        stamps, facts = entry["stamps"], np.array(entry["facts"], dtype=np.int64)
        named = all(isinstance(stamp[0], str) for stamp in stamps)
        sized = isinstance(entry["bytes"], int) and isinstance(entry["checksum"], str)
        whole = named and sized and facts.ndim == 2 and len(facts) == len(stamps)
        return entry if whole else None
    except (UserError, KeyError, TypeError, IndexError, ValueError, OverflowError):
        return None


def _checksum(path: Path, facts: list[list[int]]) -> str:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "blake2b")
    digest.update(json.dumps(facts).encode())
    return digest.hexdigest()[:32]


def _options(source: CacheableDataset) -> dict[str, Any]:
    return {"version": VERSION, **source.cache_options()}


def _other_option(manifest: Mapping[str, Any], source: CacheableDataset) -> str | None:
    """The first option in which a manifest differs from what is wanted."""
    for name, wanted in _options(source).items():
        found = manifest.get(name)
        if found != wanted:
            return name + (
                f" ({reprlib.repr(found)}, not {wanted})" if name in ("version", "size") else ""
            )
    return None


class _FileFingerprints:
    """Tells the files of pairs from changed ones; names are relative, so the data may move."""

    def __init__(self, pairs: Sequence[Sample]):
        self.pairs = pairs
        folders = {os.path.dirname(path) for pair in pairs for path in pair if path}
        self.root = Path(os.path.commonpath(folders), "_").as_posix()[:-1]  # ends with a slash

    def stamps(self, start: int, stop: int) -> list[Fingerprint]:
        return [self._stamp(pair) for pair in self.pairs[start:stop]]

    def _stamp(self, pair: Sample) -> Fingerprint:
        stamp: Fingerprint = []
        for path in filter(None, pair):
            try:
                status = os.stat(path)
            except OSError as error:
                raise UserError(f"cannot read {path}: {error.strerror}; restore it") from error
            name = path.as_posix().removeprefix(self.root)  # quick, where there are millions
            stamp += [name, status.st_size, status.st_mtime_ns]
        return stamp


def _change(old: Sequence[Fingerprint], new: Sequence[Fingerprint]) -> str:
    """What happened to the first file that is not in the same state in both lists."""
    before, after = ({stamp[0]: stamp for stamp in stamps} for stamps in (old, new))
    for name in sorted(before.keys() | after.keys()):
        if name not in after:
            return f"{name} is gone"
        if name not in before:
            return f"{name} is new"
        for i in (0, 3):
            part = after[name][i : i + 3]
            if before[name][i : i + 3] != part:
                return f"{part[0] if part else name} has changed"
    return "the order of the files has changed"

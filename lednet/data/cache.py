"""Data sets decoded once: samples at working size in memory-mapped shards on disk.

A cache is a folder with a subfolder for each split:

    train/manifest.json    options that determine the content, size and number of the shards
    train/000000.npy       (n, C, H, W) uint8, n samples as `CacheableDataset.encode` returns them
    train/000000.json      fingerprints of their files ("stamps"), metadata ("facts"), checksum

Samples read from a cache equal those of its source bit for bit. Builds are crash-safe and
resumable: a shard is written to a temporary file and renamed, then its JSON file.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import reprlib
import shlex
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from lednet.data.dataset import PairDataset
from lednet.data.pairs import Sample
from lednet.errors import UserError
from lednet.io import read_json, require_space, write_atomically, write_text
from lednet.progress import progress_bar

VERSION = 2
MANIFEST = "manifest.json"
SHARD_PAIRS, MAX_SHARDS = 64, 256
"""Samples in a shard, more if there would be too many shards: each one is an open file."""

SEGMENTATION_FLAGS = (
    "dataset", "datadir", "annotations", "labels", "classes", "val_stride", "val_prefix",
    "with_val", "height", "width", "cache",
)  # fmt: skip
CLASSIFICATION_FLAGS = ("datadir", "cache", "stored_size")
"""Flags that training and building have in common, as `argparse` names their values."""

Fingerprint = list[str | int]
"""Of a sample: name, size in bytes and modification time in ns of the image, then of the label."""


class CacheableDataset(Protocol):
    """A data set that can be cached: reading a sample twice gives equal values.

    `encode` returns a sample as contiguous uint8 planes of `encoded_shape` (C, H, W) and integer
    metadata for `decode`. `cache_options` determine the encoded samples, and are saved as JSON.
    """

    @property
    def pairs(self) -> Sequence[Sample]: ...
    @property
    def encoded_shape(self) -> tuple[int, int, int]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]: ...
    def cache_options(self) -> dict[str, Any]: ...
    def encode(self, index: int) -> tuple[Tensor, list[int]]: ...
    def decode(self, planes: Tensor, metadata: list[int], /) -> tuple[Tensor, Tensor]: ...


class CachedDataset(PairDataset):
    """A split read from its cache instead of from the files of `source`.

    Opening compares the options and the fingerprints of all files with those of `source`, and
    decodes the first sample again, since other library versions may decode or resize differently.

    Args:
        folder: folder of the split inside the cache.
        source: the split on disk.
        command: command that builds the cache, for error messages.

    Attributes:
        metadata: (len, k) int64, one row for each sample; for label maps the pixels of each class.

    Raises:
        UserError: there is no such cache, or it does not hold what `source` returns now.
    """

    classes: Sequence[str]

    def __init__(self, folder: str | os.PathLike, source: CacheableDataset, command: str):
        self.folder, self.source, self.command = Path(folder), source, command
        self.pairs = source.pairs
        for name in ("scheme", "classes"):
            if hasattr(source, name):
                setattr(self, name, getattr(source, name))
        self._maps: dict[int, np.ndarray] = {}
        if not (self.folder / MANIFEST).is_file():
            raise UserError(f"no cache in {folder}: build it with `{command}`")
        replace = f"replace it with `{command} --rebuild`"
        step = _read_manifest(self.folder, source, replace).get("shard_pairs")
        if type(step) is not int or step < 1:
            raise _stale(self.folder / MANIFEST, self.folder, command)
        self._shard_pairs: int = step
        self._shards = _list_shards(self.folder, source, step)
        rows = [shard.load(command) for shard in self._shards]
        planes, metadata = source.encode(0)
        for shard, of_shard in zip(self._shards, rows, strict=True):
            if of_shard.shape[1] != len(metadata):
                raise _stale(shard.entry_path, self.folder, command)
        self.metadata = np.concatenate(rows)
        if self.metadata[0].tolist() != metadata or not torch.equal(self._planes(0), planes):
            raise UserError(
                f"{self.pairs[0].image} is now decoded to other values than the cache in {folder} "
                f"holds: {replace}"
            )

    def verify(self) -> None:
        """Read all shards; raises a `UserError` if one differs from its checksum."""
        for shard in progress_bar(self._shards, desc="verifying", unit="shard"):
            shard.load(self.command, checksum=True)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        index = range(len(self))[index]
        return self.source.decode(self._planes(index), self.metadata[index].tolist())

    def _planes(self, index: int) -> Tensor:
        number, row = divmod(index, self._shard_pairs)
        if number not in self._maps:  # each process maps the file itself
            shard = self._shards[number]
            offset = len(shard.header)
            try:
                self._maps[number] = np.memmap(shard.path, np.uint8, "r", offset, shard.shape)
            except (OSError, ValueError):
                raise _stale(shard.path, self.folder, self.command) from None
        return torch.from_numpy(np.array(self._maps[number][row]))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}  # a pickled map would hold its whole file

    def count_label(self, index: int) -> np.ndarray:
        return self.metadata[index]

    def class_counts(self, workers: int = 4) -> np.ndarray:
        """Those of the label files at their own size, counted when the cache was built."""
        return self.metadata


def build_cache(
    folder: str | os.PathLike,
    splits: Mapping[str, CacheableDataset],
    workers: int = 0,
    rebuild: bool = False,
    shard_pairs: int = SHARD_PAIRS,
) -> None:
    """Write the shards that are missing, damaged or out of date. Shows a progress bar.

    Args:
        splits: the data of each split, by the name of its subfolder of `folder`.
        workers: decoding processes; 0 decodes in this process.
        rebuild: write all shards again.
        shard_pairs: samples in a shard, at least.

    Raises:
        UserError: a file of the data set is damaged, `folder` holds other files or a cache with
            other options, or the disk is too small. Finished shards are kept.
    """
    folder = Path(folder)
    missing = {
        name: _prepare_split(folder / name, source, rebuild, shard_pairs)
        for name, source in splits.items()
    }
    needed = sum(shard.num_bytes for shards in missing.values() for shard in shards)
    require_space(folder, needed, "the cache", "--cache")
    for name, source in splits.items():
        shards = missing[name]
        indices = [index for shard in shards for index in shard.indices]
        if not indices:
            continue
        data = shards[0].data
        loader = DataLoader(data, batch_size=None, sampler=indices, num_workers=workers)
        samples, done = iter(loader), len(source) - len(indices)
        with progress_bar(total=len(source), initial=done, desc=name, unit="image") as bar:
            for shard in shards:
                shard.write(samples, bar)


def command_line(
    script: Path,
    options: Mapping[str, Any],
    defaults: Mapping[str, Any],
    flags: Sequence[str] = SEGMENTATION_FLAGS,
) -> str:
    """The command that runs `script` with those of `flags` that differ from their defaults."""
    words = ["python", str(script)]
    for name in flags:
        if options[name] != defaults[name]:
            words.append(f"--{name.replace('_', '-')}")
            if options[name] is not True:  # not a switch
                words.append(str(options[name]))
    return shlex.join(words)


def _stale(file: object, folder: Path, command: str) -> UserError:
    return UserError(
        f"the cache in {folder} is unfinished, stale or damaged (first file: "
        f"{str(file)!r:.1000}): bring it up to date with `{command}`"
    )


class _EncodedSamples(Dataset):
    """Samples as a shard holds them: fingerprint, planes and metadata.

    Fingerprints are created on access, since ImageNet has 1.3 million files. File names
    in them are relative, so that the data set may be moved.
    """

    def __init__(self, source: CacheableDataset):
        self.source = source
        folders = {os.path.dirname(path) for pair in source.pairs for path in pair if path}
        self.root = Path(os.path.commonpath(folders), "_").as_posix()[:-1]  # ends with a slash

    def fingerprint(self, index: int) -> Fingerprint:
        values: Fingerprint = []
        for path in filter(None, self.source.pairs[index]):
            try:
                status = os.stat(path)
            except OSError as error:
                raise UserError(f"cannot read {path}: {error.strerror}; restore it") from error
            name = path.as_posix().removeprefix(self.root)  # faster than relative_to
            values += [name, status.st_size, status.st_mtime_ns]
        return values

    def __getitem__(self, index: int) -> tuple[Fingerprint, Tensor, list[int]]:
        fingerprint = self.fingerprint(index)  # first: shows a file that changes while decoding
        return fingerprint, *self.source.encode(index)


class _Shard:
    """A .npy file (n, C, H, W) with its JSON file, and the indices of its samples."""

    def __init__(self, stem: Path, indices: range, data: _EncodedSamples):
        self.path, self.entry_path = stem.with_suffix(".npy"), stem.with_suffix(".json")
        self.indices, self.data = indices, data
        self.shape = (len(indices), *data.source.encoded_shape)
        buffer = io.BytesIO()
        header = {"descr": "|u1", "fortran_order": False, "shape": self.shape}
        np.lib.format.write_array_header_1_0(buffer, header)
        self.header = buffer.getvalue()
        self.num_bytes = len(self.header) + math.prod(self.shape)

    def load(self, command: str = "", checksum: bool = False) -> np.ndarray:
        """Read the metadata, (n, k) int64; `checksum` also reads and checks the whole shard.

        Raises a `UserError` with the first file that is missing, out of date or damaged.
        """
        current = [self.data.fingerprint(index) for index in self.indices]
        wrong: object = None
        try:
            entry = read_json(self.entry_path)
            metadata, recorded = np.array(entry["facts"], dtype=np.int64), entry["checksum"]
            if entry["stamps"] != current:
                wrong = str(min(_files(entry["stamps"]) ^ _files(current))[0])
            elif metadata.ndim != 2 or len(metadata) != len(current):
                wrong = self.entry_path
            elif (
                not self.path.is_file()
                or self.path.stat().st_size != self.num_bytes
                or (checksum and recorded != self._checksum(entry["facts"]))
            ):
                wrong = self.path
        except (UserError, ArithmeticError, LookupError, TypeError, ValueError):
            wrong = self.entry_path
        if wrong is not None:
            raise _stale(wrong, self.path.parent, command)
        return metadata

    def write(self, samples: Iterator[tuple[Fingerprint, Tensor, list[int]]], bar: tqdm) -> None:
        """Write the next samples one by one, in the format of numpy.save."""
        fingerprints, metadata = [], []
        with write_atomically(self.path) as temporary, open(temporary, "wb") as file:
            file.write(self.header)
            for fingerprint, planes, values in islice(samples, len(self.indices)):
                file.write(planes.numpy().data)
                fingerprints.append(fingerprint)
                metadata.append(values)
                bar.update()
        entry = {"bytes": self.num_bytes, "checksum": self._checksum(metadata)}
        entry |= {"facts": metadata, "stamps": fingerprints}
        write_text(self.entry_path, json.dumps(entry) + "\n")

    def _checksum(self, metadata: list[list[int]]) -> str:
        with open(self.path, "rb") as file:
            digest = hashlib.file_digest(file, "blake2b")
        digest.update(json.dumps(metadata).encode())
        return digest.hexdigest()[:32]


def _list_shards(folder: Path, source: CacheableDataset, step: int) -> list[_Shard]:
    data, indices = _EncodedSamples(source), range(len(source))
    return [
        _Shard(folder / f"{number:06d}", indices[start : start + step], data)
        for number, start in enumerate(range(0, len(source), step))
    ]


def _prepare_split(
    folder: Path, source: CacheableDataset, rebuild: bool, shard_pairs: int
) -> list[_Shard]:
    """Remove invalid shards and write the manifest. Returns the shards that must be written."""
    existing = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if MANIFEST not in existing and not all(name.startswith(".") for name in existing):
        raise UserError(f"{folder} holds other files than a cache: choose another --cache")
    if MANIFEST in existing and not rebuild:
        _read_manifest(folder, source, "choose another --cache, or add --rebuild to replace it")
    step = max(shard_pairs, math.ceil(len(source) / MAX_SHARDS))
    shards, missing, kept = _list_shards(folder, source, step), [], {MANIFEST}
    for shard in progress_bar(shards, desc="checking", unit="shard"):
        with contextlib.suppress(UserError):
            if not rebuild:
                shard.load(checksum=True)
                kept |= {shard.path.name, shard.entry_path.name}
        if shard.path.name not in kept:
            missing.append(shard)
    # Shards of other options must be gone before the manifest states the new ones. Temporary
    # files of a killed build are removed too.
    for name in existing - kept:
        if name.endswith((".npy", ".json")):
            (folder / name).unlink()
    manifest = {**_options(source), "shard_pairs": step, "shards": len(shards)}
    write_text(folder / MANIFEST, json.dumps(manifest) + "\n")
    return missing


def _options(source: CacheableDataset) -> dict[str, Any]:
    return {"version": VERSION, **source.cache_options()}


def _read_manifest(folder: Path, source: CacheableDataset, next_step: str) -> dict[str, Any]:
    """Read the manifest in `folder`; names the first option that differs from `source`."""
    content = None
    with contextlib.suppress(UserError):
        content = read_json(folder / MANIFEST)
    manifest = content if isinstance(content, dict) else {}
    for name, wanted in _options(source).items():
        found = manifest.get(name)
        if found != wanted:
            short = name in ("version", "size")
            values = f" ({reprlib.repr(found)}, not {wanted})" if short else ""
            raise UserError(f"the cache in {folder} differs in its {name}{values}: {next_step}")
    return manifest


def _files(fingerprints: Any) -> set[tuple]:
    """Name, size and modification time of each file."""
    return {tuple(f[i : i + 3]) for f in fingerprints for i in range(0, len(f), 3)}

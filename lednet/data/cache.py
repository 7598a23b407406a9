"""Data sets decoded once: samples at working size in memory-mapped shards on disk.

A cache is a folder with a subfolder for each split:

    train/manifest.json    options that determine the content, size and number of the shards
    train/000000.npy       (n, C, H, W) uint8, n samples as `CacheableDataset.encode` returns them
    train/000000.json      fingerprints of their files ("stamps"), metadata ("facts"), checksum

Samples read from a cache equal those of its source bit for bit. Builds are crash-safe and
resumable: a shard is written to a temporary file and renamed, then its JSON file. File names are
held in memory for one shard at a time, since ImageNet has 1.3 million.
"""

import hashlib
import io
import json
import math
import os
import reprlib
import shlex
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, zip_longest
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

    Attributes:
        encoded_shape: (C, H, W) of the planes that `encode` returns.
    """

    @property
    def pairs(self) -> Sequence[Sample]: ...

    @property
    def encoded_shape(self) -> tuple[int, int, int]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]: ...

    def cache_options(self) -> dict[str, Any]:
        """Options that determine the encoded samples, of types that JSON preserves."""
        ...

    def encode(self, index: int) -> tuple[Tensor, list[int]]:
        """A sample as contiguous uint8 planes (C, H, W) and integer metadata."""
        ...

    def decode(self, planes: Tensor, metadata: list[int], /) -> tuple[Tensor, Tensor]:
        """The sample that `encode` returned as `planes` and `metadata`."""
        ...


class CachedDataset(PairDataset):
    """A split read from its cache instead of from the files of `source`.

    Opening compares the options and the fingerprints of all files with those of `source`, and
    decodes the first sample anew, since other library versions may decode or resize differently.

    Args:
        folder: folder of the split inside the cache.
        source: the split on disk.
        command: command that builds the cache, for error messages.

    Attributes:
        metadata: (len, k) int64, one row for each sample; for label maps the pixels of each class.
        classes: class names, if `source` has them.

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
        shard_pairs = _read_manifest(self.folder, source, replace).get("shard_pairs")
        if type(shard_pairs) is not int or shard_pairs < 1:
            self._refuse(self.folder / MANIFEST)
        self._shard_pairs: int = shard_pairs
        self._shards = _list_shards(self.folder, source, self._shard_pairs)
        rows = [self._load(shard) for shard in self._shards]
        planes, metadata = source.encode(0)
        for shard, of_shard in zip(self._shards, rows, strict=True):
            if of_shard.shape[1] != len(metadata):
                self._refuse(shard.entry_path)
        self.metadata = np.concatenate(rows)
        if self.metadata[0].tolist() != metadata or not torch.equal(self._planes(0), planes):
            raise UserError(
                f"{self.pairs[0].image} is now decoded to other values than the cache in {folder} "
                f"holds: {replace}"
            )

    def _refuse(self, file: object) -> NoReturn:
        raise UserError(
            f"the cache in {self.folder} is unfinished, stale or damaged (first file: "
            f"{str(file)!r:.1000}): bring it up to date with `{self.command}`"
        )

    def _load(self, shard: "_Shard", checksum: bool = False) -> np.ndarray:
        try:
            return shard.load(checksum)
        except _StaleError as error:
            self._refuse(error)

    def verify(self) -> None:
        """Read all shards and compare their checksums.

        Raises:
            UserError: a shard is damaged.
        """
        for shard in tqdm(self._shards, "verifying", unit="shard"):
            self._load(shard, checksum=True)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        index = range(len(self))[index]
        return self.source.decode(self._planes(index), self.metadata[index].tolist())

    def _planes(self, index: int) -> Tensor:
        number, row = divmod(index, self._shard_pairs)
        if number not in self._maps:  # each process maps the file itself
            shard = self._shards[number]
            try:
                self._maps[number] = np.memmap(
                    shard.path, np.uint8, "r", len(shard.header), shard.shape
                )
            except (OSError, ValueError):
                self._refuse(shard.path)
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
        folder: folder of the cache, created if necessary.
        splits: the data of each split, by the name of its subfolder.
        workers: decoding processes; 0 decodes in this process.
        rebuild: write all shards anew.
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
        indices = [index for shard in missing[name] for index in shard.indices]
        data = _EncodedSamples(source)
        loader = DataLoader(data, batch_size=None, sampler=indices, num_workers=workers)
        samples = iter(loader) if indices else iter(())
        done = len(source) - len(indices)
        with tqdm(total=len(source), initial=done, desc=name, unit="image") as bar:
            for shard in missing[name]:
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


class _StaleError(Exception):
    """A shard is missing, out of date or damaged. Its argument is the first such file."""


class _Shard:
    """A shard, its JSON file, and the samples that belong in it.

    Attributes:
        indices: of its samples in the source.
        shape: (n, C, H, W) of the uint8 values in the .npy file.
        header: bytes of the .npy file before the values.
        num_bytes: size of the .npy file.
    """

    def __init__(
        self,
        folder: Path,
        number: int,
        indices: range,
        encoded_shape: tuple[int, int, int],
        files: "_Fingerprints",
    ):
        self.path, self.entry_path = (folder / f"{number:06d}{end}" for end in (".npy", ".json"))
        self.indices, self.files = indices, files
        self.shape = (len(indices), *encoded_shape)
        buffer = io.BytesIO()
        header = {"descr": "|u1", "fortran_order": False, "shape": self.shape}
        np.lib.format.write_array_header_1_0(buffer, header)
        self.header = buffer.getvalue()
        self.num_bytes = len(self.header) + math.prod(self.shape)

    def load(self, checksum: bool = False) -> np.ndarray:
        """Check the shard and read its metadata.

        Args:
            checksum: compare the checksum too, which reads the whole shard.

        Returns:
            (n, k) int64.

        Raises:
            _StaleError: naming the first file that is missing, out of date or damaged.
        """
        current = [self.files[index] for index in self.indices]
        try:
            entry = read_json(self.entry_path)
            changed = _first_change(entry["stamps"], current)
            metadata = np.array(entry["facts"], dtype=np.int64)
            recorded = entry["checksum"]
            if metadata.ndim != 2 or len(metadata) != len(entry["stamps"]):
                raise ValueError("there must be one row for each sample")
        except (UserError, ArithmeticError, LookupError, TypeError, ValueError):
            raise _StaleError(self.entry_path) from None
        if changed is not None:
            raise _StaleError(changed)
        if not self.path.is_file() or self.path.stat().st_size != self.num_bytes:
            raise _StaleError(self.path)
        if checksum and recorded != self._checksum(entry["facts"]):
            raise _StaleError(self.path)
        return metadata

    def write(self, samples: Iterator[tuple[Fingerprint, Tensor, list[int]]], bar: tqdm) -> None:
        """Write the next samples one by one, to the file that numpy.save would write."""
        fingerprints, metadata = [], []
        with write_atomically(self.path) as temporary, open(temporary, "wb") as file:
            file.write(self.header)
            for fingerprint, planes, values in islice(samples, len(self.indices)):
                file.write(planes.numpy().data)
                fingerprints.append(fingerprint)
                metadata.append(values)
                bar.update()
        entry = {
            "bytes": self.num_bytes,
            "checksum": self._checksum(metadata),
            "facts": metadata,
            "stamps": fingerprints,
        }
        write_text(self.entry_path, json.dumps(entry) + "\n")

    def _checksum(self, metadata: list[list[int]]) -> str:
        with open(self.path, "rb") as file:
            digest = hashlib.file_digest(file, "blake2b")
        digest.update(json.dumps(metadata).encode())
        return digest.hexdigest()[:32]


def _list_shards(folder: Path, source: CacheableDataset, shard_pairs: int) -> list[_Shard]:
    files, indices = _Fingerprints(source.pairs), range(len(source))
    return [
        _Shard(folder, number, indices[start : start + shard_pairs], source.encoded_shape, files)
        for number, start in enumerate(range(0, len(source), shard_pairs))
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
    for shard in tqdm(shards, "checking", unit="shard", leave=False):
        try:
            if rebuild:
                raise _StaleError(shard.path)
            shard.load(checksum=True)
            kept |= {shard.path.name, shard.entry_path.name}
        except _StaleError:
            missing.append(shard)
    # Shards of other options must be gone before the manifest states the new ones. Temporary
    # files of a killed build are removed too.
    for name in existing - kept:
        if name.endswith((".npy", ".json")):
            (folder / name).unlink()
    manifest = {**_options(source), "shard_pairs": step, "shards": len(shards)}
    write_text(folder / MANIFEST, json.dumps(manifest) + "\n")
    return missing


class _EncodedSamples(Dataset):
    """Samples as a shard holds them: fingerprint, planes and metadata."""

    def __init__(self, source: CacheableDataset):
        self.source, self.files = source, _Fingerprints(source.pairs)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Fingerprint, Tensor, list[int]]:
        fingerprint = self.files[index]  # first, so that a change while decoding is noticed later
        return fingerprint, *self.source.encode(index)


def _options(source: CacheableDataset) -> dict[str, Any]:
    return {"version": VERSION, **source.cache_options()}


def _read_manifest(folder: Path, source: CacheableDataset, next_step: str) -> dict[str, Any]:
    """Read the manifest in `folder`.

    Raises:
        UserError: it is damaged, or of other options than `source`: names the first one.
    """
    try:
        content = read_json(folder / MANIFEST)
    except UserError:
        content = None
    manifest = content if isinstance(content, dict) else {}
    for name, wanted in _options(source).items():
        found = manifest.get(name)
        if found != wanted:
            short = name in ("version", "size")
            values = f" ({reprlib.repr(found)}, not {wanted})" if short else ""
            raise UserError(f"the cache in {folder} differs in its {name}{values}: {next_step}")
    return manifest


class _Fingerprints:
    """Fingerprints of samples. File names are relative, so that the data set may be moved."""

    def __init__(self, pairs: Sequence[Sample]):
        self.pairs = pairs
        folders = {os.path.dirname(path) for pair in pairs for path in pair if path}
        self.root = Path(os.path.commonpath(folders), "_").as_posix()[:-1]  # ends with a slash

    def __getitem__(self, index: int) -> Fingerprint:
        fingerprint: Fingerprint = []
        for path in filter(None, self.pairs[index]):
            try:
                status = os.stat(path)
            except OSError as error:
                raise UserError(f"cannot read {path}: {error.strerror}; restore it") from error
            name = path.as_posix().removeprefix(self.root)  # faster than relative_to
            fingerprint += [name, status.st_size, status.st_mtime_ns]
        return fingerprint


def _first_change(recorded: Any, current: Sequence[Fingerprint]) -> str | None:
    """The name of the first file that was added, removed or changed, or None."""
    if recorded == current:
        return None
    none: Fingerprint = []
    for old, new in zip_longest(recorded, current, fillvalue=none):
        for part in (slice(0, 3), slice(3, 6)):  # image, label
            if old[part] != new[part]:
                return str(min(file[0] for file in (old[part], new[part]) if file))
    raise ValueError("a fingerprint has more values than image and label give")

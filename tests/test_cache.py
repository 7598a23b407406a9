"""The cache of decoded samples: equal to the files, resumable, and refused when stale."""

import dataclasses
import errno
import hashlib
import itertools
import json
import os
import pickle
import shlex
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import assert_same_runs, content, flip_bit, truncate
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from lednet import UserError
from lednet.data import cache, dataset
from lednet.data.cache import MANIFEST, CachedDataset, build_cache
from lednet.data.dataset import SegmentationDataset
from lednet.data.registry import open_dataset, open_training_data
from lednet.io import write_text
from lednet.training.run_dir import read_records

SIZE = (36, 44)
COMMAND = "python build"


def open_source(
    root: Path, split: str = "train", size=SIZE, name="camvid", **options
) -> SegmentationDataset:
    source = open_dataset(name, root, split, **options)
    source.size = size
    return source


def build(folder: Path, source: SegmentationDataset, **options) -> None:
    build_cache(folder, {"train": source}, shard_pairs=2, **options)


def open_cached(folder: Path, source: SegmentationDataset) -> CachedDataset:
    return CachedDataset(folder / "train", source, COMMAND)


def assert_same_pairs(cached: CachedDataset, source: SegmentationDataset) -> None:
    assert len(cached) == len(source) and cached.pairs == source.pairs
    for index in range(len(source)):
        for a, b in zip(cached[index], source[index], strict=True):
            assert a.dtype == b.dtype == torch.uint8 and torch.equal(a, b)
            assert a.shape[-2:] == source.size
    assert np.array_equal(cached.class_counts(), source.class_counts())


def assert_stale(folder: Path, source: SegmentationDataset, file: str, verify=False) -> None:
    """Opening, or with `verify` only verifying, must name `file`."""
    cached = open_cached(folder, source) if verify else None
    with pytest.raises(UserError, match=rf"damaged \(first file: '(.*/)?{file}'\): .*`{COMMAND}`$"):
        cached.verify() if cached else open_cached(folder, source)


@pytest.fixture
def source(own_camvid) -> SegmentationDataset:
    """Five pairs of 64x48, which a test may change."""
    return open_source(own_camvid)


@pytest.fixture
def built(source, tmp_path) -> Path:
    """Their cache, in shards of two, two and one."""
    build(tmp_path / "cache", source)
    return tmp_path / "cache"


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """Names of the images that are decoded from now on."""
    names, read = [], SegmentationDataset.read

    def watched(self, index):
        names.append(self.pairs[index].image.stem)
        return read(self, index)

    monkeypatch.setattr(SegmentationDataset, "read", watched)
    return names


# equality with the files


@pytest.mark.parametrize(
    ("name", "root", "split", "options", "workers"),
    [
        ("cityscapes", "toy_cityscapes", "train_extra", {"annotations": "coarse"}, 0),
        ("camvid", "camvid", "train", {}, 2),
        ("folders", "own_data", "train", {"val_stride": 3}, 0),
    ],
)
def test_getitem_equals_source(name, root, split, options, workers, request, tmp_path):
    root = request.getfixturevalue(root)
    val = {key: value for key, value in options.items() if key == "val_stride"}
    splits = {
        "train": open_source(root, split, name=name, **options),
        "val": open_source(root, "val", name=name, **val),
    }
    build_cache(tmp_path, splits, workers, shard_pairs=2)
    for split, source in splits.items():
        cached = CachedDataset(tmp_path / split, source, COMMAND)
        assert_same_pairs(cached, source)
        assert cached.scheme == source.scheme


def test_build_cache_writes_format_version_2(built, source):
    """Earlier and later code must read the same files."""
    manifest = json.loads((built / "train/manifest.json").read_text())
    assert manifest == {"version": 2, **source.cache_options(), "shard_pairs": 2, "shards": 3}
    path = built / "train/000001.npy"
    entry, data = json.loads(path.with_suffix(".json").read_text()), path.read_bytes()
    assert np.load(path).shape == (2, 4, *SIZE)
    digest = hashlib.blake2b(data + json.dumps(entry["facts"]).encode()).hexdigest()
    assert (entry["bytes"], entry["checksum"]) == (len(data), digest[:32])
    for stamp, pair in zip(entry["stamps"], source.pairs[2:4], strict=True):
        states = [(f"{p.parent.name}/{p.name}", p.stat()) for p in pair]
        expected = [value for name, s in states for value in (name, s.st_size, s.st_mtime_ns)]
        assert stamp == expected


def test_open_training_data_default_size_is_that_of_the_data_set(camvid, own_data):
    assert open_training_data("camvid", camvid)[0].size == (360, 480)
    assert open_training_data("camvid", camvid, height=100)[1].size == (100, 480)
    assert open_training_data("folders", own_data, val_stride=3)[1].size == (32, 48)


def test_cached_dataset_can_be_pickled_loaded_and_indexed(built, source):
    cached = open_cached(built, source)
    unread = len(pickle.dumps(cached))
    assert torch.equal(cached[-1][0], cached[4][0])
    with pytest.raises(IndexError):
        cached[5]
    cached[0][0].zero_()  # a copy
    assert_same_pairs(cached, source)
    assert len(pickle.dumps(cached)) == unread
    batches = DataLoader(pickle.loads(pickle.dumps(cached)), batch_size=5, num_workers=1)
    assert all(map(torch.equal, next(iter(batches)), next(iter(DataLoader(source, 5)))))


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux")
def test_build_cache_memory_does_not_grow_with_the_number_of_pairs(camvid, tmp_path):
    one = open_source(camvid, size=(300, 400))
    many = SegmentationDataset(one.pairs[:1] * 150, one.scheme, one.size)  # 72 MB in all
    one.pairs = one.pairs[:1]

    def own_memory() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) * 1024

    build_cache(tmp_path, {"train": one})
    before = own_memory()
    build_cache(tmp_path / "more", {"train": many})
    cached = open_cached(tmp_path / "more", many)
    for index in range(len(cached)):
        cached[index]
    assert own_memory() - before < 20e6


# interrupted builds


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(("moves", "left"), [(0, 5), (1, 5), (2, 5), (3, 3), (6, 1)])
def test_build_cache_after_kill_resumes(built, source, tmp_path, decoded, moves, left):
    """Killed before a file is renamed: the manifest, then each shard and its JSON file."""
    folder, child = tmp_path / "killed", os.fork()
    if child == 0:
        replace, number = os.replace, itertools.count()
        os.replace = lambda *paths: (
            replace(*paths) if next(number) < moves else os.kill(os.getpid(), signal.SIGKILL)
        )
        build(folder, source)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    with pytest.raises(UserError, match=f"(no cache in|unfinished).*`{COMMAND}`"):
        open_cached(folder, source)
    assert not decoded
    build(folder, source)
    assert len(decoded) == left and content(folder) == content(built)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (OSError(errno.ENOSPC, "disk full"), r"cannot write .*000001\.npy: disk full"),
        (UserError("a.png is damaged"), r"^a\.png is damaged$"),
    ],
)
def test_build_cache_after_error_resumes(
    built, source, tmp_path, monkeypatch, decoded, fault, words
):
    folder, read = tmp_path / "other", SegmentationDataset.read

    def failing(self, index):
        if index == 3:
            raise fault
        return read(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(SegmentationDataset, "read", failing)
        with pytest.raises(UserError, match=words):
            build(folder, source, workers=int(isinstance(fault, UserError)))
    assert {*content(folder)} == {f"train/{n}" for n in (MANIFEST, "000000.json", "000000.npy")}
    decoded.clear()
    build(folder, source)
    assert len(decoded) == 3 and content(folder) == content(built)


def test_build_cache_small_disk_is_refused_before_decoding(
    built, source, tmp_path, monkeypatch, decoded
):
    needed = sum(path.stat().st_size for path in built.rglob("*.npy"))
    usage = shutil.disk_usage(tmp_path)._replace(free=needed - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"the cache needs .* GB, and the disk of .*free some"):
        build(tmp_path / "other", source)
    assert not decoded and not list((tmp_path / "other").rglob("*.npy"))
    usage = usage._replace(free=needed)
    build(tmp_path / "other", source)


def test_build_cache_finished_cache_is_not_written_again(built, source, decoded, own_camvid):
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in built.rglob("*.npy")}
    build(built, source)
    moved = open_source(own_camvid.rename(own_camvid.with_name("elsewhere")))
    build(built, moved)
    assert not decoded
    for path, expected in before.items():
        assert (path.read_bytes(), path.stat().st_mtime_ns) == expected
    assert_same_pairs(open_cached(built, moved), moved)


# stale and damaged caches


def edit(**changes: object) -> Callable[[Path], None]:
    """Change values of a JSON file; None deletes."""

    def change(path: Path) -> None:
        kept = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({k: v for k, v in kept.items() if v is not None}))

    return change


def touch(path: Path, time: int = 1) -> None:
    os.utime(path, ns=(0, path.stat().st_mtime_ns + time))


def flip_image(path: Path) -> None:
    Image.fromarray(np.array(Image.open(path))[::-1]).save(path)
    touch(path, 10**9)


def grow(path: Path) -> None:
    """One more byte at the same modification time."""
    before = path.stat().st_mtime_ns
    path.write_bytes(path.read_bytes() + b"\0")
    os.utime(path, ns=(0, before))


SHARD, ENTRY, CHANGED = "cache/train/000001.npy", "cache/train/000001.json", "train_003.png"


@pytest.mark.parametrize(
    ("file", "fault", "named", "verify"),
    [
        (SHARD, Path.unlink, "000001.npy", False),
        (SHARD, truncate, "000001.npy", False),
        (SHARD, flip_bit, "000001.npy", True),
        (ENTRY, edit(facts=[[0] * 12] * 2), "000001.npy", True),
        (ENTRY, edit(facts=[[0] * 11] * 2), "000001.json", False),
        (ENTRY, edit(facts=[[0] * 12]), "000001.json", False),
        (ENTRY, edit(stamps=[3, 4]), "000001.json", False),
        (ENTRY, edit(checksum=None), "000001.json", False),
        (ENTRY, truncate, "000001.json", False),
        (f"camvid/train/{CHANGED}", flip_image, f"train/{CHANGED}", False),
        (f"camvid/train/{CHANGED}", touch, f"train/{CHANGED}", False),
        (f"camvid/trainannot/{CHANGED}", grow, f"trainannot/{CHANGED}", False),
    ],
)
def test_open_damaged_file_is_named_and_only_its_shard_rebuilt(
    built, source, tmp_path, decoded, file, fault, named, verify
):
    before = content(built)
    fault(tmp_path / file)
    assert_stale(built, source, named, verify)
    decoded.clear()
    build(built, source)
    assert decoded == ["train_002", "train_003"]
    assert (content(built) == before) == file.startswith("cache")
    cached = open_cached(built, source)
    cached.verify()
    assert_same_pairs(cached, source)


@pytest.mark.parametrize("value", [None, 0, True, "2"])
def test_open_damaged_shard_size_in_manifest_is_named(built, source, decoded, value):
    edit(shard_pairs=value)(built / "train/manifest.json")
    assert_stale(built, source, "manifest.json")
    build(built, source)
    assert not decoded
    assert_same_pairs(open_cached(built, source), source)


def test_open_removed_and_added_pairs_are_named(built, own_camvid):
    for folder in ("train", "trainannot"):
        (own_camvid / folder / "train_001.png").unlink()
    fewer = open_source(own_camvid)
    assert_stale(built, fewer, "train/train_001.png")
    for folder in ("train", "trainannot"):
        file = own_camvid / folder / "train_000.png"
        shutil.copy2(file, file.with_name("train_0005.png"))
    assert_stale(built, open_source(own_camvid), "train/train_0005.png")
    build(built, fewer)
    assert_same_pairs(open_cached(built, fewer), fewer)
    assert len(list(built.rglob("*.npy"))) == 2
    back = SegmentationDataset(fewer.pairs[::-1], fewer.scheme, SIZE)
    assert_stale(built, back, "train/train_000.png")


def test_open_file_changed_while_decoding_is_named(source, own_camvid, tmp_path, monkeypatch):
    read, path = SegmentationDataset.read, own_camvid / "train/train_003.png"

    def watched(self, index):
        sample = read(self, index)
        if self.pairs[index].image == path:
            touch(path)
        return sample

    with monkeypatch.context() as patch:
        patch.setattr(SegmentationDataset, "read", watched)
        build(tmp_path / "cache", source)
    assert_stale(tmp_path / "cache", source, "train/train_003.png")


def test_open_other_decoding_by_libraries_is_refused(built, source, monkeypatch):
    def nearest(size):
        return v2.Compose([v2.Resize(size, v2.InterpolationMode.NEAREST), v2.ToPureTensor()])

    monkeypatch.setattr(dataset, "resize_transform", nearest)
    with pytest.raises(UserError, match=rf"train_000\.png is now decoded .*`{COMMAND} --rebuild`"):
        open_cached(built, source)


# other options


def variant(source: SegmentationDataset, size=SIZE, **changes: object) -> SegmentationDataset:
    scheme = dataclasses.replace(source.scheme, **changes)
    return SegmentationDataset(source.pairs, scheme, size)


@pytest.mark.parametrize(
    ("option", "fault", "changes"),
    [
        (r"size \(\[36, 44\], not \[24, 40\]\)", None, {"size": (24, 40)}),
        (r"version \(1, not 2\)", edit(version=1, shards={"000000.npy": {"counts": [0]}}), {}),
        (r"version \(None, not 2\)", truncate, {}),
        ("classes", None, {"classes": tuple("abcdefghijk")}),
        ("label values", None, {"file_ids": {i: 10 - i for i in range(11)} | {11: 255}}),
    ],
)
def test_build_cache_of_other_options_is_kept_until_rebuild(built, source, option, fault, changes):
    if fault:
        fault(built / "train/manifest.json")
    source, before = variant(source, **changes), content(built)
    with pytest.raises(UserError, match=f"differs in its {option}.*`{COMMAND} --rebuild`"):
        open_cached(built, source)
    with pytest.raises(UserError, match=f"differs in its {option}.*or add --rebuild"):
        build(built, source)
    assert content(built) == before
    build(built, source, rebuild=True)
    assert_same_pairs(open_cached(built, source), source)


def test_build_cache_interrupted_rebuild_leaves_no_old_shards(built, source, monkeypatch):
    def write_and_stop(path, text):
        write_text(path, text)
        raise KeyboardInterrupt

    source = variant(source, classes=tuple("abcdefghijk"))
    with monkeypatch.context() as patch:
        patch.setattr(cache, "write_text", write_and_stop)
        with pytest.raises(KeyboardInterrupt):
            build(built, source, rebuild=True)
    assert_stale(built, source, "000000.json")


def test_build_cache_folder_with_other_files_is_not_changed(source, tmp_path):
    (tmp_path / "mine/train").mkdir(parents=True)
    np.save(tmp_path / "mine/train/000000.npy", np.zeros(3))
    for rebuild in (False, True):
        with pytest.raises(UserError, match="holds other files than a cache"):
            build(tmp_path / "mine", source, rebuild=rebuild)
    assert len(content(tmp_path / "mine")) == 1


# the scripts


def test_train_from_cache_equals_training_from_files(run_inside, camvid, tmp_path):
    """Class weights counted from the labels, both stages, workers and none."""
    data = ("--dataset", "camvid", "--datadir", camvid, "--height", 40, "--width", 64)
    recipe = ("--num-epochs", 1, "--batch-size", 2, "--device", "cpu")
    folder = tmp_path / "the cache"
    runs = {"files": ("--num-workers", 1), "cache": ("--num-workers", 0, "--cache", folder)}

    refused = run_inside("train/main.py", *data, *recipe, *runs["cache"])
    refused.assert_error(f"no cache in {folder}/train")
    command = shlex.split(refused.stderr.split("`")[1])
    assert command[0] == "python" and not folder.exists()
    result = run_inside(command[1], *command[2:], "--workers", 0).check()  # the earlier spelling
    train = shlex.split(result.stdout.splitlines()[-1])
    assert train[1].endswith("train/main.py")
    assert train[2:] == [*map(str, data), "--cache", str(folder)]

    for name, flags in runs.items():
        run_inside("train/main.py", *data, *recipe, *flags, "--savedir", tmp_path / name).check()
    assert len(read_records(tmp_path / "files")) == 2
    assert_same_runs(tmp_path / "files", tmp_path / "cache", "best.pth")
    flip_bit(folder / "val/000000.npy")
    run_inside(command[1], *command[2:], "--verify").assert_error(
        str(folder / "val/000000.npy"), shlex.join(command)
    )

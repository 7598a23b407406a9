"""The cache gives what the files give, whatever happens to either."""

import errno
import json
import os
import pickle
import shlex
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_bad_input import assert_refused
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from lednet import UserError
from lednet.data import cache
from lednet.data.cache import CachedDataset, build_cache
from lednet.data.datasets import SegmentationDataset, open_training_data, pixel_shares
from lednet.data.labels import LabelScheme
from lednet.data.transforms import resize_transform
from lednet.weights import read_checkpoint

SIZE = (36, 44)
COMMAND = "python build"


def open_cached(folder: Path, source: SegmentationDataset, size=SIZE) -> CachedDataset:
    return CachedDataset(folder / "train", source, size, COMMAND)


def plain(source: SegmentationDataset, size=SIZE) -> SegmentationDataset:
    return SegmentationDataset(source.pairs, source.scheme, resize_transform(size))


def assert_same_pairs(cached: SegmentationDataset, source: SegmentationDataset, size=SIZE):
    assert len(cached) == len(source) and cached.pairs == source.pairs
    for ours, theirs in zip(
        map(cached.__getitem__, range(len(cached))),
        map(plain(source, size).__getitem__, range(len(source))),
        strict=True,
    ):
        for a, b in zip(ours, theirs, strict=True):
            assert a.dtype == b.dtype == torch.uint8 and torch.equal(a, b)


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def source(own_camvid) -> SegmentationDataset:
    """Five pairs of 64x48, which a test may damage."""
    return open_training_data("camvid", own_camvid)[0]


@pytest.fixture
def built(source, tmp_path) -> Path:
    """Their cache, in shards of two, two and one."""
    build_cache(tmp_path / "cache", {"train": source}, SIZE, shard_pairs=2)
    return tmp_path / "cache"


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """Names of the images that are read from here on."""
    names = []
    read = SegmentationDataset.read

    def watched(self, index):
        names.append(self.pairs[index].image.stem)
        return read(self, index)

    monkeypatch.setattr(SegmentationDataset, "read", watched)
    return names


# the same bits


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", ["cityscapes", "coarse", "camvid", "folders"])
def test_pairs_and_shares_are_those_of_the_files(name, workers, request, tmp_path):
    options: dict = {"cityscapes": {}, "camvid": {}, "folders": {"val_every": 3}}.get(
        name, {"annotations": "coarse"}
    )
    data = "cityscapes" if name == "coarse" else name
    root = request.getfixturevalue(
        {"cityscapes": "toy_cityscapes", "folders": "own_data"}.get(data, data)
    )
    train, val, _ = open_training_data(data, root, **options)
    splits = {"train": train, "val": val}
    build_cache(tmp_path, splits, SIZE, workers, shard_pairs=2)
    for split, source in splits.items():
        cached = CachedDataset(tmp_path / split, source, SIZE, COMMAND)
        assert_same_pairs(cached, source)
        assert np.array_equal(pixel_shares(cached), pixel_shares(source))
        assert cached.scheme == source.scheme
        shards = [np.load(path) for path in sorted((tmp_path / split).glob("*.npy"))]
        assert sum(len(shard) for shard in shards) == len(source)


def test_real_images_come_back_bit_for_bit(real_data, tmp_path):
    _, val, size = open_training_data("cityscapes", real_data / "data/cityscapes_sample")
    build_cache(tmp_path, {"train": val}, size)
    assert_same_pairs(open_cached(tmp_path, val, size), val, size)


def test_sizes_of_their_own_are_kept_where_none_is_given(camvid, own_data):
    assert open_training_data("camvid", camvid)[2] == (360, 480)
    assert open_training_data("camvid", camvid, height=100)[2] == (100, 480)
    assert open_training_data("folders", own_data, val_every=3)[2] == (32, 48)


def test_loaders_and_pickles_take_it(built, source):
    cached = open_cached(built, source)
    unread = len(pickle.dumps(cached))
    for index in range(5):
        cached[index]
    assert len(pickle.dumps(cached)) == unread
    assert_same_pairs(pickle.loads(pickle.dumps(cached)), source)
    loaders = [DataLoader(data, batch_size=3, num_workers=2) for data in (cached, plain(source))]
    for ours, theirs in zip(*loaders, strict=True):
        assert all(map(torch.equal, ours, theirs))


def test_indices_behave_and_what_is_given_may_be_written_to(built, source):
    cached = open_cached(built, source)
    assert torch.equal(cached[-1][0], cached[4][0])
    with pytest.raises(IndexError):
        cached[5]
    cached[0][0].zero_()
    assert_same_pairs(cached, source)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux")
def test_memory_does_not_grow_with_the_number_of_pairs(camvid, tmp_path):
    pair = open_training_data("camvid", camvid)[0].pairs[0]
    source = SegmentationDataset([pair] * 150, open_training_data("camvid", camvid)[0].scheme)

    def own_memory() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) * 1024

    size = (300, 400)  # 72 MB in all
    build_cache(tmp_path, {"train": SegmentationDataset([pair], source.scheme)}, size)
    before = own_memory()
    build_cache(tmp_path / "more", {"train": source}, size)
    cached = open_cached(tmp_path / "more", source, size)
    for index in range(len(cached)):
        cached[index]
    assert own_memory() - before < 20e6


# stopped and taken up again


def build_and_die(folder: Path, source: SegmentationDataset, moment: str, count: int) -> None:
    """In a process of its own: kill it before, after or amid a step of the build."""
    steps = iter(range(1, 1000))

    def die(at: str) -> None:
        if at == moment and next(steps) == count:
            os.kill(os.getpid(), signal.SIGKILL)

    replace, read = os.replace, SegmentationDataset.read

    def watched_replace(*paths):
        die("before the move")
        replace(*paths)
        die("after the move")

    def watched_read(self, index):
        die("while decoding")
        return read(self, index)

    os.replace, SegmentationDataset.read = watched_replace, watched_read
    build_cache(folder, {"train": source}, SIZE, shard_pairs=2)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    ("moment", "count", "left"),
    [
        ("before the move", 1, 5),  # of the first manifest
        ("before the move", 2, 5),  # of the first shard
        ("after the move", 2, 5),  # it is not in the manifest yet
        ("before the move", 3, 5),
        ("after the move", 3, 3),
        ("while decoding", 4, 3),  # in the middle of the second shard
        ("before the move", 7, 1),  # of the last manifest
    ],
)
def test_killed_build_goes_on(built, source, tmp_path, decoded, moment, count, left):
    folder = tmp_path / "killed"
    child = os.fork()
    if child == 0:
        build_and_die(folder, source, moment, count)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    with pytest.raises(UserError, match=f"(no cache in|unfinished).*`{COMMAND}`"):
        open_cached(folder, source)
    assert not decoded
    build_cache(folder, {"train": source}, SIZE, shard_pairs=2)
    assert len(decoded) == left
    assert content(folder) == content(built)


def test_finished_cache_is_left_as_it_is(built, source, decoded):
    before = content(built)
    times = {path: path.stat().st_mtime_ns for path in built.rglob("*.npy")}
    build_cache(built, {"train": source}, SIZE, shard_pairs=2)
    assert content(built) == before and not decoded
    assert {path: path.stat().st_mtime_ns for path in built.rglob("*.npy")} == times


@pytest.mark.parametrize("damage", ["removed", "truncated", "one bit"])
def test_damaged_shard_is_named_and_built_anew_alone(built, source, decoded, damage):
    before, path = content(built), built / "train/000001.npy"
    whole = path.read_bytes()
    if damage == "removed":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(whole[:-10])
    else:
        path.write_bytes(whole[:-10] + bytes([whole[-10] ^ 4]) + whole[-9:])
        cached = open_cached(built, source)
        with pytest.raises(UserError, match=rf"000001\.npy is damaged: bring .*`{COMMAND}`"):
            cached.verify()
    if damage != "one bit":
        with pytest.raises(UserError, match=r"000001\.npy has \d+ of its \d+ bytes: bring"):
            open_cached(built, source)
    decoded.clear()
    build_cache(built, {"train": source}, SIZE, shard_pairs=2)
    assert decoded == ["train_002", "train_003"] and content(built) == before
    open_cached(built, source).verify()


# changed data, changed options


def rewrite(path: Path) -> None:
    """Other pixels, and a time of change that no clock's step can hide."""
    Image.fromarray(np.array(Image.open(path))[::-1]).save(path)
    os.utime(path, ns=(0, time.time_ns() + 10**9))


def touch(path: Path) -> None:
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def grow(path: Path) -> None:
    """More bytes at the same time of change."""
    status = path.stat()
    with open(path, "ab") as file:
        file.write(b"\0")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("change", [rewrite, touch, grow])
@pytest.mark.parametrize("name", ["train/train_003.png", "trainannot/train_003.png"])
def test_changed_file_is_named_and_its_shard_built_anew(
    built, source, own_camvid, decoded, change, name
):
    change(own_camvid / name)
    with pytest.raises(UserError, match=f"{name} has changed since .*`{COMMAND}`"):
        open_cached(built, source)
    build_cache(built, {"train": source}, SIZE, shard_pairs=2)
    assert decoded == ["train_002", "train_003"]
    cached = open_cached(built, source)
    assert_same_pairs(cached, source)
    assert np.array_equal(pixel_shares(cached), pixel_shares(source))


def test_removed_and_added_pairs_are_named(built, own_camvid):
    for folder in ("train", "trainannot"):
        (own_camvid / folder / "train_001.png").unlink()
    fewer = open_training_data("camvid", own_camvid)[0]
    with pytest.raises(UserError, match=r"train/train_001\.png is gone since"):
        open_cached(built, fewer)
    for folder in ("train", "trainannot"):
        file = own_camvid / folder / "train_000.png"
        shutil.copy2(file, file.with_name("train_0005.png"))
    other = open_training_data("camvid", own_camvid)[0]
    with pytest.raises(UserError, match=r"train/train_0005\.png is new since"):
        open_cached(built, other)
    build_cache(built, {"train": fewer}, SIZE, shard_pairs=2)
    assert_same_pairs(open_cached(built, fewer), fewer)
    assert len(list(built.rglob("*.npy"))) == 2
    back = SegmentationDataset(fewer.pairs[::-1], fewer.scheme)
    with pytest.raises(UserError, match="the order of the files has changed"):
        open_cached(built, back)


def test_data_may_move(built, source, own_camvid):
    moved = own_camvid.rename(own_camvid.with_name("elsewhere"))
    source = open_training_data("camvid", moved)[0]
    assert_same_pairs(open_cached(built, source), source)


def assert_other(built: Path, source: SegmentationDataset, words: str, size=SIZE) -> None:
    before = content(built)
    with pytest.raises(UserError, match=f"differs in its {words}.*`{COMMAND} --rebuild`"):
        open_cached(built, source, size)
    with pytest.raises(UserError, match=f"differs in its {words}.*or add --rebuild"):
        build_cache(built, {"train": source}, size, shard_pairs=2)
    assert content(built) == before
    build_cache(built, {"train": source}, size, rebuild=True, shard_pairs=2)
    assert_same_pairs(open_cached(built, source, size), source, size)


def test_other_size_is_refused(built, source):
    assert_other(built, source, r"size \(\[36, 44\], not \[24, 40\]\)", (24, 40))


def test_other_version_is_refused(built, source, monkeypatch):
    monkeypatch.setattr(cache, "VERSION", 99)
    assert_other(built, source, r"version \(\d+, not 99\)")


@pytest.mark.parametrize(
    ("what", "classes", "ids"),
    [("classes", "xyz", (0, 1, 2)), ("label values", "abc", (0, 2, 1))],
)
def test_another_class_file_is_refused(own_data, tmp_path, what, classes, ids):
    def scheme(classes, ids) -> LabelScheme:
        file_ids = {7: ids[0], 3: ids[1], 9: ids[2]}
        return LabelScheme("own", tuple(classes), ((0, 0, 0),) * 3, file_ids)

    pairs = open_training_data("folders", own_data, val_every=3)[0].pairs
    first = SegmentationDataset(pairs, scheme("abc", (0, 1, 2)))
    build_cache(tmp_path / "cache", {"train": first}, SIZE, shard_pairs=2)
    assert_other(tmp_path / "cache", SegmentationDataset(pairs, scheme(classes, ids)), what)


def test_libraries_that_read_otherwise_are_noticed(built, source, monkeypatch):
    def nearest(size):
        return v2.Compose([v2.Resize(size, v2.InterpolationMode.NEAREST), v2.ToPureTensor()])

    monkeypatch.setattr(cache, "resize_transform", nearest)
    with pytest.raises(UserError, match=r"train_000\.png is now read otherwise .* --rebuild`"):
        open_cached(built, source)


# failing


def test_folder_with_other_things_is_left_alone(source, tmp_path):
    (tmp_path / "mine/train").mkdir(parents=True)
    np.save(tmp_path / "mine/train/000000.npy", np.zeros(3))
    for rebuild in (False, True):
        with pytest.raises(UserError, match="holds something else"):
            build_cache(tmp_path / "mine", {"train": source}, SIZE, rebuild=rebuild)
    assert len(content(tmp_path / "mine")) == 1


def test_too_small_a_disk_is_refused_before_any_work(source, tmp_path, monkeypatch, decoded):
    usage = shutil.disk_usage(tmp_path)._replace(free=5 * 4 * SIZE[0] * SIZE[1] - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"the cache needs .* GB, and the disk of .*free some"):
        build_cache(tmp_path / "cache", {"train": source}, SIZE)
    assert not decoded and not list(tmp_path.rglob("*.npy"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=usage.free + 1))
    build_cache(tmp_path / "cache", {"train": source}, SIZE)


def test_disk_that_fills_up_leaves_whole_shards_to_go_on_from(
    built, source, tmp_path, monkeypatch, decoded
):
    class Full:
        """A file that takes the header and one pair."""

        def __init__(self, file):
            self.file, self.writes = file, 0

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def write(self, data):
            self.writes += 1
            if self.writes > 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.file.write(data)

    def fill_up(path, mode):
        file = open(path, mode)  # noqa: SIM115
        return Full(file) if mode == "wb" and "000001" in path.name else file

    folder = tmp_path / "cache2"
    monkeypatch.setattr(cache, "open", fill_up, raising=False)
    with pytest.raises(UserError, match=r"cannot write .*000001\.npy: No space left on device; "):
        build_cache(folder, {"train": source}, SIZE, shard_pairs=2)
    assert content(folder).keys() == {"train/manifest.json", "train/000000.npy"}
    monkeypatch.delattr(cache, "open")
    decoded.clear()
    build_cache(folder, {"train": source}, SIZE, shard_pairs=2)
    assert len(decoded) == 3 and content(folder) == content(built)


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_image_stops_the_build_and_is_named(source, own_camvid, tmp_path, workers):
    path = own_camvid / "train/train_003.png"
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(UserError, match=r"^\S+train_003\.png is damaged"):
        build_cache(tmp_path / "cache", {"train": source}, SIZE, workers, shard_pairs=2)
    assert sorted(p.name for p in (tmp_path / "cache/train").iterdir()) == [
        "000000.npy", "manifest.json",
    ]  # fmt: skip


# the scripts


def test_training_is_the_same_with_and_without(run_inside, camvid, tmp_path):
    """Class weights counted from the labels, both stages, workers and none."""
    data = ("--dataset", "camvid", "--datadir", camvid, "--height", 40, "--width", 64)
    recipe = ("--num-epochs", 1, "--batch-size", 2, "--device", "cpu")
    folder = tmp_path / "the cache"
    runs = {"files": ("--num-workers", 1), "cache": ("--num-workers", 0, "--cache", folder)}

    refused = run_inside("train/main.py", *data, *recipe, *runs["cache"])
    assert_refused(refused, f"no cache in {folder}/train")
    command = shlex.split(refused.stderr.split("`")[1])
    assert command[0] == "python" and not folder.exists()
    built = run_inside(command[1], *command[2:], "--workers", 0)
    assert built.returncode == 0, built.stderr
    train = shlex.split(built.stdout.splitlines()[-1])
    assert train[1].endswith("train/main.py")
    assert train[2:] == [*map(str, data), "--cache", str(folder)]

    records = {}
    for name, flags in runs.items():
        result = run_inside("train/main.py", *data, *recipe, *flags, "--savedir", tmp_path / name)
        assert result.returncode == 0, result.stderr
        lines = (tmp_path / name / "log.jsonl").read_text().splitlines()
        records[name] = [{**json.loads(line), "images_per_second": None} for line in lines]
    assert len(records["files"]) == 2 and records["files"] == records["cache"]
    states = [read_checkpoint(tmp_path / name / "best.pth")["state_dict"] for name in runs]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])

    other = run_inside(
        "train/main.py", *data, "--height", 20, *recipe, *runs["cache"], "--savedir", tmp_path / "x"
    )
    assert_refused(other, "differs in its size ([40, 64], not [20, 64])", "--height 20")
    assert not (tmp_path / "x").exists()

    path = folder / "val/000000.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    verified = run_inside(command[1], *command[2:], "--verify")
    assert_refused(verified, f"{path} is damaged", shlex.join(command))

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
from lednet.checkpoint import load_checkpoint
from lednet.data import cache, dataset
from lednet.data.cache import CachedDataset, build_cache
from lednet.data.dataset import SegmentationDataset
from lednet.data.labels import LabelScheme
from lednet.data.registry import open_dataset, open_training_data
from lednet.io import write_text
from lednet.training.run_dir import MEASURED_KEYS

SIZE = (36, 44)
COMMAND = "python build"


def open_source(root: Path, split: str = "train", size=SIZE, **options) -> SegmentationDataset:
    source = open_dataset(options.pop("name", "camvid"), root, split, **options)
    source.size = size
    return source


def open_cached(folder: Path, source: SegmentationDataset) -> CachedDataset:
    return CachedDataset(folder / "train", source, COMMAND)


def assert_same_pairs(cached: CachedDataset, source: SegmentationDataset) -> None:
    assert len(cached) == len(source) and cached.pairs == source.pairs
    for ours, theirs in zip(
        map(cached.__getitem__, range(len(cached))),
        map(source.__getitem__, range(len(source))),
        strict=True,
    ):
        for a, b in zip(ours, theirs, strict=True):
            assert a.dtype == b.dtype == torch.uint8 and torch.equal(a, b)
            assert a.shape[-2:] == source.size
    assert np.array_equal(cached.class_counts(), source.class_counts())


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def source(own_camvid) -> SegmentationDataset:
    """Five pairs of 64x48, which a test may damage."""
    return open_source(own_camvid)


@pytest.fixture
def built(source, tmp_path) -> Path:
    """Their cache, in shards of two, two and one."""
    build_cache(tmp_path / "cache", {"train": source}, shard_pairs=2)
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
def test_pairs_and_counts_are_those_of_the_files(name, workers, request, tmp_path):
    options, split = {
        "cityscapes": ({}, "train"),
        "coarse": ({"annotations": "coarse"}, "train_extra"),
        "camvid": ({}, "train"),
        "folders": ({"val_every": 3}, "train"),
    }[name]
    data = "cityscapes" if name == "coarse" else name
    root = request.getfixturevalue(
        {"cityscapes": "toy_cityscapes", "folders": "own_data"}.get(data, data)
    )
    val_options = {} if name == "coarse" else options
    splits = {
        "train": open_source(root, split, name=data, **options),
        "val": open_source(root, "val", name=data, **val_options),
    }
    build_cache(tmp_path, splits, workers, shard_pairs=2)
    for split, source in splits.items():
        cached = CachedDataset(tmp_path / split, source, COMMAND)
        assert_same_pairs(cached, source)
        assert cached.scheme == source.scheme
        shards = [np.load(path) for path in sorted((tmp_path / split).glob("*.npy"))]
        assert sum(len(shard) for shard in shards) == len(source)


def test_real_images_come_back_bit_for_bit(real_data, tmp_path):
    root = real_data / "data/cityscapes_sample"
    val = open_source(root, "val", (512, 1024), name="cityscapes")
    build_cache(tmp_path, {"train": val})
    assert_same_pairs(open_cached(tmp_path, val), val)


def test_sizes_of_their_own_are_kept_where_none_is_given(camvid, own_data):
    assert open_training_data("camvid", camvid)[0].size == (360, 480)
    assert open_training_data("camvid", camvid, height=100)[1].size == (100, 480)
    assert open_training_data("folders", own_data, val_every=3)[1].size == (32, 48)


def test_loaders_and_pickles_take_it(built, source):
    cached = open_cached(built, source)
    unread = len(pickle.dumps(cached))
    for index in range(5):
        cached[index]
    assert len(pickle.dumps(cached)) == unread
    assert_same_pairs(pickle.loads(pickle.dumps(cached)), source)
    loaders = [DataLoader(data, batch_size=3, num_workers=2) for data in (cached, source)]
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
    one = open_source(camvid, size=(300, 400))
    source = SegmentationDataset(one.pairs[:1] * 150, one.scheme, one.size)  # 72 MB in all
    one.pairs = one.pairs[:1]

    def own_memory() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) * 1024

    build_cache(tmp_path, {"train": one})
    before = own_memory()
    build_cache(tmp_path / "more", {"train": source})
    cached = open_cached(tmp_path / "more", source)
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
    build_cache(folder, {"train": source}, shard_pairs=2)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    ("moment", "count", "left"),
    [
        ("before the move", 1, 5),  # of the first manifest
        ("before the move", 2, 5),  # of the first shard
        ("after the move", 2, 5),  # its JSON file is not there yet
        ("before the move", 3, 5),
        ("after the move", 3, 3),
        ("while decoding", 4, 3),  # in the middle of the second shard
        ("before the move", 7, 1),  # of the last JSON file
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
    build_cache(folder, {"train": source}, shard_pairs=2)
    assert len(decoded) == left
    assert content(folder) == content(built)


def test_finished_cache_is_left_as_it_is(built, source, decoded):
    before = content(built)
    times = {path: path.stat().st_mtime_ns for path in built.rglob("*.npy")}
    build_cache(built, {"train": source}, shard_pairs=2)
    assert content(built) == before and not decoded
    assert {path: path.stat().st_mtime_ns for path in built.rglob("*.npy")} == times


@pytest.mark.parametrize("damage", ["removed", "truncated", "one bit", "one fact"])
def test_damaged_shard_is_named_and_built_anew_alone(built, source, decoded, damage):
    before, path = content(built), built / "train/000001.npy"
    whole = path.read_bytes()
    if damage == "removed":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(whole[:-10])
    else:
        if damage == "one bit":
            path.write_bytes(whole[:-10] + bytes([whole[-10] ^ 4]) + whole[-9:])
        else:
            entry = json.loads(path.with_suffix(".json").read_text())
            entry["facts"][1][0] += 1
            path.with_suffix(".json").write_text(json.dumps(entry))
        cached = open_cached(built, source)
        with pytest.raises(UserError, match=rf"000001\.npy is damaged: bring .*`{COMMAND}`"):
            cached.verify()
    if not damage.startswith("one"):
        with pytest.raises(UserError, match=r"000001\.npy has \d+ of its \d+ bytes: bring"):
            open_cached(built, source)
    decoded.clear()
    build_cache(built, {"train": source}, shard_pairs=2)
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
    build_cache(built, {"train": source}, shard_pairs=2)
    assert decoded == ["train_002", "train_003"]
    assert_same_pairs(open_cached(built, source), source)


def test_removed_and_added_pairs_are_named(built, own_camvid):
    for folder in ("train", "trainannot"):
        (own_camvid / folder / "train_001.png").unlink()
    fewer = open_source(own_camvid)
    with pytest.raises(UserError, match=r"train/train_001\.png is gone since"):
        open_cached(built, fewer)
    for folder in ("train", "trainannot"):
        file = own_camvid / folder / "train_000.png"
        shutil.copy2(file, file.with_name("train_0005.png"))
    other = open_source(own_camvid)
    with pytest.raises(UserError, match=r"train/train_0005\.png is new since"):
        open_cached(built, other)
    build_cache(built, {"train": fewer}, shard_pairs=2)
    assert_same_pairs(open_cached(built, fewer), fewer)
    assert len(list(built.rglob("*.npy"))) == 2
    back = SegmentationDataset(fewer.pairs[::-1], fewer.scheme, SIZE)
    with pytest.raises(UserError, match="the order of the files has changed"):
        open_cached(built, back)


def test_data_may_move(built, source, own_camvid):
    moved = own_camvid.rename(own_camvid.with_name("elsewhere"))
    source = open_source(moved)
    assert_same_pairs(open_cached(built, source), source)


def assert_other(built: Path, source: SegmentationDataset, words: str) -> None:
    before = content(built)
    with pytest.raises(UserError, match=f"differs in its {words}.*`{COMMAND} --rebuild`"):
        open_cached(built, source)
    with pytest.raises(UserError, match=f"differs in its {words}.*or add --rebuild"):
        build_cache(built, {"train": source}, shard_pairs=2)
    assert content(built) == before
    build_cache(built, {"train": source}, rebuild=True, shard_pairs=2)
    assert_same_pairs(open_cached(built, source), source)


def test_other_size_is_refused(built, source):
    source.size = (24, 40)
    assert_other(built, source, r"size \(\[36, 44\], not \[24, 40\]\)")


def test_other_version_is_refused(built, source, monkeypatch):
    monkeypatch.setattr(cache, "VERSION", 99)
    assert_other(built, source, r"version \(2, not 99\)")


def test_cache_of_version_1_is_refused(built, source):
    """It had the entries of all shards in its manifest."""
    for path in (built / "train").glob("0*.json"):
        path.unlink()
    manifest = json.loads((built / "train/manifest.json").read_text())
    old = {**manifest, "version": 1, "total": 3, "shards": {"000000.npy": {"counts": [0] * 12}}}
    (built / "train/manifest.json").write_text(json.dumps(old))
    assert_other(built, source, r"version \(1, not 2\)")


@pytest.mark.parametrize(
    ("what", "classes", "ids"),
    [("classes", "xyz", (0, 1, 2)), ("label values", "abc", (0, 2, 1))],
)
def test_another_class_file_is_refused(own_data, tmp_path, what, classes, ids):
    def scheme(classes, ids) -> LabelScheme:
        file_ids = {7: ids[0], 3: ids[1], 9: ids[2]}
        return LabelScheme("own", tuple(classes), ((0, 0, 0),) * 3, file_ids)

    pairs = open_source(own_data, name="folders", val_every=3).pairs
    first = SegmentationDataset(pairs, scheme("abc", (0, 1, 2)), SIZE)
    build_cache(tmp_path / "cache", {"train": first}, shard_pairs=2)
    assert_other(tmp_path / "cache", SegmentationDataset(pairs, scheme(classes, ids), SIZE), what)


def test_old_shards_never_pass_for_those_of_a_rebuild_that_was_stopped(built, source, monkeypatch):
    class Killed(Exception):
        pass

    def write_and_die(path, text):
        write_text(path, text)
        raise Killed

    scheme = source.scheme
    other = LabelScheme(scheme.name, scheme.classes[::-1], scheme.colors, scheme.file_ids)
    source = SegmentationDataset(source.pairs, other, SIZE)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "write_text", write_and_die)
        with pytest.raises(Killed):
            build_cache(built, {"train": source}, rebuild=True, shard_pairs=2)
    with pytest.raises(UserError, match="unfinished"):
        open_cached(built, source)


def test_libraries_that_read_otherwise_are_noticed(built, source, monkeypatch):
    def nearest(size):
        return v2.Compose([v2.Resize(size, v2.InterpolationMode.NEAREST), v2.ToPureTensor()])

    monkeypatch.setattr(dataset, "resize_transform", nearest)
    with pytest.raises(UserError, match=r"train_000\.png is now read otherwise .* --rebuild`"):
        open_cached(built, source)


def test_file_that_changes_while_it_is_read_is_noticed(source, own_camvid, tmp_path, monkeypatch):
    """The stamp is of the file before: at worst it is decoded once more."""
    read, path = SegmentationDataset.read, own_camvid / "train/train_003.png"

    def watched(self, index):
        sample = read(self, index)
        if self.pairs[index].image == path:
            touch(path)
        return sample

    with monkeypatch.context() as patch:
        patch.setattr(SegmentationDataset, "read", watched)
        build_cache(tmp_path / "cache", {"train": source}, shard_pairs=2)
    with pytest.raises(UserError, match=r"train/train_003\.png has changed since"):
        open_cached(tmp_path / "cache", source)


# failing


def test_folder_with_other_things_is_left_alone(source, tmp_path):
    (tmp_path / "mine/train").mkdir(parents=True)
    np.save(tmp_path / "mine/train/000000.npy", np.zeros(3))
    for rebuild in (False, True):
        with pytest.raises(UserError, match="holds something else"):
            build_cache(tmp_path / "mine", {"train": source}, rebuild=rebuild)
    assert len(content(tmp_path / "mine")) == 1


def test_too_small_a_disk_is_refused_before_any_work(source, tmp_path, monkeypatch, decoded):
    usage = shutil.disk_usage(tmp_path)._replace(free=5 * 4 * SIZE[0] * SIZE[1] - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"the cache needs .* GB, and the disk of .*free some"):
        build_cache(tmp_path / "cache", {"train": source})
    assert not decoded and not list(tmp_path.rglob("*.npy"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=usage.free + 1))
    build_cache(tmp_path / "cache", {"train": source})


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
        build_cache(folder, {"train": source}, shard_pairs=2)
    assert content(folder).keys() == {
        "train/manifest.json", "train/000000.json", "train/000000.npy",
    }  # fmt: skip
    monkeypatch.delattr(cache, "open")
    decoded.clear()
    build_cache(folder, {"train": source}, shard_pairs=2)
    assert len(decoded) == 3 and content(folder) == content(built)


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_image_stops_the_build_and_is_named(source, own_camvid, tmp_path, workers):
    path = own_camvid / "train/train_003.png"
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(UserError, match=r"^\S+train_003\.png is damaged"):
        build_cache(tmp_path / "cache", {"train": source}, workers, shard_pairs=2)
    assert sorted(p.name for p in (tmp_path / "cache/train").iterdir()) == [
        "000000.json", "000000.npy", "manifest.json",
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
        records[name] = [json.loads(line) | dict.fromkeys(MEASURED_KEYS) for line in lines]
    assert len(records["files"]) == 2 and records["files"] == records["cache"]
    states = [load_checkpoint(tmp_path / name / "best.pth")["state_dict"] for name in runs]
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

"""Folders of classes: odd pictures are read rightly, and the cache takes them."""

import os
import pickle
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_bad_input import assert_refused
from test_cache import content
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from lednet import UserError
from lednet.data.cache import CachedDataset, build_cache
from lednet.data.dataset import SkipCorruptDataset
from lednet.data.imagefolder import ImageFolderDataset
from lednet.data.registry import open_dataset

COMMAND = "python build"
COLORS = ((255, 0, 0), (0, 200, 0), (30, 60, 250), (255, 255, 255))
"""Of the quarters of a picture: top left, top right, bottom left, bottom right."""


def picture(height: int = 36, width: int = 60, colors=COLORS) -> np.ndarray:
    pixels = np.empty((height, width, 3), np.uint8)
    rows = (slice(height // 2), slice(height // 2, None))
    columns = (slice(width // 2), slice(width // 2, None))
    for i, color in enumerate(colors):
        pixels[rows[i // 2], columns[i % 2]] = color
    return pixels


def quarters(image: torch.Tensor) -> list[list[int]]:
    """Colours in the middle of each quarter of a square picture, (3, S, S)."""
    near, far = image.shape[1] // 4, image.shape[1] * 3 // 4
    return [image[:, y, x].tolist() for y in (near, far) for x in (near, far)]


def save(folder: Path, name: str, image: np.ndarray | Image.Image, **options) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(folder / name, **options)
    return folder / name


def read_one(folder: Path, size: int = 16) -> tuple[torch.Tensor, list[int]]:
    """The only picture of the only class."""
    image, facts = ImageFolderDataset(folder, size)[0]
    assert image.dtype == torch.uint8 and image.shape == (3, size, size)
    assert facts.dtype == torch.int64
    return image, facts.tolist()


def write_tree(root: Path, train: int = 3, val: int = 1) -> Path:
    """Three classes of pictures of many sizes and colours."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for name in ("cat", "ant", "bee"):
            for i in range(count):
                height, width = rng.integers(5, 60, 2)
                pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
                save(root / split / name, f"{name}_{i}.png", pixels)
    return root


@pytest.fixture
def root(tmp_path) -> Path:
    return write_tree(tmp_path / "images")


@pytest.fixture
def source(root) -> ImageFolderDataset:
    return ImageFolderDataset(root / "train", 24)


@pytest.fixture
def built(source, tmp_path) -> Path:
    """Its cache, in shards of four, four and one."""
    build_cache(tmp_path / "cache", {"train": source}, shard_pairs=4)
    return tmp_path / "cache"


def open_cached(folder: Path, source: ImageFolderDataset) -> CachedDataset:
    return CachedDataset(folder / "train", source, COMMAND)


def assert_same(cached: CachedDataset, source: ImageFolderDataset) -> None:
    assert len(cached) == len(source) and cached.classes == source.classes
    for index in range(len(source)):
        for a, b in zip(cached[index], source[index], strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)
            assert a.is_contiguous() and b.is_contiguous()


# what is found


def test_classes_and_images_are_sorted_and_other_files_ignored(tmp_path):
    for name in ("zebra", "Ant", "big bee", "über"):
        for file in ("2.png", "10.JPG", "b.jpeg", "c.BMP", "d.webp", "e.tif"):
            save(tmp_path / name, file, picture(), format="PNG")
        for file in (".hidden.png", "._a.jpg", "notes.txt", "Thumbs.db"):
            (tmp_path / name / file).write_bytes(b"no image")
        (tmp_path / name / "folder.png").mkdir()
    (tmp_path / ".cache").mkdir()
    (tmp_path / "list.txt").write_text("no folder")
    data = ImageFolderDataset(tmp_path, 8)
    assert data.classes == ("Ant", "big bee", "zebra", "über")
    files = ["10.JPG", "2.png", "b.jpeg", "c.BMP", "d.webp", "e.tif"]
    expected = [tmp_path / name / file for name in data.classes for file in files]
    assert [pair.image for pair in data.pairs] == expected
    assert all(pair.label is None for pair in data.pairs)
    assert [data[i][1][0].item() for i in range(len(data))] == sorted([0, 1, 2, 3] * 6)
    assert data.pairs[-1] == data.pairs[23] and data.pairs[5:8] == list(data.pairs)[5:8]
    with pytest.raises(IndexError):
        data[24]


def test_class_indices_follow_the_training_split(root):
    train = ImageFolderDataset(root / "train", 8)
    val = ImageFolderDataset(root / "val", 8, train.classes)
    assert val.classes == train.classes == ("ant", "bee", "cat")
    assert [val[i][1][0].item() for i in range(3)] == [0, 1, 2]
    turned = ImageFolderDataset(root / "val", 8, ("cat", "bee", "ant"))
    assert turned.classes == ("cat", "bee", "ant")
    for i, name in enumerate(turned.classes):
        assert turned[i][1][0] == i and turned.pairs[i].image.parent.name == name


def test_no_folder_no_classes_no_images(tmp_path):
    with pytest.raises(
        UserError, match=r"no folder .*nowhere to read \(No such.*: give with --datadir"
    ):
        ImageFolderDataset(tmp_path / "nowhere")
    save(tmp_path / "flat", "a.jpg", picture())
    with pytest.raises(UserError, match=r"flat holds no folders: there must be one of images"):
        ImageFolderDataset(tmp_path / "flat")
    with pytest.raises(UserError, match="no folder"):
        ImageFolderDataset(tmp_path / "flat/a.jpg")


def test_class_without_images_is_named(root):
    (root / "train/dog").mkdir()
    (root / "train/bat").mkdir()
    (root / "train/bat/readme.txt").write_text("none yet")
    with pytest.raises(UserError, match=r"2 of the 5 class folders .*no images \(bat, dog\)"):
        ImageFolderDataset(root / "train")


@pytest.mark.parametrize(("change", "words"), [("added", "has"), ("removed", "lacks")])
def test_validation_with_other_classes_is_refused(root, change, words):
    train = ImageFolderDataset(root / "train")
    if change == "added":
        for name in ("dog", "bat"):
            save(root / "val" / name, "a.png", picture())
    else:
        for name in ("cat", "bee"):
            shutil.rmtree(root / "val" / name)
    name = {"added": "bat", "removed": "bee"}[change]
    with pytest.raises(UserError, match=f"val {words} the class {name}, unlike the training"):
        ImageFolderDataset(root / "val", classes=train.classes)


# what is read


@pytest.mark.parametrize("size", [8, 16, 100])
def test_the_whole_picture_becomes_a_square(tmp_path, size):
    save(tmp_path / "a", "a.png", picture(36, 60))
    image, facts = read_one(tmp_path, size)
    assert quarters(image) == list(map(list, COLORS)) and facts == [0, 60, 36]


def palette_picture() -> Image.Image:
    """Colours by index, the third of them transparent."""
    indices = np.full((36, 60), 3, np.uint8)
    indices[:18, :30], indices[:18, 30:], indices[18:, :30] = 0, 1, 2
    image = Image.fromarray(indices).convert("P")
    image.putpalette([value for color in COLORS for value in color])
    return image


ODD = {
    "palette": ("a.png", palette_picture(), {}),
    "palette, some transparent": ("a.png", palette_picture(), {"transparency": b"\xff\x80\x00"}),
    "palette, one transparent": ("a.png", palette_picture(), {"transparency": 2}),
    "RGB, a colour transparent": ("a.png", picture(), {"transparency": COLORS[1]}),
    "RGBA": ("a.png", np.dstack((picture(), picture()[..., 0])), {}),
    "PNG called JPEG": ("a.JPEG", picture(), {"format": "PNG"}),
    "BMP": ("a.bmp", picture(), {}),
    "TIFF": ("a.tif", picture(), {"compression": "tiff_lzw"}),
    "CMYK TIFF": ("a.tif", Image.fromarray(picture()).convert("CMYK"), {}),
    "WebP": ("a.webp", picture(), {"lossless": True}),
    "JPEG": ("a.jpg", picture(), {"quality": 100, "subsampling": 0}),
    "progressive": ("a.jpg", picture(), {"quality": 100, "subsampling": 0, "progressive": True}),
    "CMYK": ("a.jpg", Image.fromarray(picture()).convert("CMYK"), {"quality": 100}),
}


@pytest.mark.filterwarnings("ignore")  # pytest's own filters, in place of the library's
@pytest.mark.parametrize("kind", ODD)
def test_odd_pictures_have_their_colours(tmp_path, kind):
    name, image, options = ODD[kind]
    path = save(tmp_path / "a", name, image, **options)
    if kind == "CMYK":  # inverted, as Adobe's programs and all others store it
        assert b"Adobe" in path.read_bytes() and Image.open(path).mode == "CMYK"
    found, facts = read_one(tmp_path)
    loss = 3 if name == "a.jpg" else 0
    assert np.abs(np.array(quarters(found)) - COLORS).max() <= loss
    assert facts == [0, 60, 36]


GREYS = {
    "L": ("a.jpg", lambda grey: Image.fromarray(grey.astype(np.uint8)), 1),
    "LA": ("a.png", lambda grey: Image.fromarray(grey.astype(np.uint8)).convert("LA"), 0),
    "16 bits": ("a.png", lambda grey: Image.fromarray((grey * 257).astype(np.uint16)), 0),
    "1 bit": ("a.png", lambda grey: Image.fromarray(grey > 100), 0),
}


@pytest.mark.parametrize("kind", GREYS)
def test_grey_pictures_have_their_values_three_times(tmp_path, kind):
    name, convert, loss = GREYS[kind]
    values = (0, 255, 255, 0) if kind == "1 bit" else (7, 255, 130, 64)
    image = convert(picture(colors=[(v, v, v) for v in values])[..., 0].astype(int))
    save(tmp_path / "a", name, image)
    found = np.array(quarters(read_one(tmp_path)[0]))
    assert np.abs(found - np.array(values)[:, None]).max() <= loss


def orientation(number: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


STORED = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: np.rot90(upright),
    7: lambda upright: np.rot90(upright, 2).swapaxes(0, 1),
    8: lambda upright: np.rot90(upright, -1),
}
"""How a camera that was held in each way (EXIF 2.3, tag 274) stores a picture."""


@pytest.mark.parametrize("number", STORED)
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.tif"])
def test_turned_picture_equals_the_upright_one(tmp_path, name, number):
    stored = np.ascontiguousarray(STORED[number](picture()))
    options = {"a.webp": {"lossless": True}, "a.jpg": {"quality": 100, "subsampling": 0}}
    save(tmp_path / "a", name, stored, exif=orientation(number), **options.get(name, {}))
    image, facts = read_one(tmp_path)
    loss = 3 if name == "a.jpg" else 0
    assert np.abs(np.array(quarters(image)) - COLORS).max() <= loss
    assert facts == [0, 60, 36]


def test_grey_of_16_bits_and_palette_are_turned_too(tmp_path):
    deep = (picture()[..., 0].astype(np.uint16) * 257)[:, ::-1]
    save(tmp_path / "16/a", "a.png", np.ascontiguousarray(deep), exif=orientation(2))
    assert [red for red, _, _ in quarters(read_one(tmp_path / "16")[0])] == [255, 0, 30, 255]
    mirrored = palette_picture().transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    save(tmp_path / "P/a", "a.png", mirrored, exif=orientation(2))
    assert quarters(read_one(tmp_path / "P")[0]) == list(map(list, COLORS))


def exif_with_resolution() -> bytearray:
    exif = orientation(6)
    exif[0x010F], exif[0x011A] = "maker", 72.0
    return bytearray(exif.tobytes())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
@pytest.mark.parametrize("harm", ["cut", "senseless", "empty", "another entry"])
def test_picture_with_corrupt_exif_is_used(tmp_path, name, harm):
    exif = exif_with_resolution()
    stored = picture()
    if harm == "another entry":  # its orientation can be read
        exif[43], stored = 1, np.ascontiguousarray(np.rot90(stored))
    exif = {"cut": exif[:20], "senseless": b"Exif\0\0" + b"\xa5" * 40, "empty": b"Exif\0\0"}.get(
        harm, exif
    )
    save(tmp_path / "a", name, stored, exif=bytes(exif))
    image, facts = read_one(tmp_path)
    assert np.abs(np.array(quarters(image)) - COLORS).max() <= 12 and facts == [0, 60, 36]


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.bmp", "a.webp", "a.tif"])
def test_truncated_picture_is_named(tmp_path, name):
    noise = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    path = save(tmp_path / "a", name, noise)
    whole = path.read_bytes()
    for share in (0, 0.1, 0.5, 0.95):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(UserError, match=rf"a/{name} is damaged \(.*\): copy it again"):
            read_one(tmp_path)


def test_what_is_no_image_or_too_large_is_named(tmp_path, monkeypatch):
    path = save(tmp_path / "a", "a.png", picture())
    monkeypatch.setenv("LEDNET_MAX_PIXELS", "2159")
    with pytest.raises(
        UserError, match=r"a/a\.png has 60x36 pixels, and 2,159 are the limit: shrink"
    ):
        read_one(tmp_path)
    path.write_text("<html>404</html>")
    with pytest.raises(UserError, match=r"a/a\.png is damaged \(or no PNG, JPEG"):
        read_one(tmp_path)
    save(tmp_path / "b/a", "a.tif", Image.fromarray(np.ones((4, 4), np.float32)))
    with pytest.raises(UserError, match=r"b/a/a\.tif has 32-bit values"):
        read_one(tmp_path / "b")


# the cache


@pytest.mark.parametrize("workers", [0, 2])
def test_cached_pictures_are_those_of_the_files(root, tmp_path, workers):
    train = ImageFolderDataset(root / "train", 24)
    splits = {"train": train, "val": ImageFolderDataset(root / "val", 24, train.classes)}
    build_cache(tmp_path / "cache", splits, workers, shard_pairs=4)
    for split, source in splits.items():
        assert_same(CachedDataset(tmp_path / "cache" / split, source, COMMAND), source)
    shards = sorted((tmp_path / "cache/train").glob("*.npy"))
    assert [np.load(path).shape for path in shards] == [(n, 3, 24, 24) for n in (4, 4, 1)]


def test_loaders_and_pickles_take_it(built, source):
    cached = open_cached(built, source)
    cached.verify()
    assert_same(pickle.loads(pickle.dumps(cached)), source)
    loaders = [DataLoader(data, batch_size=4, num_workers=2) for data in (cached, source)]
    for ours, theirs in zip(*loaders, strict=True):
        assert all(map(torch.equal, ours, theirs))
    assert ours[0].shape == (1, 3, 24, 24) and ours[1].shape == (1, 3)
    for tensor in cached[0]:
        tensor.zero_()
    assert_same(cached, source)


def test_stopped_build_goes_on(built, source, root, tmp_path, monkeypatch):
    path = root / "train/bee/bee_2.png"  # the sixth
    whole, status = path.read_bytes(), path.stat()
    path.write_bytes(whole[:-30])
    with pytest.raises(UserError, match=r"bee/bee_2\.png is damaged"):
        build_cache(tmp_path / "other", {"train": source}, shard_pairs=4)
    with pytest.raises(UserError, match=f"unfinished.*`{COMMAND}`"):
        open_cached(tmp_path / "other", source)
    path.write_bytes(whole)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    decoded, encode = [], ImageFolderDataset.encode

    def watched(self, index):
        decoded.append(index)
        return encode(self, index)

    monkeypatch.setattr(ImageFolderDataset, "encode", watched)
    build_cache(tmp_path / "other", {"train": source}, shard_pairs=4)
    assert decoded == [4, 5, 6, 7, 8]
    assert content(tmp_path / "other") == content(built)


def test_changed_data_and_options_are_refused(built, source, root):
    other = ImageFolderDataset(root / "train", 20)
    with pytest.raises(UserError, match=r"size \(\[24, 24\], not \[20, 20\]\).*--rebuild`"):
        open_cached(built, other)
    (root / "train/cat").rename(root / "train/dog")
    with pytest.raises(UserError, match="differs in its classes"):
        open_cached(built, ImageFolderDataset(root / "train", 24))
    (root / "train/dog").rename(root / "train/cat")
    save(root / "train/cat", "new.png", picture())
    more = ImageFolderDataset(root / "train", 24)
    with pytest.raises(UserError, match=r"stale or damaged \(first file: 'cat/new\.png'\)"):
        open_cached(built, more)
    build_cache(built, {"train": more}, shard_pairs=4)
    assert_same(open_cached(built, more), more)
    save(root / "train/ant", "ant_1.png", picture(9, 9))
    with pytest.raises(UserError, match=r"stale or damaged \(first file: 'ant/ant_1\.png'\)"):
        open_cached(built, more)
    (root / "train/ant/ant_1.png").unlink()
    with pytest.raises(UserError, match=r"stale or damaged \(first file: 'ant/ant_1\.png'\)"):
        open_cached(built, ImageFolderDataset(root / "train", 24))


def test_pictures_after_a_full_last_shard_are_noticed(source, root, tmp_path):
    build_cache(tmp_path / "cache", {"train": source}, shard_pairs=3)
    save(root / "train/cat", "new.png", picture())
    with pytest.raises(UserError, match=r"unfinished, .* \(first file: '.*/000003\.json'\)"):
        open_cached(tmp_path / "cache", ImageFolderDataset(root / "train", 24))


def test_cache_of_a_segmentation_is_no_cache_of_pictures(built, source, camvid, tmp_path):
    pairs = open_dataset("camvid", camvid, "train")
    pairs.size = (24, 24)
    build_cache(tmp_path / "pairs", {"train": pairs})
    with pytest.raises(UserError, match="differs in its classes"):
        open_cached(tmp_path / "pairs", source)
    with pytest.raises(UserError, match="differs in its classes"):
        open_cached(built, pairs)


def test_unreadable_picture_is_replaced_where_skipping(source, root):
    sound = [source[i] for i in range(9)]
    skipping = SkipCorruptDataset(source)
    assert not hasattr(skipping, "scheme")
    (root / "train/bee/bee_1.png").write_bytes(b"torn")
    (root / "train/cat/cat_2.png").unlink()
    for index, other in ((3, 3), (4, 5), (5, 5), (8, 0)):
        assert all(map(torch.equal, skipping[index], sound[other]))
    damaged = skipping.damaged.nonzero().flatten().tolist()
    assert [skipping.pairs[i].image.name for i in damaged] == ["bee_1.png", "cat_2.png"]


# real pictures and the script


def test_real_pictures_are_those_that_torchvision_lists(real_data, tmp_path):
    folder = real_data / "data/imagefolder_cifar10/train"
    source, listed = ImageFolderDataset(folder, 40), ImageFolder(str(folder))
    assert list(source.classes) == listed.classes
    assert [str(pair.image) for pair in source.pairs] == [path for path, _ in listed.samples]
    build_cache(tmp_path / "cache", {"train": source}, workers=1)
    cached = open_cached(tmp_path / "cache", source)
    assert cached.metadata.tolist() == [[target, 32, 32] for _, target in listed.samples]
    for index in range(0, len(source), 37):
        assert all(map(torch.equal, cached[index], source[index]))


def test_script_builds_verifies_and_prints_the_training_command(run_script, run_inside, root):
    """In a process of its own: what goes wrong with a picture's EXIF is not on the screen."""
    stored = np.ascontiguousarray(np.rot90(picture()))
    save(root / "train/ant", "odd.jpg", stored, exif=bytes(exif_with_resolution()[:60]))
    transparent = {"transparency": b"\xff\x80\x00"}
    save(root / "train/ant", "odd.png", palette_picture(), **transparent)
    folder = root.parent / "the cache"
    flags = ("--datadir", root, "--cache", folder, "--stored-size", 24)
    result = run_script("datasets/prepare_imagenet.py", *flags, "--workers", 1)
    assert result.returncode == 0, result.stderr
    assert "arning" not in result.stderr, result.stderr
    told, command = result.stdout.splitlines()
    assert told == f"{folder}: 11 and 3 images of 3 classes, 24x24; train with"
    train = shlex.split(command)
    assert train[0] == "python" and train[1].endswith("imagenet/lednet_imagenet.py")
    assert train[2:] == list(map(str, flags))

    def again(*more: object):
        return run_inside("datasets/prepare_imagenet.py", *flags, "--workers", 0, *more)

    before = content(folder)
    assert again("--verify").returncode == 0
    other = again("--stored-size", 30)
    assert_refused(other, "differs in its size ([24, 24], not [30, 30])", "--rebuild")
    path = folder / "val/000000.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    assert_refused(again("--verify"), str(path), "prepare_imagenet.py", "--stored-size")
    assert again().returncode == 0 and content(folder) == before
    assert again("--stored-size", 0).returncode == 2
    assert_refused(again("--datadir", root / "train"), "no folder", "--datadir")
    shutil.rmtree(root / "val/bee")
    assert_refused(again(), "val lacks the class bee")

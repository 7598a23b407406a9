"""Folders of classes: images of any kind are read correctly, and can be cached."""

import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import content, flip_bit
from PIL import Image
from torchvision.datasets import ImageFolder

from lednet import UserError
from lednet.data.cache import CachedDataset, build_cache
from lednet.data.imagefolder import ImageFolderDataset

COMMAND = "python build"
COLORS = ((255, 0, 0), (0, 200, 0), (30, 60, 250), (255, 255, 255))
"""Of the quarters of an image: top left, top right, bottom left, bottom right."""


def quartered(height: int = 36, width: int = 60, colors=COLORS) -> np.ndarray:
    pixels = np.empty((height, width, 3), np.uint8)
    rows = (slice(height // 2), slice(height // 2, None))
    columns = (slice(width // 2), slice(width // 2, None))
    for i, color in enumerate(colors):
        pixels[rows[i // 2], columns[i % 2]] = color
    return pixels


def quarters(image: torch.Tensor) -> list[list[int]]:
    """Colours in the middle of each quarter of a square image, (3, S, S)."""
    near, far = image.shape[1] // 4, image.shape[1] * 3 // 4
    return [image[:, y, x].tolist() for y in (near, far) for x in (near, far)]


def save(folder: Path, name: str, image: np.ndarray | Image.Image, **options) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(folder / name, **options)
    return folder / name


def read_one(folder: Path, size: int = 16) -> tuple[torch.Tensor, list[int]]:
    """The only image of the only class."""
    image, facts = ImageFolderDataset(folder, size)[0]
    assert image.dtype == torch.uint8 and image.shape == (3, size, size)
    assert facts.dtype == torch.int64
    return image, facts.tolist()


def write_tree(root: Path, train: int = 3, val: int = 1) -> Path:
    """Three classes of images of many sizes and colours."""
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


def open_cached(folder: Path, source: ImageFolderDataset) -> CachedDataset:
    return CachedDataset(folder / "train", source, COMMAND)


def assert_same(cached: CachedDataset, source: ImageFolderDataset) -> None:
    assert len(cached) == len(source) and cached.classes == source.classes
    for index in range(len(source)):
        for a, b in zip(cached[index], source[index], strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)
            assert a.is_contiguous() and b.is_contiguous()


# listing


def test_image_folder_lists_classes_and_images_in_order(tmp_path):
    files = ["10.JPG", "2.png", "b.jpeg", "c.BMP", "d.webp", "e.tif"]
    for name in ("zebra", "Ant", "über"):
        for file in reversed(files):
            save(tmp_path / name, file, quartered(), format="PNG")
        for file in (".hidden.png", "notes.txt"):
            (tmp_path / name / file).write_bytes(b"no image")
        (tmp_path / name / "folder.png").mkdir()
    (tmp_path / ".cache").mkdir()
    (tmp_path / "list.txt").write_text("no folder")
    data = ImageFolderDataset(tmp_path, 8)
    assert data.classes == ("Ant", "zebra", "über")
    expected = [tmp_path / name / file for name in data.classes for file in files]
    assert [pair.image for pair in data.pairs] == expected
    assert all(pair.label is None for pair in data.pairs)
    assert [data[i][1][0].item() for i in range(len(data))] == sorted([0, 1, 2] * 6)
    assert data.pairs[-1] == data.pairs[17] and data.pairs[5:8] == list(data.pairs)[5:8]
    with pytest.raises(IndexError):
        data[18]


def test_image_folder_class_indices_follow_training_split(root):
    turned = ImageFolderDataset(root / "val", 8, ("cat", "bee", "ant"))
    assert turned.classes == ("cat", "bee", "ant")
    for i, name in enumerate(turned.classes):
        assert turned[i][1][0] == i and turned.pairs[i].image.parent.name == name


@pytest.mark.parametrize(
    ("change", "folder", "words"),
    [
        (None, "nowhere", r"no folder .*nowhere to read \(No such.*: give with --datadir"),
        (None, "val/cat", r"cat holds no folders: there must be one of images"),
        (None, "val/cat/cat_0.png", "no folder"),
        ("train/dog train/bat", "train", r"2 of the 5 class folders .*no images \(bat, dog\)"),
        ("val/dog val/bat", "val", "val has the class bat, unlike the training"),
        ("-val/cat -val/bee", "val", "val lacks the class bee, unlike the training"),
    ],
)
def test_image_folder_invalid_folders_are_refused(root, change, folder, words):
    classes = ("ant", "bee", "cat") if folder == "val" else None
    for name in (change or "").split():
        shutil.rmtree(root / name[1:]) if name[0] == "-" else (root / name).mkdir()
    with pytest.raises(UserError, match=words):
        ImageFolderDataset(root / folder, classes=classes)


# reading


def palette_image() -> Image.Image:
    """Colours by index, the third of them transparent."""
    indices = np.full((36, 60), 3, np.uint8)
    indices[:18, :30], indices[:18, 30:], indices[18:, :30] = 0, 1, 2
    image = Image.fromarray(indices).convert("P")
    image.putpalette([value for color in COLORS for value in color])
    return image


BEST = {"quality": 100, "subsampling": 0}
KINDS = {
    "palette": ("a.png", palette_image(), {}),
    "palette, some transparent": ("a.png", palette_image(), {"transparency": b"\xff\x80\x00"}),
    "RGB, a colour transparent": ("a.png", quartered(), {"transparency": COLORS[1]}),
    "RGBA": ("a.png", np.dstack((quartered(), quartered()[..., 0])), {}),
    "PNG called JPEG": ("a.JPEG", quartered(), {"format": "PNG"}),
    "BMP": ("a.bmp", quartered(), {}),
    "TIFF": ("a.tif", quartered(), {"compression": "tiff_lzw"}),
    "CMYK TIFF": ("a.tif", Image.fromarray(quartered()).convert("CMYK"), {}),
    "WebP": ("a.webp", quartered(), {"lossless": True}),
    "JPEG": ("a.jpg", quartered(), BEST),
    "progressive": ("a.jpg", quartered(), BEST | {"progressive": True}),
    "CMYK": ("a.jpg", Image.fromarray(quartered()).convert("CMYK"), {"quality": 100}),
}


@pytest.mark.filterwarnings("ignore")  # pytest's own filters, in place of the library's
@pytest.mark.parametrize("kind", KINDS)
def test_getitem_any_format_has_its_colours(tmp_path, kind):
    name, image, options = KINDS[kind]
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
def test_getitem_grey_image_has_three_equal_channels(tmp_path, kind):
    name, convert, loss = GREYS[kind]
    values = (0, 255, 255, 0) if kind == "1 bit" else (7, 255, 130, 64)
    image = convert(quartered(colors=[(v, v, v) for v in values])[..., 0].astype(int))
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
"""How a camera that was held in each way (EXIF 2.3, tag 274) stores an image."""
FORMATS = {"a.png": {}, "a.jpg": BEST, "a.webp": {"lossless": True}, "a.tif": {}}


@pytest.mark.parametrize(
    ("name", "number"), [*(("a.png", i) for i in STORED), *((name, 6) for name in FORMATS)]
)
def test_getitem_exif_orientation_is_applied(tmp_path, name, number):
    stored = np.ascontiguousarray(STORED[number](quartered()))
    save(tmp_path / "a", name, stored, exif=orientation(number), **FORMATS[name])
    image, facts = read_one(tmp_path)
    assert np.abs(np.array(quarters(image)) - COLORS).max() <= 3 * (name == "a.jpg")
    assert facts == [0, 60, 36]


def exif_with_resolution() -> bytes:
    exif = orientation(6)
    exif[0x010F], exif[0x011A] = "maker", 72.0
    return exif.tobytes()


EXIF = exif_with_resolution()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
@pytest.mark.parametrize("exif", [EXIF[:20], b"Exif\0\0" + b"\xa5" * 40, b"Exif\0\0"])
def test_getitem_corrupt_exif_is_ignored(tmp_path, name, exif):
    save(tmp_path / "a", name, quartered(), exif=exif)
    image, facts = read_one(tmp_path)
    assert np.abs(np.array(quarters(image)) - COLORS).max() <= 12 and facts == [0, 60, 36]


@pytest.mark.filterwarnings("ignore")
def test_getitem_exif_orientation_is_applied_beside_corrupt_entries(tmp_path):
    exif = bytearray(EXIF)
    exif[43] = 1
    save(tmp_path / "a", "a.png", np.ascontiguousarray(np.rot90(quartered())), exif=bytes(exif))
    assert quarters(read_one(tmp_path)[0]) == list(map(list, COLORS))


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.bmp", "a.webp", "a.tif"])
def test_getitem_truncated_image_is_named(tmp_path, name):
    noise = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    path = save(tmp_path / "a", name, noise)
    whole = path.read_bytes()
    for share in (0, 0.1, 0.95):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(UserError, match=rf"a/{name} is damaged \(.*\): copy it again"):
            read_one(tmp_path)


def test_getitem_invalid_image_is_named(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/a.png").write_text("not an image")
    with pytest.raises(UserError, match=r"a/a\.png is damaged \(or no PNG, JPEG"):
        read_one(tmp_path)
    save(tmp_path / "b/a", "a.tif", Image.fromarray(np.ones((4, 4), np.float32)))
    with pytest.raises(UserError, match=r"b/a/a\.tif has 32-bit values"):
        read_one(tmp_path / "b")


# the cache


def test_cache_equals_files(root, tmp_path):
    train = ImageFolderDataset(root / "train", 24)
    splits = {"train": train, "val": ImageFolderDataset(root / "val", 24, train.classes)}
    build_cache(tmp_path / "cache", splits, workers=1, shard_pairs=4)
    for split, source in splits.items():
        assert_same(CachedDataset(tmp_path / "cache" / split, source, COMMAND), source)
    shards = sorted((tmp_path / "cache/train").glob("*.npy"))
    assert [np.load(path).shape for path in shards] == [(n, 3, 24, 24) for n in (4, 4, 1)]


def test_open_cache_of_more_or_fewer_images_is_refused(root, tmp_path):
    def train() -> ImageFolderDataset:
        return ImageFolderDataset(root / "train", 24)

    build_cache(tmp_path, {"train": train()}, shard_pairs=3)
    save(root / "train/cat", "new.png", quartered())
    with pytest.raises(UserError, match=r"unfinished, .* \(first file: '.*/000003\.json'\)"):
        open_cached(tmp_path, train())
    build_cache(tmp_path, {"train": train()}, shard_pairs=3)
    assert_same(open_cached(tmp_path, train()), train())
    (root / "train/ant/ant_1.png").unlink()
    with pytest.raises(UserError, match=r"stale or damaged \(first file: 'ant/ant_1\.png'\)"):
        open_cached(tmp_path, train())


# real images and the script


def test_image_folder_real_images_equal_torchvision(real_data, tmp_path):
    folder = real_data / "data/imagefolder_cifar10/train"
    source, listed = ImageFolderDataset(folder, 40), ImageFolder(str(folder))
    assert list(source.classes) == listed.classes
    assert [str(pair.image) for pair in source.pairs] == [path for path, _ in listed.samples]
    build_cache(tmp_path / "cache", {"train": source}, workers=1)
    cached = open_cached(tmp_path / "cache", source)
    assert cached.metadata.tolist() == [[target, 32, 32] for _, target in listed.samples]
    for index in range(0, len(source), 37):
        assert all(map(torch.equal, cached[index], source[index]))


def test_prepare_imagenet_builds_verifies_and_prints_training_command(run_script, run_inside, root):
    """In a process of its own: warnings of an image's EXIF are not shown."""
    stored = np.ascontiguousarray(np.rot90(quartered()))
    save(root / "train/ant", "odd.jpg", stored, exif=EXIF[:60])
    save(root / "train/ant", "odd.png", palette_image(), transparency=b"\xff\x80\x00")
    folder = root.parent / "the cache"
    flags = ("--datadir", root, "--cache", folder, "--stored-size", 24)
    result = run_script("datasets/prepare_imagenet.py", *flags, "--workers", 1).check()
    assert "arning" not in result.stderr, result.stderr
    summary, command = result.stdout.splitlines()
    assert summary == f"{folder}: 11 and 3 images of 3 classes, 24x24; train with"
    train = shlex.split(command)
    assert train[0] == "python" and train[1].endswith("imagenet/lednet_imagenet.py")
    assert train[2:] == list(map(str, flags))

    def again(*more: object):
        return run_inside("datasets/prepare_imagenet.py", *flags, "--workers", 0, *more)

    before = content(folder)
    assert again("--verify").returncode == 0
    words = ("differs in its size ([24, 24], not [30, 30])", "--rebuild")
    again("--stored-size", 30).assert_error(*words)
    path = folder / "val/000000.npy"
    flip_bit(path)
    again("--verify").assert_error(str(path), "prepare_imagenet.py", "--stored-size")
    assert again().returncode == 0 and content(folder) == before
    assert again("--stored-size", 0).returncode == 2
    again("--datadir", root / "train").assert_error("no folder", "--datadir")

"""Label files of every bit depth, EXIF orientation of images, and pairs in subfolders."""

import logging
import struct
import zlib

import numpy as np
import pytest
from fuzzing import png_of
from PIL import Image

from lednet.data import image_io
from lednet.data.image_io import open_image, read_ids
from lednet.data.registry import open_dataset
from lednet.errors import UserError

IDS = np.arange(64).reshape(4, 16).astype(np.uint8)


def write_png(path, ids, bits, palette):
    """Write a PNG of less than 8 bits, which Pillow does not do for greyscale."""
    height, width = ids.shape
    samples = ids.reshape(height, -1, 8 // bits).astype(np.uint16)
    shifts = bits * np.arange(8 // bits)[::-1]
    rows = (samples << shifts).sum(axis=2).astype(np.uint8)

    header = struct.pack(">IIBBBBB", width, height, bits, 3 if palette else 0, 0, 0, 0)
    colors = [(b"PLTE", bytes(range(3 * 2**bits))[::-1])] if palette else []
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    path.write_bytes(png_of([(b"IHDR", header), *colors, (b"IDAT", data), (b"IEND", b"")]))


@pytest.mark.parametrize("palette", [False, True])
@pytest.mark.parametrize(("bits", "top"), [(1, 2), (2, 3), (2, 4), (4, 6), (4, 16)])
def test_read_ids_low_bit_depths_as_stored(tmp_path, bits, top, palette):
    write_png(tmp_path / "a.png", IDS % top, bits, palette)
    np.testing.assert_array_equal(read_ids(tmp_path / "a.png"), IDS % top)


@pytest.mark.parametrize(
    ("suffix", "mode"),
    [
        *((".png", mode) for mode in ("1", "L", "P", "LA", "I;16")),
        *((".tif", mode) for mode in ("1", "L", "P", "LA", "I;16", "I")),
        *((".bmp", mode) for mode in ("1", "L", "P")),
    ],
)
def test_read_ids_modes_and_formats_as_stored(tmp_path, suffix, mode):
    ids = IDS % 2 if mode == "1" else IDS
    image = Image.fromarray(ids)
    if mode == "1":
        image = Image.fromarray(ids.astype(bool))
    elif mode == "P":
        image.putpalette(list(range(255, -1, -1)) * 3)
    elif mode == "LA":
        image.putalpha(255)
    elif mode in ("I;16", "I"):
        image = Image.fromarray(ids.astype(np.uint16 if mode == "I;16" else np.int32))
    path = tmp_path / f"a{suffix}"
    image.save(path)
    np.testing.assert_array_equal(read_ids(path), ids)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.full((2, 2), 300, np.uint16), r"has 16-bit values \(300\), and ids are 0 to 255"),
        (np.zeros((2, 2, 3), np.uint8), r"is a color image \(mode RGB\), not 8-bit ids"),
        (np.zeros((2, 2, 4), np.uint8), r"is a color image \(mode RGBA\)"),
        (np.zeros((2, 2, 2), np.uint8), "has transparent pixels, which have no id"),
    ],
)
def test_read_ids_other_images_are_refused_by_name(tmp_path, pixels, message):
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    with pytest.raises(UserError, match=f"a.png {message}"):
        read_ids(path)


def write_pair(root, name, image, label, **options):
    for kind, pixels in (("images", image), ("labels", label)):
        suffix = ".jpg" if kind == "images" and options else ".png"
        path = root / kind / f"{name}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, **(options if kind == "images" else {}))
    (root / "classes.yaml").write_text("classes: [{name: a}, {name: b}]\nignore: [255]\n")


@pytest.fixture
def rotated(tmp_path):
    """A function that writes a photograph with EXIF orientation 6, and its upright label."""

    def write(height, width, upright=True):
        label = np.zeros((height, width), np.uint8)
        label[: height // 2] = 1
        stored = np.ascontiguousarray(np.rot90(label))
        exif = Image.Exif()
        exif[274] = 6
        image = np.repeat(stored[..., None] * np.uint8(200), 3, axis=2)
        write_pair(
            tmp_path, "a", image, label if upright else stored, exif=exif.tobytes(), quality=95
        )
        return open_dataset("folders", tmp_path, "")

    return write


@pytest.mark.parametrize(
    ("size", "upright", "logged"),
    [((48, 32), True, False), ((48, 32), False, False), ((32, 32), True, True)],
)
def test_read_exif_orientation_image_matches_label(rotated, caplog, size, upright, logged):
    image_io._warned.clear()
    data = rotated(*size, upright=upright)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            image, label = data.read(0)
            np.testing.assert_array_equal(image.mean(axis=2) > 100, label == 1)
    assert [("a.jpg" in r.message, "EXIF" in r.message) for r in caplog.records] == [
        (True, True)
    ] * logged


def test_read_exif_orientation_other_size_names_both(tmp_path, rotated):
    rotated(48, 32)
    Image.fromarray(np.zeros((5, 7), np.uint8)).save(tmp_path / "labels/a.png")
    with pytest.raises(UserError, match=r"7x5, its image a.jpg 48x32 \(32x48 turned by its EXIF"):
        open_dataset("folders", tmp_path, "").read(0)


def test_open_dataset_equal_names_in_two_folders_are_two_pairs(tmp_path):
    for folder, value in (("rec1", 0), ("rec2", 1)):
        image = np.full((8, 8, 3), 100 * value, np.uint8)
        write_pair(tmp_path, f"{folder}/0000", image, np.full((8, 8), value, np.uint8))
    data = open_dataset("folders", tmp_path, "")
    assert [data.read(i)[1].max() for i in range(2)] == [0, 1]
    held_out = open_dataset("folders", tmp_path, "val", val_prefix="rec2/")
    assert [pair.image.parent.name for pair in held_out.pairs] == ["rec2"]


def test_open_dataset_unused_images_are_logged(tmp_path, caplog):
    write_pair(tmp_path, "a", np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), np.uint8))
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "images/b.gif")
    open_dataset("folders", tmp_path, "")
    assert "1 image files are not used, because of their format or name: b.gif" in caplog.text


@pytest.mark.parametrize(
    ("name", "logged"), [("a.tif", 1), ("a.webp", 1), ("a.png", 1), ("b.jpg", 0)]
)
def test_open_image_with_several_images_takes_the_first_and_says_so(
    tmp_path, monkeypatch, caplog, name, logged
):
    monkeypatch.setattr(image_io, "_warned", set())
    first, *others = (Image.new("L" if name == "a.tif" else "RGB", (9, 9), v) for v in (9, 80, 160))
    options = {"format": "MPO"} if name == "b.jpg" else {}
    first.save(tmp_path / name, save_all=True, append_images=others, **options)
    for _ in range(2):
        assert np.abs(np.asarray(open_image(tmp_path / name)).astype(int) - 9).max() < 20
    assert len(caplog.records) == logged
    assert all(f"{name} holds 3 images" in record.getMessage() for record in caplog.records)

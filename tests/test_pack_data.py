"""Output of benchmarks/pack_data.py: equal labels, the same pairs, no incomplete files."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import make_camvid
from PIL import ExifTags, Image
from test_bad_input import assert_refused

from lednet.data.registry import open_dataset
from lednet.validation.splits import open_splits


@pytest.fixture
def pack(run_inside, tmp_path):
    """Pack into a folder of `tmp_path`; returns the finished process."""

    def run(*flags: object, out: str = "packed"):
        return run_inside("benchmarks/pack_data.py", "--out", tmp_path / out, *flags)

    return run


def files_below(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file()]


def assert_labels_are_equal(root: Path, packed: Path) -> set[str]:
    """Compare all PNG of one channel; returns their modes."""
    modes = set()
    for path in root.rglob("*.png"):
        with Image.open(path) as before:
            if before.mode not in ("RGB", "RGBA"):
                with Image.open(packed / path.relative_to(root)) as after:
                    assert (after.mode, after.getpalette()) == (before.mode, before.getpalette())
                    assert np.array_equal(np.array(after), np.array(before))
                assert (packed / path.relative_to(root)).stat().st_size <= path.stat().st_size
                modes.add(before.mode)
    return modes


def test_pack_cityscapes_keeps_pairs_and_labels(pack, toy_cityscapes, tmp_path):
    result = pack("--datadir", f"streets={toy_cityscapes}")
    assert result.returncode == 0, result.stderr
    packed = tmp_path / "packed/streets"
    assert {"L", "I;16"} <= assert_labels_are_equal(toy_cityscapes, packed)
    for split, kind in {"train": "fine", "test": "fine", "train_extra": "coarse"}.items():
        before, after = (
            open_dataset("cityscapes", root, split, annotations=kind)
            for root in (toy_cityscapes, packed)
        )
        for old, new in zip(before.pairs, after.pairs, strict=True):
            name = old.image.relative_to(toy_cityscapes).with_suffix(".webp")
            assert new.image == packed / name
            label = old.label and packed / old.label.relative_to(toy_cityscapes)
            assert new.label == label
        difference = before.read(0)[0].astype(int) - after.read(0)[0]
        assert 0 < np.abs(difference).mean() < 12
    images = len(list(toy_cityscapes.rglob("*_leftImg8bit.png")))
    colors = len(list(toy_cityscapes.rglob("*_color.png")))
    assert f"{images + colors} image files" in result.stdout and "PSNR" in result.stdout
    assert not open_splits("cityscapes", packed)[1]


def test_pack_palettes_few_bits_and_small_files_are_kept(pack, own_camvid, tmp_path):
    label = np.array(Image.open(own_camvid / "trainannot/train_000.png"))
    palette = Image.fromarray(label)
    palette.putpalette(list(range(255, -1, -1)) * 3)
    palette.save(own_camvid / "trainannot/train_000.png")
    Image.fromarray(label > 5).save(own_camvid / "trainannot/train_001.png")
    Image.fromarray(label).save(own_camvid / "trainannot/train_002.png", transparency=3)
    noise = np.random.default_rng(0).integers(0, 256, label.shape).astype(np.uint8)
    Image.fromarray(noise).save(own_camvid / "trainannot/train_003.png")
    (own_camvid / "classes.yaml").write_text("classes: []\n")
    (own_camvid / "train/.hidden.jpg").write_text("no image")
    assert pack("--datadir", own_camvid).returncode == 0
    packed = tmp_path / "packed/camvid"
    assert assert_labels_are_equal(own_camvid, packed) == {"P", "1", "L"}
    with Image.open(packed / "trainannot/train_002.png") as kept:
        assert kept.info["transparency"] == 3
    assert (packed / "classes.yaml").read_text() == "classes: []\n"
    assert not (packed / "train/.hidden.webp").exists()


def test_pack_grey_jpeg_is_an_image_and_keeps_its_exif(pack, tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    (tmp_path / "photos").mkdir()
    Image.linear_gradient("L").resize((40, 20)).save(tmp_path / "photos/a.b.JPG", exif=exif)
    assert pack("--datadir", tmp_path / "photos").returncode == 0
    with Image.open(tmp_path / "packed/photos/a.b.webp") as image:
        assert image.size == (40, 20) and image.getexif() == exif


def test_pack_golden_keeps_all_but_excluded_files(pack, camvid, tmp_path):
    golden = tmp_path / "reference"
    golden.mkdir()
    arrays = {"logits": np.zeros((20, 30), np.float32), "file": np.arange(5), "n": np.array("x")}
    np.savez(golden / "a.npz", **{k: v for k, v in arrays.items() if k != "file"})
    shutil.copy(camvid / "train/train_000.png", golden)
    Image.new("RGB", (8, 8)).save(golden / "b.jpg")
    (golden / "broken.npz").write_bytes(b"no zip")
    (golden / "same.pth.tar").write_bytes(b"1" * 2**21)
    flags = ("--datadir", f"c={camvid}", "--golden", golden, "--exclude", "*.pth.tar", "val*")
    assert pack(*flags).returncode == 0
    packed = tmp_path / "packed/golden"
    assert {path.name for path in packed.iterdir()} == {
        "a.npz", "train_000.png", "b.jpg", "broken.npz"
    }  # fmt: skip
    assert (packed / "a.npz").stat().st_size < (golden / "a.npz").stat().st_size
    with np.load(packed / "a.npz") as after:
        assert set(after) == {"logits", "n"}
        for name in after:
            assert after[name].dtype == arrays[name].dtype
            assert np.array_equal(after[name], arrays[name])
    for name in ("train_000.png", "b.jpg", "broken.npz"):
        assert (packed / name).read_bytes() == (golden / name).read_bytes()
    assert not list((tmp_path / "packed/c").glob("val*"))


def test_pack_after_interruption_resumes(pack, own_camvid, tmp_path):
    damaged = own_camvid / "val/val_001.png"
    content = damaged.read_bytes()
    damaged.write_bytes(content[:200])
    assert_refused(pack("--datadir", own_camvid), "val_001.png is damaged")
    damaged.write_bytes(content)
    assert pack("--datadir", own_camvid).returncode == 0
    packed = tmp_path / "packed/camvid"
    before = {path: path.stat().st_ino for path in files_below(packed)}
    assert len(before) == 16 and not list(packed.rglob(".*"))
    (packed / "train/train_003.webp").unlink()
    label = own_camvid / "valannot/val_000.png"
    Image.fromarray(np.array(Image.open(label)) // 2).save(label)
    os.utime(label, ns=(1, 1))  # older than what was packed of it
    assert pack("--datadir", own_camvid).returncode == 0
    fresh = {path.name for path in before if path.stat().st_ino != before[path]}
    assert fresh <= {"train_003.webp", "val_000.png"} and "val_000.png" in fresh
    assert (packed / "train/train_003.webp").is_file()
    assert_labels_are_equal(own_camvid, packed)


def test_pack_invalid_input_is_refused(pack, own_camvid, camvid, tmp_path):
    def datadir(*values: object, **options: str):
        return pack("--datadir", *values, **options)

    assert_refused(pack(), "nothing to do")
    assert_refused(datadir(tmp_path / "nowhere"), "nowhere is no folder")
    assert_refused(datadir("name="), "no folder")
    assert_refused(datadir(own_camvid, out="camvid/packed"), "--out is inside")
    assert_refused(datadir(own_camvid, out="camvid"), "--out is inside")
    assert_refused(pack("--datadir", own_camvid, "--quality", 0), "1 to 100")
    make_camvid(tmp_path / "others")
    assert_refused(datadir(own_camvid, out="others"), "holds other files")
    assert_refused(datadir(own_camvid, f"camvid={camvid}"), "would be one file")
    Image.new("RGB", (8, 8)).save(own_camvid / "val/val_001.jpg")
    assert_refused(datadir(own_camvid), "val_001.jpg", "val_001.png", "keep one")
    assert not (tmp_path / "packed").exists()
    assert datadir(camvid).returncode == 0
    assert_refused(pack("--datadir", camvid, "--quality", 70), "name another --out")


def test_pack_over_limit_suggests_a_quality_that_fits(pack, camvid, tmp_path):
    assert pack("--datadir", f"c={camvid}").returncode == 0
    sizes = [sum(path.stat().st_size for path in (tmp_path / "packed/c").rglob(pattern))
             for pattern in ("*.webp", "*.png")]  # fmt: skip
    limit = (sizes[0] * 0.8 + sizes[1]) / 2**20
    flags = ("--datadir", f"c={camvid}", "--limit-mib", limit)
    result = pack(*flags)
    assert_refused(result, "MiB: try --quality ", "another --out")
    quality = int(result.stderr.split("--quality ")[1].split()[0])
    assert 1 < quality < 80
    assert pack(*flags, "--quality", quality, out="smaller").returncode == 0
    assert_refused(pack(*flags, "--quality", quality + 1, out="larger"), f"--quality {quality} ")
    assert_refused(pack("--datadir", f"c={camvid}", "--limit-mib", 0), "try --exclude")

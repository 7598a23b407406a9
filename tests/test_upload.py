"""Files for the Cityscapes benchmark: names, label images, the zip, and the check of them."""

import os
import re
import shutil
import struct
import time
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image
from test_bad_input import assert_refused

from lednet import UserError
from lednet.data.image_io import write_label_map
from lednet.evaluation.cityscapes_submission import (
    CITIES,
    MAX_BYTES,
    check_submission,
    frame_name,
    image_frames,
    prediction_name,
    write_submission,
)

SIZE = (16, 32)
FRAMES = [f"{city}_000{i}00_000019" for i, city in enumerate(CITIES["test"])]
IDS = np.arange(16 * 32, dtype=np.uint8).reshape(SIZE) % 34


@pytest.mark.parametrize(
    ("path", "frame"),
    [
        ("a/berlin_000543_000019_leftImg8bit.png", "berlin_000543_000019"),
        ("munich_000000_000019_gtFine_labelIds.png", "munich_000000_000019"),
        ("bad-honnef_000000_000000_pred_labelIds.png", "bad-honnef_000000_000000"),
        ("bonn_000000_000019.jpg", "bonn_000000_000019"),
    ],
)
def test_frame_name(path, frame):
    assert frame_name(path) == frame


@pytest.mark.parametrize(
    "name", ["berlin.png", "berlin_0_19_leftImg8bit.png", "x/000000_000019_leftImg8bit.png",
             "berlin_000000_0000190.png", "_000000_000019.png"]
)  # fmt: skip
def test_name_that_is_no_frame(name):
    with pytest.raises(UserError, match=re.escape(name)):
        frame_name(name)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_prediction_name(suffix):
    name = prediction_name(f"/data/berlin/berlin_000543_000019_leftImg8bit.{suffix}")
    assert name == "berlin_000543_000019_pred_labelIds.png"


def test_label_ids_are_written_as_8_bit_grey(tmp_path):
    write_label_map(tmp_path / "ids.png", IDS)
    image = Image.open(tmp_path / "ids.png")
    assert (image.mode, image.format, image.size) == ("L", "PNG", (32, 16))
    np.testing.assert_array_equal(np.array(image), IDS)


@pytest.mark.parametrize("ids", [IDS.astype(np.int64), IDS[None]])
def test_label_ids_of_another_type_or_shape(tmp_path, ids):
    with pytest.raises(ValueError, match="uint8"):
        write_label_map(tmp_path / "ids.png", ids)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def folder(tmp_path):
    """A good upload of six small images, still in a folder."""
    for frame in FRAMES:
        write_label_map(tmp_path / "pred" / prediction_name(frame), IDS)
    return tmp_path / "pred"


@pytest.fixture(params=["folder", "zip"])
def check(request, folder, tmp_path):
    """Check the folder as it is at the time of the call, or a zip made of it."""

    def run(frames=FRAMES, **options) -> list[str]:
        path = folder
        if request.param == "zip":
            path = tmp_path / "pred.zip"
            write_submission(path, [p for p in folder.rglob("*") if p.is_file()])
        options = {"size": SIZE, "progress": False, **options}
        return check_submission(path, frames=frames, **options)

    return run


def file(folder, i: int = 0):
    """Path of the i-th prediction."""
    return folder / prediction_name(FRAMES[i])


def assert_one(problems: list[str], *words: str) -> None:
    assert len(problems) == 1, problems
    for word in words:
        assert word in problems[0]
    assert "\n" not in problems[0]


def test_good_upload(check):
    assert check() == []


def test_zip_is_flat_stored_and_the_same_every_time(folder, tmp_path, monkeypatch):
    files = sorted(folder.iterdir())
    (tmp_path / "other").mkdir()
    write_submission(tmp_path / "a.zip", files)
    for path in files:  # copies of another time and mode, given in another order
        copy = shutil.copyfile(path, tmp_path / "other" / path.name)
        copy.chmod(0o600)
        os.utime(copy, (1e9, 1e9))
    monkeypatch.setattr(time, "time", lambda: 1.2e9)
    write_submission(tmp_path / "b.zip", reversed(sorted((tmp_path / "other").iterdir())))
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert archive.namelist() == [path.name for path in files]
        assert {m.compress_type for m in archive.infolist()} == {zipfile.ZIP_STORED}
        assert archive.read(files[2].name) == files[2].read_bytes()


def test_zip_of_a_missing_file_leaves_the_old_one(folder, tmp_path):
    (tmp_path / "up.zip").write_text("old")
    with pytest.raises(UserError, match=r"cannot read .*gone\.png"):
        write_submission(tmp_path / "up.zip", [*folder.iterdir(), folder / "gone.png"])
    assert (tmp_path / "up.zip").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pred", "up.zip"]


def test_zip_of_two_files_of_one_name(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "again")
    with pytest.raises(UserError, match=r"berlin_000000_000019_pred_labelIds\.png"):
        write_submission(tmp_path / "up.zip", [file(folder), file(tmp_path / "again")])


def test_missing_file(check, folder):
    file(folder, 1).unlink()
    problems = check()
    assert_one(problems[:1], "holds 5 .png files, and 6 are wanted")
    assert_one(problems[1:], "1 frame without a file (bielefeld_000100_000019)")


def test_numbers_of_the_subsets(check):
    assert_one(check(None), "6 .png files, and 1525 are wanted")
    problems = check(None, subset="val")
    assert_one(problems[:1], "500 are wanted")
    assert_one(problems[1:], "6 files of a city outside val (berlin_", "and 3 more")


def test_city_of_another_subset(check, folder):
    file(folder).rename(folder / "frankfurt_000000_000294_pred_labelIds.png")
    problems = check(None)
    assert_one(problems[1:], "1 file of a city outside test (frankfurt_000000_000294_pred")


def test_unknown_frame(check, folder):
    file(folder).rename(folder / "berlin_000009_000019_pred_labelIds.png")
    problems = check()
    assert_one(problems[:1], "without a file (berlin_000000_000019)")
    assert_one(problems[1:], "1 file of a frame outside test (berlin_000009_000019_pred")


def test_bad_name(check, folder):
    file(folder).rename(folder / "berlin_1.png")
    assert_one(check()[:1], "1 file not named <city>_123456_123456*.png (berlin_1.png)")


def test_two_files_for_one_frame(check, folder):
    shutil.copy(file(folder), folder / "berlin_000000_000019.png")
    problems = check()
    assert_one(problems[:1], "holds 7 .png files, and 6")
    assert_one(
        problems[1:],
        "1 frame with more than one file "
        "(berlin_000000_000019.png / berlin_000000_000019_pred_labelIds.png)",
    )


def test_extra_files(check, folder):
    (folder / ".DS_Store").write_text("x")
    (folder / "notes.txt").write_text("x")
    assert_one(check(), "2 files other than .png (.DS_Store, notes.txt)")


def test_another_format(check, folder):
    Image.fromarray(IDS).save(file(folder), format="JPEG")
    assert_one(check(), "1 file called .png and of another format (berlin_")


@pytest.mark.parametrize("length", [0, 4, 20, 60, 0.5, -20])
def test_truncated_file(check, folder, length):
    data = file(folder).read_bytes()
    end = int(len(data) * length) if isinstance(length, float) else length
    file(folder).write_bytes(data[:end])
    assert_one(check(), "1 file damaged or unreadable (berlin_000000_000019_pred_labelIds.png)")


def test_flipped_bit(check, folder):
    data = bytearray(file(folder).read_bytes())
    data[data.index(b"IDAT") + 30] ^= 1
    file(folder).write_bytes(data)
    assert_one(check(), "1 file damaged or unreadable (berlin_")


@pytest.mark.parametrize(
    ("mode", "words"),
    [("P", "1-bit palette"), ("RGB", "8-bit RGB"), ("RGBA", "8-bit RGB with alpha"),
     ("LA", "8-bit grey with alpha"), ("I;16", "16-bit grey"), ("1", "1-bit grey")],
)  # fmt: skip
def test_mode(check, folder, mode, words):
    Image.new(mode, (32, 16)).save(file(folder))
    assert_one(check(), "1 file not 8-bit single-channel (berlin_", f": {words})")


def test_sizes_name_three_and_count_the_rest(check, folder):
    for i in range(5):
        write_label_map(file(folder, i), IDS[:8])
    problems = check()
    assert_one(problems, "5 files of the wrong size (berlin_", ": 32x8", "and 2 more")
    assert "leverkusen" not in problems[0]


def test_palette_of_256(check, folder):
    Image.fromarray(IDS).convert("RGB").quantize(256).save(file(folder), bits=8)
    assert_one(check(), ": 8-bit palette)")


@pytest.mark.parametrize("size", [(17, 32), (16, 33)])
def test_larger_image_is_not_decoded(check, folder, size):
    write_label_map(file(folder), np.full(size, 99, np.uint8))
    assert_one(
        check(), f"1 file of the wrong size (berlin_000000_000019_pred_labelIds.png: {size[1]}x"
    )


@pytest.mark.parametrize("value", [34, 254])
def test_ids_outside_the_table(check, folder, value):
    ids = IDS.copy()
    ids[3, 4] = value
    write_label_map(file(folder), ids)
    assert_one(check(), "1 file with ids outside the table, 0 to 33 (berlin_", f": {value})")


def test_void_of_train_ids(check, folder):
    ids = IDS.copy()
    ids[3, 4] = 255
    write_label_map(file(folder), ids)
    assert_one(check(), "1 file with 255, the void of trainIds (berlin_", "labelIds")


def test_train_ids_throughout(check, folder):
    for i in range(6):
        write_label_map(file(folder, i), IDS % 19)
    assert_one(check(), "no file of", "above 18", "trainIds")
    ids = IDS % 19
    ids[0, 0] = 19  # one id above them, in one file, is enough
    write_label_map(file(folder, 5), ids)
    assert check() == []


def test_train_ids_with_void(check, folder):
    for i in range(6):
        ids = IDS % 19
        ids[0, 0] = 255
        write_label_map(file(folder, i), ids)
    problems = check()
    assert_one(problems[:1], "6 files with 255, the void of trainIds")
    assert_one(problems[1:], "no file of", "above 18")


def test_every_kind_at_once_is_a_sentence_each(check, folder):
    """No problem hides another, and each kind says it once."""
    file(folder, 0).write_bytes(b"\x89PNG\r\n\x1a\n")
    Image.new("P", (32, 16)).save(file(folder, 1))
    write_label_map(file(folder, 2), IDS[:8])
    write_label_map(file(folder, 3), IDS + np.uint8(40))
    file(folder, 4).rename(folder / "x.png")
    Image.fromarray(IDS).save(file(folder, 5), format="JPEG")
    (folder / "readme").write_text("x")
    problems = check()
    for word in ("not named", "without a file", "other than .png", "damaged", "8-bit single",
                 "wrong size", "outside the table", "another format"):  # fmt: skip
        assert sum(word in problem for problem in problems) == 1, (word, problems)
    assert len(problems) == 8


def test_folder_is_searched_and_a_zip_must_be_flat(folder, tmp_path):
    (folder / "berlin").mkdir()
    file(folder).rename(file(folder / "berlin"))
    options = {"frames": FRAMES, "size": SIZE, "progress": False}
    assert check_submission(folder, **options) == []
    shutil.make_archive(str(tmp_path / "up"), "zip", tmp_path, "pred")
    assert_one(check_submission(tmp_path / "up.zip", **options), "1 folder in the zip (pred/)")


def test_one_name_twice_in_a_zip(folder, tmp_path):
    write_submission(tmp_path / "up.zip", folder.iterdir())
    with pytest.warns(UserWarning), zipfile.ZipFile(tmp_path / "up.zip", "a") as archive:
        archive.write(file(folder), file(folder).name)
    problems = check_submission(tmp_path / "up.zip", frames=FRAMES, size=SIZE, progress=False)
    assert_one(problems[1:], "1 frame with more than one file (berlin_")


def pack(path, folder, method: int, replacement: bytes | None = None) -> None:
    """Zip the folder, the first image replaced and compressed."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(file(folder).name, replacement or file(folder).read_bytes(), method)
        for i in range(1, 6):
            archive.write(file(folder, i), file(folder, i).name)


def test_member_that_inflates_beyond_the_limit_is_not_read(folder, tmp_path):
    pack(tmp_path / "up.zip", folder, zipfile.ZIP_DEFLATED, bytes(MAX_BYTES + 1))
    problems = check_submission(tmp_path / "up.zip", frames=FRAMES, size=SIZE, progress=False)
    assert_one(problems, "1 file over 64 MiB and not read (berlin_")


def test_member_that_lies_about_its_size(folder, tmp_path):
    data = file(folder).read_bytes()
    pack(tmp_path / "up.zip", folder, zipfile.ZIP_DEFLATED, data + bytes(10**6))
    raw = (tmp_path / "up.zip").read_bytes()
    said, lie = struct.pack("<I", len(data) + 10**6), struct.pack("<I", len(data))
    assert raw.count(said) == 2  # before the member, and in the directory at the end
    (tmp_path / "up.zip").write_bytes(raw.replace(said, lie))
    tracemalloc.start()
    problems = check_submission(tmp_path / "up.zip", frames=FRAMES, size=SIZE, progress=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10**6  # it is not inflated beyond what it says
    assert_one(problems, "1 file damaged or unreadable (berlin_")


def test_deflated_zip_is_good_and_other_methods_are_refused(folder, tmp_path):
    options = {"frames": FRAMES, "size": SIZE, "progress": False}
    pack(tmp_path / "up.zip", folder, zipfile.ZIP_DEFLATED)
    assert check_submission(tmp_path / "up.zip", **options) == []
    pack(tmp_path / "up.zip", folder, zipfile.ZIP_LZMA)
    assert_one(check_submission(tmp_path / "up.zip", **options), "damaged or unreadable (berlin_")


def test_image_made_to_fill_the_memory_is_not_decoded(check, folder):
    """A PNG of 2**31 - 1 pixels a side."""
    data = bytearray(file(folder).read_bytes())
    data[16:24] = struct.pack(">II", 2**31 - 1, 2**31 - 1)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    file(folder).write_bytes(data)
    assert_one(check(), "1 file of the wrong size", "2147483647x2147483647")


def test_unprintable_name_stays_on_its_line(check, folder):
    file(folder).rename(folder / "berlin_1\n2.png")
    assert_one(check()[:1], r"berlin_1\n2.png")


def test_path_that_is_no_upload(folder, tmp_path):
    (tmp_path / "a.zip").write_text("no zip")
    write_submission(tmp_path / "b.zip", folder.iterdir())
    directory = (
        (tmp_path / "b.zip").read_bytes().replace(b"PK\1\2\x14\x03\x14", b"PK\1\2\x14\x03\xff")
    )
    (tmp_path / "b.zip").write_bytes(directory)  # of a version to come
    for name, words in (("gone.zip", "check the path"), ("a.zip", "no zip"), ("b.zip", "no zip")):
        with pytest.raises(UserError, match=f"{re.escape(name)}.*{words}"):
            check_submission(tmp_path / name, progress=False)


def test_frames_of_a_data_folder(toy_cityscapes, tmp_path):
    frames = image_frames(toy_cityscapes, "val")
    assert len(frames) == 3
    assert all(frame_name(frame) == frame for frame in frames)
    with pytest.raises(UserError, match=r"no .*images"):
        image_frames(tmp_path, "val")


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_script(run_script, toy_cityscapes, tmp_path, kind):
    frames = sorted(image_frames(toy_cityscapes, "val"))
    folder = tmp_path / "pred"
    for frame in frames:
        write_label_map(folder / prediction_name(frame), IDS)

    def run():
        path = folder if kind == "folder" else tmp_path / "up.zip"
        if kind == "zip":
            write_submission(path, folder.iterdir())
        return run_script("utils/check_upload.py", path, "--subset", "val", "--datadir",
                          toy_cityscapes, "--height", 16, "--width", 32)  # fmt: skip

    good = run()
    assert good.returncode == 0, good.stderr
    assert good.stdout.startswith("OK: 3 files")

    (folder / prediction_name(frames[0])).unlink()
    write_label_map(folder / prediction_name(frames[1]), IDS[:8])
    write_label_map(folder / prediction_name(frames[2]), IDS[:8])
    bad = run()
    assert bad.returncode == 2
    assert "OK" not in bad.stdout and "Traceback" not in bad.stderr
    errors = [line for line in bad.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 3
    assert "2 .png files, and 3 are wanted" in errors[0]
    assert f"1 frame without a file ({frames[0]})" in errors[1]
    assert "2 files of the wrong size" in errors[2]


def test_script_refuses_what_is_no_upload(run_script, tmp_path):
    assert_refused(run_script("utils/check_upload.py", tmp_path / "gone.zip"), "gone.zip")

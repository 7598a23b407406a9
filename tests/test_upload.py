"""Cityscapes submissions: file names, label images, the zip and its validation."""

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
OPTIONS = {"frames": FRAMES, "size": SIZE, "progress": False}


@pytest.mark.parametrize(
    ("path", "frame"),
    [
        ("a/berlin_000543_000019_leftImg8bit.png", "berlin_000543_000019"),
        ("bad-honnef_000000_000000_pred_labelIds.png", "bad-honnef_000000_000000"),
        ("bonn_000000_000019.jpg", "bonn_000000_000019"),
        ("berlin_0_19_leftImg8bit.png", None),
        ("berlin_000000_0000190.png", None),
        ("_000000_000019.png", None),
    ],
)
def test_frame_name_takes_cityscapes_names_only(path, frame):
    if frame:
        assert frame_name(path) == frame
        assert prediction_name(f"/data/{path}") == f"{frame}_pred_labelIds.png"
        return
    with pytest.raises(UserError, match=re.escape(path)):
        frame_name(path)


def test_write_label_map_writes_8_bit_grey_png_of_uint8_only(tmp_path):
    write_label_map(tmp_path / "ids.png", IDS)
    image = Image.open(tmp_path / "ids.png")
    assert (image.mode, image.format, image.size) == ("L", "PNG", (32, 16))
    np.testing.assert_array_equal(np.array(image), IDS)
    for ids in (IDS.astype(np.int64), IDS[None]):
        with pytest.raises(ValueError, match="uint8"):
            write_label_map(tmp_path / "other.png", ids)
    assert [path.name for path in tmp_path.iterdir()] == ["ids.png"]


@pytest.fixture
def folder(tmp_path):
    """A valid submission of six small images, as a folder."""
    for frame in FRAMES:
        write_label_map(tmp_path / "pred" / prediction_name(frame), IDS)
    return tmp_path / "pred"


@pytest.fixture
def check(folder, tmp_path):
    """Problems of the folder, which are also those of a zip made of it."""

    def run(**options) -> list[str]:
        options = OPTIONS | options
        write_submission(tmp_path / "pred.zip", folder.iterdir())
        problems = check_submission(folder, **options)
        zipped = check_submission(tmp_path / "pred.zip", **options)
        assert [p.replace(str(tmp_path / "pred.zip"), str(folder)) for p in zipped] == problems
        return problems

    return run


def file(folder, i: int = 0):
    """Path of the i-th prediction."""
    return folder / prediction_name(FRAMES[i])


def assert_problems(problems: list[str], *expected: str) -> None:
    """Each problem is one line and contains the expected text of the same position."""
    assert len(problems) == len(expected), problems
    for problem, text in zip(problems, expected, strict=True):
        assert text in problem and "\n" not in problem


def rename(name: str):
    return lambda folder: file(folder).rename(folder / name)


def edit(change):
    """Replace the bytes of the first file by what `change` returns."""
    return lambda folder: file(folder).write_bytes(change(file(folder).read_bytes()))


def flip_bit(data: bytes) -> bytes:
    at = data.index(b"IDAT") + 30
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def huge_png(data: bytes) -> bytes:
    header = b"IHDR" + struct.pack(">II", 2**31 - 1, 2**31 - 1) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


def ids_with(value: int, count: int = 1, base: np.ndarray = IDS):
    """Write the id `value` to one pixel of the first `count` files."""

    def write(folder) -> None:
        for i in range(count):
            ids = base.copy()
            ids[3, 4] = value
            write_label_map(file(folder, i), ids)

    return write


def image(mode: str):
    return lambda folder: Image.new(mode, (32, 16)).save(file(folder))


NAME = "berlin_000000_000019_pred_labelIds.png"
COUNT = "{} .png files, but {} are required".format
MISSING = "1 frame without a file (berlin_000000_000019)"
DAMAGED = f"1 file damaged or unreadable ({NAME}): write it again"
MODE = f"1 file not 8-bit single-channel ({NAME}: {{}}): write the ids".format
VOID = "255, the void of trainIds (berlin_"
TRAIN_IDS = "hold no id above 18 and mostly ids that are not evaluated, so they are probably"
FAULTS = {
    "none": (lambda folder: None, []),
    "missing": (lambda folder: file(folder).unlink(), [COUNT(5, 6), MISSING]),
    "unknown frame": (
        rename("berlin_000009_000019_pred.png"),
        [MISSING, "1 file of a frame outside test (berlin_000009_000019_pred.png)"],
    ),
    "name": (
        rename("berlin_1.png"),
        ["1 file not named <city>_123456_123456*.png (berlin_1.png)", MISSING],
    ),
    "unprintable name": (rename("berlin_1\n2.png"), [r"berlin_1\n2.png", MISSING]),
    "duplicate": (
        lambda folder: shutil.copy(file(folder), folder / "berlin_000000_000019.png"),
        [COUNT(7, 6), f"1 frame with more than one file (berlin_000000_000019.png / {NAME})"],
    ),
    "other files": (
        lambda folder: [(folder / n).write_text("x") for n in ("._a.png", "scores.csv", "n.txt")],
        ["2 files other than .png (n.txt, scores.csv)"],
    ),
    "format": (
        lambda folder: Image.fromarray(IDS).save(file(folder), format="JPEG"),
        [f"1 file named .png but in another format ({NAME})"],
    ),
    **{
        f"cut at {end}": (edit(lambda data, end=end: data[:end]), [DAMAGED])
        for end in (0, 4, 20, -20)
    },
    "flipped bit": (edit(flip_bit), [DAMAGED]),
    "palette": (
        lambda folder: Image.fromarray(IDS).convert("RGB").quantize(256).save(file(folder), bits=8),
        [MODE("8-bit palette")],
    ),
    "RGB": (image("RGB"), [MODE("8-bit RGB")]),
    "LA": (image("LA"), [MODE("8-bit grey with alpha")]),
    "16-bit": (image("I;16"), [MODE("16-bit grey")]),
    "1-bit": (image("1"), [MODE("1-bit grey")]),
    "size": (
        lambda folder: [write_label_map(file(folder, i), IDS[:8]) for i in range(5)],
        [f"5 files of the wrong size ({NAME}: 32x8, bielefeld_000100_000019_pred_labelIds.png: "
         "32x8, bonn_000200_000019_pred_labelIds.png: 32x8 and 2 more)"],
    ),
    # Larger images are not decoded, so their ids are not reported.
    "height": (
        lambda folder: write_label_map(file(folder), np.full((17, 32), 99, np.uint8)),
        [f"1 file of the wrong size ({NAME}: 32x17)"],
    ),
    "width": (
        lambda folder: write_label_map(file(folder), np.full((16, 33), 99, np.uint8)),
        [f"1 file of the wrong size ({NAME}: 33x16)"],
    ),
    "huge": (edit(huge_png), [f"1 file of the wrong size ({NAME}: 2147483647x2147483647)"]),
    "id 34": (ids_with(34), [f"1 file with ids outside the table, 0 to 33 ({NAME}: 34)"]),
    "void": (ids_with(255), [f"1 file with {VOID}"]),
    "trainIds": (ids_with(18, 6, IDS % 19), [TRAIN_IDS]),
    "trainIds with void": (ids_with(255, 6, IDS % 19), [f"6 files with {VOID}", TRAIN_IDS]),
    "label ids of few classes": (
        lambda folder: [
            write_label_map(file(folder, i), np.array([0, 7, 7, 8, 11, 17], np.uint8)[IDS % 6])
            for i in range(6)
        ],
        [],
    ),
    "road alone": (ids_with(7, 6, 0 * IDS + 7), []),
    "one id above trainIds": (
        lambda folder: [ids_with(18, 6, IDS % 19)(folder), ids_with(19, 1, IDS % 19)(folder)], []
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_check_submission_reports_each_fault_in_a_sentence(check, folder, fault):
    damage, expected = FAULTS[fault]
    damage(folder)
    assert_problems(check(), *expected)


def test_check_submission_without_frames_checks_number_and_cities(check, folder):
    assert_problems(check(frames=None), COUNT(6, 1525))
    foreign = "6 files of a city outside val (berlin_"
    assert_problems(check(frames=None, subset="val"), COUNT(6, 500), foreign)
    file(folder).rename(folder / "frankfurt_000000_000294_pred.png")
    foreign = "1 file of a city outside test (frankfurt_000000_000294_pred.png)"
    assert_problems(check(frames=None), COUNT(6, 1525), foreign)


def test_write_submission_is_flat_stored_and_reproducible(folder, tmp_path, monkeypatch):
    files = sorted(folder.iterdir())
    (tmp_path / "other").mkdir()
    write_submission(tmp_path / "a.zip", files)
    for path in files:  # copies with another time and mode, in another order
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


def test_write_submission_with_missing_or_duplicate_files_keeps_the_old_zip(folder, tmp_path):
    (tmp_path / "up.zip").write_text("old")
    with pytest.raises(UserError, match=r"cannot read .*gone\.png"):
        write_submission(tmp_path / "up.zip", [*folder.iterdir(), folder / "gone.png"])
    with pytest.raises(UserError, match=rf"\({NAME}\): keep one"):
        write_submission(tmp_path / "up.zip", [file(folder), file(tmp_path / "again")])
    assert (tmp_path / "up.zip").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pred", "up.zip"]


def test_check_submission_takes_subfolders_in_a_folder_but_not_in_a_zip(folder, tmp_path):
    (folder / "berlin").mkdir()
    file(folder).rename(file(folder / "berlin"))
    assert check_submission(folder, **OPTIONS) == []
    shutil.make_archive(str(tmp_path / "up"), "zip", tmp_path, "pred")
    assert_problems(check_submission(tmp_path / "up.zip", **OPTIONS), "1 folder in the zip (pred/)")


def test_check_submission_reports_a_name_twice_in_a_zip(folder, tmp_path):
    write_submission(tmp_path / "up.zip", folder.iterdir())
    with pytest.warns(UserWarning), zipfile.ZipFile(tmp_path / "up.zip", "a") as archive:
        archive.write(file(folder), file(folder).name)
    problems = check_submission(tmp_path / "up.zip", **OPTIONS)
    assert_problems(problems, COUNT(7, 6), "1 frame with more than one file (berlin_")


@pytest.mark.parametrize(
    ("method", "content", "expected"),
    [
        (zipfile.ZIP_DEFLATED, None, []),
        (zipfile.ZIP_LZMA, None, [DAMAGED]),  # decompressed without a limit by `zipfile`
        (zipfile.ZIP_DEFLATED, bytes(MAX_BYTES + 1), [f"1 file over 64 MiB and not read ({NAME}"]),
        (zipfile.ZIP_DEFLATED, "false size", [DAMAGED]),
    ],
)
def test_check_submission_limits_decompression(folder, tmp_path, method, content, expected):
    data, path = file(folder).read_bytes(), tmp_path / "up.zip"
    false_size = content == "false size"
    content = data + bytes(10**6) if false_size else content or data
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(NAME, content, method)
        for i in range(1, 6):
            archive.write(file(folder, i), file(folder, i).name)
    if false_size:
        true, false = (struct.pack("<I", size) for size in (len(content), len(data)))
        raw = path.read_bytes()
        assert raw.count(true) == 2  # in the member's header and in the directory
        path.write_bytes(raw.replace(true, false))
    tracemalloc.start()
    problems = check_submission(path, **OPTIONS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert_problems(problems, *expected)
    assert peak < 10**6 or method == zipfile.ZIP_LZMA


def test_check_submission_refuses_paths_that_are_no_zip(folder, tmp_path):
    (tmp_path / "a.zip").write_text("no zip")
    write_submission(tmp_path / "b.zip", folder.iterdir())
    content = (tmp_path / "b.zip").read_bytes()  # of an unknown version:
    (tmp_path / "b.zip").write_bytes(content.replace(b"PK\1\2\x14\x03\x14", b"PK\1\2\x14\x03\xff"))
    for name, words in (("gone.zip", "check the path"), ("a.zip", "zip"), ("b.zip", "zip")):
        with pytest.raises(UserError, match=f"{re.escape(name)}.*{words}"):
            check_submission(tmp_path / name, progress=False)


def test_script_prints_a_line_for_each_problem(run_inside, toy_cityscapes, tmp_path):
    frames = sorted(image_frames(toy_cityscapes, "val"))
    assert len(frames) == 3 and all(frame_name(frame) == frame for frame in frames)
    folder = tmp_path / "pred"
    for frame in frames:
        write_label_map(folder / prediction_name(frame), IDS)
    command = ("utils/check_upload.py", folder, "--subset", "val", "--datadir", toy_cityscapes,
               "--height", 16, "--width", 32)  # fmt: skip
    valid = run_inside(*command).check()
    assert valid.stdout.startswith("OK: 3 files")

    (folder / prediction_name(frames[0])).unlink()
    for frame in frames[1:]:
        write_label_map(folder / prediction_name(frame), IDS[:8])
    invalid = run_inside(*command)
    assert invalid.returncode == 2 and "OK" not in invalid.stdout
    errors = [line for line in invalid.stderr.splitlines() if line.startswith("error: ")]
    missing = f"1 frame without a file ({frames[0]})"
    assert_problems(errors, COUNT(2, 3), missing, "2 files of the wrong size")
    run_inside("utils/check_upload.py", tmp_path / "gone.zip").assert_error("gone.zip")
    run_inside("utils/check_upload.py", folder, "--datadir", tmp_path).assert_error(
        "holds no *_leftImg8bit images"
    )

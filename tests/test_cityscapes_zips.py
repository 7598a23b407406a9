"""Extraction of the official zips, check of the tree, and labels drawn from polygons."""

import errno
import io
import json
import os
import shutil
import stat
import struct
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fakes import content, flip_bit
from fuzzing import damaged, ends_well, foreign, json_files
from hypothesis import given, strategies as st
from PIL import Image
from tqdm import tqdm

from lednet import UserError
from lednet.data.labels import CITYSCAPES_LABELS
from lednet.data.prepare import cityscapes_tree, zips as zips_module
from lednet.data.prepare.cityscapes_tree import BLACK_FRAME, FRAMES, open_archive
from lednet.data.prepare.polygons import MAX_BYTES, MAX_COORDINATE, draw_labels, read_polygons
from lednet.data.prepare.zips import MAX_FILE_BYTES

SIZE = (8, 16)  # (height, width)
TOY_FRAMES = {
    "train": ["aachen_000000_000019", "ulm_000001_000019"],
    "val": ["lindau_000000_000019"],
    "test": ["bonn_000000_000019"],
    "train_extra": ["bad-honnef_000000_000000", BLACK_FRAME],
}
ZIPS = {
    "leftImg8bit_trainvaltest.zip": ("leftImg8bit", ("train", "val", "test")),
    "leftImg8bit_trainextra.zip": ("leftImg8bit", ("train_extra",)),
    "gtFine_trainvaltest.zip": ("gtFine", ("train", "val", "test")),
    "gtCoarse.zip": ("gtCoarse", ("train", "val", "train_extra")),
}
FINE, IMAGES = "gtFine_trainvaltest.zip", "leftImg8bit_trainvaltest.zip"
ULM = "gtFine/train/ulm/ulm_000001_000019_gtFine_labelIds.png"
POLYGONS = {
    "imgHeight": 8,
    "imgWidth": 16,
    "objects": [
        {"label": "road", "polygon": [[-2, 4], [20, 4], [20, 9], [-2, 9]]},
        {"label": "cargroup", "polygon": [[3, 2], [9, 2], [9, 6], [3, 6]]},
    ],
}


def png(mode: str, value: int) -> bytes:
    file = io.BytesIO()
    Image.new(mode, SIZE[::-1], value).save(file, "PNG")
    return file.getvalue()


def members(name: str) -> dict[str, bytes]:
    """Files of an official archive by their names."""
    kind, splits = ZIPS[name]
    files = {"README": f"of {kind}".encode(), "license.txt": b"terms"}
    for split in splits:
        for i, frame in enumerate(TOY_FRAMES[split]):
            stem = f"{kind}/{split}/{frame.split('_')[0]}/{frame}_{kind}"
            if kind == "leftImg8bit":
                files[f"{stem}.png"] = png("RGB", 0 if frame == BLACK_FRAME else 70 + i)
            else:
                files[f"{stem}_color.png"] = png("RGBA", i)
                files[f"{stem}_instanceIds.png"] = png("I;16", 26000 + i)
                files[f"{stem}_labelIds.png"] = png("L", 7 + i)
                files[f"{stem}_polygons.json"] = json.dumps(POLYGONS).encode()
    return files


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for folder in sorted({f"{name.rsplit('/', 1)[0]}/" for name in files if "/" in name}):
            archive.writestr(folder, b"")
        for name, data in files.items():
            archive.writestr(name, data)
    return path


@pytest.fixture
def zips(tmp_path, monkeypatch) -> Path:
    """A folder with the four archives, and the published numbers reduced to theirs."""
    for split, frames in TOY_FRAMES.items():
        monkeypatch.setitem(FRAMES, split, len(frames))
    (tmp_path / "zips").mkdir()
    for name in ZIPS:
        write_zip(tmp_path / "zips" / name, members(name))
    return tmp_path / "zips"


@pytest.fixture
def data(tmp_path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def prepare(run_inside, data):
    return lambda *args: run_inside("datasets/prepare_cityscapes_zips.py", *args, "--datadir", data)


def everything() -> dict[str, bytes]:
    files = {name: data for zip_name in ZIPS for name, data in members(zip_name).items()}
    return files | {"README": members("gtCoarse.zip")["README"]}  # of the first one


# extraction


def test_prepare_official_zips_writes_complete_tree(zips, prepare, data):
    assert prepare(zips / FINE).returncode == 0 and content(data) == members(FINE)
    shutil.rmtree(data)
    result = prepare(zips).check()
    assert content(data) == everything()
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["leftImg8bit.png", "2", "1", "1", "2"] in lines
    assert ["gtFine_labelIds.png", "2", "1", "1", "-"] in lines
    assert ["gtCoarse_polygons.json", "2", "1", "-", "2"] in lines
    assert f"{BLACK_FRAME}_leftImg8bit.png is black, as published" in result.stdout


def test_prepare_existing_files_replaces_only_damaged_ones(zips, prepare, data):
    prepare(zips)
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*.*")}
    assert ": 0 files written" in prepare(zips).stdout
    assert {path: path.stat().st_mtime_ns for path in data.rglob("*.*")} == before
    whole = (data / ULM).read_bytes()
    (data / ULM).write_bytes(whole[:-1] + b"?")  # of the same size
    (data / "README").write_text("my own")
    assert ": 1 files written" in prepare(zips).stdout
    assert (data / ULM).read_bytes() == whole and (data / "README").read_text() == "my own"


def test_prepare_members_outside_the_tree_are_not_extracted(zips, prepare, data, tmp_path):
    others = (
        "__MACOSX/._gtFine",
        "gtFine/train/ulm/aachen_000000_000019_gtFine_labelIds.png",  # of another city
        "gtFine/train_extra/ulm/ulm_000000_000019_gtFine_labelIds.png",
        "gtFine/train/ulm/ulm_000000_000019_gtFine_labelIds.png.exe",
        "gtFine/train/ulm/sub/ulm_000000_000019_gtFine_labelIds.png",
        "gtFine/train/ulm/ulm_000000_00001\u0669_gtFine_labelIds.png",  # not an ASCII digit
        f"gtFine/train/{'a' * 99}/{'a' * 99}_000000_000019_gtFine_labelIds.png",
        "../out.png", "gtFine/../../out.png", "/etc/out.png", "C:/out.png", "..\\out.png",
        f"../{ULM}", f"/{ULM}", "README/x",
    )  # fmt: skip
    result = prepare(
        write_zip(zips / "odd.zip", members(FINE) | dict.fromkeys(others, b"no"))
    ).check()
    assert f"{len(others)} files are not part of the tree" in result.stdout
    assert content(data) == members(FINE) and {*os.listdir(tmp_path)} == {"zips", "data"}


# faults


def add(name: str, data: bytes = b"x", **attributes: object) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        member = zipfile.ZipInfo(name)
        for key, value in attributes.items():
            setattr(member, key, value)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(member, data)

    return change


def patch(offset: int, code: str, value: int) -> Callable[[Path], None]:
    """Change a field of the last member in the directory."""

    def change(path: Path) -> None:
        whole = bytearray(path.read_bytes())
        struct.pack_into(code, whole, whole.rindex(b"PK\x01\x02") + offset, value)
        path.write_bytes(whole)

    return change


def flip_a_bit(path: Path) -> None:
    """In the middle of the bytes of `ULM`."""
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo(ULM)
    flip_bit(path, member.header_offset + 30 + len(ULM) + member.compress_size // 2)


LAST = "gtFine/test/bonn/bonn_000000_000019_gtFine_polygons.json"
NEW = ULM.replace("000001", "000002")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (patch(8, "<H", 1), f"{LAST} in ... is encrypted"),
        (patch(24, "<I", MAX_FILE_BYTES + 1), f"{LAST} in ... is encrypted, larger than 16,777"),
        (add(NEW, compress_type=zipfile.ZIP_BZIP2), f"{NEW} in ... is encrypted, larger than"),
        (lambda path: os.truncate(path, path.stat().st_size - 30), "... is not a zip, or damaged"),
        (lambda path: write_zip(path, {"README": b"x"}), "... holds no files of Cityscapes' tree"),
        (Path.unlink, "no file or folder ..."),
        (add(ULM.replace("train", "val")), "... has more than 18 files"),
    ],
)
def test_prepare_invalid_zip_is_refused_before_extraction(
    change, words, zips, prepare, data, monkeypatch
):
    if "18 files" in words:
        monkeypatch.setattr(zips_module, "MAX_FILES", len(members(FINE)))
    change(zips / FINE)
    prepare(zips / IMAGES, zips / FINE).assert_error(words.replace("...", f"{zips / FINE}"))
    assert not data.exists()


@pytest.mark.parametrize("change", [
    flip_a_bit,
    patch(16, "<I", 7),  # CRC
    patch(24, "<I", 10),  # declared sizes
    patch(24, "<I", 300_000),
    add(NEW, bytes(10**6), compress_type=zipfile.ZIP_DEFLATED),
])  # fmt: skip
def test_prepare_damaged_member_is_named_and_preceding_ones_kept(change, zips, prepare, data):
    path, files = zips / FINE, members(FINE)
    good, name = path.read_bytes(), ULM if change is flip_a_bit else LAST
    change(path)
    if name is LAST and len(path.read_bytes()) > len(good):  # a bomb that declares one byte
        name = NEW
        patch(24, "<I", 1)(path)
    prepare(path).assert_error(f"{name} is damaged in {path}", "download the archive again")
    before = [*files, NEW]
    before = before[: before.index(name)]
    assert {*content(data)} == {*before}
    path.write_bytes(good)
    result = prepare(path)
    assert f"{len(files) - len(before)} files written" in result.stdout
    assert content(data) == files


def test_prepare_small_disk_is_refused_before_extraction(zips, prepare, data, monkeypatch):
    usage = shutil.disk_usage(zips)._replace(free=sum(map(len, everything().values())) // 2)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    prepare(zips).assert_error("what is to be unpacked needs", "free some", "--datadir")
    assert not data.exists()


def test_prepare_after_full_disk_resumes(zips, prepare, data, monkeypatch):
    write, calls = Path.write_bytes, []

    def failing(path: Path, whole: bytes) -> int:
        calls.append(path)
        if len(calls) == 8:
            write(path, whole[: len(whole) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, whole)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", failing)
        prepare(zips).assert_error("No space left")
    assert len(content(data)) == 7 and content(data).items() <= everything().items()
    # A killed process leaves its temporary file.
    (data / "gtCoarse/train/aachen/.aachen_000000_000019.4711.png").write_bytes(b"half")
    assert f"{len(everything()) - 7:,} files written, " in prepare(zips).stdout
    assert content(data) == everything()


# completeness


def test_check_tree_missing_files_are_counted_and_named(zips, prepare, data, tmp_path):
    prepare(tmp_path).assert_error("holds none of gtCoarse.zip, ")
    prepare().assert_error("no folder")
    prepare(zips)
    (data / ULM).unlink()
    (data / "leftImg8bit/val/lindau/lindau_000000_000019_leftImg8bit.png").unlink()
    result = prepare()
    result.assert_error(
        "leftImg8bit/val holds 0 *_leftImg8bit.png of 1: unpack leftImg8bit_trainvaltest.zip again",
        "gtFine/train holds 1 *_gtFine_labelIds.png of 2: unpack gtFine_trainvaltest.zip again",
        "1 images of leftImg8bit/train have no label in gtFine/train (ulm_000001_000019): unpack "
        "gtFine_trainvaltest.zip again",
        "and 2 more",
    )
    assert "leftImg8bit.png" in result.stdout  # the table is printed anyway
    shutil.rmtree(data / "leftImg8bit/val")  # not unpacked at all: no problem
    shutil.rmtree(data / "gtFine/train")
    assert prepare().returncode == 0
    (data / f"leftImg8bit/train_extra/troisdorf/{BLACK_FRAME}_leftImg8bit.png").unlink()
    prepare().assert_error(
        f"1 labels of gtCoarse/train_extra have no image in leftImg8bit/train_extra ({BLACK_FRAME})"
        ": unpack leftImg8bit_trainextra.zip again"
    )
    # The black frame may be removed from images and labels.
    (data / f"gtCoarse/train_extra/troisdorf/{BLACK_FRAME}_gtCoarse_labelIds.png").unlink()
    result = prepare()
    assert result.returncode == 0 and "is black" not in result.stdout
    shutil.rmtree(data)
    data.mkdir()
    prepare().assert_error("holds no files of Cityscapes")


# fuzzing of zips


def zip_of_modes(files: dict[str, bytes], mode: int = 0) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            member = zipfile.ZipInfo("x")
            member.filename, member.external_attr = name, mode << 16
            archive.writestr(member, data)
    return buffer.getvalue()


VALID = zip_of_modes({ULM: b"here" * 9, NEW: b"there", "README": b"x"})
DIRECTORY = VALID.index(b"PK\x01\x02")
PARTS = st.sampled_from(
    ["gtFine", "train", "ulm", "ulm_000001_000019_gtFine_labelIds.png", "..", ".", "", "C:", "\0",
     "\\", "README", "leftImg8bit", "a" * 300]
) | st.text(max_size=4)  # fmt: skip


@st.composite
def zips_of_odd_members(draw) -> bytes:
    names = st.lists(PARTS, min_size=1, max_size=6).map("/".join)
    files = draw(st.dictionaries(names, st.binary(max_size=64), max_size=5))
    mode = draw(st.sampled_from([0, stat.S_IFREG, stat.S_IFLNK, stat.S_IFDIR, stat.S_IFCHR]))
    try:
        return zip_of_modes({ULM: b"here", **files}, mode)
    except (UnicodeEncodeError, struct.error, IndexError):  # zipfile cannot write it
        return VALID


@given(
    foreign([VALID])
    | damaged([VALID[DIRECTORY:]]).map(lambda end: VALID[:DIRECTORY] + end)
    | zips_of_odd_members()
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_extract_any_zip_writes_only_files_of_the_tree(whole):
    with tempfile.TemporaryDirectory() as name:
        path, root = Path(name, "a.zip"), Path(name, "inner/data")
        path.write_bytes(whole)
        ends_well(lambda: open_archive(path).extract(root, tqdm(disable=True)), path.name)
        assert {p.name for p in Path(name).iterdir()} <= {"a.zip", "inner"}
        for file in Path(name, "inner").rglob("*"):
            if file.is_file():
                assert not file.is_symlink() and file.stat().st_size <= MAX_FILE_BYTES
                assert cityscapes_tree._MEMBER.fullmatch(file.relative_to(root).as_posix())


# polygons

official = pytest.importorskip("cityscapesscripts.preparation.json2labelImg")


COORDINATES = (
    st.integers(-60, 100)
    | st.floats(-60, 100, allow_nan=False)
    | st.integers(-MAX_COORDINATE, MAX_COORDINATE)
)
NAMES = st.sampled_from([label.name for label in CITYSCAPES_LABELS])
OBJECTS = st.fixed_dictionaries(
    {
        "label": NAMES | NAMES.map(lambda name: f"{name}group"),
        "polygon": st.lists(st.lists(COORDINATES, min_size=2, max_size=2), min_size=2, max_size=9),
    },
    optional={"deleted": st.sampled_from([0, 1, True, False]), "id": st.integers(), "user": NAMES},
)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("polygons") / "a_polygons.json"


def assert_equals_official_drawing(path: Path) -> None:
    annotation = official.Annotation()
    annotation.fromJsonFile(str(path))
    for ours, theirs in (("labelIds", "ids"), ("labelTrainIds", "trainIds")):
        expected = np.array(official.createLabelImage(annotation, theirs))
        assert np.array_equal(draw_labels(read_polygons(path), ours), expected)


@given(height=st.integers(1, 40), width=st.integers(1, 60), objects=st.lists(OBJECTS, max_size=6))
def test_draw_labels_equals_official_tool(path, height, width, objects):
    path.write_text(json.dumps({"imgHeight": height, "imgWidth": width, "objects": objects}))
    assert_equals_official_drawing(path)


def test_draw_labels_real_polygons_equal_official_tool(real_data):
    """The published images were drawn by the Pillow of 2015, whose outlines differ."""
    files = sorted((real_data / "data/cityscapes_sample/gtFine").rglob("*_polygons.json"))
    assert len(files) == 5
    for path in files:
        assert_equals_official_drawing(path)
        published = path.with_name(path.name.replace("polygons.json", "labelIds.png"))
        drawn, published = draw_labels(read_polygons(path)), np.array(Image.open(published))
        assert (drawn != published).mean() < 0.005


ROAD = {"label": "road", "polygon": [[0, 0], [1, 1]]}


def with_corner(*corner: object) -> dict:
    return {"objects": [ROAD | {"polygon": [[1, 2], list(corner)]}]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "Expecting value"),
        ("[" * 100_000, "recursion"),
        ("\xff", "codec can't decode"),
        (" " * (MAX_BYTES + 1), "more than 16,777,216 bytes"),
        ("{}", "no 'imgHeight'"),
        ({"imgHeight": True}, "must be positive integers"),
        ({"imgHeight": -1, "imgWidth": -4}, "must be positive integers"),
        ({"imgHeight": 6250001}, "more than 100,000,000 pixels"),
        ({"objects": {}}, "objects must be a list"),
        ({"objects": [ROAD | {"label": "roads"}]}, "'roads' is not a Cityscapes label"),
        ({"objects": [ROAD | {"polygon": [[1, 2]]}]}, "fewer than two corners"),
        (with_corner(1, "2"), "bad operand type"),
        (with_corner(1, float("nan")), "not a number up to"),
        (with_corner(1, -MAX_COORDINATE - 1), "not a number up to"),
    ],
)
def test_read_polygons_malformed_file_is_refused(content, words, path):
    path.unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"cannot read .*a_polygons\.json: No such file"):
        read_polygons(path)
    if isinstance(content, dict):
        content = json.dumps({"imgHeight": 8, "imgWidth": 16, "objects": []} | content)
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=rf"a_polygons\.json is not a Cityscapes .*{words}"):
        read_polygons(path)


@given(whole=json_files(POLYGONS))
def test_read_polygons_any_file_ends_well(path, whole):
    path.write_bytes(whole)
    annotation = ends_well(lambda: read_polygons(path), path.name)
    if annotation is not None and max(annotation.size) < 1000:
        assert draw_labels(annotation).shape == annotation.size


def test_prepare_draws_missing_labels_and_reports_unreadable_polygons(zips, prepare, data):
    prepare(zips)
    drawn = data / ULM
    bad = data / "gtCoarse/val/lindau/lindau_000000_000019_gtCoarse_polygons.json"
    drawn.unlink()
    bad.with_name("lindau_000000_000019_gtCoarse_labelIds.png").unlink()
    kept, good = content(data), bad.read_bytes()
    bad.write_text("{}")
    (hidden := bad.with_name(f"._{bad.name}")).write_bytes(b"written by macOS")
    result = prepare("--labels-from-polygons")
    result.assert_error(f"{bad} is not a Cityscapes annotation", "gtCoarse/val holds 0")
    assert "._" not in result.stderr
    assert "1 labelIds drawn from polygons" in result.stdout
    bad.write_bytes(good)
    hidden.unlink()
    assert content(data) == kept | {ULM: drawn.read_bytes()}
    with Image.open(drawn) as image:
        assert image.mode == "L" and {*np.unique(np.array(image))} == {0, 7, 26}
    result = prepare("--labels-from-polygons", "--train-ids-from-polygons")
    assert result.returncode == 0 and "1 labelIds drawn from polygons" in result.stdout
    assert "9 labelTrainIds drawn from polygons" in result.stdout
    with Image.open(str(drawn).replace("labelIds", "labelTrainIds")) as image:
        assert {*np.unique(np.array(image))} == {0, 13, 255}

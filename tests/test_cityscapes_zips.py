"""The official zips, in good faith and bad, and the labels that polygons draw."""

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
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image
from test_bad_input import assert_refused
from tqdm import tqdm

from lednet import UserError
from lednet.data.labels import CITYSCAPES_LABELS
from lednet.data.prepare import cityscapes_tree
from lednet.data.prepare.cityscapes_tree import BLACK_FRAME, FRAMES, LIMITS, open_archive
from lednet.data.prepare.polygons import FARTHEST, draw_labels, read_polygons
from lednet.data.prepare.zips import SMALL, Archive

FUZZ = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

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


def members(kind: str, splits: tuple[str, ...]) -> dict[str, bytes]:
    """Files of an official archive by their names."""
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
        for name, content in files.items():
            archive.writestr(name, content)
    return path


@pytest.fixture
def zips(tmp_path, monkeypatch) -> Path:
    """The four archives in a folder, and the published numbers brought down to them."""
    for split, frames in TOY_FRAMES.items():
        monkeypatch.setitem(FRAMES, split, len(frames))
    folder = tmp_path / "zips"
    folder.mkdir()
    for name, content in ZIPS.items():
        write_zip(folder / name, members(*content))
    return folder


@pytest.fixture
def prepare(run_inside, tmp_path):
    def run(*args: object):
        return run_inside("datasets/prepare_cityscapes_zips.py", *args, "--datadir",
                          tmp_path / "data")  # fmt: skip

    return run


def contents(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file()
    }


def everything() -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    for content in ZIPS.values():
        files = members(*content) | files
    files["README"] = members(*ZIPS["gtCoarse.zip"])["README"]  # the first one stays
    return files


# Unpacked


def test_the_four_official_zips_become_a_complete_tree(zips, prepare, tmp_path):
    result = prepare(zips)
    assert result.returncode == 0, result.stderr
    assert contents(tmp_path / "data") == everything()
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["leftImg8bit.png", "2", "1", "1", "2"] in lines
    assert ["gtFine_labelIds.png", "2", "1", "1", "-"] in lines
    assert ["gtCoarse_polygons.json", "2", "1", "-", "2"] in lines
    assert f"{BLACK_FRAME}_leftImg8bit.png is black, as published" in result.stdout


def test_any_of_them_will_do_in_any_order(zips, prepare, tmp_path):
    result = prepare(zips / "gtFine_trainvaltest.zip")
    assert result.returncode == 0, result.stderr
    files = members(*ZIPS["gtFine_trainvaltest.zip"])
    assert contents(tmp_path / "data") == files
    result = prepare(zips / "leftImg8bit_trainvaltest.zip", zips / "gtFine_trainvaltest.zip")
    assert result.returncode == 0, result.stderr
    assert "4 files written" in result.stdout
    files = members(*ZIPS["leftImg8bit_trainvaltest.zip"]) | files
    assert contents(tmp_path / "data") == files


def test_what_is_there_is_left_alone_and_what_is_damaged_is_replaced(zips, prepare, tmp_path):
    assert prepare(zips).returncode == 0
    data = tmp_path / "data"
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*.*")}
    result = prepare(zips)
    assert result.returncode == 0 and ": 0 files written" in result.stdout
    assert {path: path.stat().st_mtime_ns for path in data.rglob("*.*")} == before

    image = data / "leftImg8bit/train/ulm/ulm_000001_000019_leftImg8bit.png"
    content = image.read_bytes()
    image.write_bytes(content[:-1] + b"?")  # of the same size
    (data / "README").write_text("my own")
    result = prepare(zips)
    assert result.returncode == 0 and ": 1 files written" in result.stdout
    assert image.read_bytes() == content and (data / "README").read_text() == "my own"


def test_files_that_are_no_part_of_the_tree_stay_inside(zips, prepare, tmp_path):
    files = members(*ZIPS["gtFine_trainvaltest.zip"])
    others = (
        "__MACOSX/._gtFine",
        "gtFine/train/ulm/notes.txt",
        "gtFine/train/ulm/aachen_000000_000019_gtFine_labelIds.png",  # another city's
        "gtFine/train_extra/ulm/ulm_000000_000019_gtFine_labelIds.png",
        "gtFine/train/ulm/ulm_000000_000019_gtFine_labelIds.png.exe",
        "gtFine/train/ulm/sub/ulm_000000_000019_gtFine_labelIds.png",
        "gtFine/train/ulm/ulm_000000_00001\u0669_gtFine_labelIds.png",  # a digit elsewhere
        "lednet/model.py",
    )
    path = write_zip(zips / "odd.zip", files | dict.fromkeys(others, b"no"))
    result = prepare(path)
    assert result.returncode == 0, result.stderr
    assert f"{len(others)} files are no part of the tree" in result.stdout
    assert contents(tmp_path / "data") == files


# Bad faith


def add(name: str, content: bytes = b"x", **attributes: object) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        member = zipfile.ZipInfo(name)
        member.filename = name
        for key, value in attributes.items():
            setattr(member, key, value)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(member, content)

    return change


def patch(offset: int, code: str, value: int) -> Callable[[Path], None]:
    """Change a field of the last member in the directory."""

    def change(path: Path) -> None:
        content = bytearray(path.read_bytes())
        struct.pack_into(code, content, content.rindex(b"PK\x01\x02") + offset, value)
        path.write_bytes(content)

    return change


def without_a_name(path: Path) -> None:
    """Turn the last member's name into its comment."""
    with zipfile.ZipFile(path) as archive:
        length = len(archive.infolist()[-1].filename)
    patch(28, "<H", 0)(path)
    patch(32, "<H", length)(path)


def overlap(path: Path) -> None:
    """Let every member's data be those of one that is larger than the rest."""
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("large", os.urandom(5000))
    with zipfile.ZipFile(path) as archive:
        packed = archive.infolist()[-1].compress_size
    content = bytearray(path.read_bytes())
    at = content.find(b"PK\x01\x02")
    while at >= 0:
        struct.pack_into("<I", content, at + 20, packed)
        at = content.find(b"PK\x01\x02", at + 4)
    path.write_bytes(content)


ULM = "gtFine/train/ulm/ulm_000001_000019_gtFine_labelIds.png"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (add("../out.png"), "'../out.png' leads out of the folder"),
        (add("gtFine/../../out.png"), "leads out of the folder"),
        (add("/etc/out.png"), "'/etc/out.png' leads out of the folder"),
        (add("C:/out.png"), "leads out of the folder"),
        (add("..\\out.png"), "leads out of the folder"),
        (add(f"../{ULM}"), "leads out of the folder"),
        (without_a_name, "'' leads out of the folder"),
        (add("link", b"/etc", external_attr=(stat.S_IFLNK | 0o777) << 16), "'link' is a link"),
        (add("pipe", b"", external_attr=stat.S_IFIFO << 16), "is a link or a device"),
        (add(ULM, b"again"), "it holds files of one name"),
        (add("a", b"x", compress_type=zipfile.ZIP_BZIP2), "is packed in an unusual way"),
        (patch(8, "<H", 1), "needs a password"),
        (patch(24, "<I", LIMITS.file + 1), "would unpack to 17 MB"),
        (add("bomb", bytes(2 * SMALL), compress_type=zipfile.ZIP_DEFLATED), "would unpack to 2097"),
        (overlap, "its files overlap"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_zips_of_bad_faith_are_not_unpacked_at_all(change, words, zips, prepare, tmp_path):
    path = zips / "gtFine_trainvaltest.zip"
    change(path)
    assert_refused(prepare(zips), str(path), words, "download it again")
    assert not (tmp_path / "data").exists()
    assert {*os.listdir(tmp_path)} == {"zips"}


def test_many_files_that_are_each_small_enough_are_a_bomb_too(zips, prepare, tmp_path):
    frames = (f"gtFine/train/ulm/ulm_{i:06d}_000019_gtFine_labelIds.png" for i in range(100))
    path = write_zip(zips / "bomb.zip", dict.fromkeys(frames, bytes(SMALL)))
    assert_refused(prepare(path), "it would unpack to 0.1 GB")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("declared", [10, 300_000])
def test_directory_that_lies_about_a_size_is_found_out(declared, prepare, tmp_path):
    """The file has 200,000 bytes, be it declared to have fewer or more."""
    path = write_zip(tmp_path / "a.zip", {ULM: os.urandom(200_000)})
    patch(24, "<I", declared)(path)
    assert_refused(prepare(path), f"{ULM} is damaged in {path}")
    assert not contents(tmp_path / "data")


def test_zip_that_is_none_or_cut_short(zips, prepare, tmp_path):
    path = zips / "gtCoarse.zip"
    content = path.read_bytes()
    for size in (0, 1, 100, len(content) // 2, len(content) - 30):
        path.write_bytes(content[:size])
        assert_refused(prepare(zips), f"{path} is no zip, or damaged or cut short")
    assert not (tmp_path / "data").exists()
    assert_refused(prepare(tmp_path / "gone.zip"), "no file or folder", "gone.zip")
    write_zip(tmp_path / "b.zip", {"README": b"of something else"})
    assert_refused(prepare(tmp_path / "b.zip"), "holds no files of Cityscapes' tree")
    assert_refused(prepare(tmp_path), "holds none of gtCoarse.zip, ")
    assert_refused(prepare(), "no folder")


# Bad luck


def damage(path: Path, name: str) -> None:
    """Flip a bit in the middle of a member's bytes."""
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo(name)
    content = bytearray(path.read_bytes())
    begin = member.header_offset + 30 + len(name)
    content[begin + member.compress_size // 2] ^= 1
    path.write_bytes(content)


def test_damaged_file_is_named_and_those_before_it_stay(zips, prepare, tmp_path):
    path = zips / "gtFine_trainvaltest.zip"
    good = path.read_bytes()
    damage(path, ULM)
    assert_refused(prepare(path), f"{ULM} is damaged in {path}", "download the archive again")
    files = [*members(*ZIPS["gtFine_trainvaltest.zip"])]
    assert {*contents(tmp_path / "data")} == {*files[: files.index(ULM)]}
    path.write_bytes(good)
    result = prepare(path)
    assert result.returncode == 0, result.stderr
    assert f"{len(files) - files.index(ULM)} files written" in result.stdout
    assert contents(tmp_path / "data") == members(*ZIPS["gtFine_trainvaltest.zip"])


def test_disk_that_is_too_small_is_refused_before_anything_is_written(
    zips, prepare, tmp_path, monkeypatch
):
    size = sum(map(len, everything().values()))
    usage = shutil.disk_usage(tmp_path)._replace(free=size // 2)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert_refused(prepare(zips), "what is to be unpacked needs", "free some", "--datadir")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("fault", "status", "words"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 2, "No space left"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_stopped_half_way_it_goes_on_with_the_rest(
    fault, status, words, zips, prepare, tmp_path, monkeypatch
):
    write, number = Path.write_bytes, 0

    def failing(path: Path, content: bytes) -> int:
        nonlocal number
        number += 1
        if number == 8:
            write(path, content[: len(content) // 2])
            raise fault
        return write(path, content)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", failing)
        result = prepare(zips)
    assert result.returncode == status and words in result.stderr
    there = contents(tmp_path / "data")
    assert len(there) == 7 and there.items() <= everything().items()

    # Killed by force, it could not have cleaned up.
    leftover = tmp_path / "data/gtCoarse/train/aachen/.aachen_000000_000019.4711.png"
    leftover.write_bytes(b"half")
    result = prepare(zips)
    assert result.returncode == 0, result.stderr
    assert f"{len(everything()) - 7:,} files written, " in result.stdout
    assert contents(tmp_path / "data") == everything()


# Complete or not


def test_what_is_missing_is_told(zips, prepare, tmp_path):
    assert prepare(zips).returncode == 0
    data = tmp_path / "data"
    (data / ULM).unlink()
    (data / "leftImg8bit/val/lindau/lindau_000000_000019_leftImg8bit.png").unlink()
    result = prepare()
    assert_refused(
        result,
        "leftImg8bit/val holds 0 *_leftImg8bit.png of 1: unpack leftImg8bit_trainvaltest.zip again",
        "gtFine/train holds 1 *_gtFine_labelIds.png of 2: unpack gtFine_trainvaltest.zip again",
        "1 images of leftImg8bit/train have no label in gtFine/train (ulm_000001_000019)",
        "and 2 more",
    )
    assert "leftImg8bit.png" in result.stdout  # the table all the same
    shutil.rmtree(data / "leftImg8bit/val")  # not unpacked at all: not missed
    shutil.rmtree(data / "gtFine/train")
    assert prepare().returncode == 0
    shutil.rmtree(data)
    data.mkdir()
    assert_refused(prepare(), "holds nothing of Cityscapes")


def test_black_frame_may_be_removed_but_from_images_and_labels(zips, prepare, tmp_path):
    assert prepare(zips).returncode == 0
    data = tmp_path / "data"
    (data / f"leftImg8bit/train_extra/troisdorf/{BLACK_FRAME}_leftImg8bit.png").unlink()
    assert_refused(prepare(), "1 labels of gtCoarse/train_extra have no image", BLACK_FRAME)
    (data / f"gtCoarse/train_extra/troisdorf/{BLACK_FRAME}_gtCoarse_labelIds.png").unlink()
    result = prepare()
    assert result.returncode == 0 and "is black" not in result.stdout


def test_published_numbers():
    assert FRAMES == {"train": 2975, "val": 500, "test": 1525, "train_extra": 19998}


# Fuzzing


def unpack_somewhere(content: bytes) -> None:
    """Unpack, if it can be, and see that nothing but files of the tree was written."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "a.zip").write_bytes(content)
        root = folder / "inner/data"
        try:
            archive = open_archive(folder / "a.zip")
            archive.unpack(root, tqdm(disable=True))
        except UserError as error:
            assert len(str(error).splitlines()) == 1
        expected = cityscapes_tree._MEMBER
        assert {p.name for p in folder.iterdir()} <= {"a.zip", "inner"}
        for path in (folder / "inner").rglob("*"):
            if path.is_file():
                assert not path.is_symlink()
                assert expected.fullmatch(path.relative_to(root).as_posix())
                assert path.stat().st_size <= LIMITS.file


@pytest.fixture(scope="module")
def valid_zip(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("valid") / "a.zip"
    return write_zip(path, members("gtFine", ("train",))).read_bytes()


@FUZZ
@given(
    changes=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=8),
    end=st.none() | st.integers(0, 10**6),
    directory=st.booleans(),
)
def test_no_change_of_a_zip_ends_without_a_result_or_a_sentence(valid_zip, changes, end, directory):
    content = bytearray(valid_zip)
    first = content.find(b"PK\x01\x02") if directory else 0  # where most decisions are taken
    for position, value in changes:
        content[first + position % (len(content) - first)] = value
    unpack_somewhere(bytes(content[: None if end is None else end % len(content)]))


PARTS = st.sampled_from(
    ["gtFine", "train", "ulm", "ulm_000001_000019_gtFine_labelIds.png", "..", ".", "", "C:", "\0",
     "\\", "README", "leftImg8bit", "a" * 300]
) | st.text(max_size=4)  # fmt: skip


@FUZZ
@given(
    files=st.dictionaries(
        st.lists(PARTS, min_size=1, max_size=6).map("/".join), st.binary(max_size=64), max_size=5
    ),
    mode=st.sampled_from([0, stat.S_IFREG, stat.S_IFLNK, stat.S_IFDIR, stat.S_IFCHR]),
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_no_name_leads_out_of_the_tree(files, mode):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in {ULM: b"here", **files}.items():
            member = zipfile.ZipInfo("x")
            member.filename = name
            member.external_attr = mode << 16
            try:
                archive.writestr(member, content)
            except (UnicodeEncodeError, struct.error, IndexError):
                return  # zipfile cannot write it
    unpack_somewhere(file.getvalue())


# Polygons

official = pytest.importorskip("cityscapesscripts.preparation.json2labelImg")
ENCODINGS = {"labelIds": "ids", "labelTrainIds": "trainIds"}


def assert_drawn_as_by_the_official_tool(path: Path) -> None:
    annotation = official.Annotation()
    annotation.fromJsonFile(str(path))
    for ours, theirs in ENCODINGS.items():
        expected = np.array(official.createLabelImage(annotation, theirs))
        assert np.array_equal(draw_labels(read_polygons(path), ours), expected)


COORDINATES = (
    st.integers(-60, 100)
    | st.floats(-60, 100, allow_nan=False)
    | st.integers(-FARTHEST, FARTHEST)
)  # fmt: skip
NAMES = st.sampled_from([label.name for label in CITYSCAPES_LABELS])
OBJECTS = st.fixed_dictionaries(
    {
        "label": NAMES | NAMES.map(lambda name: f"{name}group"),
        "polygon": st.lists(st.lists(COORDINATES, min_size=2, max_size=2), min_size=2, max_size=9),
    },
    optional={"deleted": st.sampled_from([0, 1, True, False]), "id": st.integers(), "user": NAMES},
)
ANNOTATIONS = st.fixed_dictionaries(
    {
        "imgHeight": st.integers(1, 40),
        "imgWidth": st.integers(1, 60),
        "objects": st.lists(OBJECTS, max_size=6),
    }
)


@FUZZ
@given(ANNOTATIONS)
def test_polygons_are_drawn_as_by_the_official_tool(tmp_path, content):
    path = tmp_path / "a_polygons.json"
    path.write_text(json.dumps(content))
    assert_drawn_as_by_the_official_tool(path)


def test_real_polygons_are_drawn_as_by_the_official_tool_and_nearly_as_published(real_data):
    """The published images are of 2015's Pillow, whose outlines took other pixels."""
    files = sorted((real_data / "data/cityscapes_sample/gtFine").rglob("*_polygons.json"))
    assert len(files) == 5
    for path in files:
        assert_drawn_as_by_the_official_tool(path)
        published = path.with_name(path.name.replace("polygons.json", "labelIds.png"))
        drawn, published = draw_labels(read_polygons(path)), np.array(Image.open(published))
        assert (drawn != published).mean() < 0.005
        shifted = [np.roll(drawn, (y, x), (0, 1)) for y in (-1, 0, 1) for x in (-1, 0, 1)]
        assert (np.array(shifted) != published).all(axis=0).mean() < 0.00005


def test_later_polygons_lie_on_top_and_groups_and_plates_are_as_they_should_be(tmp_path):
    rows = [("road", 0), ("cargroup", 2), ("license plate", 4), ("out of roi", 6)]
    objects = [
        {"label": label, "polygon": [[left, 0], [9, 0], [9, 0], [left, 0]]} for label, left in rows
    ]
    objects.append({"label": "nonsense", "polygon": [[0, 0]], "deleted": 1})
    path = tmp_path / "a_polygons.json"
    path.write_text(json.dumps({"imgHeight": 1, "imgWidth": 8, "objects": objects}))
    annotation = read_polygons(path)
    assert draw_labels(annotation).tolist() == [[7, 7, 26, 26, 26, 26, 3, 3]]
    assert draw_labels(annotation, "labelTrainIds").tolist() == [[0, 0, 13, 13, 13, 13, 255, 255]]


def with_object(**changes: object) -> str:
    row = {"label": "road", "polygon": [[0, 0], [1, 1]]} | changes
    return json.dumps({"imgHeight": 8, "imgWidth": 16, "objects": [row]})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "Expecting value"),
        ("[" * 100_000, "nested too deep"),
        ('{"a":' * 100_000, "nested too deep"),
        ("9" * 10_000, "Exceeds the limit"),
        ("\xff", "codec can't decode"),
        ("[]", "no imgHeight that is int"),
        ("{}", "no imgHeight that is int"),
        ('{"imgHeight": true, "imgWidth": 4, "objects": []}', "no imgHeight that is int"),
        ('{"imgHeight": 8.0, "imgWidth": 4, "objects": []}', "no imgHeight that is int"),
        ('{"imgHeight": NaN, "imgWidth": 4, "objects": []}', "no imgHeight that is int"),
        ('{"imgHeight": 4, "imgWidth": "4", "objects": []}', "no imgWidth that is int"),
        ('{"imgHeight": 0, "imgWidth": 4, "objects": []}', "an image of no pixels"),
        ('{"imgHeight": -1, "imgWidth": -4, "objects": []}', "an image of no pixels"),
        ('{"imgHeight": 50000001, "imgWidth": 2, "objects": []}', "of more than 100,000,000"),
        ('{"imgHeight": 4, "imgWidth": 4, "objects": {}}', "no objects that is list"),
        ('{"imgHeight": 4, "imgWidth": 4, "objects": [3]}', "object 0: no label that is str"),
        (with_object(label=None), "object 0: no label that is str"),
        (with_object(label="roads"), "object 0: the label 'roads' is none of Cityscapes'"),
        (with_object(label="\ud800"), r"the label '\\ud800' is none"),
        (with_object(polygon=None), "object 0: no polygon that is list"),
        (with_object(polygon=[]), "fewer than two corners"),
        (with_object(polygon=[[1, 2]]), "fewer than two corners"),
        (with_object(polygon=[[1, 2], [1, 2, 3]]), r"a corner is not \[x, y\]"),
        (with_object(polygon=[[1, 2], 4]), r"a corner is not \[x, y\]"),
        (with_object(polygon=[[1, 2], [1, "2"]]), "not of numbers up to"),
        (with_object(polygon=[[1, 2], [1, True]]), "not of numbers up to"),
        (with_object(polygon=[[1, 2], [1, float("nan")]]), "not of numbers up to"),
        (with_object(polygon=[[1, 2], [1, FARTHEST + 1]]), "not of numbers up to"),
        (with_object(polygon=[[1, 2], [1, -(10**400)]]), "not of numbers up to"),
        (with_object(polygon=[[1, 2], [1, 7]]).replace("7", "1e999"), "not of numbers up to"),
    ],
)  # fmt: skip
def test_malformed_polygons_are_refused_in_a_sentence(text, words, tmp_path):
    path = tmp_path / "a_polygons.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=rf"a_polygons\.json is no annotation.*{words}"):
        read_polygons(path)


def test_missing_or_huge_polygons_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*a_polygons\.json: No such file"):
        read_polygons(tmp_path / "a_polygons.json")
    with open(tmp_path / "a_polygons.json", "wb") as file:
        file.truncate(2**30)
    with pytest.raises(UserError, match="more than 16777216 bytes"):
        read_polygons(tmp_path / "a_polygons.json")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                ["imgHeight", "imgWidth", "objects", "label", "polygon", "deleted", "x"]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=12,
)


@FUZZ
@given(content=ANNOTATIONS, key=st.sampled_from(["imgHeight", "objects", "label", "polygon", ""]),
       value=JSON, at=st.integers(0, 5))  # fmt: skip
def test_no_json_ends_without_a_label_or_a_sentence(tmp_path, content, key, value, at):
    rows = content["objects"]
    if key in content:
        content[key] = value
    elif key and rows:
        rows[at % len(rows)][key] = value
    elif not key:
        content = value
    path = tmp_path / "a_polygons.json"
    path.write_text(json.dumps(content))
    try:
        annotation = read_polygons(path)
    except UserError as error:
        assert str(path) in str(error)
        return
    assert draw_labels(annotation).shape == annotation.size


@FUZZ
@given(st.binary(max_size=60) | st.text(alphabet='{}[]":,0e.-Na', max_size=60).map(str.encode))
def test_no_bytes_end_without_a_sentence(tmp_path, content):
    path = tmp_path / "a_polygons.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match="is no annotation"):
        read_polygons(path)


def test_labels_are_drawn_where_they_are_missing(zips, prepare, tmp_path):
    assert prepare(zips).returncode == 0
    data = tmp_path / "data"
    drawn = data / ULM
    kept = data / "gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png"
    drawn.unlink()
    before = kept.read_bytes()
    result = prepare("--labels-from-polygons")
    assert result.returncode == 0, result.stderr
    assert "1 labelIds drawn from polygons" in result.stdout
    with Image.open(drawn) as image:
        assert image.mode == "L"
        label = np.array(image)
    polygons = drawn.with_name("ulm_000001_000019_gtFine_polygons.json")
    assert np.array_equal(label, draw_labels(read_polygons(polygons)))
    assert {*np.unique(label)} == {0, 7, 26} and kept.read_bytes() == before

    result = prepare("--train-ids-from-polygons")
    assert "9 labelTrainIds drawn from polygons" in result.stdout
    with Image.open(str(drawn).replace("labelIds", "labelTrainIds")) as image:
        assert {*np.unique(np.array(image))} == {0, 13, 255}


def test_one_bad_file_does_not_stop_the_others(zips, prepare, tmp_path):
    assert prepare(zips).returncode == 0
    data = tmp_path / "data"
    (data / ULM).unlink()
    bad = data / "gtCoarse/val/lindau/lindau_000000_000019_gtCoarse_polygons.json"
    bad.write_text("{}")
    bad.with_name(bad.name.replace("polygons.json", "labelIds.png")).unlink()
    result = prepare("--labels-from-polygons")
    assert_refused(result, f"{bad} is no annotation", "gtCoarse/val holds 0")
    assert (data / ULM).exists() and "1 labelIds drawn" in result.stdout


def test_archive_is_judged_as_a_whole(zips):
    """The library's class for itself: what it would write, and how much."""
    archive = open_archive(zips / "gtFine_trainvaltest.zip")
    assert isinstance(archive, Archive) and not archive.left_out
    files = members(*ZIPS["gtFine_trainvaltest.zip"])
    assert archive.size == sum(map(len, files.values()))

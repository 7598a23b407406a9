"""The toy data set: Cityscapes layout, ids, colours and polygons; reproducible files."""

import hashlib
import json
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import make_toy_cityscapes as toy
import numpy as np
import pytest
from PIL import Image, ImageDraw
from toy_scene import compose

from lednet.data.labels import CITYSCAPES_LABELS, IGNORE_INDEX, cityscapes_scheme
from lednet.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPT = REPOSITORY / "datasets" / "make_toy_cityscapes.py"

SIZE = {"width": 128, "height": 64}
COUNTS = {"train": 12, "val": 8, "test": 2, "train_extra": 3}
BY_NAME = {label.name: label for label in CITYSCAPES_LABELS}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("toy") / "set"
    assert toy.write_toy_cityscapes(folder, **COUNTS, **SIZE, seed=1, workers=1)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def read(path: Path) -> np.ndarray:
    return np.array(Image.open(path))


def annotations(root: Path, pattern: str = "gt*/*/*/*_labelIds.png") -> list[tuple]:
    """(path, label ids, its other files by kind) of each annotation."""
    found = sorted(root.glob(pattern))
    assert found

    def other(path: Path, kind: str) -> Path:
        return path.with_name(path.name.replace("labelIds.png", kind))

    kinds = {"instances": "instanceIds.png", "color": "color.png", "polygons": "polygons.json"}
    return [(p, read(p), {k: other(p, name) for k, name in kinds.items()}) for p in found]


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60)


def test_write_two_workers_equal_one(root, tmp_path):
    toy.write_toy_cityscapes(tmp_path / "set", **COUNTS, **SIZE, seed=1, workers=2)
    assert files(tmp_path / "set") == files(root)


def test_toy_scene_differs_by_seed_split_and_index():
    streets = [(1, "train", 0), (2, "train", 0), (1, "val", 0), (1, "train", 1)]
    images = [toy.toy_scene(*street, **SIZE).image for street in streets]
    assert len({image.tobytes() for image in images}) == len(streets)


@pytest.mark.parametrize(("index", "digest"), [(0, "84b4d81353cd68d8"), (5, "ff0eca9a8db2bcfb")])
def test_toy_scene_is_unchanged(index, digest):
    """The same seed must draw the same street; raise DRAWING otherwise."""
    scene = toy.toy_scene(1, "val", index, **SIZE)
    data = [scene.fine.instance_ids, scene.coarse.label_ids]
    assert hashlib.sha256(b"".join(a.tobytes() for a in data)).hexdigest()[:16] == digest


def test_layout_is_official(root):
    kinds = ("labelIds.png", "instanceIds.png", "color.png", "polygons.json")
    expected, cities = {"toy.json"}, []
    for split, count in COUNTS.items():
        folders = list((root / "leftImg8bit" / split).iterdir())
        cities += [folder.name for folder in folders]
        stems = {p.name[: -len("_leftImg8bit.png")] for f in folders for p in f.iterdir()}
        assert len(stems) == count and len(folders) > 1
        for stem in stems:
            city = re.fullmatch(r"([a-z]+)_\d{6}_\d{6}", stem).group(1)
            expected.add(f"leftImg8bit/{split}/{city}/{stem}_leftImg8bit.png")
            truths = {"test": ["gtFine"], "train_extra": ["gtCoarse"]}
            for truth in truths.get(split, ["gtFine", "gtCoarse"]):
                expected |= {f"{truth}/{split}/{city}/{stem}_{truth}_{kind}" for kind in kinds}
    assert set(files(root)) == expected
    assert len(cities) == len(set(cities))  # no city in two splits


def test_annotations_formats_ids_and_colors(root):
    colors = {label.id: (*label.color, 255) for label in CITYSCAPES_LABELS}
    for path, labels, others in annotations(root):
        images = [Image.open(p) for p in (path, others["instances"], others["color"])]
        assert [image.mode for image in images] == ["L", "I;16", "RGBA"]
        assert {image.size for image in images} == {(128, 64)}
        rgba = np.array(images[2])
        for value in np.unique(labels).tolist():
            assert (rgba[labels == value] == colors[value]).all()
    for path in root.glob("leftImg8bit/*/*/*.png"):
        assert (Image.open(path).mode, Image.open(path).size) == ("RGB", (128, 64))


@pytest.mark.parametrize("split", ["train", "val"])
def test_split_contains_every_class_and_void(root, split):
    lut, seen = cityscapes_scheme().lut, set()
    for _, labels, _ in annotations(root, f"gtFine/{split}/*/*_labelIds.png"):
        classes, pixels = np.unique(lut[labels], return_counts=True)
        seen |= {int(c) for c, n in zip(classes, pixels, strict=True) if n >= 8}
    assert seen == {*range(19), IGNORE_INDEX}


def test_instances_agree_with_labels(root):
    counted = [label.id for label in CITYSCAPES_LABELS if label.has_instances]
    several = 0
    for _, labels, others in annotations(root):
        instances = read(others["instances"]).astype(int)
        numbered = instances >= 1000
        assert np.array_equal(np.where(numbered, instances // 1000, instances), labels)
        assert np.array_equal(numbered, np.isin(labels, counted))
        several += (np.unique(instances[numbered]) % 1000 > 0).any()
    assert several > 10


def test_polygons_redraw_labels_and_instances(root):
    """As cityscapesscripts' json2labelImg and json2instanceImg draw them."""
    for path, labels, others in annotations(root):
        truth = json.loads(others["polygons"].read_text())
        size = truth["imgWidth"], truth["imgHeight"]
        drawn, instances, counts = Image.new("L", size), Image.new("I", size), Counter()
        for item in truth["objects"]:
            label, polygon = BY_NAME[item["label"]], [tuple(p) for p in item["polygon"]]
            value = label.id
            if label.has_instances:
                value = 1000 * label.id + counts[label.id]
                counts[label.id] += 1
            ImageDraw.Draw(drawn).polygon(polygon, fill=label.id)
            ImageDraw.Draw(instances).polygon(polygon, fill=value)
        assert np.array_equal(np.array(drawn), labels), path
        assert np.array_equal(np.array(instances), read(others["instances"])), path


def test_coarse_is_fine_with_more_void(root):
    void, agreeing, labelled = Counter(), 0, 0
    lut = cityscapes_scheme().lut
    for path, labels, _ in annotations(root, "gtFine/train/*/*_labelIds.png"):
        fine, coarse = lut[labels], lut[read(Path(str(path).replace("gtFine", "gtCoarse")))]
        known = coarse != IGNORE_INDEX
        agreeing, labelled = agreeing + (fine == coarse)[known].sum(), labelled + known.sum()
        void["fine"] += (fine == IGNORE_INDEX).sum()
        void["coarse"] += (~known).sum()
    assert agreeing >= 0.95 * labelled
    assert 2 * void["fine"] < void["coarse"] < labelled


def test_test_split_annotations_are_dummies(root):
    for _, labels, _ in annotations(root, "gtFine/test/*/*_labelIds.png"):
        assert (labels == BY_NAME["out of roi"].id).all()


def mask(polygons: list, width: int = 512, height: int = 256) -> np.ndarray:
    canvas = Image.new("1", (width, height))
    for polygon in polygons:
        scaled = [(x * width / 2 - 0.5, y * height - 0.5) for x, y in polygon]
        ImageDraw.Draw(canvas).polygon(scaled, fill=1)
    return np.array(canvas)


def test_strokes_stay_inside_outline():
    """So that image and label agree; shadows are translucent and not counted."""
    painted, spilled = Counter(), Counter()
    for index in range(6):
        for thing in compose(random.Random(index))[0]:
            opaque = [polygon for polygon, color in thing.strokes if len(color) == 3]
            paint, inside = mask(opaque), mask([thing.outline])
            painted[thing.label] += paint.sum()
            spilled[thing.label] += (paint & ~inside).sum()
    assert {BY_NAME[name].train_id for name in painted} >= set(range(19))
    assert {name for name in painted if spilled[name] > 0.02 * painted[name]} == set()


def test_toy_scene_is_equal_at_every_size():
    small, large = (toy.toy_scene(1, "train", 3, n * 128, n * 64).fine.label_ids for n in (1, 2))
    assert (large[::2, ::2] == small).mean() > 0.93


def test_script_from_another_folder_writes_set(root, tmp_path):
    few = {"train": 3, "val": 1, "test": 1, "train-extra": 1, "width": 128, "height": 64}
    options = [f"--{name}={value}" for name, value in few.items()] + ["--workers=2", "--out=set"]
    first = run(*options, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    written, expected = files(tmp_path / "set"), files(root)
    assert len(written) == 6 + 4 * (4 * 2 + 1 + 1) + 1  # images, annotations, toy.json
    assert all(data == expected[name] for name, data in written.items() if name != "toy.json")


def test_write_finished_set_changes_nothing(root):
    stamps = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert not toy.write_toy_cityscapes(root, **COUNTS, **SIZE, seed=1)
    assert stamps == {path: path.stat().st_mtime_ns for path in root.rglob("*")}


def test_script_default_folder_is_in_repository(monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT)])
    assert toy.parse_arguments().out == REPOSITORY / "datasets" / "toy_cityscapes"


def test_script_foreign_folder_exit_status_2(tmp_path):
    (tmp_path / "aachen.png").write_bytes(b"real data")
    result = run(f"--out={tmp_path}", cwd=REPOSITORY)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and str(tmp_path) in result.stderr
    assert files(tmp_path) == {"aachen.png": b"real data"}


def test_write_interrupted_set_is_completed(root, tmp_path, monkeypatch):
    draw, calls = toy.write_scene, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 5:
            raise KeyboardInterrupt
        draw(*arguments)

    monkeypatch.setattr(toy, "write_scene", interrupted)
    with pytest.raises(KeyboardInterrupt):
        toy.write_toy_cityscapes(tmp_path / "set", **COUNTS, **SIZE)
    assert json.loads((tmp_path / "set" / "toy.json").read_text())["complete"] is False
    half = next((tmp_path / "set").glob("gtFine/train/*"))
    (half / ".duckburg_000009_000019_gtFine_labelIds.77.png").write_bytes(b"half")
    monkeypatch.undo()
    assert toy.write_toy_cityscapes(tmp_path / "set", **COUNTS, **SIZE)
    assert files(tmp_path / "set") == files(root)


@pytest.mark.parametrize("wrong", [{"width": 8}, {"height": 9000}, {"train": -1}, {"workers": 0}])
def test_write_wrong_options_are_rejected(root, tmp_path, wrong):
    with pytest.raises(UserError):
        toy.write_toy_cityscapes(tmp_path / "set", **{**COUNTS, **SIZE, **wrong})
    assert not (tmp_path / "set").exists()
    before = files(root)
    with pytest.raises(UserError, match="other options"):
        toy.write_toy_cityscapes(root, **COUNTS, **SIZE, seed=2)
    assert files(root) == before

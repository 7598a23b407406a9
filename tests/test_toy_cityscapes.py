"""The toy data set: Cityscapes layout, ids, colours and polygons; reproducible files."""

import hashlib
import json
import random
import re
from collections import Counter
from pathlib import Path

import make_toy_cityscapes as toy
import numpy as np
import pytest
from conftest import ROOT
from fakes import content, read
from PIL import Image, ImageDraw
from toy_scene import compose

from lednet.data.labels import CITYSCAPES_LABELS, IGNORE_INDEX, cityscapes_scheme
from lednet.errors import UserError

SIZE = {"width": 128, "height": 64}
COUNTS = {"train": 12, "val": 8, "test": 2, "train_extra": 3}
BY_NAME = {label.name: label for label in CITYSCAPES_LABELS}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("toy") / "set"
    assert toy.write_toy_cityscapes(folder, **COUNTS, **SIZE, seed=1, workers=1)
    return folder


def annotations(root: Path, pattern: str = "gt*/*/*/*_labelIds.png") -> list[tuple]:
    """(path, label ids, its other files by kind) of each annotation."""
    found = sorted(root.glob(pattern))
    assert found
    kinds = {"instances": "instanceIds.png", "color": "color.png", "polygons": "polygons.json"}
    return [
        (p, read(p), {k: p.with_name(p.name.replace("labelIds.png", e)) for k, e in kinds.items()})
        for p in found
    ]


def test_write_two_workers_equal_one(root, tmp_path):
    toy.write_toy_cityscapes(tmp_path / "set", **COUNTS, **SIZE, seed=1, workers=2)
    assert content(tmp_path / "set") == content(root)


def test_toy_scene_depends_on_seed_split_and_index_not_size():
    streets = [(1, "train", 0), (2, "train", 0), (1, "val", 0), (1, "train", 1)]
    images = [toy.toy_scene(*street, **SIZE).image for street in streets]
    assert len({image.tobytes() for image in images}) == len(streets)
    small, large = (toy.toy_scene(1, "train", 3, n * 128, n * 64).fine.label_ids for n in (1, 2))
    assert (large[::2, ::2] == small).mean() > 0.93


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
    assert set(content(root)) == expected
    assert len(cities) == len(set(cities))  # no city in two splits


def test_annotations_have_official_formats_ids_and_colors(root):
    colors = {label.id: (*label.color, 255) for label in CITYSCAPES_LABELS}
    for path, labels, others in annotations(root):
        images = [Image.open(p) for p in (path, others["instances"], others["color"])]
        assert [image.mode for image in images] == ["L", "I;16", "RGBA"]
        assert {image.size for image in images} == {(128, 64)}
        rgba = np.array(images[2])
        for value in np.unique(labels).tolist():
            assert (rgba[labels == value] == colors[value]).all()
        if "/gtFine/test/" in str(path):
            assert (labels == BY_NAME["out of roi"].id).all()
    for path in root.glob("leftImg8bit/*/*/*.png"):
        assert (Image.open(path).mode, Image.open(path).size) == ("RGB", (128, 64))


@pytest.mark.parametrize("split", ["train", "val"])
def test_split_contains_every_class_and_void(root, split):
    lut, seen = cityscapes_scheme().lut, set()
    for _, labels, _ in annotations(root, f"gtFine/{split}/*/*_labelIds.png"):
        classes, pixels = np.unique(lut[labels], return_counts=True)
        seen |= {int(c) for c, n in zip(classes, pixels, strict=True) if n >= 8}
    assert seen == {*range(19), IGNORE_INDEX}


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


def test_coarse_annotations_agree_with_fine_ones_and_have_more_void(root):
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


def test_script_writes_the_same_files(root, tmp_path, run_inside):
    few = {"train": 3, "val": 1, "test": 1, "train-extra": 1, "width": 128, "height": 64}
    options = [f"--{name}={value}" for name, value in few.items()] + ["--workers=1"]
    run_inside("datasets/make_toy_cityscapes.py", *options, "--out", tmp_path / "set").check()
    written, expected = content(tmp_path / "set"), content(root)
    assert len(written) == 6 + 4 * (4 * 2 + 1 + 1) + 1  # images, annotations, toy.json
    assert all(data == expected[name] for name, data in written.items() if name != "toy.json")


def test_write_finished_set_changes_nothing(root):
    stamps = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert not toy.write_toy_cityscapes(root, **COUNTS, **SIZE, seed=1)
    assert stamps == {path: path.stat().st_mtime_ns for path in root.rglob("*")}


def test_script_foreign_folder_exits_with_status_2(tmp_path, run_inside):
    (tmp_path / "aachen.png").write_bytes(b"real data")
    run_inside("datasets/make_toy_cityscapes.py", "--out", tmp_path).assert_error(str(tmp_path))
    assert content(tmp_path) == {"aachen.png": b"real data"}
    assert toy.build_parser().parse_args([]).out == ROOT / "datasets" / "toy_cityscapes"


def test_write_after_interruption_completes_set(root, tmp_path, monkeypatch):
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
    assert content(tmp_path / "set") == content(root)


@pytest.mark.parametrize("wrong", [{"width": 8}, {"height": 9000}, {"train": -1}, {"workers": 0}])
def test_write_invalid_options_are_refused(root, tmp_path, wrong):
    with pytest.raises(UserError):
        toy.write_toy_cityscapes(tmp_path / "set", **{**COUNTS, **SIZE, **wrong})
    assert not (tmp_path / "set").exists()
    before = content(root)
    with pytest.raises(UserError, match="other options"):
        toy.write_toy_cityscapes(root, **COUNTS, **SIZE, seed=2)
    assert content(root) == before

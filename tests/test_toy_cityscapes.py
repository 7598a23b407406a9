"""The toy data set is a Cityscapes: layout, ids, colours, polygons; and it is reproducible."""

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


def companion(path: Path, kind: str) -> Path:
    return path.with_name(path.name.replace("labelIds.png", kind))


def label_files(root: Path, pattern: str = "gt*/*/*/*_labelIds.png") -> list[Path]:
    found = sorted(root.glob(pattern))
    assert found
    return found


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60)


def test_same_seed_gives_the_same_bytes_with_two_workers(root, tmp_path):
    toy.write_toy_cityscapes(tmp_path / "set", **COUNTS, **SIZE, seed=1, workers=2)
    assert files(tmp_path / "set") == files(root)


def test_another_seed_split_or_index_gives_another_street():
    streets = [(1, "train", 0), (2, "train", 0), (1, "val", 0), (1, "train", 1)]
    images = [toy.toy_scene(*street, **SIZE).image for street in streets]
    assert len({image.tobytes() for image in images}) == len(streets)


def test_layout_is_the_official_one(root):
    kinds = ("labelIds.png", "instanceIds.png", "color.png", "polygons.json")
    expected = {"toy.json"}
    for split, count in COUNTS.items():
        stems = [
            path.name[: -len("_leftImg8bit.png")]
            for path in (root / "leftImg8bit" / split).glob("*/*")
        ]
        assert len(stems) == len(set(stems)) == count
        for stem in stems:
            city = re.fullmatch(r"([a-z]+)_\d{6}_\d{6}", stem).group(1)
            expected.add(f"leftImg8bit/{split}/{city}/{stem}_leftImg8bit.png")
            truths = {"test": ["gtFine"], "train_extra": ["gtCoarse"]}
            for truth in truths.get(split, ["gtFine", "gtCoarse"]):
                expected |= {f"{truth}/{split}/{city}/{stem}_{truth}_{kind}" for kind in kinds}
    assert set(files(root)) == expected


def test_splits_share_no_city(root):
    cities = [path.name for path in (root / "leftImg8bit").glob("*/*")]
    assert len(cities) == len(set(cities))
    assert all(len(list((root / "leftImg8bit" / s).iterdir())) > 1 for s in COUNTS)


def test_pixel_formats(root):
    for path in label_files(root):
        forms = {
            kind: Image.open(companion(path, f"{kind}.png"))
            for kind in ("labelIds", "instanceIds", "color")
        }
        assert {kind: image.mode for kind, image in forms.items()} == {
            "labelIds": "L",
            "instanceIds": "I;16",
            "color": "RGBA",
        }
        assert {image.size for image in forms.values()} == {(128, 64)}
    for path in root.glob("leftImg8bit/*/*/*.png"):
        assert (Image.open(path).mode, Image.open(path).size) == ("RGB", (128, 64))


def test_every_id_is_in_the_table(root):
    ids = {label.id for label in CITYSCAPES_LABELS}
    for path in label_files(root):
        assert set(np.unique(read(path)).tolist()) <= ids


@pytest.mark.parametrize("split", ["train", "val"])
def test_every_class_and_some_void_occur(root, split):
    lut, seen = cityscapes_scheme().lut, set()
    for path in label_files(root, f"gtFine/{split}/*/*_labelIds.png"):
        classes, pixels = np.unique(lut[read(path)], return_counts=True)
        seen |= {int(c) for c, n in zip(classes, pixels, strict=True) if n >= 8}
    assert seen == {*range(19), IGNORE_INDEX}


def test_instances_agree_with_labels(root):
    counted = {label.id for label in CITYSCAPES_LABELS if label.has_instances}
    several = 0
    for path in label_files(root):
        labels, instances = read(path).astype(int), read(companion(path, "instanceIds.png"))
        instances = instances.astype(int)
        numbered = instances >= 1000
        assert np.array_equal(np.where(numbered, instances // 1000, instances), labels)
        assert np.array_equal(numbered, np.isin(labels, list(counted)))
        several += (np.unique(instances[numbered]) % 1000 > 0).any()
    assert several > 10


def test_colors_are_those_of_the_table(root):
    colors = {label.id: (*label.color, 255) for label in CITYSCAPES_LABELS}
    for path in label_files(root):
        labels, rgba = read(path), read(companion(path, "color.png"))
        for value in np.unique(labels):
            assert (rgba[labels == value] == colors[int(value)]).all()


def test_polygons_redraw_the_labels(root):
    """As cityscapesscripts' json2labelImg and json2instanceImg do it."""
    for path in label_files(root):
        truth = json.loads(companion(path, "polygons.json").read_text())
        size = truth["imgWidth"], truth["imgHeight"]
        labels, instances, counts = Image.new("L", size), Image.new("I", size), {}
        for item in truth["objects"]:
            label, polygon = BY_NAME[item["label"]], [tuple(p) for p in item["polygon"]]
            value = label.id
            if label.has_instances:
                counts[label.id] = counts.get(label.id, -1) + 1
                value = 1000 * label.id + counts[label.id]
            ImageDraw.Draw(labels).polygon(polygon, fill=label.id)
            ImageDraw.Draw(instances).polygon(polygon, fill=value)
        assert np.array_equal(np.array(labels), read(path))
        assert np.array_equal(np.array(instances), read(companion(path, "instanceIds.png")))


def test_coarse_is_fine_with_more_void(root):
    void, agreeing, labelled = {"gtFine": 0, "gtCoarse": 0}, 0, 0
    lut = cityscapes_scheme().lut
    for path in label_files(root, "gtFine/train/*/*_labelIds.png"):
        fine = lut[read(path)]
        coarse = lut[read(Path(str(path).replace("gtFine", "gtCoarse")))]
        counts = coarse != IGNORE_INDEX
        agreeing, labelled = agreeing + (fine == coarse)[counts].sum(), labelled + counts.sum()
        void["gtFine"] += (fine == IGNORE_INDEX).sum()
        void["gtCoarse"] += (~counts).sum()
    assert agreeing >= 0.95 * labelled
    assert void["gtCoarse"] > 2 * void["gtFine"]
    assert labelled > void["gtCoarse"]


def test_truth_of_the_test_split_is_a_dummy(root):
    for path in label_files(root, "gtFine/test/*/*_labelIds.png"):
        assert (read(path) == BY_NAME["out of roi"].id).all()


def mask(polygons: list, width: int = 512, height: int = 256) -> np.ndarray:
    canvas = Image.new("1", (width, height))
    for polygon in polygons:
        scaled = [(x * width / 2 - 0.5, y * height - 0.5) for x, y in polygon]
        ImageDraw.Draw(canvas).polygon(scaled, fill=1)
    return np.array(canvas)


def test_paint_stays_inside_the_outline():
    """So that the picture shows what the label says; shadows are no paint."""
    painted, spilled = Counter(), Counter()
    for index in range(6):
        for thing in compose(random.Random(index))[0]:
            opaque = [polygon for polygon, color in thing.strokes if len(color) == 3]
            paint, inside = mask(opaque), mask([thing.outline])
            painted[thing.label] += paint.sum()
            spilled[thing.label] += (paint & ~inside).sum()
    assert {BY_NAME[name].train_id for name in painted} >= set(range(19))
    assert {name for name in painted if spilled[name] > 0.02 * painted[name]} == set()


def test_a_street_is_the_same_at_every_size():
    small, large = (toy.toy_scene(1, "train", 3, n * 128, n * 64).fine.label_ids for n in (1, 2))
    assert (large[::2, ::2] == small).mean() > 0.93


def test_command_line_from_another_folder(root, tmp_path):
    few = {"train": 3, "val": 1, "test": 1, "train-extra": 1, "width": 128, "height": 64}
    options = [f"--{name}={value}" for name, value in few.items()] + ["--workers=2", "--out=set"]
    first = run(*options, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    written, expected = files(tmp_path / "set"), files(root)
    assert len(written) == 6 + 4 * (4 * 2 + 1 + 1) + 1  # pictures, truths, toy.json
    assert all(data == expected[name] for name, data in written.items() if name != "toy.json")


def test_finished_set_is_left_alone(root):
    stamps = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert not toy.write_toy_cityscapes(root, **COUNTS, **SIZE, seed=1)
    assert stamps == {path: path.stat().st_mtime_ns for path in root.rglob("*")}


def test_default_folder_is_in_the_repository(monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT)])
    assert toy.parse_arguments().out == REPOSITORY / "datasets" / "toy_cityscapes"


def test_foreign_folder_is_refused(tmp_path):
    (tmp_path / "aachen.png").write_bytes(b"real data")
    result = run(f"--out={tmp_path}", cwd=REPOSITORY)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and str(tmp_path) in result.stderr
    assert files(tmp_path) == {"aachen.png": b"real data"}


def test_other_options_are_refused(root):
    before = files(root)
    with pytest.raises(UserError, match="other options"):
        toy.write_toy_cityscapes(root, **COUNTS, **SIZE, seed=2)
    assert files(root) == before


def test_interrupted_set_is_completed(root, tmp_path, monkeypatch):
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


@pytest.mark.parametrize("wrong", [{"width": 8}, {"train": -1}, {"workers": 0}])
def test_impossible_options_are_refused(tmp_path, wrong):
    with pytest.raises(UserError):
        toy.write_toy_cityscapes(tmp_path / "set", **{**COUNTS, **SIZE, **wrong})
    assert not (tmp_path / "set").exists()

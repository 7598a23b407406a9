"""Benchmark metrics: equal to those of cityscapesscripts, the official tool."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lednet.data.dataset import read_label
from lednet.data.labels import CITYSCAPES_LABELS, cityscapes_id_scheme
from lednet.evaluation.cityscapes_evaluator import (
    FrameResult,
    find_frames,
    find_predictions,
    score_predictions,
    total_scores,
)
from lednet.evaluation.cityscapes_metrics import (
    AVERAGE_INSTANCE_SIZE,
    EVALUATED_CLASSES,
    BenchmarkScores,
    count_image,
)
from lednet.evaluation.evaluator import count_scored
from lednet.evaluation.report import format_scores
from lednet.metrics import ConfusionMatrix

ID = {label.name: label.id for label in CITYSCAPES_LABELS}
EVALUATED = [ID[name] for name in EVALUATED_CLASSES]


@pytest.fixture(scope="module")
def official():
    """cityscapesscripts' evaluation module."""
    if not hasattr(np, "in1d"):
        np.in1d = np.isin  # it calls the old name, which NumPy 2.4 took away
    module = pytest.importorskip(
        "cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling",
        reason="needs cityscapesscripts, which the extra dev installs",
    )
    module.args.quiet, module.args.JSONOutput = True, False
    return module


def corrupt(ids: np.ndarray, kind: str, rng: np.random.Generator) -> np.ndarray:
    """A wrong prediction made from the truth."""
    wrong = ids.copy()
    if kind == "shift":
        wrong = np.roll(ids, (5, -9), axis=(0, 1))
    elif kind == "swap":
        wrong[ids == ID["car"]] = ID["bicycle"]
        wrong[ids == ID["building"]] = ID["vegetation"]
        wrong[ids == ID["person"]] = ID["rider"]  # another class, the same category
    elif kind == "blocks":
        for _ in range(40):
            y, x = (int(rng.integers(0, length)) for length in ids.shape)
            wrong[y : y + 24, x : x + 40] = rng.integers(0, 34)  # ignored and group labels too
    elif kind == "missing":
        wrong[np.isin(ids, [ID["road"], ID["sky"], ID["person"]])] = 0
    elif kind == "ignored":
        wrong[ids == ID["car"]] = ID["caravan"]
        wrong[ids == ID["building"]] = ID["trailer"]
        wrong[ids == ID["sidewalk"]] = ID["parking"]
    elif kind == "void":
        wrong[:] = 0
    return wrong


KINDS = ("perfect", "shift", "swap", "blocks", "missing", "ignored", "void", "one image")


def write_corrupted(root: Path, folder: Path, kind: str) -> tuple[list, list, BenchmarkScores]:
    """Label files and corrupted predictions of a val split, and the scores of these."""
    frames, scheme = find_frames(root, "val", images=False)
    rng = np.random.default_rng(1)
    folder.mkdir()
    if kind == "one image":  # and so classes that are absent
        frames = frames[:1]
    for frame in frames:
        wrong = corrupt(np.array(Image.open(frame.label)), kind, rng)
        Image.fromarray(wrong).save(folder / f"{frame.name}_anything.png")
    files = find_predictions(folder, frames)
    paths = [files[frame.name] for frame in frames]
    results = score_predictions(frames, scheme, paths, workers=1)
    labels = [frame.label for frame in frames]
    return labels, paths, total_scores(result.full for result in results)


def assert_equal_figures(root: Path, folder: Path, kind: str, official) -> None:
    labels, paths, scores = write_corrupted(root, folder, kind)
    ours = scores.official_result()
    theirs = official.evaluateImgLists([*map(str, paths)], [*map(str, labels)], official.args)
    assert ours.keys() == theirs.keys()
    for key in ("confMatrix", "labels"):
        assert ours.pop(key) == theirs[key]
    for key, values in ours.items():
        a, b = (v if isinstance(v, dict) else {key: v} for v in (values, theirs[key]))
        a = {name: math.nan if value is None else value for name, value in a.items()}
        assert a == pytest.approx(b, abs=1e-9, rel=1e-9, nan_ok=True), key

    # Figures that the official tool does not compute, from the pixels alone
    truth, predicted = (
        np.concatenate([np.array(Image.open(path)).ravel() for path in group])
        for group in (labels, paths)
    )
    counted = np.isin(truth, EVALUATED)
    assert scores.pixel_accuracy() == pytest.approx((truth == predicted)[counted].mean(), abs=1e-12)
    shares = {name: (truth == ID[name]).sum() / counted.sum() for name in EVALUATED_CLASSES}
    weighted = sum(s * theirs["classScores"][name] for name, s in shares.items() if s)
    assert scores.frequency_weighted_iou() == pytest.approx(weighted, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_figures_equal_the_official_ones_on_toy_streets(kind, toy_cityscapes, tmp_path, official):
    assert_equal_figures(toy_cityscapes, tmp_path / "predictions", kind, official)


def test_figures_equal_the_official_ones_on_real_streets(real_data, tmp_path, official):
    root = real_data / "data" / "cityscapes_sample"
    assert_equal_figures(root, tmp_path / "predictions", "blocks", official)


def test_toy_streets_have_instances_ignored_labels_and_absent_classes(toy_cityscapes):
    frames, scheme = find_frames(toy_cityscapes, "val", images=False)
    first, *rest = [set(np.unique(read_label(frame.label, scheme)).tolist()) for frame in frames]
    every = first.union(*rest)
    assert len(every & {ID[name] for name in AVERAGE_INSTANCE_SIZE}) >= 2
    assert every - set(EVALUATED) and set(EVALUATED) - first


def test_confusion_matrix_of_training_targets_gives_the_same_scores(toy_cityscapes, tmp_path):
    labels, paths, scores = write_corrupted(toy_cityscapes, tmp_path / "p", "blocks")
    to_target = np.full(34, 19, np.uint8)
    to_target[EVALUATED] = np.arange(19)
    confusion = ConfusionMatrix(19)
    for pair in zip(paths, labels, strict=True):
        confusion.update(*(torch.from_numpy(to_target[np.array(Image.open(p))]) for p in pair))
    assert confusion.counts.tolist() == scores.class_matrix().tolist()
    for name in ("mean_iou", "pixel_accuracy", "frequency_weighted_iou"):
        expected = pytest.approx(getattr(scores, name)(), abs=1e-12)
        assert getattr(confusion, name)() == expected


def test_iiou_equals_the_one_computed_by_hand():
    """A car of 4 pixels of which 1 is right, one of 2 all right, and 1 false pixel."""
    car, road, truck = ID["car"], ID["road"], ID["truck"]
    truth = np.array([[car, car, car, car], [car, car, road, road]], np.uint8)
    instances = np.array([[26000, 26000, 26000, 26000], [26001, 26001, road, road]], np.int32)
    predicted = np.array([[car, truck, road, road], [car, car, car, road]], np.uint8)
    scores = count_image(predicted, truth, instances)
    size = AVERAGE_INSTANCE_SIZE["car"]
    hit, missed = size * (1 / 4 + 2 / 2), size * 3 / 4
    assert scores.class_iiou()["car"] == pytest.approx(hit / (hit + missed + 1))
    assert math.isnan(scores.class_iiou()["road"])
    hit, missed = size * (2 / 4 + 2 / 2), size * 2 / 4  # a truck is a vehicle too
    assert scores.category_iiou()["vehicle"] == pytest.approx(hit / (hit + missed + 1))
    assert scores.class_iou()["truck"] == 0 and math.isnan(scores.class_iou()["bus"])


def test_presence_tells_predicted_only_from_absent():
    truth = np.full((2, 2), ID["road"], np.uint8)
    predicted = np.array([[ID["road"], ID["truck"]], [ID["road"], ID["static"]]], np.uint8)
    scores = count_image(predicted, truth)
    presence = scores.presence()
    found = {name: where for name, where in presence.items() if where != "absent"}
    assert found == {"road": "present", "truck": "predicted only"}
    assert count_scored(presence) == "2 of 19 classes"
    assert scores.mean_iou() == pytest.approx(0.25)  # (2/4 + 0) / 2
    assert scores.presence("category")["vehicle"] == "predicted only"
    text = format_scores(scores, None, None)
    assert re.search(r"truck +\* 0\.0000", text) and re.search(r"bus +absent", text)
    assert "* in no label, but predicted" in text and "2 of 19 classes scored" in text
    assert "* in no label" not in format_scores(count_image(truth, truth), None, None)


def test_crowds_are_no_instances_and_without_instance_images_there_is_no_iiou():
    """A label id in the instance image marks a group, which is not weighted."""
    truth = np.full((2, 2), ID["person"], np.uint8)
    crowd = count_image(truth, truth, truth.astype(np.int32))
    assert crowd.class_iou()["person"] == 1 and math.isnan(crowd.class_iiou()["person"])
    summary = count_image(truth, truth).summary()
    assert summary["class_iou"] == 1 and summary["class_iiou"] is None


def test_frame_result_is_restored_from_json():
    ids = np.random.default_rng(0).integers(0, 34, (2, 16, 16), dtype=np.uint8)
    counts = count_image(*ids, ids[1].astype(np.int32) * 1000 + 1)
    result = FrameResult("a", counts, count_image(*ids[:, ::2]))
    again = FrameResult.from_json(json.loads(json.dumps(result.to_json())))
    assert again.name == "a" and again.full.images == again.network.images == 1
    assert (again.full.matrix == result.full.matrix).all()
    assert (again.full.instances == result.full.instances).all()
    assert (again.network.matrix == result.network.matrix).all()


def test_id_scheme_reads_both_encodings():
    by_id, by_train_id = cityscapes_id_scheme(), cityscapes_id_scheme("labelTrainIds")
    assert by_id.lut[[0, 7, 33]].tolist() == [0, 7, 33] and by_id.lut[34] == -1
    assert by_train_id.lut[[0, 18, 255]].tolist() == [7, 33, 0] and by_train_id.lut[19] == -1

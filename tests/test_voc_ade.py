"""Pascal VOC and ADE20K: official trees and tables, invalid ones, all steps on toy trees."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.models._meta import _VOC_CATEGORIES

from lednet import UserError
from lednet.data.dataset import SegmentationDataset
from lednet.data.folders import read_class_file
from lednet.data.labels import IGNORE_INDEX
from lednet.data.registry import CLASS_FILES, open_dataset, open_training_data

SIZES = [(40, 56), (56, 40), (48, 48)]  # (height, width)
VOC_SPLITS = {
    "train": ["2007_000032", "2007_000039", "2008_000002"],
    "val": ["2007_000033", "2007_000042"],
}


def save_image(path: Path, label: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = (label[..., None].astype(int) * [37, 91, 11] + 20) % 256
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def save_label(path: Path, label: np.ndarray, palette: np.ndarray | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(label)
    if palette is not None:
        image.putpalette(palette.tobytes())
    image.save(path)


def bands(ids: list[int], size: tuple[int, int]) -> np.ndarray:
    """(H, W) uint8: a band of rows for each id."""
    rows = np.repeat(np.array(ids, np.uint8), -(-size[0] // len(ids)))[: size[0]]
    return np.repeat(rows[:, None], size[1], axis=1)


@pytest.fixture
def voc(tmp_path) -> Path:
    """The folder that VOC's archive unpacks to, with an image that no list names."""
    root = tmp_path / "data/VOCdevkit/VOC2012"
    palette = read_class_file(CLASS_FILES / "VOC.yaml").palette
    names = [name for split in VOC_SPLITS.values() for name in split]
    for i, name in enumerate(names):
        label = bands([0, i + 1, 255, 20 - i], SIZES[i % 3])
        save_image(root / f"JPEGImages/{name}.jpg", label)
        save_label(root / f"SegmentationClass/{name}.png", label, palette)
    save_image(root / "JPEGImages/2007_000027.jpg", label)
    for split, names in VOC_SPLITS.items():
        write_list(root, split, names)
    return root


def write_list(root: Path, split: str, names: list[str]) -> None:
    path = root / f"ImageSets/Segmentation/{split}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name}\n" for name in names))


@pytest.fixture
def augmented(voc) -> Path:
    """With the labels that SBD adds: of all images but those of val, in grey."""
    names = ["2007_000027", *VOC_SPLITS["train"]]
    write_list(voc, "trainaug", names)
    for i, name in enumerate(names):
        with Image.open(voc / f"JPEGImages/{name}.jpg") as image:
            size = image.height, image.width
        save_label(voc / f"SegmentationClassAug/{name}.png", bands([0, 7 + i, 255], size))
    return voc


@pytest.fixture
def ade20k(tmp_path) -> Path:
    """The folder that ADE20K's archive unpacks to, with a grey image."""
    root = tmp_path / "data/ADEChallengeData2016"
    for split, short, count in (("training", "train", 4), ("validation", "val", 2)):
        for i in range(count):
            label = bands([0, 1 + i, 150 - i, 75], SIZES[i % 3])
            name = f"ADE_{short}_{i + 1:08d}"
            save_image(root / f"images/{split}/{name}.jpg", label)
            save_label(root / f"annotations/{split}/{name}.png", label)
    Image.open(root / "images/training/ADE_train_00000002.jpg").convert("L").save(
        root / "images/training/ADE_train_00000002.jpg"
    )
    return root


# Tables


def test_voc_class_file_equals_official_table():
    scheme = read_class_file(CLASS_FILES / "VOC.yaml")
    assert scheme.name == "VOC"
    assert scheme.classes == ("background", *_VOC_CATEGORIES[1:])
    assert {scheme.lut[i] for i in range(21)} == set(range(21))
    assert scheme.lut[255] == IGNORE_INDEX and scheme.lut[21] == scheme.lut[254] == -1
    for index, color in enumerate(scheme.colors):
        # The development kit deals the bits of the index out to red, green and blue in turn.
        bits = [[index >> (3 * turn + channel) & 1 for turn in range(8)] for channel in range(3)]
        assert color == tuple(sum(b << (7 - turn) for turn, b in enumerate(row)) for row in bits)


def test_ade20k_class_file_has_rows_of_official_table():
    scheme = read_class_file(CLASS_FILES / "ADE20K.yaml")
    assert scheme.name == "ADE20K" and len(set(scheme.classes)) == scheme.num_classes == 150
    assert all(scheme.lut[i + 1] == i for i in range(150))
    assert scheme.lut[0] == IGNORE_INDEX and scheme.lut[151] == scheme.lut[255] == -1
    rows = dict(zip(scheme.classes, scheme.colors, strict=True))
    for index, name, color in (
        (1, "wall", (120, 120, 120)),
        (3, "sky", (6, 230, 230)),
        (45, "chest of drawers", (6, 51, 255)),
        (150, "flag", (92, 0, 255)),
    ):
        assert scheme.classes[index - 1] == name and rows[name] == color
    # It gives one colour twice: to road and skyscraper.
    assert len(set(scheme.colors)) == 149 and rows["road"] == rows["skyscraper"]


# Trees


def stems(data: SegmentationDataset) -> list[str]:
    assert all(pair.image.stem == pair.label.stem for pair in data.pairs)
    return [pair.image.stem for pair in data.pairs]


def test_open_voc_split_has_the_images_of_its_list(voc):
    for folder in (voc, voc.parent, voc.parent.parent):
        for split, names in VOC_SPLITS.items():
            assert stems(open_dataset("voc", folder, split)) == names
    write_list(voc, "trainval", ["2007_000042", "", "2007_000032"])
    assert stems(open_dataset("voc", voc, "trainval")) == ["2007_000032", "2007_000042"]
    write_list(voc, "test", ["2007_000027"])
    (pair,) = open_dataset("voc", voc, "test").pairs
    assert pair.label is None
    image, label = open_dataset("voc", voc, "train").read(0)  # palette indices, border void
    assert image.shape == (*SIZES[0], 3) and label.dtype == np.uint8
    assert np.array_equal(label, bands([0, 1, IGNORE_INDEX, 20], SIZES[0]))


def test_open_ade20k_id_0_is_void_and_the_first_class_is_1(ade20k):
    for folder in (ade20k, ade20k.parent):
        data = open_dataset("ade20k", folder, "train")
        assert len(data) == 4 and len(open_dataset("ade20k", folder, "val")) == 2
    assert np.array_equal(data.read(0)[1], bands([IGNORE_INDEX, 0, 149, 74], SIZES[0]))
    assert data.read(1)[0].shape == (*SIZES[1], 3)  # of a grey JPEG
    (ade20k / "annotations/training/ADE_train_00000003.png").unlink()
    with pytest.raises(UserError, match=r"1 of 4 images have no label \(ADE_train_00000003\)"):
        open_dataset("ade20k", ade20k, "train")


@pytest.mark.parametrize("name", ["voc", "ade20k"])
def test_open_training_data_resizes_images_to_one_size(name, request):
    train, val = open_training_data(name, request.getfixturevalue(name))
    assert train.size == val.size == (512, 512)
    train.size = (32, 24)
    assert {tuple(plane.shape[-2:] for plane in pair) for pair in train} == {((32, 24), (32, 24))}


def test_open_training_data_augmented_voc(augmented):
    train, val = open_training_data("voc", augmented, annotations="aug")
    assert stems(train) == ["2007_000027", *VOC_SPLITS["train"]]
    assert {pair.label.parent.name for pair in train.pairs} == {"SegmentationClassAug"}
    assert np.array_equal(train.read(1)[1], bands([0, 8, IGNORE_INDEX], SIZES[0]))
    assert stems(val) == VOC_SPLITS["val"]
    assert {pair.label.parent.name for pair in val.pairs} == {"SegmentationClass"}
    assert stems(open_training_data("voc", augmented)[0]) == VOC_SPLITS["train"]
    names = ["2007_000027", "2007_000032"]  # some copies of the list hold paths
    lines = [f"/JPEGImages/{name}.jpg /SegmentationClassAug/{name}.png" for name in names]
    write_list(augmented, "trainaug", lines)
    assert stems(open_dataset("voc", augmented, "train", annotations="aug")) == names


# Errors


def test_open_dataset_folders_with_no_tree_or_two_are_refused(voc, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"VOC2012: unpack VOCtrainval_11-May-2012\.tar there"):
        open_dataset("voc", tmp_path / "empty", "train")
    with pytest.raises(UserError, match=r"unpack ADEChallengeData2016\.zip there"):
        open_dataset("ade20k", tmp_path / "empty", "train")
    data = voc.parent.parent
    (data / "VOC2012/ImageSets/Segmentation").mkdir(parents=True)
    with pytest.raises(UserError, match=r"both .* hold ImageSets/Segmentation: choose one"):
        open_dataset("voc", data, "train")


def test_open_voc_files_of_the_list_must_exist_once(voc, tmp_path):
    (voc / "SegmentationClass/2007_000039.png").unlink()
    with pytest.raises(UserError, match=r"train\.txt: 1 of 3 images have no label \(2007_000039\)"):
        open_dataset("voc", voc, "train")
    (voc / "JPEGImages/2007_000039.jpg").unlink()  # neither image nor label: still an error
    with pytest.raises(UserError, match=r"names 1 images that are not in .* \(2007_000039\)"):
        open_dataset("voc", voc, "train")
    save_image(voc / "JPEGImages/2007_000033.webp", np.zeros(SIZES[0], np.uint8))
    with pytest.raises(UserError, match=r"1 images have the name of another one .*2007_000033"):
        open_dataset("voc", voc, "val")
    save_image(tmp_path / "secret.jpg", np.zeros(SIZES[0], np.uint8))
    write_list(voc, "val", ["../../../../secret"])  # does not lead out of the tree
    with pytest.raises(UserError, match=r"names 1 images that are not in .* \(secret\)"):
        open_dataset("voc", voc, "val")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, r"no file .*val\.txt: unpack"),
        (b"\n \n", r"val\.txt names no images: unpack"),
        (b"\xff", r"val\.txt is not UTF-8 text \(line 1\)"),
    ],
)
def test_open_voc_list_without_names_is_refused(voc, content, words):
    path = voc / "ImageSets/Segmentation/val.txt"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        open_dataset("voc", voc, "val")


@pytest.mark.parametrize(
    ("name", "annotations", "words"),
    [
        ("voc", "aug", r"no file .*trainaug\.txt: add SBD's"),
        ("voc", "coarse", "voc has no coarse annotations: choose fine or aug"),
        ("ade20k", "aug", "ade20k has no aug annotations: choose fine$"),
        ("camvid", "both", "camvid has no coarse annotations: choose fine$"),
        ("own_data", "coarse", "folders has no coarse annotations: choose fine$"),
        ("toy_cityscapes", "aug", "cityscapes has no aug annotations: choose fine or coarse$"),
    ],
)
def test_open_training_data_unavailable_annotations_are_refused(name, annotations, words, request):
    root = request.getfixturevalue(name)
    name = {"own_data": "folders", "toy_cityscapes": "cityscapes"}.get(name, name)
    options = {"val_stride": 3} if name == "camvid" else {}
    with pytest.raises(UserError, match=words):
        open_training_data(name, root, annotations=annotations, **options)


def test_open_training_data_shared_images_are_refused(augmented):
    write_list(augmented, "val", [VOC_SPLITS["train"][0], *VOC_SPLITS["val"]])
    with pytest.raises(UserError, match=r"1 of 3 validation images .* \(2007_000032\.jpg\)"):
        open_training_data("voc", augmented)
    # Held out by number, they would be others of train than of trainaug.
    with pytest.raises(UserError, match=r"1 of 1 validation images .* are among those trained on"):
        open_training_data("voc", augmented, annotations="aug", val_stride=3)
    train, val = open_training_data("voc", augmented, annotations="aug", val_prefix="2007_000039")
    assert stems(val) == ["2007_000039"] and len(train) == 3


# All steps


@pytest.mark.parametrize(
    ("name", "annotations", "classes"), [("voc", "aug", 21), ("ade20k", "fine", 150)]
)
def test_scripts_from_tree_to_predictions(
    name, annotations, classes, request, run_inside, tmp_path
):
    root = request.getfixturevalue("augmented" if annotations == "aug" else name)
    data = ("--dataset", name, "--datadir", root.parent)
    aug = ("--annotations", annotations)
    small = ("--height", 32, "--width", 32, "--cache", tmp_path / "cache", "--num-workers", 0)

    def run(script: str, *flags: object) -> str:
        result = run_inside(script, *flags).check()
        return result.stdout

    run("datasets/prepare_cityscapes.py", *data, *aug, *small)
    run("train/main.py", *data, *aug, *small, "--savedir", tmp_path / "run", "--num-epochs", 1,
        "--batch-size", 2, "--device", "cpu")  # fmt: skip
    meta = json.loads(run("utils/class_weights.py", *data, *aug, "--format", "json"))
    assert len(meta["shares"]) == classes + 1 and meta["labels"] == 4

    weights = ("--weights", tmp_path / "run/best.pth")
    run("test/eval_iou.py", *weights, *data, "--device", "cpu", "--num-workers", 0,
        "--json", tmp_path / "val.json", "--contact-sheet", tmp_path / "sheet.png")  # fmt: skip
    scores = json.loads((tmp_path / "val.json").read_text())
    assert scores["scored_at"] == "full" and scores["network_size"] == [32, 32]
    assert len(scores["class_iou"]) == classes and scores["images"] == 2

    voc = name == "voc"
    images = root / ("JPEGImages" if voc else "images/validation")
    run("test/eval_cityscapes_color.py", *weights, "--input", images, "--out",
        tmp_path / "colored", "--no-legend", "--device", "cpu")  # fmt: skip
    colors = read_class_file(CLASS_FILES / f"{'VOC' if voc else 'ADE20K'}.yaml").palette
    for image in images.iterdir():
        pixels = np.array(Image.open(tmp_path / f"colored/{image.stem}_color.png").convert("RGB"))
        with Image.open(image) as original:
            assert pixels.shape[:2] == (original.height, original.width)
        assert {*map(tuple, pixels.reshape(-1, 3))} <= {*map(tuple, colors)}

    check = ("utils/check_dataset.py", *data, "--out", tmp_path / "out", "--workers", 0,
             "--fail-on", "error")  # fmt: skip
    run(*check)
    path = sorted((root / ("SegmentationClass" if voc else "annotations/training")).iterdir())[0]
    with Image.open(path) as image:
        Image.new("L", image.size, 200).save(path)
    assert run_inside(*check).returncode == 1
    report = (tmp_path / "out/report.json").read_text()
    assert f"values that {'VOC' if voc else 'ADE20K'} does not define" in report

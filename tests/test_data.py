"""Data sets: labels, pairs of files, splits and annotations, and the transforms of training."""

import itertools
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import seeded
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

from lednet import UserError
from lednet.data import transforms
from lednet.data.cache import CachedDataset
from lednet.data.dataset import SegmentationDataset, SkipCorruptDataset, pixel_shares, read_label
from lednet.data.folders import read_class_file
from lednet.data.labels import CITYSCAPES_LABELS, IGNORE_INDEX, cityscapes_scheme
from lednet.data.registry import cache_split, open_dataset, open_training_data
from lednet.data.transforms import PRESETS, SHIFT, Augmentation, color_jitter, resize_transform

# labels


def test_label_table_equals_official_one():
    official = pytest.importorskip("cityscapesscripts.helpers.labels").labels
    names = ("name", "id", "trainId", "category", "hasInstances", "ignoreInEval", "color")
    expected = [tuple(getattr(label, name) for name in names) for label in official]
    assert [tuple(label) for label in CITYSCAPES_LABELS] == expected


def test_cityscapes_scheme_encodings_have_the_same_classes():
    ids, train_ids = cityscapes_scheme("labelIds"), cityscapes_scheme("labelTrainIds")
    assert ids.classes == train_ids.classes and ids.num_classes == 19 and ids.num_outputs == 20
    assert ids.classes[0] == "road" and ids.classes[18] == "bicycle"
    for label in CITYSCAPES_LABELS:
        if not label.ignore_in_eval:
            assert ids.lut[label.id] == train_ids.lut[label.train_id] == label.train_id
    assert ids.lut[0] == train_ids.lut[255] == IGNORE_INDEX
    assert ids.lut[34] == ids.lut[255] == train_ids.lut[19] == -1
    assert ids.palette[11].tolist() == [220, 20, 60]


# pairs


def camvid_error(root: Path, split: str = "train", **options) -> str:
    with pytest.raises(UserError) as caught:
        open_dataset("camvid", root, split, **options)
    return str(caught.value)


def test_open_dataset_unmatched_files_are_named_and_counted(own_camvid, tmp_path):
    label = own_camvid / "trainannot/train_001.png"
    Image.open(label).save(label.with_suffix(".webp"), lossless=True)  # not used as a label
    for i in (1, 3):
        (own_camvid / f"trainannot/train_{i:03d}.png").unlink()
    assert "2 of 5 images have no label (train_001, train_003)" in camvid_error(own_camvid)
    for i in (1, 2, 3):
        (own_camvid / f"train/train_{i:03d}.png").unlink()
    assert "1 of 3 labels have no image (train_002)" in camvid_error(own_camvid)
    for folder in ("test", "testannot"):
        (own_camvid / folder).mkdir()
    assert "test holds no images" in camvid_error(own_camvid, "test")
    assert "nowhere: give the data set's folder" in camvid_error(tmp_path / "nowhere")
    shutil.rmtree(own_camvid / "valannot")
    assert f"no folder {own_camvid / 'valannot'}: check" in camvid_error(own_camvid, "val")


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_open_dataset_image_in_two_formats_is_refused(own_camvid, suffix):
    path = own_camvid / "val/val_001.png"
    Image.open(path).save(path.with_suffix(suffix))
    error = camvid_error(own_camvid, "val")
    assert "1 images have the name of another one" in error and f"val_001{suffix}" in error


def to_webp(folder: Path, ending: str = "") -> None:
    """Replace PNG images by lossless WebP, with suffixes in different case."""
    for i, path in enumerate(sorted(folder.rglob(f"*{ending}.png"))):
        suffix = (".webp", ".WEBP", ".WebP")[i % 3]
        Image.open(path).save(path.with_suffix(suffix), "WEBP", lossless=True)
        path.unlink()


def test_open_dataset_finds_images_in_subfolders_and_other_formats(camvid, own_camvid):
    to_webp(own_camvid / "train")
    (own_camvid / "train/a").mkdir()
    (own_camvid / "train/train_000.webp").rename(own_camvid / "train/a/train_000.webp")
    (own_camvid / "train/.hidden.png").write_bytes(b"no image")
    data, original = (open_dataset("camvid", root, "train") for root in (own_camvid, camvid))
    assert len(data) == len(original) == 5
    for i, (image, label) in enumerate(data.pairs):
        assert image.suffix.lower() == ".webp" and label.name == f"{image.stem}.png"
        assert all(map(np.array_equal, data.read(i), original.read(i)))


def test_open_dataset_holds_out_images(own_camvid):
    def numbers(**options) -> list[str]:
        parts = (open_dataset("camvid", own_camvid, name, **options) for name in ("train", "val"))
        return ["".join(pair.image.stem[-1] for pair in part.pairs) for part in parts]

    assert numbers(val_stride=2) == ["024", "13"]
    assert numbers(val_prefix="train_004") == ["0123", "4"]
    empty = camvid_error(own_camvid, "val", val_prefix="0099")
    assert "val is empty after --val-prefix 0099: hold out others" in empty
    assert "give one of them" in camvid_error(own_camvid, "val", val_prefix="0", val_stride=2)


def test_open_training_data_with_val_trains_on_it_too(camvid):
    train, val = open_training_data("camvid", camvid)
    both, same = open_training_data("camvid", camvid, with_val=True)
    assert both.pairs == train.pairs + val.pairs and same.pairs == val.pairs


# annotations


@pytest.fixture
def own_cityscapes(toy_cityscapes, tmp_path) -> Path:
    """The toy tree, which a test may change."""
    return shutil.copytree(toy_cityscapes, tmp_path / "cityscapes")


def folders(data: SegmentationDataset) -> Counter:
    """Number of pairs by the folders, kind and split, of their files."""
    for image, label in data.pairs:
        assert image.name.split("_leftImg8bit")[0] == label.name.split("_gt")[0]
    return Counter(tuple("/".join(p.parts[-4:-2]) for p in pair) for pair in data.pairs)


TRAIN, EXTRA, VAL = "leftImg8bit/train", "leftImg8bit/train_extra", "leftImg8bit/val"
PARTS = {
    "fine": {(TRAIN, "gtFine/train"): 6},
    "coarse": {(EXTRA, "gtCoarse/train_extra"): 2, (TRAIN, "gtCoarse/train"): 6},
    "both": {(TRAIN, "gtFine/train"): 6, (EXTRA, "gtCoarse/train_extra"): 2},
}


@pytest.mark.parametrize("annotations", PARTS)
def test_open_training_data_annotations_select_splits(own_cityscapes, annotations):
    def opened(**options) -> tuple[SegmentationDataset, SegmentationDataset]:
        options["annotations"] = annotations
        return open_training_data("cityscapes", own_cityscapes, 24, 40, **options)

    train, val = opened()
    assert folders(train) == PARTS[annotations] and folders(val) == {(VAL, "gtFine/val"): 3}
    assert len({pair.image for pair in train.pairs}) == len(train)
    for data in (train, val):
        assert [plane.shape[-2:] for plane in data[len(data) - 1]] == [(24, 40)] * 2
    unused = ("leftImg8bit/val", "leftImg8bit/test", "gtFine/val", "gtFine/test", "gtCoarse/val")
    for folder in unused:
        shutil.rmtree(own_cityscapes / folder)
    train, val = opened(val_stride=3)
    assert folders(val) == {(TRAIN, "gtFine/train"): 2}
    assert len(train) == (4 if annotations == "fine" else 6)
    assert not {pair.image for pair in train.pairs} & {pair.image for pair in val.pairs}


def test_open_dataset_cityscapes_splits(toy_cityscapes):
    for split, count in {"train": 6, "val": 3, "train_extra": 2}.items():
        data = open_dataset("cityscapes", toy_cityscapes, split, annotations="coarse")
        assert folders(data) == {(f"leftImg8bit/{split}", f"gtCoarse/{split}"): count}
    test = open_dataset("cityscapes", toy_cityscapes, "test")
    assert [pair.label for pair in test.pairs] == [None, None]
    assert (test.read(0)[1] == IGNORE_INDEX).all()
    with pytest.raises(UserError, match="choose coarse annotations, train_extra has no others"):
        open_dataset("cityscapes", toy_cityscapes, "train_extra")


def add_train_ids(folder: Path, keep: bool) -> None:
    """Write labelTrainIds next to the labelIds, or replace them."""
    scheme = cityscapes_scheme()
    for path in list(folder.rglob("*_labelIds.png")):
        name = path.name.replace("labelIds", "labelTrainIds")
        Image.fromarray(read_label(path, scheme)).save(path.with_name(name))
        if not keep:
            path.unlink()


def test_open_training_data_detects_encodings_and_refuses_mixed_ones(own_cityscapes):
    def opened(annotations: str, labels: str = "auto") -> SegmentationDataset:
        options = {"annotations": annotations, "labels": labels}
        return open_training_data("cityscapes", own_cityscapes, 64, 128, **options)[0]

    expected = {name: [label for _, label in opened(name)] for name in PARTS}
    add_train_ids(own_cityscapes / "gtCoarse/train_extra", keep=False)
    for annotations, parts in (
        ("coarse", "gtCoarse/train_extra and gtCoarse/train"),
        ("both", "gtFine/train and gtCoarse/train_extra"),
    ):
        with pytest.raises(UserError, match=rf"of {parts} in {own_cityscapes}, .*--labels"):
            opened(annotations)
    assert len(opened("fine")) == 6
    with pytest.raises(UserError, match="have no label"):
        opened("both", "labelIds")
    for folder in ("gtFine", "gtCoarse/train"):
        add_train_ids(own_cityscapes / folder, keep=True)
    assert opened("fine").pairs[0].label.name.endswith("labelIds.png")
    for annotations, labels in expected.items():
        data = opened(annotations, "labelTrainIds")
        assert all(pair.label.name.endswith("labelTrainIds.png") for pair in data.pairs)
        assert all(torch.equal(ours[1], label) for ours, label in zip(data, labels, strict=True))
    for path in own_cityscapes.rglob("*_labelIds.png"):
        path.unlink()
    assert opened("fine").pairs[0].label.name.endswith("labelTrainIds.png")


@pytest.mark.parametrize(
    ("folder", "annotations", "archive"),
    [
        ("gtCoarse/train", "coarse", "gtCoarse"),
        ("gtCoarse/train_extra", "both", "gtCoarse"),
        ("leftImg8bit/train_extra", "both", "leftImg8bit_trainextra"),
        ("leftImg8bit/train", "coarse", "leftImg8bit_trainvaltest"),
        ("gtFine/val", "coarse", "gtFine_trainvaltest"),
    ],
)
def test_open_training_data_missing_folder_is_named_with_its_archive(
    own_cityscapes, folder, annotations, archive
):
    gone, root = own_cityscapes / folder, own_cityscapes
    shutil.rmtree(gone)
    with pytest.raises(UserError, match=rf"^no folder {gone}: unpack {archive}\.zip into {root},"):
        open_training_data("cityscapes", own_cityscapes, annotations=annotations)


def test_prepare_cityscapes_one_cache_holds_all_annotations(toy_cityscapes, run_inside, tmp_path):
    written: dict[Path, int] = {}
    for annotations in PARTS:
        flags = ("--datadir", toy_cityscapes, "--cache", tmp_path, "--annotations", annotations,
                 "--height", 24, "--width", 40, "--workers", 0)  # fmt: skip
        result = run_inside("datasets/prepare_cityscapes.py", *flags).check()
        command = result.stdout.splitlines()[-1]
        assert (f"--annotations {annotations}" in command) == (annotations != "fine")
        assert all(path.stat().st_mtime_ns == time for path, time in written.items())
        folder = tmp_path / cache_split(annotations)
        written |= {path: path.stat().st_mtime_ns for path in folder.iterdir()}
        options = {"annotations": annotations}
        source, _ = open_training_data("cityscapes", toy_cityscapes, 24, 40, **options)
        cached = CachedDataset(folder, source, "build")
        assert all(torch.equal(cached[i][1], source[i][1]) for i in range(len(source)))
    names = {"val", "train", "train_coarse", "train_both"}
    assert {path.name for path in tmp_path.iterdir()} == names


# files


@pytest.mark.parametrize(
    ("folder", "image", "words"),
    [
        ("trainannot", Image.new("L", (64, 48), 12), "holds the id 12, which CamVid does not have"),
        ("trainannot", Image.new("RGB", (64, 48)), r"is a color image \(mode RGB\), not 8-bit ids"),
        ("trainannot", Image.new("L", (64, 50)), "is 64x50, its image train_003.png 64x48"),
        ("trainannot", None, "is damaged"),
        ("train", None, "is damaged"),
    ],
)
def test_getitem_invalid_file_is_named(own_camvid, folder, image, words):
    path = own_camvid / folder / "train_003.png"
    image.save(path) if image else path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match=rf"{folder}/train_003\.png {words}"):
        open_dataset("camvid", own_camvid, "train")[3]


def test_class_counts_are_those_of_the_files(own_camvid):
    data = open_dataset("camvid", own_camvid, "train")
    data.size = (5, 7)
    small = np.array([[0, 0, 2], [11, 0, 2]], np.uint8)
    Image.fromarray(small).save(own_camvid / "trainannot/train_001.png")
    expected = np.full((5, 12), 48 * 64 / 12, dtype=int)
    expected[1] = [3, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 1]
    counts = data.class_counts(workers=2)
    assert counts.dtype == np.int64 and np.array_equal(counts, expected)
    shares = pixel_shares(np.array([[1, 0, 1], [5, 0, 1]]))  # void counts in the total
    np.testing.assert_allclose(shares, [0.75, 0, 0.25])


def test_class_counts_unreadable_labels_are_zero_where_skipping(own_camvid):
    data = open_dataset("camvid", own_camvid, "train")
    (own_camvid / "trainannot/train_001.png").write_bytes(b"torn")
    Image.new("L", (64, 48), 77).save(own_camvid / "trainannot/train_003.png")
    with pytest.raises(UserError, match=r"train_001\.png is damaged"):
        data.class_counts()
    skipping = SkipCorruptDataset(data)
    expected = np.full((5, 12), 48 * 64 / 12, dtype=int)
    expected[[1, 3]] = 0
    assert np.array_equal(skipping.class_counts(workers=3), expected)
    assert skipping.damaged.nonzero().flatten().tolist() == [1, 3]
    for path in (own_camvid / "trainannot").iterdir():
        path.write_bytes(b"torn")
    with pytest.raises(UserError, match=r"train_000\.png is damaged"):
        skipping.class_counts()


# own data


def test_open_dataset_own_data(own_data, tmp_path):
    train = open_dataset("folders", own_data, "train", val_stride=3)
    assert (len(train), len(open_dataset("folders", own_data, "val", val_stride=3))) == (4, 2)
    assert train.scheme.classes == ("field", "path") and train.scheme.colors[0] == (0, 200, 0)
    assert train.scheme.num_outputs == 3
    assert np.unique(train.read(0)[1]).tolist() == [0, 1, IGNORE_INDEX]
    content = {"classes": [{"name": "a"}, {"name": "b"}], "ignore": [255]}
    (tmp_path / "c.json").write_text(json.dumps(content))
    scheme = read_class_file(tmp_path / "c.json")
    assert scheme.file_ids == {0: 0, 1: 1, 255: IGNORE_INDEX} and len(set(scheme.colors)) == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("classes: [{name: a, colour: [1, 2, 3]}]", "'colour': its keys are name, id and color"),
        ("classes: [{name: a}]\nignored: [255]", "has 'ignored': its keys are classes and ignore"),
    ],
)
def test_read_class_file_unknown_key_names_the_known_ones(tmp_path, text, words):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=words):
        read_class_file(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    "word",
    ["no", "on", "null", "~", "010", "1_000", "0x1f", "1e3", "2024-01-31", "12:30:45", ".nan"],
)
def test_read_class_file_unquoted_word_is_name_as_written(tmp_path, word):
    text = f"classes:\n  - {{name: {word}, id: 3}}\n  - name: {word}x\n"
    (tmp_path / "c.yaml").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    scheme = read_class_file(tmp_path / "c.yaml")
    assert scheme.classes == (word, f"{word}x") and scheme.file_ids == {3: 0, 1: 1}


@pytest.mark.parametrize("value", ["0.7", "true", "1_000", "0x1f", "010", "1e1", "null", "-1", "٣"])
@pytest.mark.parametrize("row", ["{{name: road, id: {}}}", "{{name: road, color: [0, 0, {}]}}"])
def test_read_class_file_number_that_is_no_integer_is_refused(tmp_path, row, value):
    (tmp_path / "c.yaml").write_text(f"classes:\n  - {row.format(value)}\n", encoding="utf-8")
    with pytest.raises(UserError, match=rf"c\.yaml: the class 'road' has the .* '{value}'"):
        read_class_file(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        *((text, "must hold `classes`, a list") for text in ("", "classes: []", "classes: 3",
                                                             "[1, 2]")),
        ("classes: [}", "neither YAML nor JSON"),
        (f"classes: {[{'name': 'a'}] * 255}", "255 classes: reduce them to 254"),
        ("classes: [{name: road}, {name: ' road'}]", "road' is there twice"),
        ("classes: [{name: caf\u00e9}, {name: cafe\u0301}]", "is there twice"),
        ("classes: [{id: 1}]", "the name None, which is not text"),
        ("classes: [{name: a}, {name: }]", "class 2 of the list has the name ''"),
        ("classes: [{name: [a, b]}]", r"the name \['a', 'b'\], which is not text"),
        ('{"classes": [{"name": null}]}', "the name None, which is not text"),
        ('{"classes": [{"name": "a", "id": true}]}', "the id True"),
        ('{"classes": [{"name": "a", "id": 0.7}]}', "the id '0.7'"),
        ("classes: [{name: a, id: 256}]", "the id '256'"),
        ("classes: [{name: a, id: 1}, {name: b, id: 1}]", "the id 1, which is used before"),
        ("classes: [{name: a, id: 1}]\nignore: [1]", "the id 1, which is used before"),
        ("classes: [{name: a, color: [1, 2]}]", "give .red, green, blue"),
        ("classes: [{name: a, color: [1, 2, 300]}]", "the color value '300'"),
        ('classes: [{name: "a\\tb"}]', "visible letters"),
        ("classes: [{name: Void}]", "called 'Void', the reserved name of pixels without a class"),
        ("classes: [{name: a, colour: [1, 2, 3]}]", "'a' has 'colour'"),
        ("classes: [{name: a, id: 1, id: 2}]", "the key 'id' twice"),
        ('{"classes": [],\n\t"classes": [{"name": "a"}]}', "the key 'classes' twice"),
        ("classes: [{name: a}]\nignore: 255", "`ignore` is '255'"),
        ('classes: [{name: "C:\\data"}]', r"escape character.* in line 1\): write /"),
        ("classes:\n\t- name: a", "in line 2.*use spaces instead of tabs"),
    ],
)  # fmt: skip
def test_read_class_file_sentence_names_class_and_reason(tmp_path, text, sentence):
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=sentence) as raised:
        read_class_file(tmp_path / "c.yaml")
    assert "c.yaml" in str(raised.value)


def test_read_class_file_json_with_tabs_and_bom(tmp_path):
    text = '\ufeff{\r\n\t"classes": [\r\n\t\t{"name": "no", "id": 1}\r\n\t],\r\n\t"ignore": [0]}'
    (tmp_path / "c.yaml").write_bytes(text.encode())
    scheme = read_class_file(tmp_path / "c.yaml")
    assert scheme.classes == ("no",) and scheme.file_ids == {1: 0, 0: IGNORE_INDEX}
    (tmp_path / "c.yaml").write_bytes(text.encode("utf-16"))
    with pytest.raises(UserError, match=r"c\.yaml is UTF-16"):
        read_class_file(tmp_path / "c.yaml")


# transforms


def quartered(height: int = 60, width: int = 80) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
    """An image whose pixel value is a function of its label: 10 times it, in four fields."""
    label = torch.zeros(height, width, dtype=torch.uint8)
    label[:, width // 2 :] = 5
    label[height // 2 :, : width // 2] = 11
    label[height // 2 :, width // 2 :] = 18
    image = (label * 10 + 30).expand(3, -1, -1).contiguous()
    return tv_tensors.Image(image), tv_tensors.Mask(label)


def located(n: int, height: int = 40, width: int = 56) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch whose pixels say where they are: row, column and label of each, never 0."""
    rows = torch.arange(height, dtype=torch.uint8)[:, None].expand(-1, width) * 4 + 4
    columns = torch.arange(width, dtype=torch.uint8).expand(height, -1) * 4 + 4
    label = (rows // 4 * 5 + columns // 4 * 3) % 19
    batch = torch.stack((rows, columns, label + 1)).repeat(n, 1, 1, 1)
    return batch, label.repeat(n, 1, 1)


def test_resize_transform_keeps_bytes_and_labels():
    image, label = quartered(61, 83)
    x, y = resize_transform((31, 40))(image, label)
    assert x.shape == (3, 31, 40) and y.shape == (31, 40)
    assert type(x) is type(y) is torch.Tensor and x.dtype == y.dtype == torch.uint8
    assert set(y.unique().tolist()) == {0, 5, 11, 18}
    same = resize_transform((61, 83))(image, label)
    assert torch.equal(same[0], image) and torch.equal(same[1], label)


def shifted(image: torch.Tensor, flip: bool, down: int, right: int, fill: int) -> torch.Tensor:
    """(..., H, W): mirrored, then moved pixel by pixel."""
    image = image.flip(-1) if flip else image
    height, width = image.shape[-2:]
    moved = torch.full_like(image, fill)
    for y in range(height):
        for x in range(width):
            if 0 <= y - down < height and 0 <= x - right < width:
                moved[..., y, x] = image[..., y - down, x - right]
    return moved


def test_augmentation_paper_moves_whole_pixels_and_fills_with_void():
    images, labels = located(200, 7, 9)
    x, y = Augmentation("paper")(images, labels, seeded())
    steps = range(-SHIFT, SHIFT + 1)
    expected = {
        move: (shifted(images[0], *move, 0) * (1 / 255), shifted(labels[0], *move, IGNORE_INDEX))
        for move in itertools.product((False, True), steps, steps)
    }
    moves = Counter()
    for image, target in zip(x, y, strict=True):
        (move,) = [m for m, (_, label) in expected.items() if torch.equal(target, label.long())]
        assert torch.equal(image, expected[move][0])
        moves[move] += 1
    assert 70 < sum(count for (flip, _, _), count in moves.items() if flip) < 130
    for axis in (1, 2):  # every shift equally often: 40 times
        shifts = Counter()
        for move, count in moves.items():
            shifts[move[axis]] += count
        assert set(shifts) == set(steps) and all(20 < count < 60 for count in shifts.values())
    assert len(moves) > 40  # flip and both shifts are drawn apart


def test_augmentation_modern_keeps_image_and_label_aligned(monkeypatch):
    monkeypatch.setattr(transforms, "JITTER", 0)
    images, labels = located(100)
    height, width = labels.shape[1:]
    x, y = Augmentation("modern")(images, labels, seeded())
    scales, mirrored = [], 0
    for image, target in zip(x * 255, y, strict=True):
        inside = target != IGNORE_INDEX
        assert (image[:, ~inside] == 0).all() and (image[:2, inside] > 3.9).all()
        # Bilinear interpolation of a ramp gives back where in the source a pixel was taken.
        rows, columns = image[0] / 4 - 1, image[1] / 4 - 1
        clear = inside.clone()  # of the border between two source pixels
        for place in (rows, columns):
            clear &= (place % 1 - 0.5).abs() > 0.02
        nearest = labels[0][rows.round().long().clamp(0), columns.round().long().clamp(0)]
        assert torch.equal(target[clear], nearest[clear].long())
        # What is inside is a rectangle; its rows are evenly spaced.
        ys, xs = inside.any(1).nonzero()[:, 0], inside.any(0).nonzero()[:, 0]
        assert inside.sum() == len(ys) * len(xs)
        middle_row, middle_column = ys[len(ys) // 2], xs[len(xs) // 2]
        down = rows[middle_row + 1, middle_column] - rows[middle_row, middle_column]
        across = columns[middle_row, middle_column + 1] - columns[middle_row, middle_column]
        scale = 1 / float(down)
        assert float(across.abs()) == pytest.approx(1 / scale, abs=0.01)
        mirrored += int(across < 0)
        for length, of in ((len(ys), height), (len(xs), width)):
            assert length == pytest.approx(min(1, scale) * of, abs=1)
        scales.append(scale)
    assert 30 < mirrored < 70
    assert 0.5 < min(scales) < 0.6 and 1.9 < max(scales) < 2.01
    assert np.mean(scales) == pytest.approx(1.25, abs=0.15)
    tops = {int((target != IGNORE_INDEX).any(1).nonzero()[0]) for target in y}
    assert len(tops) > 10 and {0} < tops  # reduced images are placed anywhere


def test_color_jitter_changes_each_sample_by_its_factors():
    images = torch.rand(2, 3, 6, 8, generator=seeded()) * 0.4 + 0.3
    same = torch.ones(2, 3)
    torch.testing.assert_close(color_jitter(images, same), images)

    def changed(column: int, factor: float) -> torch.Tensor:
        factors = same.clone()
        factors[1, column] = factor
        result = color_jitter(images, factors)
        torch.testing.assert_close(result[0], images[0])  # each sample has its own
        return result[1]

    torch.testing.assert_close(changed(0, 1.2), images[1] * 1.2)
    assert changed(0, 9).max() == 1
    luma = (images[1] * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0)
    mean = luma.mean()
    torch.testing.assert_close(changed(1, 0.5), (images[1] + mean) / 2)
    torch.testing.assert_close(changed(2, 0.5), (images[1] + luma) / 2)

    flat = torch.full((200, 3, 4, 4), 100, dtype=torch.uint8)
    x, _ = Augmentation("modern")(flat, torch.zeros(200, 4, 4, dtype=torch.uint8), seeded())
    factors = x.amax((1, 2, 3)) * 255 / 100
    assert 0.699 < factors.min() < 0.75 and 1.25 < factors.max() < 1.301


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("shape", [(1, 33, 47), (20, 24, 32), (2, 1, 5)])
def test_augmentation_any_size_returns_floats_with_void_outside(preset, shape):
    images, labels = located(*shape)
    before = images.clone(), labels.clone()
    x, y = Augmentation(preset)(images, labels, seeded())
    assert x.shape == (len(x), 3, *shape[1:]) and y.shape == shape
    assert x.dtype == torch.float32 and y.dtype == torch.int64
    assert x.min() >= 0 and x.max() <= 1
    assert torch.equal(y == IGNORE_INDEX, (x == 0).all(1))
    assert torch.equal(images, before[0]) and torch.equal(labels, before[1])
    mean, std = (0.1, 0.2, 0.3), (0.5, 1.0, 2.0)
    normalized, _ = Augmentation(preset, mean, std)(images, labels, seeded())
    torch.testing.assert_close(normalized, v2.functional.normalize(x, mean, std))


@pytest.mark.parametrize("preset", PRESETS)
def test_augmentation_depends_on_generator_only(preset):
    images, labels = located(20)
    augmentation = Augmentation(preset)
    first, again, other = (augmentation(images, labels, seeded(seed)) for seed in (5, 5, 6))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[1], other[1])
    assert len({tuple(target.flatten().tolist()) for target in first[1]}) > 10
    strided = images.contiguous(memory_format=torch.channels_last)
    x, y = augmentation(strided, labels, seeded(5))
    assert torch.equal(x, first[0]) and torch.equal(y, first[1])
    assert x.is_contiguous() and augmentation.normalize(strided, labels)[0].is_contiguous()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("preset", PRESETS)
def test_augmentation_on_gpu_equals_cpu(preset):
    images, labels = located(8)
    augmentation = Augmentation(preset, (0.1, 0.2, 0.3), (0.5, 1.0, 2.0))
    x, y = augmentation(images, labels, seeded())
    tf32 = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = True
        x2, y2 = augmentation.cuda()(images.cuda(), labels.cuda(), seeded())
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32
    assert (y2.cpu() != y).float().mean() < 1e-3
    assert (x2.cpu() - x).abs().gt(1e-3).float().mean() < 1e-3


def test_augmentation_size_resizes_images_and_training_labels(monkeypatch):
    """Antialiased, and nearest to each cell's centre; labels of validation keep their size."""
    monkeypatch.setattr(transforms, "SHIFT", 0)
    images, labels = located(4, 12, 18)
    small = Augmentation("paper", size=(4, 6))
    x, y = small(images, labels, seeded())
    pixels = v2.functional.resize(images, [4, 6], antialias=True).float() / 255
    for image, target, resized in zip(x, y, pixels, strict=True):
        expected = labels[0, 1::3, 1::3].long()  # the middle one of three
        if not torch.equal(target, expected):  # mirrored
            expected, resized = expected.flip(1), resized.flip(2)
        assert torch.equal(target, expected)
        torch.testing.assert_close(image, resized)
    x, y = small.normalize(images, labels)
    torch.testing.assert_close(x, pixels)
    assert torch.equal(y, labels.long())


def test_normalize_equals_torchvision():
    normalization = (0.1, 0.2, 0.3), (0.5, 1, 2)
    image, label = quartered()
    pixels = v2.functional.resize(image, [30, 40], antialias=True)
    expected = v2.functional.normalize(v2.functional.to_dtype(pixels, scale=True), *normalization)
    small, small_label = resize_transform((30, 40))(image, label)
    batch = Augmentation("paper", *normalization).normalize(small[None], small_label[None])
    torch.testing.assert_close(batch[0][0], expected, rtol=0, atol=1e-6)
    assert batch[1].dtype == torch.int64
    expected = v2.functional.resize(label, [30, 40], v2.InterpolationMode.NEAREST)
    assert torch.equal(batch[1][0], expected.long())

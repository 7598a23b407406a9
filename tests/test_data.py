import json
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from lednet import UserError
from lednet.data.datasets import open_dataset, pixel_shares, read_class_file, read_label
from lednet.data.labels import (
    CITYSCAPES_LABELS,
    IGNORE_INDEX,
    camvid_scheme,
    cityscapes_scheme,
)
from lednet.data.pairs import cityscapes_pairs, folder_pairs
from lednet.data.transforms import PRESETS, SHIFT, evaluation_transform, training_transform

# labels


def test_label_table_is_the_official_one():
    official = pytest.importorskip("cityscapesscripts.helpers.labels").labels
    assert len(official) == len(CITYSCAPES_LABELS)
    for ours, theirs in zip(CITYSCAPES_LABELS, official, strict=True):
        assert (ours.name, ours.id, ours.train_id) == (theirs.name, theirs.id, theirs.trainId)
        assert (ours.category, ours.color) == (theirs.category, theirs.color)
        assert ours.has_instances == theirs.hasInstances
        assert ours.ignore_in_eval == theirs.ignoreInEval


def test_both_cityscapes_encodings_mean_the_same_classes():
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


def test_pairs_are_made_by_name(toy_cityscapes):
    for split, count in (("train", 6), ("val", 3)):
        pairs = cityscapes_pairs(toy_cityscapes, split)
        assert len(pairs) == count
        for image, label in pairs:
            assert image.name.split("_leftImg8bit")[0] == label.name.split("_gtFine")[0]
    assert len(cityscapes_pairs(toy_cityscapes, "train_extra", "coarse")) == 2
    assert [pair.label for pair in cityscapes_pairs(toy_cityscapes, "test")] == [None, None]


def test_missing_label_is_named_and_counted(own_camvid):
    for i in (1, 3):
        (own_camvid / f"trainannot/train_{i:03d}.png").unlink()
    with pytest.raises(UserError, match=r"2 of 5 images have no label \(train_001, train_003\)"):
        open_dataset("camvid", own_camvid, "train")


def test_missing_image_is_named_and_counted(own_camvid):
    (own_camvid / "train/train_002.png").unlink()
    with pytest.raises(UserError, match=r"1 of 5 labels have no image \(train_002\)"):
        open_dataset("camvid", own_camvid, "train")


def test_doubled_partner_is_named(own_camvid):
    picture = Image.open(own_camvid / "val/val_001.png")
    picture.save(own_camvid / "val/val_001.jpg")
    with pytest.raises(UserError, match=r"1 images stand twice .*val_001"):
        open_dataset("camvid", own_camvid, "val")


def test_jpeg_images_are_found(own_camvid):
    for path in (own_camvid / "val").iterdir():
        Image.open(path).save(path.with_suffix(".JPG"), "JPEG")
        path.unlink()
    assert len(open_dataset("camvid", own_camvid, "val")) == 3


def test_empty_split_and_missing_folder_are_named(own_camvid, tmp_path):
    (own_camvid / "test").mkdir()
    (own_camvid / "testannot").mkdir()
    with pytest.raises(UserError, match="test holds no images"):
        open_dataset("camvid", own_camvid, "test")
    with pytest.raises(UserError, match=r"no folder .*nowhere"):
        open_dataset("camvid", tmp_path / "nowhere", "train")


def test_train_ids_are_told_by_their_names(toy_cityscapes, tmp_path):
    scheme = cityscapes_scheme()
    for image, label in cityscapes_pairs(toy_cityscapes, "val"):
        for path, folder in ((image, "leftImg8bit"), (label, "gtFine")):
            target = tmp_path / folder / "val" / path.parent.name
            target.mkdir(parents=True, exist_ok=True)
            if folder == "leftImg8bit":
                (target / path.name).write_bytes(path.read_bytes())
            else:
                name = path.name.replace("labelIds", "labelTrainIds")
                Image.fromarray(read_label(path, scheme)).save(target / name)
    by_train_ids = open_dataset("cityscapes", tmp_path, "val")
    by_ids = open_dataset("cityscapes", toy_cityscapes, "val")
    assert by_train_ids.pairs[0].label.name.endswith("labelTrainIds.png")
    for i in range(3):
        assert np.array_equal(by_train_ids.read(i)[1], by_ids.read(i)[1])
    with pytest.raises(UserError, match="have no label"):
        open_dataset("cityscapes", tmp_path, "val", labels="labelIds")


def test_hold_out_parts_the_images(own_camvid):
    train = open_dataset("camvid", own_camvid, "train", val_every=2)
    val = open_dataset("camvid", own_camvid, "val", val_every=2)
    names = [[pair.image.stem[-1] for pair in data.pairs] for data in (train, val)]
    assert names == [["0", "2", "4"], ["1", "3"]]


# files


def test_void_and_classes_are_read_from_palette_and_grey_files(tmp_path):
    values = np.array([[0, 10], [11, 4]], dtype=np.uint8)
    palette = Image.fromarray(values).convert("P")
    palette.putdata(values.ravel().tolist())
    palette.putpalette([0, 90, 0] * 256)
    palette.save(tmp_path / "p.png")
    Image.fromarray(values).save(tmp_path / "l.png")
    for name in ("p.png", "l.png"):
        assert read_label(tmp_path / name, camvid_scheme()).tolist() == [[0, 10], [255, 4]]


def test_id_outside_the_table_is_named(own_camvid):
    Image.fromarray(np.full((48, 64), 12, np.uint8)).save(own_camvid / "trainannot/train_004.png")
    with pytest.raises(UserError, match=r"train_004\.png holds the id 12, which CamVid"):
        open_dataset("camvid", own_camvid, "train")[4]


def test_colour_label_is_refused(own_camvid):
    Image.new("RGB", (64, 48)).save(own_camvid / "trainannot/train_000.png")
    with pytest.raises(UserError, match=r"train_000\.png has mode RGB"):
        open_dataset("camvid", own_camvid, "train")[0]


def test_label_of_another_size_is_refused(own_camvid):
    Image.new("L", (64, 50)).save(own_camvid / "trainannot/train_000.png")
    with pytest.raises(UserError, match=r"train_000\.png is 64x50, its image train_000\.png 64x48"):
        open_dataset("camvid", own_camvid, "train")[0]


@pytest.mark.parametrize("folder", ["train", "trainannot"])
def test_truncated_file_is_named(own_camvid, folder):
    path = own_camvid / folder / "train_003.png"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match=r"train_003\.png is damaged"):
        open_dataset("camvid", own_camvid, "train")[3]


def test_pixel_shares_count_void_in_the_total(camvid):
    data = open_dataset("camvid", camvid, "train")
    shares = pixel_shares(data, workers=2)
    assert shares.shape == (12,)
    np.testing.assert_allclose(shares, np.full(12, 1 / 12))


# own data


@pytest.fixture
def own_data(tmp_path):
    """Two folders without splits and a class file: id 7 is field, 3 is path, 9 is ignored."""
    rng = np.random.default_rng(0)
    for folder in ("images", "labels"):
        (tmp_path / "own" / folder).mkdir(parents=True)
    for i in range(6):
        label = rng.choice(np.array([7, 3, 9], np.uint8), (32, 48))
        Image.fromarray(label).save(tmp_path / f"own/labels/{i}.png")
        Image.fromarray(np.stack([label * 20] * 3, -1)).save(tmp_path / f"own/images/{i}.jpg")
    (tmp_path / "own/classes.yaml").write_text(
        "classes:\n  - {name: field, id: 7, color: [0, 200, 0]}\n  - {name: path, id: 3}\n"
        "ignore: [9]\n"
    )
    return tmp_path / "own"


def test_own_data_needs_two_folders_and_a_class_file(own_data):
    train = open_dataset("folders", own_data, "train", val_every=3)
    val = open_dataset("folders", own_data, "val", val_every=3)
    assert (len(train), len(val)) == (4, 2)
    assert train.scheme.classes == ("field", "path") and train.scheme.colors[0] == (0, 200, 0)
    assert train.scheme.num_outputs == 3
    assert np.unique(train.read(0)[1]).tolist() == [0, 1, IGNORE_INDEX]


def test_class_file_may_be_json(tmp_path):
    content = {"classes": [{"name": "a"}, {"name": "b"}], "ignore": [255]}
    (tmp_path / "c.json").write_text(json.dumps(content))
    scheme = read_class_file(tmp_path / "c.json")
    assert scheme.file_ids == {0: 0, 1: 1, 255: IGNORE_INDEX}
    assert len(set(scheme.colors)) == 2


@pytest.mark.parametrize(
    "text",
    [
        "",
        "classes: []",
        "classes: 3",
        "[1, 2]",
        "classes: [{id: 1}]",
        "classes: [{name: a, id: 256}]",
        "classes: [{name: a, id: 1}, {name: b, id: 1}]",
        "classes: [{name: a, id: 1}]\nignore: [1]",
        "classes: [{name: a, color: [1, 2]}]",
        "classes: [{name: a, color: [1, 2, 300]}]",
        "classes: [}",
    ],
)
def test_class_files_that_make_no_sense_are_refused(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=r"c\.yaml"):
        read_class_file(tmp_path / "c.yaml")


def test_subfolders_are_searched(own_camvid):
    (own_camvid / "train/a").mkdir()
    (own_camvid / "train/train_000.png").rename(own_camvid / "train/a/train_000.png")
    assert len(folder_pairs(own_camvid / "train", own_camvid / "trainannot")) == 5


# transforms


def quartered(height: int = 60, width: int = 80) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
    """A picture whose pixel value is a function of its label: 10 times it, in four fields."""
    label = torch.zeros(height, width, dtype=torch.uint8)
    label[:, width // 2 :] = 5
    label[height // 2 :, : width // 2] = 11
    label[height // 2 :, width // 2 :] = 18
    image = (label * 10 + 30).expand(3, -1, -1).contiguous()
    return tv_tensors.Image(image), tv_tensors.Mask(label)


@pytest.mark.parametrize("preset", PRESETS)
def test_image_and_label_stay_aligned_and_labels_stay_labels(preset):
    torch.manual_seed(0)
    transform = training_transform((48, 64), preset)
    transform.transforms = [t for t in transform.transforms if type(t).__name__ != "ColorJitter"]
    image, label = quartered()
    seen = Counter()
    for _ in range(40):
        x, y = transform(image, label)
        assert x.shape == (3, 48, 64) and y.shape == (48, 64)
        assert x.dtype == torch.float32 and y.dtype == torch.int64
        assert type(x) is type(y) is torch.Tensor
        values = set(y.unique().tolist())
        assert values <= {0, 5, 11, 18, IGNORE_INDEX}
        seen.update(values)
        inside = y != IGNORE_INDEX
        expected = (y * 10 + 30).float() / 255
        # Only pixels beside an edge may mix two fields.
        wrong = (x[0] - expected).abs() > 0.02
        assert (wrong & inside).float().mean() < 0.12
        assert (x[0][~inside] == 0).all()
    assert seen[IGNORE_INDEX] > 0
    assert seen[0] == 40 if preset == "paper" else seen[0] > 10


def test_paper_preset_shifts_by_at_most_two_pixels_and_fills_with_void():
    torch.manual_seed(0)
    image, label = quartered(48, 64)
    label[:] = 3
    transform = training_transform((48, 64), "paper")
    rows, columns = Counter(), Counter()
    for _ in range(200):
        void = transform(image, label)[1] == IGNORE_INDEX
        rows[int(void.all(1).sum())] += 1
        columns[int(void.all(0).sum())] += 1
        assert void[:SHIFT].all(1).sum() == 0 or void[-SHIFT:].all(1).sum() == 0
    assert set(rows) == set(columns) == {0, 1, 2}


def test_flip_happens_half_of_the_time():
    torch.manual_seed(0)
    image, label = quartered(48, 64)
    transform = training_transform((48, 64), "paper")
    flipped = sum(int(transform(image, label)[1][10, 10] == 5) for _ in range(200))
    assert 70 < flipped < 130


def test_evaluation_resizes_the_image_and_the_label_only_when_asked():
    image, label = quartered()
    x, y = evaluation_transform((30, 40))(image, label)
    assert x.shape == (3, 30, 40) and y.shape == (30, 40)
    x, y = evaluation_transform((30, 40), full_size_labels=True)(image, label)
    assert x.shape == (3, 30, 40) and torch.equal(y, label.long())
    assert x.min() > 0.0 and x.max() <= 1.0


def test_normalization_is_applied():
    image, label = quartered()
    raw, _ = evaluation_transform((30, 40))(image, label)
    x, _ = evaluation_transform((30, 40), mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0))(image, label)
    expected = (raw - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / torch.tensor([0.5, 1.0, 2.0])[
        :, None, None
    ]
    torch.testing.assert_close(x, expected)

import itertools
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

from lednet import UserError
from lednet.data import transforms
from lednet.data.cache import CachedDataset
from lednet.data.cityscapes import cityscapes_pairs
from lednet.data.dataset import SegmentationDataset, SkipCorruptDataset, pixel_shares, read_label
from lednet.data.folders import read_class_file
from lednet.data.labels import (
    CITYSCAPES_LABELS,
    IGNORE_INDEX,
    camvid_scheme,
    cityscapes_scheme,
)
from lednet.data.registry import cache_split, open_dataset, open_training_data
from lednet.data.transforms import PRESETS, SHIFT, Augmentation, color_jitter, resize_transform

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


def to_webp(folder: Path, ending: str = "") -> None:
    """Put WebP, without loss and with suffixes of any case, in the place of PNG images."""
    for i, path in enumerate(sorted(folder.rglob(f"*{ending}.png"))):
        suffix = (".webp", ".WEBP", ".WebP")[i % 3]
        Image.open(path).save(path.with_suffix(suffix), "WEBP", lossless=True)
        path.unlink()


def test_webp_images_of_camvid_are_found_and_read(camvid, own_camvid):
    for split, count in (("train", 5), ("val", 3)):
        to_webp(own_camvid / split)
        data, original = (open_dataset("camvid", root, split) for root in (own_camvid, camvid))
        assert len(data) == count
        for i, (image, label) in enumerate(data.pairs):
            assert image.suffix.lower() == ".webp" and label.name == f"{image.stem}.png"
            for ours, theirs in zip(data.read(i), original.read(i), strict=True):
                assert np.array_equal(ours, theirs)


def test_webp_images_of_cityscapes_are_found_and_read(own_cityscapes, toy_cityscapes):
    to_webp(own_cityscapes / "leftImg8bit", "_leftImg8bit")
    data, original = (open_training_data("cityscapes", root, 64, 128, annotations="both")
                      for root in (own_cityscapes, toy_cityscapes))  # fmt: skip
    for part, expected in zip(data, original, strict=True):
        assert folders(part) == folders(expected)
        assert {pair.image.suffix.lower() for pair in part.pairs} == {".webp"}
        for ours, theirs in zip(part.read(0), expected.read(0), strict=True):
            assert np.array_equal(ours, theirs)
    assert len(open_dataset("cityscapes", own_cityscapes, "test")) == 2


def test_webp_label_is_never_paired(own_camvid):
    label = own_camvid / "valannot/val_001.png"
    Image.open(label).save(label.with_suffix(".webp"), lossless=True)
    pairs = open_dataset("camvid", own_camvid, "val").pairs
    assert [pair.label.name for pair in pairs] == [f"val_00{i}.png" for i in range(3)]
    label.unlink()
    with pytest.raises(UserError, match=r"1 of 3 images have no label \(val_001\)"):
        open_dataset("camvid", own_camvid, "val")


def test_image_in_two_formats_is_named(own_camvid):
    Image.open(own_camvid / "val/val_001.png").save(own_camvid / "val/val_001.webp")
    with pytest.raises(UserError, match=r"1 images stand twice .*val_001"):
        open_dataset("camvid", own_camvid, "val")


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
    train = open_dataset("camvid", own_camvid, "train", val_stride=2)
    val = open_dataset("camvid", own_camvid, "val", val_stride=2)
    names = [[pair.image.stem[-1] for pair in data.pairs] for data in (train, val)]
    assert names == [["0", "2", "4"], ["1", "3"]]


def test_hold_out_of_a_recording(own_camvid):
    whole = open_dataset("camvid", own_camvid, "train").pairs
    last = whole[-1].image.name
    train = open_dataset("camvid", own_camvid, "train", val_prefix=last[:-4])
    val = open_dataset("camvid", own_camvid, "val", val_prefix=last[:-4])
    assert [pair.image.name for pair in val.pairs] == [last]
    assert train.pairs == whole[:-1]
    with pytest.raises(UserError, match="val is empty after --val-prefix 0099: hold out others"):
        open_dataset("camvid", own_camvid, "val", val_prefix="0099")
    with pytest.raises(UserError, match="give one of them"):
        open_dataset("camvid", own_camvid, "val", val_prefix="0", val_stride=2)


# annotations


@pytest.fixture
def own_cityscapes(toy_cityscapes, tmp_path) -> Path:
    """The toy tree, which a test may damage."""
    return shutil.copytree(toy_cityscapes, tmp_path / "cityscapes")


def folders(data: SegmentationDataset) -> Counter:
    """Pairs by the two folders, kind and split, that their files lie in."""
    for image, label in data.pairs:
        assert image.name.split("_leftImg8bit")[0] == label.name.split("_gt")[0]
    return Counter(tuple("/".join(p.parts[-4:-2]) for p in pair) for pair in data.pairs)


TRAIN, EXTRA, VAL = "leftImg8bit/train", "leftImg8bit/train_extra", "leftImg8bit/val"


@pytest.mark.parametrize(
    ("annotations", "expected"),
    [
        ("fine", {(TRAIN, "gtFine/train"): 6}),
        ("coarse", {(EXTRA, "gtCoarse/train_extra"): 2, (TRAIN, "gtCoarse/train"): 6}),
        ("both", {(TRAIN, "gtFine/train"): 6, (EXTRA, "gtCoarse/train_extra"): 2}),
    ],
)
def test_annotations_say_what_is_trained_on_and_fine_val_validates(
    toy_cityscapes, annotations, expected
):
    train, val = open_training_data("cityscapes", toy_cityscapes, 24, 40, annotations=annotations)
    assert folders(train) == expected and folders(val) == {(VAL, "gtFine/val"): 3}
    assert len({pair.image for pair in train.pairs}) == len(train)
    for data in (train, val):
        assert [plane.shape[-2:] for plane in data[len(data) - 1]] == [(24, 40)] * 2


@pytest.mark.parametrize("split", ["train", "val", "train_extra"])
def test_coarse_annotations_of_one_split_are_of_that_split_alone(toy_cityscapes, split):
    data = open_dataset("cityscapes", toy_cityscapes, split, annotations="coarse")
    count = {"train": 6, "val": 3, "train_extra": 2}[split]
    assert folders(data) == {(f"leftImg8bit/{split}", f"gtCoarse/{split}"): count}


@pytest.mark.parametrize("annotations", ["fine", "coarse", "both"])
def test_frames_held_out_are_trained_on_in_no_annotation(own_cityscapes, annotations):
    for kind in ("leftImg8bit", "gtFine", "gtCoarse"):
        shutil.rmtree(own_cityscapes / kind / "val")
    options = {"annotations": annotations, "val_stride": 3}
    train, val = open_training_data("cityscapes", own_cityscapes, **options)
    assert folders(val) == {(TRAIN, "gtFine/train"): 2}
    assert len(train) == (4 if annotations == "fine" else 6)
    assert not {pair.image for pair in train.pairs} & {pair.image for pair in val.pairs}


def add_train_ids(folder: Path, keep: bool) -> None:
    """Write labelTrainIds beside the labelIds, or in their place."""
    scheme = cityscapes_scheme()
    for path in list(folder.rglob("*_labelIds.png")):
        name = path.name.replace("labelIds", "labelTrainIds")
        Image.fromarray(read_label(path, scheme)).save(path.with_name(name))
        if not keep:
            path.unlink()


def test_parts_of_different_kinds_of_labels_are_refused(own_cityscapes):
    def opened(annotations: str, labels: str = "auto") -> SegmentationDataset:
        options = {"annotations": annotations, "labels": labels}
        return open_training_data("cityscapes", own_cityscapes, 64, 128, **options)[0]

    expected = {name: [label for _, label in opened(name)] for name in ("fine", "coarse", "both")}
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
    for annotations, labels in expected.items():
        data = opened(annotations, "labelTrainIds")
        assert all(pair.label.name.endswith("labelTrainIds.png") for pair in data.pairs)
        assert len(data) == len(labels)
        assert all(torch.equal(data[i][1], label) for i, label in enumerate(labels))


@pytest.mark.parametrize("name", ["camvid", "folders"])
def test_other_data_sets_have_no_coarse_annotations(camvid, own_data, name):
    root = {"camvid": camvid, "folders": own_data}[name]
    for annotations in ("coarse", "both"):
        with pytest.raises(UserError, match=f"^{name} has no coarse annotations: choose fine$"):
            open_training_data(name, root, val_stride=3, annotations=annotations)
    with pytest.raises(UserError, match=f"^{name} has no coarse annotations"):
        open_dataset(name, root, "train", val_stride=3, annotations="coarse")
    assert open_dataset(name, root, "train", val_stride=3, annotations="fine")


@pytest.mark.parametrize(
    ("folder", "annotations", "archive"),
    [
        ("gtCoarse/train", "coarse", "gtCoarse"),
        ("gtCoarse/train_extra", "coarse", "gtCoarse"),
        ("gtCoarse/train_extra", "both", "gtCoarse"),
        ("leftImg8bit/train_extra", "both", "leftImg8bit_trainextra"),
        ("leftImg8bit/train", "coarse", "leftImg8bit_trainvaltest"),
        ("gtFine/train", "both", "gtFine_trainvaltest"),
        ("gtFine/val", "coarse", "gtFine_trainvaltest"),
    ],
)
def test_folder_that_is_missing_is_named_with_its_archive(
    own_cityscapes, folder, annotations, archive
):
    gone, root = own_cityscapes / folder, own_cityscapes
    shutil.rmtree(gone)
    with pytest.raises(UserError, match=rf"^no folder {gone}: unpack {archive}\.zip into {root},"):
        open_training_data("cityscapes", own_cityscapes, annotations=annotations)


def test_what_is_not_trained_on_need_not_be_there(own_cityscapes):
    for folder in ("gtCoarse/train", "gtCoarse/val", "leftImg8bit/test", "gtFine/test"):
        shutil.rmtree(own_cityscapes / folder)
    assert len(open_training_data("cityscapes", own_cityscapes, annotations="both")[0]) == 8
    with pytest.raises(UserError, match="choose coarse annotations, train_extra has no others"):
        open_dataset("cityscapes", own_cityscapes, "train_extra")
    for folder in ("gtCoarse", "leftImg8bit/train_extra"):
        shutil.rmtree(own_cityscapes / folder)
    assert len(open_training_data("cityscapes", own_cityscapes)[0]) == 6


def test_one_cache_holds_the_data_of_all_annotations(toy_cityscapes, run_inside, tmp_path):
    names = {"fine": "train", "coarse": "train_coarse", "both": "train_both"}
    written = {}
    for annotations, name in names.items():
        flags = ("--datadir", toy_cityscapes, "--cache", tmp_path, "--annotations", annotations,
                 "--height", 24, "--width", 40, "--workers", 0)  # fmt: skip
        result = run_inside("datasets/prepare_cityscapes.py", *flags)
        assert result.returncode == 0, result.stderr
        command = result.stdout.splitlines()[-1]
        assert (f"--annotations {annotations}" in command) == (annotations != "fine")
        for path in (tmp_path / name).iterdir():
            written[path] = (path.read_bytes(), path.stat().st_mtime_ns)
        folders_there = {path.name for path in tmp_path.iterdir()}
        assert folders_there == {"val", *(path.parent.name for path in written)}
        for path, content in written.items():  # what was there is left alone
            assert (path.read_bytes(), path.stat().st_mtime_ns) == content
    for annotations, name in names.items():
        assert cache_split(annotations) == name
        options = {"annotations": annotations}
        source, _ = open_training_data("cityscapes", toy_cityscapes, 24, 40, **options)
        cached = CachedDataset(tmp_path / name, source, "build")
        for i in range(len(source)):
            assert all(map(torch.equal, cached[i], source[i]))


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


def write_label(path, rows) -> None:
    Image.fromarray(np.array(rows, np.uint8)).save(path)


def test_class_counts_are_of_each_label_at_its_own_size(own_camvid):
    data = open_dataset("camvid", own_camvid, "train")
    data.size = (5, 7)
    write_label(own_camvid / "trainannot/train_001.png", [[0, 0, 2], [11, 0, 2]])
    expected = np.full((5, 12), 48 * 64 / 12, dtype=int)
    expected[1] = [3, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 1]
    counts = data.class_counts(workers=2)
    assert counts.dtype == np.int64 and np.array_equal(counts, expected)


def test_pixel_shares_count_void_in_the_total():
    shares = pixel_shares(np.array([[1, 0, 1], [5, 0, 1]]))
    np.testing.assert_allclose(shares, [0.75, 0, 0.25])


def test_labels_that_cannot_be_counted_are_left_out_and_marked_where_skipping(own_camvid):
    data = open_dataset("camvid", own_camvid, "train")
    (own_camvid / "trainannot/train_001.png").write_bytes(b"torn")
    write_label(own_camvid / "trainannot/train_003.png", [[77]])
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


def test_damaged_label_stops_no_run_that_skips_and_computes_its_weights(
    run_inside, own_camvid, tmp_path
):
    (own_camvid / "trainannot/train_001.png").write_bytes(b"torn")
    flags = ("--dataset", "camvid", "--datadir", own_camvid, "--height", 40, "--width", 64,
             "--num-epochs", 1, "--batch-size", 2, "--num-workers", 0, "--device", "cpu",
             "--class-weights", "computed", "--decoder", "--savedir", tmp_path / "run")  # fmt: skip
    refused = run_inside("train/main.py", *flags)
    assert refused.returncode == 2 and "train_001.png is damaged" in refused.stderr
    result = run_inside("train/main.py", *flags, "--skip-corrupt")
    assert result.returncode == 0, result.stderr
    assert "damaged and replaced by others: train_001.png" in result.stdout


# own data


def test_own_data_needs_two_folders_and_a_class_file(own_data):
    train = open_dataset("folders", own_data, "train", val_stride=3)
    val = open_dataset("folders", own_data, "val", val_stride=3)
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
    assert len(open_dataset("camvid", own_camvid, "train")) == 5


# transforms


def quartered(height: int = 60, width: int = 80) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
    """A picture whose pixel value is a function of its label: 10 times it, in four fields."""
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


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_resizing_keeps_bytes_and_labels():
    image, label = quartered(61, 83)
    x, y = resize_transform((31, 40))(image, label)
    assert x.shape == (3, 31, 40) and y.shape == (31, 40)
    assert type(x) is type(y) is torch.Tensor and x.dtype == y.dtype == torch.uint8
    assert set(y.unique().tolist()) == {0, 5, 11, 18}
    same = resize_transform((61, 83))(image, label)
    assert torch.equal(same[0], image) and torch.equal(same[1], label)


def shifted(picture: torch.Tensor, flip: bool, down: int, right: int, fill: int) -> torch.Tensor:
    """(..., H, W): mirrored, then moved pixel by pixel."""
    picture = picture.flip(-1) if flip else picture
    height, width = picture.shape[-2:]
    moved = torch.full_like(picture, fill)
    for y in range(height):
        for x in range(width):
            if 0 <= y - down < height and 0 <= x - right < width:
                moved[..., y, x] = picture[..., y - down, x - right]
    return moved


def test_paper_preset_moves_whole_pixels_and_fills_with_void():
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


def test_modern_preset_keeps_image_and_label_aligned(monkeypatch):
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
    assert len(tops) > 10 and {0} < tops  # small pictures lie anywhere


def test_colours_of_the_modern_preset():
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
def test_what_comes_from_outside_is_void_and_never_a_class(preset):
    images = torch.full((30, 3, 24, 32), 200, dtype=torch.uint8)
    labels = torch.zeros(30, 24, 32, dtype=torch.uint8)
    x, y = Augmentation(preset)(images, labels, seeded())
    assert set(y.unique().tolist()) == {0, IGNORE_INDEX}
    assert torch.equal(y == IGNORE_INDEX, (x == 0).all(1))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("shape", [(1, 33, 47), (3, 24, 32), (2, 1, 5)])
def test_augmentation_gives_floats_and_targets_of_any_size(preset, shape):
    n, height, width = shape
    images, labels = located(n, height, width)
    before = images.clone(), labels.clone()
    x, y = Augmentation(preset)(images, labels, seeded())
    assert x.shape == (n, 3, height, width) and y.shape == shape
    assert x.dtype == torch.float32 and y.dtype == torch.int64
    assert x.min() >= 0 and x.max() <= 1
    assert torch.equal(images, before[0]) and torch.equal(labels, before[1])


@pytest.mark.parametrize("preset", PRESETS)
def test_augmentation_depends_on_its_generator_alone(preset):
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
def test_augmentation_is_the_same_on_a_gpu(preset):
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


def test_final_model_trains_on_the_validation_images_too(camvid):
    train, val = open_training_data("camvid", camvid, None, None)
    both, same = open_training_data("camvid", camvid, None, None, with_val=True)
    assert both.pairs == train.pairs + val.pairs and same.pairs == val.pairs


def test_smaller_size_shrinks_images_and_the_labels_of_training(monkeypatch):
    """Antialiased, and nearest to each cell's centre; labels of validation keep their size."""
    monkeypatch.setattr(transforms, "SHIFT", 0)
    images, labels = located(4, 12, 18)
    small = Augmentation("paper", size=(4, 6))
    x, y = small(images, labels, seeded())
    pixels = v2.functional.resize(images, [4, 6], antialias=True).float() / 255
    for image, target, picture in zip(x, y, pixels, strict=True):
        expected = labels[0, 1::3, 1::3].long()  # the middle one of three
        if not torch.equal(target, expected):  # mirrored
            expected, picture = expected.flip(1), picture.flip(2)
        assert torch.equal(target, expected)
        torch.testing.assert_close(image, picture)
    x, y = small.normalize(images, labels)
    torch.testing.assert_close(x, pixels)
    assert torch.equal(y, labels.long())


@pytest.mark.parametrize("preset", PRESETS)
def test_augmented_batches_are_normalized(preset):
    images, labels = located(3)
    mean, std = (0.1, 0.2, 0.3), (0.5, 1.0, 2.0)
    raw, _ = Augmentation(preset)(images, labels, seeded())
    x, _ = Augmentation(preset, mean, std)(images, labels, seeded())
    torch.testing.assert_close(x, v2.functional.normalize(raw, mean, std))


@pytest.mark.parametrize("normalization", [((0, 0, 0), (1, 1, 1)), ((0.1, 0.2, 0.3), (0.5, 1, 2))])
def test_validation_batches_are_what_torchvision_makes(normalization):
    image, label = quartered()
    pixels = v2.functional.resize(image, [30, 40], antialias=True)
    expected = v2.functional.normalize(v2.functional.to_dtype(pixels, scale=True), *normalization)
    small, small_label = resize_transform((30, 40))(image, label)
    batch = Augmentation("paper", *normalization).normalize(small[None], small_label[None])
    torch.testing.assert_close(batch[0][0], expected, rtol=0, atol=1e-6)
    assert batch[1].dtype == torch.int64
    expected = v2.functional.resize(label, [30, 40], v2.InterpolationMode.NEAREST)
    assert torch.equal(batch[1][0], expected.long())

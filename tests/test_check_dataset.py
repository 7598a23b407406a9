"""The data-set doctor: each kind of fault is planted and must be found, by its file's name."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image, ImageFilter
from test_page import CHROMIUM, QUIET

from lednet import UserError
from lednet.data.labels import cityscapes_scheme
from lednet.data.pairs import Sample
from lednet.training.losses import class_weights
from lednet.validation.alignment import edge_alignment
from lednet.validation.checks import ValidationReport, validate_dataset
from lednet.validation.duplicates import (
    CLOSE,
    SAME,
    THUMBNAIL,
    find_copies,
    find_near_duplicates,
    similarities,
)
from lednet.validation.inspection import inspect_pair
from lednet.validation.issues import ISSUE_TYPES, SEVERITIES
from lednet.validation.report import worst_aligned, write_dataset_page
from lednet.validation.splits import open_splits

SIZE = (96, 128)  # (height, width)
COLORS = np.random.default_rng(7).integers(30, 225, (12, 3))


def make_label(seed: int, values: int = 12) -> np.ndarray:
    """(H, W) uint8: rectangles, every value somewhere."""
    rng = np.random.default_rng(seed)
    label = np.full(SIZE, seed % values, np.uint8)
    for value in rng.permutation(np.repeat(np.arange(values), 3)):
        top, left = rng.integers(0, (SIZE[0] - 16, SIZE[1] - 24))
        label[top : top + rng.integers(8, 40), left : left + rng.integers(8, 50)] = value
    label.ravel()[:values] = range(values)
    return label


def make_image(label: np.ndarray, seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).normal(0, 6, (*label.shape, 3))
    return Image.fromarray((COLORS[label] + noise).clip(0, 255).astype(np.uint8))


def write_pair(root: Path, split: str, name: str, seed: int) -> None:
    label = make_label(seed)
    make_image(label, seed).save(root / split / f"{name}.png")
    Image.fromarray(label).save(root / f"{split}annot" / f"{name}.png")


@pytest.fixture(scope="module")
def clean_tree(tmp_path_factory) -> Path:
    """CamVid's layout, 24 and 5 pairs, without a fault."""
    root = tmp_path_factory.mktemp("clean") / "camvid"
    for split, count in (("train", 24), ("val", 5)):
        (root / split).mkdir(parents=True)
        (root / f"{split}annot").mkdir()
        for i in range(count):
            write_pair(root, split, f"{split}_{i:02d}", 1000 * len(split) + i)
    return root


@pytest.fixture
def tree(clean_tree, tmp_path) -> Path:
    """The same, to be damaged."""
    return Path(shutil.copytree(clean_tree, tmp_path / "camvid"))


def examine(root: Path, name: str = "camvid", **options) -> ValidationReport:
    splits, findings = open_splits(name, root, **options)
    return validate_dataset(root, splits, findings)


def found(diagnosis: ValidationReport) -> dict[str, str]:
    """Kind of each finding -> its files, in one text."""
    return {finding.kind: " ".join(finding.files) for finding in diagnosis.findings}


@pytest.fixture
def check(run_inside, tmp_path):
    """Run the script on a tree; reports go to `out`."""

    def run(root: Path, *flags: object):
        return run_inside(
            "utils/check_dataset.py", "--dataset", "camvid", "--datadir", root, "--out",
            tmp_path / "out", "--workers", 0, "--images", 2, *flags,
        )  # fmt: skip

    return run


# What is found


def test_a_clean_tree_has_no_findings(check, clean_tree, tmp_path):
    result = check(clean_tree)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "24 train, 5 val pairs; 0 errors, 0 warnings, 0 notes" in result.stdout
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"report.html", "report.json", "sheet.png"}


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit(path: Path, change) -> None:
    """Write a picture anew from the array that `change` makes of it."""
    Image.fromarray(change(np.array(Image.open(path)))).save(path)


def turn(root: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.open(root / "train/train_03.png")
    (root / "train/train_03.png").unlink()
    image.save(root / "train/train_03.jpg", exif=exif)


def make_floats(root: Path) -> None:
    """Of 32-bit values, in a format that PIL knows whatever the file is called."""
    Image.fromarray(np.ones(SIZE, np.float32)).save(root / "train/train_03.png", format="TIFF")


def resize_pair(root: Path) -> None:
    for folder in ("train", "trainannot"):
        path = root / folder / "train_03.png"
        Image.open(path).resize((64, 48), Image.Resampling.NEAREST).save(path)


def add_copy(root: Path) -> None:
    """The picture of train_03 once more, as bad JPEG and lighter; with a label of its own."""
    image = Image.open(root / "train/train_03.png").point(lambda v: min(255, 30 + v))
    image.save(root / "train/train_99.jpg", quality=40)
    shutil.copy(root / "trainannot/train_03.png", root / "trainannot/train_99.png")


def mix_up(root: Path) -> None:
    labels = sorted((root / "trainannot").iterdir())
    content = [path.read_bytes() for path in labels]
    for path, other in zip(labels, content[7:] + content[:7], strict=True):
        path.write_bytes(other)


FAULTS = {
    "no-label": lambda root: (root / "trainannot/train_03.png").unlink(),
    "no-image": lambda root: (root / "train/train_03.png").unlink(),
    "name": lambda root: (root / "trainannot/train_03.png").rename(
        root / "trainannot/Train_3_mask.png"
    ),
    "double": lambda root: shutil.copy(root / "train/train_03.png", root / "train/train_03.jpeg"),
    "not-taken": lambda root: Image.new("RGB", (8, 8)).save(root / "train/train_03.bmp"),
    "damaged": lambda root: truncate(root / "train/train_03.png"),
    "image-mode": make_floats,
    "label-mode": lambda root: edit(
        root / "trainannot/train_03.png", lambda a: COLORS.astype(np.uint8)[a]
    ),
    "size": lambda root: edit(root / "trainannot/train_03.png", lambda a: a[::2, ::2]),
    "id": lambda root: edit(root / "trainannot/train_03.png", lambda a: np.where(a == 5, 77, a)),
    "turned": turn,
    "blank": lambda root: edit(root / "train/train_03.png", lambda a: a * 0 + 9),
    "all-void": lambda root: edit(root / "trainannot/train_03.png", lambda a: a * 0 + 11),
    "copy": add_copy,
    "mode": lambda root: edit(root / "train/train_03.png", lambda a: a[..., 0].astype(np.uint16)),
    "sizes": resize_pair,
    "mixed-up": mix_up,
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_planted_fault_is_found_and_its_file_named(tree, kind):
    FAULTS[kind](tree)
    diagnosis = examine(tree)
    kinds = found(diagnosis)
    # Nothing else is wrong; of 16 bits this image uses the lowest 8.
    assert set(kinds) == ({kind, "blank"} if kind == "mode" else {kind})
    (finding,) = (one for one in diagnosis.findings if one.kind == kind)
    assert finding.split == "train" and finding.severity == ISSUE_TYPES[kind].severity
    if kind not in ("sizes", "mixed-up"):  # which are of no single file
        assert "train_03" in kinds[kind] and "train_03" in finding.sentence
    assert "{" not in str(finding)


def test_webp_is_taken_as_an_image_and_not_as_a_label(tree):
    for path in (tree / "train").iterdir():
        Image.open(path).save(path.with_suffix(".webp"), lossless=True)
        path.unlink()
    assert not examine(tree).findings
    label = tree / "trainannot/train_03.png"
    Image.open(label).save(label.with_suffix(".webp"), lossless=True)
    assert found(examine(tree)) == {"not-taken": "trainannot/train_03.webp"}


@pytest.mark.parametrize(
    ("label", "mode"),
    [
        (np.uint16(300) + np.zeros(SIZE, np.uint16), "I;16"),
        (np.zeros(SIZE, bool), "1"),
        (np.zeros((*SIZE, 4), np.uint8), "RGBA"),
    ],
)
def test_labels_that_are_not_8_bit_are_told_by_their_mode(tree, label, mode):
    Image.fromarray(label).save(tree / "trainannot/train_03.png")
    assert found(examine(tree))["label-mode"].startswith("trainannot/train_03.png: " + mode)


def test_palette_labels_are_read_by_index(tree):
    path = tree / "valannot/val_02.png"
    label = Image.open(path)
    before = examine(tree).splits[1].id_counts
    label.putpalette(list(range(255, -1, -1)) * 3)
    label.save(path)
    diagnosis = examine(tree)
    assert Image.open(path).mode == "P"
    assert np.array_equal(diagnosis.splits[1].id_counts, before)
    assert found(diagnosis) == {"mode": "valannot/val_02.png"}


def test_a_class_that_never_occurs(tree):
    for split in ("train", "val"):
        for path in (tree / f"{split}annot").iterdir():
            edit(path, lambda a: np.where(a == 9, 11, a))
    findings = {finding.split: finding for finding in examine(tree).findings}
    assert findings["train"].kind == "absent" and findings["val"].kind == "unscored"
    assert findings["train"].files == findings["val"].files == ("pedestrian",)


def test_much_void_is_told(tree):
    for path in (tree / "trainannot").iterdir():
        edit(path, lambda a: np.where(np.arange(len(a))[:, None] > 30, 11, a))
    assert "void" in found(examine(tree))


def test_every_value_that_is_wrong_is_named(tree):
    edit(tree / "valannot/val_01.png", lambda a: np.where(a < 2, a + 200, a))
    assert found(examine(tree)) == {"id": "valannot/val_01.png: 200 201"}


def cityscapes_copy(toy_cityscapes, tmp_path) -> Path:
    return Path(shutil.copytree(toy_cityscapes, tmp_path / "cityscapes"))


def test_train_ids_under_the_name_of_label_ids(toy_cityscapes, tmp_path):
    root = cityscapes_copy(toy_cityscapes, tmp_path)
    assert not {"encoding", "id"} & found(examine(root, "cityscapes")).keys()
    labels = sorted((root / "gtFine/train").rglob("*_labelIds.png"))
    lut = cityscapes_scheme().lut.astype(np.uint8)
    edit(labels[0], lambda a: lut[a])
    (finding,) = (one for one in examine(root, "cityscapes").findings if one.severity == "error")
    assert finding.kind == "encoding" and [labels[0].name] == [
        Path(file).name for file in finding.files
    ]
    assert "labelTrainIds inside, taken for labelIds" in finding.sentence
    for path in labels[1:]:
        edit(path, lambda a: lut[a])
    findings = examine(root, "cityscapes").findings
    assert [len(one.files) for one in findings if one.kind == "encoding"] == [6]
    # And the other way round.
    for path in labels:
        path.rename(str(path).replace("labelIds", "labelTrainIds"))
    assert not {"encoding", "id"} & found(examine(root, "cityscapes")).keys()
    edit(next((root / "gtFine/train").rglob("*_labelTrainIds.png")), lambda a: a * 0 + 26)
    kinds = found(examine(root, "cityscapes"))
    assert "encoding" in kinds and "id" not in kinds


def test_a_missing_split_folder_does_not_hide_the_other(tree):
    shutil.rmtree(tree / "valannot")
    diagnosis = examine(tree)
    assert [split.name for split in diagnosis.splits] == ["train"]
    (finding,) = diagnosis.findings
    assert finding.kind == "split" and "valannot" in finding.sentence


def test_many_faults_at_once_are_all_found(tree):
    kinds = ("blank", "not-taken", "double")
    for kind in kinds:
        FAULTS[kind](tree)
    truncate(tree / "train/train_04.png")
    (tree / "valannot/val_00.png").write_bytes(b"")
    (tree / "val/val_01.png").write_text("no picture")
    (tree / "trainannot/train_05.png").unlink()
    findings = examine(tree).findings
    assert {finding.kind for finding in findings} == {*kinds, "no-label", "damaged"}
    damaged = [file for one in findings if one.kind == "damaged" for file in one.files]
    names = ("train/train_04.png", "valannot/val_00.png", "val/val_01.png")
    assert sorted(file.split(":")[0] for file in damaged) == sorted(names)
    severities = [SEVERITIES.index(finding.severity) for finding in findings]
    assert severities == sorted(severities)


def test_no_bytes_end_the_check(tmp_path):
    rng = np.random.default_rng(3)
    pixels = make_image(make_label(1), 1).resize((40, 30))
    originals = []
    for suffix in ("png", "jpg"):
        pixels.save(tmp_path / f"a.{suffix}")
        originals.append((suffix, (tmp_path / f"a.{suffix}").read_bytes()))
    outcomes = set()
    for i in range(240):
        suffix, content = originals[i % 2]
        damaged = bytearray(content)
        for place in rng.integers(0, len(damaged), 1 + i % 9):
            damaged[place] = rng.integers(256)
        path = tmp_path / f"b.{suffix}"
        path.write_bytes(damaged[: rng.integers(1, len(damaged) + 1)] if i % 3 else damaged)
        look = inspect_pair(Sample(path, path))
        outcomes.update(kind for kind, _, _ in look.problems)
        assert look.thumbnail is None or look.thumbnail.shape == THUMBNAIL
    assert "damaged" in outcomes


def test_a_large_jpeg_is_measured_at_its_own_size(tmp_path):
    image = make_image(make_label(4), 4).resize((1200, 900), Image.Resampling.BICUBIC)
    image.save(tmp_path / "a.jpg", quality=95)
    look = inspect_pair(Sample(tmp_path / "a.jpg", None))
    assert look.image_size == (1200, 900) and not look.problems
    exact = np.array(image.resize(THUMBNAIL[::-1], Image.Resampling.BOX).convert("L"), int)
    assert np.abs(look.thumbnail - exact).mean() < 2


# Images that two splits share


def street(seed: int) -> Image.Image:
    """A picture full of detail, 256x192."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    fine = rng.integers(0, 50, (192, 256, 3))
    return Image.fromarray(
        (np.array(coarse.resize((256, 192), Image.Resampling.BICUBIC)) * 0.8 + fine).astype(
            np.uint8
        )
    )


def drive(seed: int, steps: int) -> list[Image.Image]:
    """Frames of a camera that moves ahead; after a few nothing of the first is left."""
    scene = street(seed).resize((1024, 768), Image.Resampling.BICUBIC)
    frames = []
    for step in range(steps):
        scale = 1.15**step
        width, height = 1024 / scale, 768 / scale
        box = ((1024 - width) / 2, (768 - height) / 2, (1024 + width) / 2, (768 + height) / 2)
        frames.append(scene.resize((256, 192), Image.Resampling.BICUBIC, box=box))
    return frames


def thumbnails(images: list[Image.Image]) -> np.ndarray:
    small = (i.resize(THUMBNAIL[::-1], Image.Resampling.BOX).convert("L") for i in images)
    return np.stack([np.array(image) for image in small])


def as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer)


CHANGES = {
    "codec": (lambda image: as_jpeg(image, 30), SAME),
    "size": (lambda image: image.resize((90, 70)), SAME),
    "light": (lambda image: image.point(lambda v: v * 0.6 + 20), SAME),
    "grey": (lambda image: image.convert("L").convert("RGB"), SAME),
    "blur": (lambda image: image.filter(ImageFilter.GaussianBlur(1)), SAME),
    "border cut off": (lambda image: image.crop((12, 9, 244, 183)), CLOSE),
    "corner": (lambda image: image.crop((0, 0, 216, 162)), CLOSE),
    "enlarged middle": (lambda image: image.crop((43, 32, 213, 160)), CLOSE),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_picture_is_recognized(change):
    alter, least = CHANGES[change]
    images = [street(seed) for seed in range(6)]
    similarity = similarities(thumbnails([alter(image) for image in images]), thumbnails(images))
    assert similarity.shape == (6, 6)
    assert similarity.diagonal().min() >= least
    assert similarity[~np.eye(6, dtype=bool)].max() < CLOSE


def test_distinct_pictures_are_not_confused():
    images, others = (thumbnails([street(s) for s in range(*r)]) for r in ((0, 40), (40, 60)))
    assert find_near_duplicates(images, others) == []
    assert find_copies(np.concatenate((images, others))) == []


def test_a_still_camera_is_no_alarm_but_a_copy_is():
    """Where any two images of the set look alike, only the same picture counts."""
    background = np.array(street(0), float)
    frames = []
    for seed in range(30):
        frame = background * 0.7 + np.array(street(100 + seed), float) * 0.3
        frames.append(Image.fromarray(frame.astype(np.uint8)))
    seen = thumbnails(frames)
    assert find_near_duplicates(seen[:10], seen[10:]) == []
    copied = np.concatenate((seen[:10], seen[20:21]))
    assert [(one.image, one.other) for one in find_near_duplicates(copied, seen[10:])] == [(10, 10)]


def test_a_drive_that_goes_on_is_followed_frame_by_frame():
    frames = drive(5, 12)
    train = thumbnails([*(street(s) for s in range(30)), *frames[:4]])
    val = thumbnails([*(street(s) for s in range(50, 60)), *frames[4:]])
    alike = find_near_duplicates(val, train)
    assert [one.image for one in alike] == list(range(10, 18))
    assert alike[0].other >= 30 and alike[0].direct  # of the frames that train has
    assert not alike[-1].direct


def test_copies_are_counted_once_each():
    images = [street(0), street(1), as_jpeg(street(0), 50), street(2), street(0)]
    assert find_copies(thumbnails(images)) == [(0, 2), (2, 4)]


def test_blank_pictures_resemble_nothing():
    blank = np.full((3, *THUMBNAIL), 7, np.uint8)
    assert find_copies(blank) == [] and find_near_duplicates(blank, blank) == []
    assert find_near_duplicates(blank[:0], blank) == find_copies(blank[:0]) == []


def test_a_val_image_that_train_has_is_named_with_its_like(tree):
    image = Image.open(tree / "train/train_11.png")
    image.crop((6, 4, 122, 92)).resize(SIZE[::-1]).save(tree / "val/val_03.png")
    diagnosis = examine(tree)
    (finding,) = diagnosis.findings
    assert finding.kind == "leak" and finding.split == "val"
    assert "1 of 5 images show what train shows too" in finding.sentence
    assert "val/val_03.png ~ train/train_11.png" in finding.sentence


def test_labels_that_fit_their_images_are_told_from_others():
    images = [make_image(make_label(s), s) for s in range(20)]
    labels = np.stack([make_label(s)[::2, ::2] for s in range(20)])
    fit, misfit = edge_alignment(thumbnails(images), labels)
    assert fit.min() > 0.2 and misfit.max() < 0.2
    wrong, misfit = edge_alignment(thumbnails(images), np.roll(labels, 3, axis=0))
    assert wrong.max() < fit.min() and 0.25 < misfit.mean() < 0.75
    even, _ = edge_alignment(thumbnails(images), labels * 0)
    assert not even.any()


# The script and its reports


def test_exit_status(check, tree, tmp_path):
    shutil.copy(tree / "train/train_11.png", tree / "val/val_03.png")
    result = check(tree)  # a warning
    assert result.returncode == 1 and "warning  val: 1 of 5 images" in result.stdout
    assert check(tree, "--fail-on", "error").returncode == 0
    (tree / "trainannot/train_03.png").unlink()
    result = check(tree, "--fail-on", "error")
    assert result.returncode == 1
    assert result.stdout.splitlines()[0].startswith("error    train: 1 image without a label")
    assert check(tree, "--fail-on", "never").returncode == 0
    shutil.rmtree(tmp_path / "out")
    for flags in (("--datadir", tmp_path / "nowhere"), ("--workers", -1), ("--images", -1)):
        result = check(tree, *flags)
        assert result.returncode == 2 and result.stderr.startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_a_tree_without_a_readable_file_is_still_reported(check, tree, tmp_path):
    for path in tree.rglob("*.png"):
        path.write_bytes(b"\x89PNG\r\n\x1a\nno more")
    result = check(tree)
    assert result.returncode == 1 and "48 files unreadable" in result.stdout
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["counts"] == {"error": 2, "warning": 0, "note": 0}
    assert report["class_weights"] == {} and report["splits"]["train"]["void_share"] is None


def test_values_are_those_counted_by_hand(run_inside, own_data, tmp_path):
    for path in own_data.rglob("*.*g"):
        path.unlink()
    labels = ([[7, 7, 7], [7, 3, 9]], [[3, 3, 3], [3, 3, 3]])
    for i, rows in enumerate(labels):
        Image.fromarray(np.array(rows, np.uint8)).save(own_data / f"labels/{i}.png")
        make_image(make_label(i), i).resize((3, 2)).save(own_data / f"images/{i}.png")
    common = ("--dataset", "folders", "--datadir", own_data)
    run_inside("utils/check_dataset.py", *common, "--out", tmp_path / "out", "--workers", 0)
    report = json.loads((tmp_path / "out/report.json").read_text())
    split = report["splits"]["all"]
    assert split["pairs"] == 2 and split["image_sizes"] == {"3x2": 2}
    assert split["label_values"] == {
        "3": {"pixels": 7, "labels": 2, "meaning": "path"},
        "7": {"pixels": 4, "labels": 1, "meaning": "field"},
        "9": {"pixels": 1, "labels": 1, "meaning": "void"},
    }
    assert split["void_share"] == pytest.approx(1 / 12)
    assert split["classes"]["path"] == {
        "pixels": 7, "share": pytest.approx(7 / 12), "labels": 2,
    }  # fmt: skip
    expected = dict(zip(("field", "path"), class_weights([4 / 12, 7 / 12], 1.1), strict=True))
    assert report["class_weights"]["c = 1.10"] == pytest.approx(expected)


def test_a_hold_out_is_checked_as_training_will_see_it(own_data):
    shutil.copy(own_data / "images/1.jpg", own_data / "images/2.jpg")
    assert [split.name for split in examine(own_data, "folders").splits] == ["all"]
    diagnosis = examine(own_data, "folders", val_every=3)
    sizes = {split.name: len(split.pairs) for split in diagnosis.splits}
    assert sizes == {"train": 4, "val": 2}
    assert "images/2.jpg ~ images/1.jpg" in found(diagnosis)["leak"]
    (own_data / "labels/5.png").unlink()
    findings = examine(own_data, "folders", val_every=3).findings
    assert sum(finding.kind == "no-label" for finding in findings) == 1
    with pytest.raises(UserError, match="give one of them"):
        examine(own_data, "folders", val_every=3, val_names="1")


def test_processes_see_what_one_sees(tree):
    FAULTS["damaged"](tree)
    splits, findings = open_splits("camvid", tree)
    alone = examine(tree)
    together = validate_dataset(tree, splits, findings, workers=2)
    assert together.findings == alone.findings
    for one, other in zip(alone.splits, together.splits, strict=True):
        assert np.array_equal(one.id_counts, other.id_counts)
        assert np.array_equal(one.fit, other.fit, equal_nan=True)


def test_a_name_that_is_no_text_is_written_as_its_code(check, tree, tmp_path):
    for folder in ("val", "valannot"):
        (tree / folder / "val_00.png").rename(tree / folder / "val\n\udce9.png")
    truncate(tree / "val/val\n\udce9.png")
    result = check(tree, "--images", 29)
    assert result.returncode == 1 and "val\\n\\udce9.png" in result.stdout
    (tree / "val/val\n\udce9.png").unlink()
    shutil.copy(tree / "train/train_11.png", tree / "val/val\n\udce9.png")
    assert check(tree, "--images", 29).returncode == 1  # on the sheet and among similar images
    assert "val\\n\\udce9.png" in (tmp_path / "out/report.html").read_text(encoding="utf-8")


HOSTILE = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def page(clean_tree, tmp_path_factory) -> Path:
    """The page of a tree with faults, one of them in a file with a hostile name."""
    root = Path(shutil.copytree(clean_tree, tmp_path_factory.mktemp("page") / "camvid"))
    shutil.copy(root / "train/train_11.png", root / "val/val_03.png")
    make_image(make_label(1), 1).save(root / f"train/{HOSTILE.replace('/', '')}.png")
    for i in range(5):
        (root / f"trainannot/train_{i:02d}.png").unlink()
    diagnosis = examine(root)
    weights = {"c = 1.10": [0.5 + i for i in range(11)]}
    path = root / "report.html"
    write_dataset_page(path, "Toy & co", diagnosis, worst_aligned(diagnosis, 3), weights)
    return path


def test_the_page_escapes_and_stands_alone(page):
    html = page.read_text(encoding="utf-8")
    assert "<script>alert" not in html and "&lt;script&gt;alert" in html
    assert "://" not in html and "Toy &amp; co" in html
    assert html.count("label on the image</span>") == 3


def test_the_page_in_a_browser(page):
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("needs a browser: apt-get install chromium")
    complaints = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        opened = browser.new_page(viewport={"width": 360, "height": 800}, color_scheme="dark")
        opened.on("console", lambda message: complaints.append(message.text))
        opened.on("pageerror", lambda error: complaints.append(str(error)))
        opened.goto(page.as_uri())
        assert opened.evaluate("document.documentElement.scrollWidth") <= 360
        badges = opened.locator("#findings .badge").all_inner_texts()
        assert badges == ["error", "warning"]
        opened.locator("#findings summary").first.click()
        assert opened.locator("#findings .files li").first.is_visible()
        weight = opened.locator("#class-table").get_by_role("button", name="weight")
        weight.click()  # the heaviest first
        names = opened.locator("#class-table tbody th").all_inner_texts()
        assert names[0] == "bicyclist" and names[-1] == "sky"
        for image in opened.locator("img").all():
            image.scroll_into_view_if_needed()
        opened.wait_for_function(
            "[...document.images].every((i) => i.complete && i.naturalWidth > 0)"
        )
        assert opened.locator("#twins .pane").count() == 2
        browser.close()
    assert complaints == []


# utils/class_weights.py


def test_class_weights_are_those_of_the_training(run_inside, clean_tree):
    common = ("--dataset", "camvid", "--datadir", clean_tree, "--workers", 1)

    def run(*flags: object):
        return run_inside("utils/class_weights.py", *common, *flags)

    read = json.loads(run("--format", "json", "--offsets", 1.02, 1.2).stdout)
    counts = examine(clean_tree).splits[0].class_counts.sum(axis=0)
    assert list(read["shares"].values()) == pytest.approx((counts / counts.sum()).tolist())
    assert list(read["shares"])[-1] == "void" and list(read["weights"]) == ["1.02", "1.2"]
    expected = class_weights(counts[:-1] / counts.sum(), 1.02)
    assert list(read["weights"]["1.02"].values()) == pytest.approx(expected.tolist())
    same = yaml.safe_load(run("--format", "yaml", "--offsets", 1.02, 1.2).stdout)
    assert same["weights"][1.2] == read["weights"]["1.2"]
    table = run().stdout
    assert "c=1.1 " in table and "c=1.2 " in table and "24 labels" in table
    refused = run("--offsets", 1)
    assert refused.returncode == 2 and "more than 1" in refused.stderr


# Real images


def test_camvid_val_continues_a_training_sequence(real_data):
    diagnosis = examine(real_data / "data/camvid")
    (finding,) = diagnosis.findings
    assert finding.kind == "leak" and finding.severity == "warning"
    assert "101 of 101 images show what train shows too" in finding.sentence
    # The frames next to the gap in train that val fills, at both of its ends.
    assert "val/0016E5_07959.jpg ~ train/0016E5_07920.jpg" in finding.sentence
    assert "val/0016E5_08159.jpg ~ train/0016E5_08190.jpg" in finding.sentence


def test_a_recording_held_out_whole_is_no_alarm(real_data):
    diagnosis = examine(real_data / "data/camvid", val_names="0006R0")
    assert "leak" not in found(diagnosis)


def test_cityscapes_is_clean(real_data):
    diagnosis = examine(real_data / "data/cityscapes_sample", "cityscapes")
    assert [finding.kind for finding in diagnosis.findings] == ["unscored"]
    for options in ({}, {"val_every": 6}):
        assert not examine(real_data / "data/cityscapes_512x256", "cityscapes", **options).findings

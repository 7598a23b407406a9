"""Colour maps, overlays, legends, and the script that draws them for any images."""

import runpy
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import CLASSES, COLORS, ROOT
from PIL import Image
from test_bad_input import assert_refused

from lednet import LEDNet, UserError
from lednet.checkpoint import save_checkpoint
from lednet.data.labels import IGNORE_INDEX, LabelScheme, camvid_scheme, cityscapes_scheme
from lednet.inference.predictor import Predictor
from lednet.model import load_model
from lednet.plots import contact_sheet
from lednet.visualization import Visualizer, colorize, draw_legend, output_scheme, overlay

SCRIPT = ROOT / "test/eval_cityscapes_color.py"
SCHEME = camvid_scheme()
VOID = SCHEME.num_classes


def test_colors_of_classes_and_both_kinds_of_void():
    label = np.array([[0, 1, VOID, IGNORE_INDEX]], np.uint8)
    black = [0, 0, 0]
    assert colorize(label, SCHEME).tolist() == [[[128, 128, 128], [128, 0, 0], black, black]]


@pytest.mark.parametrize(
    ("alpha", "pixel"), [(0, [200, 101, 3]), (0.25, [182, 76, 2]), (0.5, [164, 51, 2]),
                         (1, [128, 0, 0])]
)  # fmt: skip
def test_overlay_mixes_class_colors_and_leaves_void(alpha, pixel):
    image = np.full((1, 3, 3), [200, 101, 3], np.uint8)
    label = np.array([[1, VOID, IGNORE_INDEX]], np.uint8)
    before = [200, 101, 3]
    assert overlay(image, label, SCHEME, alpha).tolist() == [[pixel, before, before]]
    assert image.tolist() == [[before] * 3]  # the caller's image is not drawn on


def test_overlay_refuses_a_share_above_one():
    with pytest.raises(ValueError, match="alpha"):
        overlay(np.zeros((1, 1, 3), np.uint8), np.zeros((1, 1), np.uint8), SCHEME, 1.5)


def colored(label: np.ndarray, scheme: LabelScheme) -> np.ndarray:
    """Class colours with the legend below."""
    return Visualizer(scheme).draw("color", np.zeros((*label.shape, 3), np.uint8), label)


@pytest.mark.parametrize("width", [200, 480, 1024, 2048])
def test_legend_stands_below_an_untouched_picture(width):
    label = np.random.default_rng(0).integers(0, 20, (20, width)).astype(np.uint8)
    image = colorize(label, cityscapes_scheme())
    picture = colored(label, cityscapes_scheme())
    assert picture.shape[0] > 20 and picture.shape[1:] == (width, 3)
    np.testing.assert_array_equal(picture[:20], image)
    shown = {tuple(color) for color in picture[20:].reshape(-1, 3).tolist()}
    assert shown >= {*cityscapes_scheme().colors, (0, 0, 0), (255, 255, 255)}


def test_legend_of_a_picture_narrower_than_a_name_is_whole():
    label = np.full((5, 10), 9, np.uint8)
    picture = colored(label, SCHEME)
    np.testing.assert_array_equal(picture[:5, :10], colorize(label, SCHEME))
    assert (picture[:5, 10:] == 255).all()
    assert (picture[:, -1] == 255).all()  # no letter is cut off
    assert not (picture[5:, 40:] == 255).all()


def test_legend_wraps_and_grows_with_its_letters():
    narrow, wide = draw_legend(SCHEME, 250), draw_legend(SCHEME, 1500)
    assert (narrow.width, wide.width) == (250, 1500)
    assert narrow.height > 2 * wide.height
    assert draw_legend(SCHEME, 1500, font_size=30).height > wide.height


def test_letters_grow_with_the_picture():
    scheme = LabelScheme("two", ("grass", "snow"), ((0, 200, 0), (250, 250, 250)), {0: 0, 1: 1})
    small, large = (len(colored(np.zeros((1, width), np.uint8), scheme)) for width in (512, 2048))
    assert large > 1.8 * small


@pytest.mark.parametrize("void", [True, False])
def test_void_in_the_legend_is_a_choice(void):
    pixels = np.asarray(draw_legend(SCHEME, 500, void=void))
    black = torch.from_numpy((pixels == 0).all(axis=2)).float()[None, None]
    # A black square of 8 pixels is more than a letter's stroke.
    assert bool((torch.nn.functional.avg_pool2d(black, 8, 1) == 1).any()) == void


def test_contact_sheet_has_the_legend(tmp_path):
    image = np.full((40, 80, 3), 17, np.uint8)
    label = np.zeros((40, 80), np.uint8)
    contact_sheet([(image, label, label)], SCHEME, tmp_path / "sheet.png", tile_width=200)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    legend = np.asarray(draw_legend(SCHEME, sheet.shape[1]))
    np.testing.assert_array_equal(sheet[-len(legend) :], legend)
    assert sheet[60, 100].tolist() == [17] * 3
    assert sheet[60, 300].tolist() == sheet[60, 520].tolist() == [128] * 3


def test_classes_of_weights():
    named = output_scheme({"classes": CLASSES, "colors": COLORS, "dataset": "mine"}, 12, "w.pth")
    assert (named.name, named.classes) == ("mine", tuple(CLASSES))
    assert colorize(np.array([[3]]), named).tolist() == [[COLORS[3]]]
    assert output_scheme({}, 20, "w.pth").classes == cityscapes_scheme().classes
    assert output_scheme({}, 12, "w.pth").colors == camvid_scheme().colors


@pytest.mark.parametrize(
    ("meta", "outputs"),
    [({}, 7), ({"classes": CLASSES, "colors": COLORS}, 20), ({"classes": CLASSES}, 12)],
)
def test_classes_that_the_weights_do_not_tell(meta, outputs):
    with pytest.raises(UserError, match=r"w\.pth .*give weights"):
        output_scheme(meta, outputs, "w.pth")


@pytest.fixture
def flags(weights, photos, tmp_path) -> list:
    return ["--weights", weights, "--input", photos, "--out", tmp_path / "out", "--device", "cpu"]


@pytest.fixture
def draw(flags, monkeypatch, capsys):
    """Run the script in this process, which spares its start; later flags win."""

    def run(*more: object) -> subprocess.CompletedProcess:
        command = [str(SCRIPT), *map(str, (*flags, *more))]
        monkeypatch.setattr(sys, "argv", command)
        monkeypatch.setattr(sys, "path", sys.path.copy())
        status = 0
        try:
            runpy.run_path(command[0], run_name="__main__")
        except SystemExit as end:
            status = end.code
        return subprocess.CompletedProcess(command, status, *capsys.readouterr())

    return run


def pictures(folder) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def read(path) -> np.ndarray:
    return np.array(Image.open(path))


def expected(weights, image: np.ndarray) -> np.ndarray:
    net, _ = load_model(weights)
    return Predictor(net, (48, 64))(image)


def test_folder_with_sub_folder(run_script, flags, weights, photos, tmp_path):
    result = run_script("test/eval_cityscapes_color.py", *flags, "--no-legend", "--alpha", 0.25)
    assert result.returncode == 0, result.stderr
    assert "2 of 2 images" in result.stdout
    names = [f"{folder}a_{kind}.png" for folder in ("", "sub/") for kind in ("color", "overlay")]
    assert pictures(tmp_path / "out") == names
    scheme = output_scheme({"classes": CLASSES, "colors": COLORS}, 12, weights)
    for folder in ("", "sub/"):
        image = read(photos / f"{folder}a.png")
        label = expected(weights, image)
        color = read(tmp_path / f"out/{folder}a_color.png")
        np.testing.assert_array_equal(color, colorize(label, scheme))
        mixed = read(tmp_path / f"out/{folder}a_overlay.png")
        np.testing.assert_array_equal(mixed, overlay(image, label, scheme, 0.25))


def test_one_image_and_one_kind_with_legend(draw, photos, tmp_path):
    result = draw("--input", photos / "a.png", "--outputs", "overlay", "--alpha", 0)
    assert result.returncode == 0, result.stderr
    assert pictures(tmp_path / "out") == ["a_overlay.png"]
    picture = read(tmp_path / "out/a_overlay.png")
    np.testing.assert_array_equal(picture[:50, :70], read(photos / "a.png"))
    assert len(picture) > 50


def test_an_interrupted_run_goes_on_where_it_stopped(draw, tmp_path):
    (tmp_path / "out").mkdir()
    for name in ("a_color.png", "a_overlay.png"):
        (tmp_path / "out" / name).write_text("drawn before")
    result = draw()
    assert "1 of 2 images" in result.stdout and "1 were there already" in result.stdout
    assert (tmp_path / "out/a_color.png").read_text() == "drawn before"
    assert len(pictures(tmp_path / "out")) == 4
    (tmp_path / "out/sub/a_color.png").unlink()
    (tmp_path / "out/sub/a_overlay.png").write_text("drawn before")
    assert "1 of 2 images" in draw().stdout
    assert (tmp_path / "out/sub/a_overlay.png").read_text() == "drawn before"
    assert read(tmp_path / "out/sub/a_color.png").size

    assert "2 of 2 images" in draw("--overwrite").stdout
    assert read(tmp_path / "out/a_color.png").size
    assert read(tmp_path / "out/sub/a_overlay.png").size


def test_results_inside_the_input_are_no_inputs(draw, photos):
    for _ in range(2):
        result = draw("--out", photos / "out", "--outputs", "color")
        assert "of 2 images" in result.stdout, result.stderr
    assert pictures(photos / "out") == ["a_color.png", "sub/a_color.png"]


def test_results_in_the_folder_above_the_input(draw, tmp_path):
    assert "2 of 2 images" in draw("--out", tmp_path, "--outputs", "color").stdout
    assert (tmp_path / "sub/a_color.png").is_file()


def test_orientation_in_a_photo_is_applied(draw, photos, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to see it upright
    Image.new("RGB", (60, 30)).save(photos / "turned.jpg", exif=exif)
    assert draw("--input", photos / "turned.jpg", "--no-legend").returncode == 0
    assert read(tmp_path / "out/turned_overlay.png").shape == (60, 30, 3)


def test_two_images_of_one_name(draw, photos, tmp_path):
    Image.new("RGB", (60, 30)).save(photos / "sub/a.jpg")
    assert_refused(draw(), "sub/a.jpg", "a.png", "rename one")
    assert not (tmp_path / "out").exists()


def test_truncated_image(draw, photos, tmp_path):
    path = photos / "sub/a.png"
    path.write_bytes(path.read_bytes()[:-200])
    assert_refused(draw(), str(path), "is damaged")
    assert pictures(tmp_path / "out") == ["a_color.png", "a_overlay.png"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--alpha", 2), "--alpha is 2"),
        (("--input", "nowhere"), "nowhere"),
        (("--precision", "fp16"), "fp16 needs a GPU"),
    ],
)
def test_options_that_make_no_sense(draw, more, words):
    assert_refused(draw(*more), words)


def test_folders_that_do_not_suit(draw, photos, tmp_path):
    assert_refused(draw("--out", photos), str(photos), "choose another")
    (tmp_path / "empty").mkdir()
    assert_refused(draw("--input", tmp_path / "empty"), "empty holds no images")


def test_weights_without_known_classes(draw, tmp_path):
    save_checkpoint(tmp_path / "other.pth", LEDNet(5), {"size": [48, 64]})
    assert_refused(draw("--weights", tmp_path / "other.pth"), "other.pth", "5 outputs")

"""HTML report of an evaluation: content of the file, and behaviour in a browser."""

import base64
import contextlib
import io
import re
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lednet.data.labels import IGNORE_INDEX, LabelScheme
from lednet.evaluation.report import (
    ERROR_COLOR,
    ImageRow,
    encode_panes,
    score_column,
    write_report,
)
from lednet.html import Figure

HOSTILE = "<script>alert(1)</script>.png"
SCHEME = LabelScheme(
    name="Toy",
    classes=("road", "car", "<b>tram</b>"),
    colors=((128, 64, 128), (0, 0, 142), (0, 80, 100)),
    file_ids={0: 0, 1: 1, 2: 2},
)


@contextlib.contextmanager
def opened(browser, file: Path, width: int = 1280, scheme: str = "light") -> Iterator[Any]:
    """A page in the browser. Fails on console messages, script errors and network requests."""
    complaints = []
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.set_default_timeout(20_000)
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: complaints.append(request.url))
    page.goto(file.as_uri())
    yield page
    page.close()
    assert [c for c in complaints if not c.startswith(("file:", "data:"))] == []


def toy_panes() -> dict[str, str]:
    label = np.arange(32, dtype=np.uint8).reshape(4, 8) % 3
    return encode_panes(np.full((4, 8, 3), 90, np.uint8), label, label[::-1], SCHEME)


def toy_rows() -> Iterator[ImageRow]:
    # The order by car differs from the order by mIoU, and not every image has a car.
    panes = toy_panes()
    yield ImageRow("b", 0.5, (0.9, 0.1, None), panes)
    yield ImageRow("all_void", None, (None, None, None), panes)
    yield ImageRow("a", 0.2, (0.2, None, None), panes)
    yield ImageRow("c", 0.8, (0.7, 0.9, None), panes)
    yield ImageRow(HOSTILE, 0.4, (None, 0.4, None), panes)


def write_toy(path: Path, images=None, **changes) -> str:
    arguments = {
        "title": "Toy & co",
        "headline": (Figure("class mIoU", "0.692", "3 classes"), Figure("speed", "71 fps")),
        "scheme": SCHEME,
        "columns": [
            score_column("IoU", (0.75, 0.25, None), "absent"),
            score_column("iIoU", (None, 0.125, None)),
        ],
        "matrix": np.array([[12_345, 0, 0, 0], [10, 30, 0, 0], [0, 0, 0, 0]]),
        "tables": {"Options <i>": [("--state", "a&b.pth")]},
        "images": toy_rows() if images is None else images,
        **changes,
    }
    write_report(path, **arguments)
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_toy(path)
    return path


@pytest.fixture(scope="module")
def html(page_file) -> str:
    return page_file.read_text(encoding="utf-8")


def decode(uri: str) -> np.ndarray:
    head, _, data = uri.partition(",")
    assert head == "data:image/webp;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))


def test_encode_panes_colours_every_pixel():
    image = np.full((2, 3, 3), 100, np.uint8)
    truth = np.array([[0, 0, IGNORE_INDEX], [1, 1, IGNORE_INDEX]], np.uint8)
    prediction = np.array([[0, 1, 0], [1, IGNORE_INDEX, 1]], np.uint8)
    panes = {k: decode(uri) for k, uri in encode_panes(image, truth, prediction, SCHEME).items()}
    road, car, void, dim, wrong = (128, 64, 128), (0, 0, 142), (0, 0, 0), (48, 48, 48), ERROR_COLOR
    assert list(panes) == ["input", "truth", "prediction", "error"]
    assert np.abs(panes["input"].astype(int) - 100).max() <= 3  # lossy
    assert np.array_equal(panes["truth"], [[road, road, void], [car, car, void]])
    assert np.array_equal(panes["prediction"], [[road, car, road], [car, void, car]])
    assert np.array_equal(panes["error"], [[dim, wrong, void], [dim, wrong, void]])


def test_encode_panes_shrinks_only_and_refuses_other_sizes():
    image, label = np.zeros((10, 40, 3), np.uint8), np.zeros((10, 40), np.uint8)
    for width, shape in ((20, (5, 20, 3)), (512, (10, 40, 3))):
        panes = encode_panes(image, label, label, SCHEME, width=width)
        assert {decode(uri).shape for uri in panes.values()} == {shape}
    with pytest.raises(ValueError, match="differ in size"):
        encode_panes(image, label, label[:2], SCHEME)


def test_report_escapes_text_and_refers_to_no_other_file(html):
    assert "<script>alert" not in html and "<b>tram" not in html and "<i>" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;.png" in html and "a&amp;b.pth" in html
    assert "://" not in html  # Base64 has no colon, so this finds every absolute address.
    references = re.findall(r'(?:src|href)="([^"]*)"|url\(([^)]*)\)|@import (.*)', html)
    found = {part for match in references for part in match if part}
    assert found and all(reference.startswith(("#", "data:")) for reference in found)
    ids = re.findall(r'\sid="([^"]*)"', html)
    assert len(ids) == len(set(ids))


def test_class_table_marks_absent_classes(html):
    rows = re.findall(r"<tr>\n<th scope=\"row\" data-value.*?</tr>", html, re.DOTALL)
    assert [">absent<" in row for row in rows] == [False, False, True]
    assert ">0.750<" in rows[0] and "0.000" not in rows[2]
    assert ["--share: " in row for row in rows] == [True, True, False]


def test_matrix_cells_have_text_colour_and_description(html):
    matrix = html[html.index('id="matrix"') : html.index('class="scale"')]
    cells = re.findall(r'<td class="(\w*)" style="--strength: ([\d.]+)" title="(.*?)">(.*?)<',
                       matrix)  # fmt: skip
    assert len(cells) == 3 * 4
    assert cells[0] == (
        "strong", "1.000", "truth road, predicted road: 100.0 % (12,345 pixels)", "100"
    )  # fmt: skip
    assert cells[4] == ("", "0.500", "truth car, predicted road: 25.0 % (10 pixels)", "25")
    assert cells[11][:3] == (
        "absent", "0.000",
        "truth &lt;b&gt;tram&lt;/b&gt;, predicted void: truth absent (0 pixels)",
    )  # fmt: skip
    assert [text for *_, text in cells if text] == ["100", "25", "75"]
    confusions = html[html.index('id="largest-title"') : html.index('id="tables"')]
    assert confusions.count(" %</td>") == 1 and "<td>car</td><td>road</td><td>25.0 %" in confusions


def test_report_streams_images_with_names_that_are_not_unicode(tmp_path, html):
    assert write_toy(tmp_path / "again.html") == html

    class Panes(dict):  # plain dicts do not support weak references
        __hash__ = object.__hash__

    alive = weakref.WeakSet()

    def rows():
        for index in range(50):
            assert len(alive) <= 2
            panes = Panes(toy_panes())
            alive.add(panes)
            yield ImageRow(f"{index}_\udce9", 0.5, (0.5, None, None), panes)

    streamed = write_toy(tmp_path / "report.html", rows())
    assert streamed.count("data-name=") == 50 and 'data-name="7_\\udce9"' in streamed


def test_report_leaves_no_file_after_an_error(tmp_path):
    def rows():
        yield from toy_rows()
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        write_toy(tmp_path / "report.html", rows())
    for shape in ((3, 3), (2, 4)):
        with pytest.raises(ValueError, match="zip"):
            write_toy(tmp_path / "report.html", matrix=np.zeros(shape, int))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def open_page(browser, page_file):
    with contextlib.ExitStack() as pages:
        yield lambda *args, **options: pages.enter_context(
            opened(browser, page_file, *args, **options)
        )


def names(page) -> list[str]:
    # Not inner text: rows out of sight are not laid out and have none.
    return page.locator("#rows > li:not([hidden]) h3").all_text_contents()


def test_images_are_sorted_and_filtered(open_page):
    page = open_page()
    assert names(page) == ["a", HOSTILE, "b", "c", "all_void"]  # worst first
    for order, chosen, text, expected in (
        ("best", "all classes", "", ["c", "b", HOSTILE, "a", "all_void"]),
        ("name", "all classes", "", [HOSTILE, "a", "all_void", "b", "c"]),
        ("best", "car", "", ["c", HOSTILE, "b"]),
        ("worst", "car", "", ["b", HOSTILE, "c"]),
        ("worst", "<b>tram</b>", "", []),
        ("worst", "all classes", "A", ["a", HOSTILE, "all_void"]),
        ("name", "car", "SCRIPT", [HOSTILE]),
    ):
        page.get_by_label("Order").select_option(order)
        page.get_by_label("Class", exact=True).select_option(chosen)
        page.get_by_label("Name contains").fill(text)
        assert names(page) == expected
        assert page.locator("#count").inner_text() == f"{len(expected)} of 5 images"
        assert page.locator("#nothing").is_visible() == (not expected)
    scores = page.locator("#rows > li:not([hidden]) .scores").all_text_contents()
    assert scores == ["mIoU 0.400car 0.400"]


def test_class_table_sorts_absent_classes_last(open_page):
    page = open_page()
    table = page.locator("#class-table")
    for button, order, expected in (
        ("IoU", "descending", ["road", "car"]),
        ("IoU", "ascending", ["car", "road"]),
        ("Class", "ascending", ["road", "car"]),
    ):
        table.get_by_role("button", name=button, exact=True).click()
        assert page.locator(f"th[aria-sort={order}]").inner_text() == button
        assert table.locator("tbody th").all_inner_texts() == [*expected, "<b>tram</b>"]


def test_theme_follows_the_system_and_the_button(open_page):
    def background(page):
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    light, dark = open_page(scheme="light"), open_page(scheme="dark")
    themes = background(light), background(dark)
    assert themes[0] != themes[1]
    for page, colors in ((light, themes[::-1]), (dark, themes)):
        for color in colors:
            page.get_by_role("button", name="Light / dark").click()
            assert background(page) == color


def test_layout_fits_a_phone_and_loads_all_images(open_page):
    page = open_page(360)
    page.locator("#rows img").last.scroll_into_view_if_needed()
    page.wait_for_function("[...document.images].every((i) => i.complete && i.naturalWidth === 8)")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    left = page.locator("#rows > li:first-child .pane").evaluate_all(
        "panes => panes.map((pane) => Math.round(pane.getBoundingClientRect().left))"
    )
    assert left[0] == left[2] < left[1] == left[3]  # two by two
    page.locator(".panes").first.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_keyboard_reaches_controls_matrix_and_large_view(open_page):
    page = open_page()
    reached = []
    while "panes" not in reached and len(reached) < 40:
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate("document.activeElement.id || document.activeElement.className")
        )
    controls = ("skip", "theme", "matrix", "order", "class", "text", "panes")
    assert [name for name in reached if name in controls] == list(controls)

    page.keyboard.press("Enter")
    large, name = page.get_by_role("dialog"), page.locator("#large-name")
    assert large.is_visible() and name.inner_text() == "a"
    for key, expected in (("Right", HOSTILE), ("Left", "a"), ("Left", "all_void"), ("Left", "c")):
        page.keyboard.press(f"Arrow{key}")
        assert name.inner_text() == expected
    assert page.locator("#large-panes img").count() == 4
    assert page.locator("#large-classes li").all_inner_texts() == ["road 0.700", "car 0.900"]
    page.keyboard.press("Escape")
    assert not large.is_visible()
    # The dialog's "close" event, which moves the focus, is asynchronous.
    page.wait_for_function("document.activeElement.getAttribute('aria-label') == 'Enlarge c'")


def test_matrix_reads_out_cells_by_key_and_pointer(open_page):
    page = open_page()
    page.locator("#matrix").focus()
    for key, expected in (
        ("ArrowUp", "truth road, predicted road: 100.0 % (12,345 pixels)"),
        ("ArrowDown", "truth car, predicted road: 25.0 % (10 pixels)"),
        ("ArrowLeft", "truth car, predicted road: 25.0 % (10 pixels)"),
        ("ArrowRight", "truth car, predicted car: 75.0 % (30 pixels)"),
    ):
        page.keyboard.press(key)
        assert page.locator("#readout").inner_text() == expected
        assert page.locator("#matrix .current").get_attribute("title") == expected
    page.locator("#matrix tbody td").nth(3).hover()
    assert page.locator("#readout").inner_text() == "truth road, predicted void: 0.0 % (0 pixels)"

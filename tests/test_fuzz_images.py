"""Whatever the bytes of an image, a zip of images or a video: a result or a sentence."""

import io
import struct
import time
import zipfile
import zlib
from pathlib import Path

import av
import fuzzing
import numpy as np
import pytest
from fuzzing import Hang, damaged, ends_well, foreign, zip_of
from hypothesis import given, strategies as st
from PIL import Image

from lednet.data.dataset import read_label
from lednet.data.image_io import FORMATS, open_image, read_image, to_rgb
from lednet.data.labels import IGNORE_INDEX, cityscapes_scheme
from lednet.data.pairs import Sample
from lednet.demo.labeller import MAX_SIDE, decode_image
from lednet.errors import UserError
from lednet.evaluation.cityscapes_evaluator import read_instances
from lednet.evaluation.cityscapes_submission import check_submission
from lednet.inference.video import VideoReader
from lednet.io import LIMIT
from lednet.validation.inspection import inspect_pair

pytestmark = pytest.mark.filterwarnings("ignore")  # as the library does with Pillow's

PIXELS = 250_000
SCHEME = cityscapes_scheme()
NOISE = np.random.default_rng(0).integers(0, 34, (9, 14, 4), np.uint8)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("images")


@pytest.fixture(autouse=True)
def small_limit(monkeypatch):
    monkeypatch.setenv(LIMIT, str(PIXELS))


def encoded(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def exif() -> Image.Exif:
    found = Image.Exif()
    found[0x0112], found[0x011A], found[0x010F] = 6, 72.0, "maker"
    return found


GREY, RGB = Image.fromarray(NOISE[..., 0]), Image.fromarray(NOISE[..., :3])
RGBA = Image.fromarray(NOISE)
PALETTE = GREY.convert("P")
DEEP = Image.fromarray(NOISE[..., 0].astype(np.uint16) * 1000)
FLOATS = encoded(Image.fromarray(np.float32(NOISE[..., 0])), "TIFF")
PNGS = [
    encoded(GREY, "PNG"),
    encoded(PALETTE, "PNG", transparency=b"\0\1\2"),
    encoded(RGB, "PNG", exif=exif()),
    encoded(RGBA, "PNG", save_all=True, append_images=[RGBA.rotate(180)]),
    encoded(DEEP, "PNG"),
    encoded(GREY.convert("1"), "PNG"),
    encoded(GREY.convert("LA"), "PNG"),
]
OTHERS = [
    encoded(RGB, "JPEG", exif=exif()),
    encoded(RGB, "JPEG", progressive=True),
    encoded(RGB.convert("CMYK"), "JPEG"),
    encoded(RGB, "MPO", save_all=True, append_images=[RGB]),
    encoded(GREY, "BMP"),
    encoded(PALETTE, "BMP"),
    encoded(RGBA, "WEBP", exif=exif()),
    encoded(RGB, "WEBP", lossless=True, save_all=True, append_images=[RGB.rotate(90)]),
    *(encoded(RGB, "TIFF", compression=name, exif=exif())
      for name in (None, "tiff_lzw", "tiff_deflate", "packbits", "jpeg")),
    FLOATS,
    encoded(DEEP, "TIFF", save_all=True, append_images=[DEEP]),
    encoded(RGB.convert("LAB"), "TIFF"),
]  # fmt: skip
FOREIGN = [
    *(encoded(RGB, format) for format in ("GIF", "PPM", "ICO", "EPS", "TGA", "PCX", "JPEG2000")),
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(sprung) (w) file closefile\n",
    b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/hostname'/></svg>",
]


def read_all(path: Path) -> None:
    """By every reader of image files."""
    image = ends_well(lambda: read_image(path), path.name)
    if image is not None:
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
        assert 0 < image.shape[0] * image.shape[1] <= PIXELS
    upright = ends_well(lambda: to_rgb(open_image(path)), path.name)
    assert (image is None) == (upright is None)
    uploaded = ends_well(lambda: decode_image(path.read_bytes(), PIXELS), "image")  # to the page
    if upright is None or max(upright.shape) > MAX_SIDE:
        assert uploaded is None
    else:
        assert np.array_equal(uploaded, upright)
    label = ends_well(lambda: read_label(path, SCHEME), path.name)
    if label is not None:
        assert set(np.unique(label)) <= {*range(SCHEME.num_classes), IGNORE_INDEX}
    instances = ends_well(lambda: read_instances(path), path.name)
    if instances is not None:
        assert instances.ndim == 2 and 0 <= instances.min() <= instances.max() < 34000
    look = inspect_pair(Sample(path, path))
    assert look.problems or (image is not None and look.image_size == image.shape[1::-1])


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("i", range(len(PNGS + OTHERS)))
def test_sound_images_are_read(place, i):
    path = write(place / "sound.png", (PNGS + OTHERS)[i])
    read_all(path)
    if (PNGS + OTHERS)[i] is not FLOATS:
        assert sorted(read_image(path).shape) == [3, 9, 14]  # Pillow turns TIFFs upright


@given(content=foreign([*PNGS, *OTHERS]))
def test_damaged_images(place, content):
    read_all(write(place / "damaged.png", content))


@given(content=foreign(FOREIGN))
def test_images_of_other_formats_are_not_opened(place, content):
    path = write(place / "other.png", content)
    read_all(path)
    if content in FOREIGN:
        with pytest.raises(UserError, match=r"other\.png is damaged \(or no PNG"):
            open_image(path)


def chunks_of(png: bytes) -> list[tuple[bytes, bytes]]:
    chunks, at = [], 8
    while at < len(png):
        (length,) = struct.unpack_from(">I", png, at)
        chunks.append((png[at + 4 : at + 8], png[at + 8 : at + 8 + length]))
        at += 12 + length
    return chunks


def png_of(chunks: list[tuple[bytes, bytes]]) -> bytes:
    parts = [b"\x89PNG\r\n\x1a\n"]
    for kind, data in chunks:
        check = struct.pack(">I", zlib.crc32(kind + data))
        parts.append(struct.pack(">I", len(data)) + kind + data + check)
    return b"".join(parts)


BOMB = zlib.compress(bytes(3 << 20), 9)
KINDS = [
    b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"gAMA",
    b"pHYs", b"eXIf", b"acTL", b"fcTL", b"fdAT", b"sRGB", b"cHRM", b"aaaa", b"\0\1\2\3",
]  # fmt: skip
odd_numbers = st.sampled_from([0, 1, 7, 255, 499, 500, 501, 65536, 2**31 - 1, 2**32 - 1])
headers = st.builds(
    lambda sides, rest: struct.pack(">II", *sides) + bytes(rest),
    st.tuples(odd_numbers, odd_numbers),
    st.tuples(
        st.sampled_from([1, 2, 4, 8, 16, 3]), st.sampled_from([0, 2, 3, 4, 6, 1]),
        st.integers(0, 1), st.integers(0, 1), st.integers(0, 2),
    ),
)  # fmt: skip
payloads = st.one_of(
    headers,
    st.binary(max_size=40),
    st.binary(max_size=300).map(zlib.compress),
    st.sampled_from(
        [b"", BOMB, b"key\0\0" + BOMB, b"key\0\1\0\0\0" + BOMB, bytes(768), bytes(2000)]
    ),
    st.integers(1, 300).map(lambda n: b"Comment\0\0" + zlib.compress(bytes(1000 * n))),
)


@st.composite
def chunky_pngs(draw) -> bytes:
    """PNG files whose check sums are right, whatever the chunks hold."""
    chunks = chunks_of(draw(st.sampled_from(PNGS)))
    for _ in range(draw(st.integers(1, 4))):
        i = draw(st.integers(0, len(chunks) - 1))
        change = draw(st.sampled_from(["data", "kind", "add", "double", "remove", "damage"]))
        kind, data = chunks[i]
        if change == "data":
            chunks[i] = kind, draw(headers if kind == b"IHDR" else payloads)
        elif change == "kind":
            chunks[i] = draw(st.sampled_from(KINDS)), data
        elif change == "add":
            chunks.insert(i, (draw(st.sampled_from(KINDS)), draw(payloads)))
        elif change == "double":
            chunks[i:i] = [chunks[i]] * draw(st.sampled_from([1, 100]))
        elif change == "remove" and len(chunks) > 1:
            del chunks[i]
        elif change == "damage":
            chunks[i] = kind, draw(damaged([data]))
    return png_of(chunks)


@given(content=chunky_pngs())
def test_pngs_of_odd_chunks(place, content):
    read_all(write(place / "chunks.png", content))


def tiff_of(entries: list[tuple[int, int, int, int]], more: bytes, next_at: int = 0) -> bytes:
    directory = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    head = b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries))
    return head + directory + struct.pack("<I", next_at) + more


TAGS = (254, 256, 257, 258, 259, 262, 270, 273, 274, 277, 278, 279, 282, 284, 317, 320, 322, 323,
        324, 325, 330, 338, 339, 347, 34665, 34675, 50000)  # fmt: skip
entries = st.tuples(
    st.sampled_from(TAGS),
    st.integers(0, 18),
    st.sampled_from([0, 1, 2, 3, 2**16, 2**32 - 1]),
    st.sampled_from([*range(9), 16, 32, 200, 2**31, 2**32 - 1]),
)


@st.composite
def tiffs(draw) -> bytes:
    width, height = draw(odd_numbers), draw(odd_numbers)
    usual = [(256, 4, 1, width), (257, 4, 1, height), (273, 4, 1, 8)]
    found = sorted([*usual, *draw(st.lists(entries, max_size=14))])
    next_at = draw(st.sampled_from([0, 8, 8, 9, 2**32 - 1]))
    return tiff_of(found, draw(st.binary(max_size=200)), next_at)


@given(content=tiffs())
def test_tiffs_of_odd_tags(place, content):
    read_all(write(place / "tags.tif", content))


bmps = st.builds(
    lambda size, sides, planes, bits, compression, colors, rest: (
        b"BM" + struct.pack("<IIIIiiHHIIiiII", 200, 0, 54, size, *sides, planes, bits, compression,
                            0, 0, 0, colors, 0) + rest
    ),
    st.sampled_from([12, 40, 40, 40, 64, 108, 124, 0, 2**31]),
    st.tuples(*[st.sampled_from([0, 1, 5, 600, -1, -5, 2**31 - 1, -(2**31)])] * 2),
    st.integers(0, 2), st.sampled_from([1, 4, 8, 16, 24, 32, 0, 7]), st.integers(0, 6),
    st.sampled_from([0, 2, 256, 257, 2**32 - 1]), st.binary(max_size=300),
)  # fmt: skip


@given(content=bmps)
def test_bmps_of_odd_headers(place, content):
    read_all(write(place / "header.bmp", content))


@pytest.mark.parametrize("format", FORMATS)
def test_one_pixel_too_many_is_refused_undecoded(place, format, monkeypatch):
    path = write(place / f"large.{format}", encoded(Image.new("L", (501, 499)), format))
    assert open_image(path).size == (501, 499)  # 249,999
    write(path, encoded(Image.new("L", (501, 500)), format))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    with pytest.raises(UserError, match=rf"large\.{format} has 501x500 pixels, and 250,000 are"):
        open_image(path)
    kind, file, remark = inspect_pair(Sample(path, None)).problems[0]
    assert (kind, file) == ("damaged", path) and "501x500 pixels" in remark


@pytest.mark.parametrize("told", ["", "0", "-5", "many", "1e6", "²", "9" * 30])
def test_limit_must_be_a_number(place, told, monkeypatch):
    monkeypatch.setenv(LIMIT, told)
    with pytest.raises(UserError, match=LIMIT):
        open_image(write(place / "small.png", PNGS[0]))


def test_limit_can_be_raised_above_pillows(place, monkeypatch):
    """No 200-million-pixel image is decoded here: only its header is read."""
    header = struct.pack(">IIBBBBB", 20_000, 10_000, 8, 0, 0, 0, 0)
    path = write(place / "huge.png", png_of([(b"IHDR", header), (b"IDAT", b""), (b"IEND", b"")]))
    monkeypatch.delenv(LIMIT)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 80_000_000)
    with pytest.raises(UserError, match=r"20000x10000 pixels, and 100,000,000 are"):
        open_image(path)
    monkeypatch.setenv(LIMIT, "300000000")
    with pytest.raises(UserError, match=r"huge\.png is damaged"):
        open_image(path)


# uploads

FRAME = "berlin_000000_000019"


def check(path: Path) -> list[str] | None:
    options = {"frames": [FRAME], "size": NOISE.shape[:2], "progress": False}
    problems = ends_well(lambda: check_submission(path, **options), path.name)
    assert problems is None or all("\n" not in problem for problem in problems)
    return problems


ZIPS = [
    zip_of({f"{FRAME}.png": PNGS[0]}),
    zip_of({f"{FRAME}.png": PNGS[0], "a/b.txt": b"x"}, zipfile.ZIP_DEFLATED),
    zip_of({f"../{FRAME}.png": PNGS[0], "/etc/x.png": PNGS[1]}, zipfile.ZIP_BZIP2),
]


@given(content=foreign(ZIPS))
def test_damaged_uploads(place, content):
    check(write(place / "up.zip", content))


letters = st.characters(exclude_characters="\0", exclude_categories=["Cs"])
names = st.one_of(
    st.just(f"{FRAME}.png"),
    st.text(letters, max_size=12).map(lambda name: f"{name}.png"),
    st.text(letters, min_size=1),
)


@given(
    members=st.dictionaries(names, chunky_pngs() | st.sampled_from(PNGS), max_size=3),
    method=st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA]),
)
def test_uploads_of_odd_images(place, members, method):
    check(write(place / "odd.zip", zip_of(members, method)))
    assert not [path for path in place.iterdir() if path.is_dir()]  # nothing is unpacked


# videos


def video_of(suffix: str) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=suffix) as container:
        stream = container.add_stream("mpeg4" if suffix == "avi" else "libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        for i in range(4):
            picture = np.full((16, 32, 3), 60 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()


VIDEOS = [video_of(name) for name in ("mp4", "matroska", "avi", "mpegts")]


def watch(path: Path) -> list | None:
    def run() -> list:
        with VideoReader(path) as video:
            frames = [frame.image for frame, _ in zip(video, range(12), strict=False)]
        for image in frames:
            assert image.dtype == np.uint8 and image.shape[0] * image.shape[1] <= PIXELS
        return frames

    return ends_well(run, path.name)


@given(content=foreign(VIDEOS))
def test_damaged_videos(place, content):
    watch(write(place / "clip.mp4", content))


@pytest.mark.parametrize(
    "text",
    [
        "ffconcat version 1.0\nfile secret.ts\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nsecret.ts\n#EXT-X-ENDLIST\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\n",
        "<?xml version='1.0'?><MPD xmlns='urn:mpeg:dash:schema:mpd:2011'></MPD>",
    ],
)
def test_a_playlist_that_is_called_a_video_reads_no_other_file(place, text):
    write(place / "secret.ts", VIDEOS[3])
    assert len(watch(place / "secret.ts")) == 4
    path = place / "list.mp4"
    path.write_text(text)
    with pytest.raises(UserError, match=r"list\.mp4 cannot be read as a video"):
        VideoReader(path)


# the measure itself


def test_only_results_and_sentences_are_good_ends(monkeypatch):
    monkeypatch.setattr(fuzzing, "SECONDS", 1)
    assert ends_well(lambda: 7, "x") == 7
    with pytest.raises(Hang):
        ends_well(lambda: time.sleep(30), "x")
    with pytest.raises(ZeroDivisionError):
        ends_well(lambda: 1 / 0, "x")

    def refuse(sentence: str) -> None:
        raise UserError(sentence)

    assert ends_well(lambda: refuse("x is damaged"), "x") is None
    for sentence in ("it is damaged", "x is\ndamaged", ""):
        with pytest.raises(AssertionError):
            ends_well(lambda sentence=sentence: refuse(sentence), "x")

"""Read and write video with PyAV, an optional dependency. Presentation timestamps are kept."""

import contextlib
import os
from collections.abc import Iterator
from fractions import Fraction
from types import ModuleType
from typing import Any, NamedTuple, Self

import numpy as np

from lednet.data import image_io
from lednet.errors import UserError
from lednet.files import require_content
from lednet.io import write_atomically

VIDEO_SUFFIXES = (
    ".mp4", ".m4v", ".mp4v", ".mov", ".qt", ".3gp", ".3g2", ".f4v", ".mkv", ".webm", ".avi",
    ".divx", ".mpg", ".mpeg", ".mpe", ".m1v", ".m2v", ".vob", ".ts", ".m2t", ".m2ts", ".mts",
    ".wmv", ".asf", ".flv", ".ogv", ".mxf", ".h264", ".264", ".hevc", ".265",
)  # fmt: skip
READ_OPTIONS = {
    "format_whitelist": "mov,matroska,webm,avi,mpeg,mpegvideo,mpegts,asf,flv,ogg,mxf,h264,hevc",
    "protocol_whitelist": "file",
}
"""FFmpeg's demuxers and protocols that are allowed. A file is opened by its content, not by its
suffix, and a playlist named .mp4 would read other files or the network."""
MIN_AV_VERSION = 17
ENCODER = "libx264"
ENCODER_OPTIONS = {"preset": "ultrafast", "crf": "18"}
"""Class colours stay distinct, in a fifth of the time of "veryfast" and up to twice the size."""
CAMERA_FORMAT = "v4l2"
BT709 = 1
"""Code of BT.709 for colour space, primaries and transfer function in H.264."""
DEFAULT_RATE = Fraction(25)
MAX_STEP_BACK = 1
"""Timestamps that go back by more seconds begin anew: recordings joined by appending the files."""
MAX_MISSING_FRAMES = 3
"""A video may end this many frames early, because its stated duration is not always exact."""


def import_av() -> ModuleType:
    """The package `av`; a `UserError` if PyAV is not installed or too old."""
    try:
        import av
    except ImportError as error:
        raise UserError("videos and cameras need PyAV: pip install av") from error
    if int(av.__version__.split(".")[0]) < MIN_AV_VERSION:
        raise UserError(f"PyAV {av.__version__} is too old: pip install -U av")
    return av


class VideoError(UserError):
    """A video or camera cannot be read. Other inputs are not affected."""


def _require_content(source: str) -> None:
    try:
        require_content(source)
    except UserError as error:
        raise VideoError(str(error)) from error


class VideoFrame(NamedTuple):
    """A decoded frame.

    Attributes:
        number: index of the frame, from 0.
        pts: presentation timestamp in units of `VideoReader.time_base`. The first is 0.
        image: (H, W, 3) uint8 RGB, upright. All frames of a video have one size.
        pixel_aspect: width of a pixel relative to its height.
    """

    number: int
    pts: int
    image: np.ndarray
    pixel_aspect: Fraction = Fraction(1)


class VideoReader:
    """Iterate once over the frames of a video file or camera, in presentation order.

    Args:
        source: path of a file or of a camera device.
        format: `CAMERA_FORMAT` for a camera. The format of a file is detected.
        max_pixels: limit of pixels per frame, checked before decoding (default:
            `lednet.io.max_pixels()`).

    Attributes:
        rate: average frames per second.
        time_base: seconds per unit of a frame's `pts`.
        expected: number of frames according to the file's header, approximate where that states
            only a duration; None if unknown.
        problem: None, or a sentence about missing frames. Valid after the last frame.

    Raises:
        VideoError: The file is not a video, or its frames have more than `max_pixels`.
        UserError: PyAV is not installed.
    """

    def __init__(
        self, source: str | os.PathLike, format: str | None = None, max_pixels: int | None = None
    ):
        self.source = os.fspath(source)
        self._av = import_av()
        # "file:" keeps a name with a colon from being read as a protocol.
        url, options = (self.source, {}) if format else (f"file:{self.source}", READ_OPTIONS)
        try:
            self._container = self._av.open(
                url, format=format, container_options=options, metadata_errors="replace"
            )
        except self._av.error.FFmpegError as error:
            if not format:
                _require_content(self.source)
            raise VideoError(
                f"{source} cannot be read as a video ({error.strerror}): check it, or copy it again"
            ) from error
        self._stream = self._container.streams.best("video")
        if self._stream is None or self._stream.codec_context is None:
            self._container.close()
            raise VideoError(f"{source} holds no video that this PyAV can read: give another file")
        self._limit_frames(image_io.max_pixels() if max_pixels is None else max_pixels)
        self._stream.thread_type = "AUTO"
        self.rate = self._stream.average_rate or self._stream.guessed_rate or DEFAULT_RATE
        self.time_base = self._stream.time_base or 1 / self.rate
        duration = Fraction(self._container.duration or 0, 10**6)  # from microseconds
        self.expected: int | None = self._stream.frames or round(duration * self.rate) or None
        start = Fraction(self._container.start_time or 0, 10**6)
        self._stated_end = start + duration if duration else None
        self._end, self._damaged = Fraction(0), False
        self.problem: str | None = None

    def _limit_frames(self, max_pixels: int) -> None:
        codec = self._stream.codec_context
        if codec.width * codec.height > max_pixels:
            self._container.close()
            raise VideoError(
                f"{self.source} has frames of {codec.width}x{codec.height}, and {max_pixels:,} "
                "pixels are the limit: make it smaller"
            )
        # For frames that grow later. FFmpeg rounds sides up before it compares.
        codec.options = {"max_pixels": str(4 * max_pixels)}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._container.close()

    def __iter__(self) -> Iterator[VideoFrame]:
        """Decode the frames; a `VideoError` if there is none."""
        step = max(1, round(1 / (self.rate * self.time_base)))
        number, pts, first = 0, -step, None
        size: dict[str, int] = {}
        for frame in self._decode():
            size = size or {"width": frame.width, "height": frame.height}
            image = frame.to_ndarray(format="rgb24", threads=1, **size)
            aspect = self._stream.sample_aspect_ratio or Fraction(1)
            if (matrix := frame.side_data.get("DISPLAYMATRIX")) is not None:
                image, transposed = apply_display_matrix(image, matrix)
                aspect = 1 / aspect if transposed else aspect
            if frame.pts is None:
                pts += step
            else:
                first = frame.pts - number * step if first is None else first
                if (frame.pts - first - pts) * self.time_base < -MAX_STEP_BACK:
                    first = frame.pts - pts - step
                pts = max(frame.pts - first, pts + 1)  # encoders need increasing timestamps
            yield VideoFrame(number, pts, image, aspect)
            number += 1
        if not number:
            raise VideoError(f"{self.source} holds no frame that can be decoded: copy it again")
        missing = self._stated_end - self._end if self._stated_end and self._end else 0
        if self._damaged or missing > MAX_MISSING_FRAMES / self.rate:
            of = f" of about {self.expected}" if self.expected else ""
            self.problem = (
                f"{self.source} is damaged or cut short: {number}{of} frames could be read, and "
                "were predicted; copy it again"
            )

    def _decode(self) -> Iterator[Any]:
        """Decode all frames that can be decoded."""
        for packet in self._packets():
            try:
                yield from self._stream.decode(packet)
            except self._av.error.FFmpegError:
                self._damaged = True

    def _packets(self) -> Iterator[Any]:
        """Yield the video's packets, and None after an error to flush the decoder.

        The end of every stream is noted: the header states only that of the longest one.
        """
        try:
            for packet in self._container.demux():
                start = packet.dts if packet.pts is None else packet.pts
                if start is not None and packet.time_base:
                    self._end = max(self._end, (start + (packet.duration or 0)) * packet.time_base)
                if packet.stream.index == self._stream.index:
                    yield packet
        except self._av.error.FFmpegError:
            self._damaged = True
            yield None


def apply_display_matrix(image: np.ndarray, matrix: bytes) -> tuple[np.ndarray, bool]:
    """Turn and mirror a frame as its display matrix says, in steps of 90 degrees.

    Args:
        matrix: nine native 32-bit integers a b u c d v x y w of FFmpeg: a pixel (x, y) is shown at
            (a x + c y, b x + d y).

    Returns:
        The upright image, and whether its axes were exchanged.
    """
    a, b, _, c, d, *_ = np.frombuffer(matrix, np.int32).tolist()
    transposed = abs(b) > abs(a)
    if transposed:
        image, a, d = image.swapaxes(0, 1), c, b
    return np.ascontiguousarray(image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]), transposed


class VideoEncoder:
    """Encodes images as H.264 into an open container. Created by `write_video`.

    Attributes:
        padded: whether a side of the images is odd. H.264 needs even sides, so that the last row
            or column is repeated.
    """

    padded = False

    def __init__(self, container: Any, rate: Fraction, time_base: Fraction):
        self._container, self._time_base = container, time_base
        self._stream = container.add_stream(ENCODER, rate=rate, options=ENCODER_OPTIONS)
        self._stream.pix_fmt = "yuv420p"
        self._codec = codec = self._stream.codec_context
        codec.time_base = time_base
        codec.colorspace = codec.color_primaries = codec.color_trc = BT709
        codec.color_range = 1  # limited: black is 16 and white 235

    def append(self, image: np.ndarray, pts: int, pixel_aspect: Fraction = Fraction(1)) -> None:
        """Encode an image (H, W, 3) uint8 RGB; all have one size and increasing timestamps.

        Args:
            pixel_aspect: width of a pixel relative to its height, of the first image.
        """
        height, width = image.shape[:2]
        if height % 2 or width % 2:
            self.padded = True
            image = np.pad(image, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        if not self._codec.is_open:
            self._stream.height, self._stream.width = image.shape[:2]
            self._codec.sample_aspect_ratio = pixel_aspect
        frame = import_av().VideoFrame.from_ndarray(image, format="rgb24").reformat(
            format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG", threads=1
        )  # fmt: skip
        frame.pts, frame.time_base = pts, self._time_base
        self._container.mux(self._stream.encode(frame))

    def flush(self) -> None:
        """Write the frames that the encoder still holds."""
        if self._codec.is_open:
            self._container.mux(self._stream.encode(None))


@contextlib.contextmanager
def write_video(
    path: str | os.PathLike, rate: Fraction, time_base: Fraction
) -> Iterator[VideoEncoder]:
    """Yield a `VideoEncoder`. The file appears at `path` only if the block succeeds.

    Args:
        path: its suffix selects the container, for example .mp4.
        rate: average frames per second.
        time_base: seconds per unit of the timestamps.

    Raises:
        UserError: The file cannot be written or encoded, or PyAV has no H.264 encoder.
    """
    av = import_av()
    if ENCODER not in av.codecs_available:
        raise UserError(f"this PyAV has no {ENCODER}: pip install --force-reinstall av")
    with write_atomically(path) as temporary:
        try:
            with av.open(f"file:{temporary}", "w") as container:
                encoder = VideoEncoder(container, rate, time_base)
                yield encoder
                encoder.flush()
        except av.error.FFmpegError as error:
            if isinstance(error, OSError):  # from the disk; `write_atomically` reports it
                raise
            raise UserError(f"{path} cannot be encoded as H.264 ({error.strerror})") from error


CAMERA = "camera:"
"""Prefix of the source names of cameras."""


def open_video(source: str | os.PathLike) -> VideoReader:
    """A reader of a video file, or of the camera "camera:N"; raises as `VideoReader`."""
    name = os.fspath(source)
    if name.startswith(CAMERA):
        return open_camera(name.removeprefix(CAMERA))
    return VideoReader(source)


def open_camera(device: str) -> VideoReader:
    """A reader of a camera, which has no end. Linux only.

    Args:
        device: a number N, for /dev/videoN, or the path of a device.

    Raises:
        VideoError: There is no such camera, or another program uses it.
    """
    path = f"/dev/video{device}" if device.isdigit() else device
    try:
        return VideoReader(path, CAMERA_FORMAT)
    except ValueError as error:  # PyAV for another system does not know the format
        raise UserError("cameras are read by Video4Linux, on Linux: give a recording") from error

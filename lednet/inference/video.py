"""Frames out of videos and cameras, and into videos, with their time stamps (PyAV, optional)."""

import contextlib
import os
import re
from collections.abc import Iterator
from fractions import Fraction
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from lednet.data import image_io
from lednet.errors import UserError
from lednet.io import write_atomically

VIDEO_SUFFIXES = (".mp4", ".mkv", ".mov", ".avi", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv")
CONTAINERS = "mov,matroska,webm,avi,mpeg,mpegvideo,mpegts,asf,h264,hevc"
"""FFmpeg's names of what is opened, by content and never by suffix: a playlist called .mp4 would
have it read other files, or the network."""
OLDEST_AV = 17
ENCODER = "libx264"
ENCODER_OPTIONS = {"preset": "ultrafast", "crf": "18"}
"""A fifth of the time of "veryfast", at a quality that keeps class colours apart, for files that
are up to twice as large."""
CAMERA_FORMAT = "v4l2"
BT709 = 1
"""Number of that standard in the three tables of H.264 that say what colours mean."""
DEFAULT_RATE = Fraction(25)
FINEST_TICK = 10_000
"""Ticks a second at least: time stamps off the beat are kept to 0.1 ms."""
TOLERANCE = 3
"""Frames that a video may lack at its end; its length is not always exact."""


def import_av() -> ModuleType:
    """
    Raises:
        UserError: PyAV is not installed, or too old.
    """
    try:
        import av
    except ImportError as error:
        raise UserError("videos and cameras need PyAV: pip install av") from error
    if int(av.__version__.split(".")[0]) < OLDEST_AV:
        raise UserError(f"PyAV {av.__version__} is too old: pip install -U av")
    return av


class VideoError(UserError):
    """A video or camera that gives nothing; others may."""


class FrameClock:
    """Time stamps as ticks from the first frame on, in a unit that holds the frame rate exactly.

    A stamp that is as near to the beat as its container can tell lies on the beat; others, of
    a variable frame rate or after a gap, stay where they are.

    Attributes:
        unit: seconds a tick.
        step: ticks from one beat to the next.
    """

    def __init__(self, rate: Fraction, time_base: Fraction | None):
        fineness = -(-FINEST_TICK // rate.numerator)
        self.unit = Fraction(1, rate.numerator * fineness)
        self.step = rate.denominator * fineness
        self._grain = time_base / self.unit if time_base else Fraction(0)
        self._first: int | None = None
        self._last = -self.step

    def ticks(self, stamp: int | None) -> int:
        """Later than that of the call before; without a stamp, by one beat."""
        ticks = self._last + self.step
        if stamp is not None:
            if self._first is None:
                self._first = stamp
            exact = (stamp - self._first) * self._grain
            beat = round(exact / self.step) * self.step
            ticks = beat if abs(exact - beat) <= self._grain else round(exact)
        self._last = max(ticks, self._last + 1)
        return self._last


class VideoFrame(NamedTuple):
    """image: (H, W, 3) uint8 RGB, upright; all of a video have one size."""

    number: int
    ticks: int
    image: np.ndarray


class VideoReader:
    """The frames of a video file or a camera, in the order in which they are shown; once.

    Args:
        source: a file, or a camera's device.
        format: that of a camera, `CAMERA_FORMAT`; a file's is told by its content.
        max_pixels: of a frame, `lednet.io.max_pixels()` if not given; the limit holds
            before one is decoded.

    Attributes:
        rate: frames a second, on average.
        unit: of the frames' ticks, in seconds.
        expected: number of frames, if the file tells it or its length.
        problem: after the last frame, None or a sentence: frames are missing.

    Raises:
        VideoError: not a video, or frames of more than `max_pixels`.
        UserError: PyAV is not installed.
    """

    def __init__(
        self,
        source: str | os.PathLike,
        format: str | None = None,
        max_pixels: int | None = None,
    ):
        self.source = os.fspath(source)
        self._av = import_av()
        try:
            # A name with a colon is no protocol's.
            url = self.source if format else f"file:{self.source}"
            safety = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
            self._container = self._av.open(
                url,
                format=format,
                container_options={} if format else safety,
                metadata_errors="replace",
            )
        except self._av.error.FFmpegError as error:
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
        self._clock = FrameClock(self.rate, self._stream.time_base)
        self.unit = self._clock.unit
        self._end = self._promised_end()
        by_length = None if self._end is None else round(self._end * self.rate)
        self.expected: int | None = self._stream.frames or by_length
        self.problem: str | None = None
        self._damaged = False

    def _limit_frames(self, max_pixels: int) -> None:
        codec = self._stream.codec_context
        if codec.width * codec.height > max_pixels:
            self._container.close()
            raise VideoError(
                f"{self.source} has frames of {codec.width}x{codec.height}, and {max_pixels:,} "
                "pixels are the limit: make it smaller"
            )
        # For frames that grow on the way; with room, as FFmpeg counts sides that it rounds up.
        codec.options = {"max_pixels": str(4 * max_pixels)}

    def _promised_end(self) -> Fraction | None:
        """When the last frame ends, in seconds of the stream's own time."""
        stream, container = self._stream, self._container
        if stream.duration and stream.time_base:
            return ((stream.start_time or 0) + stream.duration) * stream.time_base
        # Matroska's, as 00:00:01.001000000
        if told := re.fullmatch(
            r"(\d{1,9}):(\d{1,9}):(\d{1,9}\.?\d{0,9})", stream.metadata.get("DURATION", "")
        ):
            hours, minutes, seconds = told.groups()
            return Fraction(seconds) + 60 * int(minutes) + 3600 * int(hours)
        if len(container.streams) == 1 and container.duration:
            return Fraction((container.start_time or 0) + container.duration, 10**6)
        return None

    def __enter__(self) -> "VideoReader":
        return self

    def __exit__(self, *error: object) -> None:
        self._container.close()

    def __iter__(self) -> Iterator[VideoFrame]:
        """
        Raises:
            VideoError: not one frame can be decoded.
        """
        number = 0
        end: Fraction | None = None
        size: dict[str, int] = {}
        for frame in self._decoded():
            size = size or {"width": frame.width, "height": frame.height}
            image = frame.to_ndarray(format="rgb24", threads=1, **size)
            # The angle is counterclockwise, as that of rot90.
            image = np.ascontiguousarray(np.rot90(image, round(frame.rotation / 90)))
            if frame.pts is not None:
                lasts = frame.duration * frame.time_base if frame.duration else 1 / self.rate
                end = frame.pts * frame.time_base + lasts
            yield VideoFrame(number, self._clock.ticks(frame.pts), image)
            number += 1
        if not number:
            raise VideoError(f"{self.source} holds no frame that can be decoded: copy it again")
        missing = 0 if end is None or self._end is None else self._end - end
        short = missing > TOLERANCE / self.rate
        if short or self._damaged:
            of = f" of about {self.expected}" if self.expected else ""
            self.problem = (
                f"{self.source} is damaged or cut short: {number}{of} frames could be read, and "
                "were predicted; copy it again"
            )

    def _decoded(self) -> Iterator[Any]:
        """All frames that can be had, past damaged ones."""
        for packet in self._packets():
            try:
                frames = self._stream.decode(packet)
            except self._av.error.FFmpegError:
                self._damaged = True
                continue
            yield from frames

    def _packets(self) -> Iterator[Any]:
        """What the file holds; at the end one that makes the decoder hand over all it has."""
        try:
            yield from self._container.demux(self._stream)
        except self._av.error.FFmpegError:
            self._damaged = True
            yield None


class VideoEncoder:
    """Appends pictures to an open container as H.264; made by `write_video`."""

    def __init__(self, container: Any, rate: Fraction, unit: Fraction):
        self._av = import_av()
        self._container, self._rate, self._unit = container, rate, unit
        self._stream: Any | None = None
        self.padded = False
        """Whether a side was odd, which the encoder does not take: its last line is doubled."""

    def append(self, picture: np.ndarray, ticks: int) -> None:
        """
        Args:
            picture: (H, W, 3) uint8 RGB, all of one size.
            ticks: later than the last one.
        """
        height, width = picture.shape[:2]
        self.padded = bool(height % 2 or width % 2)
        if self.padded:
            picture = np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        if self._stream is None:
            self._stream = self._open(*picture.shape[:2])
        frame = self._av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(
            format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG", threads=1
        )
        frame.pts, frame.time_base = ticks, self._unit
        self._container.mux(self._stream.encode(frame))

    def _open(self, height: int, width: int) -> Any:
        stream = self._container.add_stream(ENCODER, rate=self._rate, options=ENCODER_OPTIONS)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        context = stream.codec_context
        context.time_base = self._unit
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = 1  # black is 16 and white 235
        return stream

    def finish(self) -> None:
        """Write what the encoder still holds."""
        if self._stream is not None:
            self._container.mux(self._stream.encode(None))


@contextlib.contextmanager
def write_video(path: str | os.PathLike, rate: Fraction, unit: Fraction) -> Iterator[VideoEncoder]:
    """Yield a `VideoEncoder` whose video is at `path` when the block ends well; else nothing is.

    Args:
        path: its suffix names the container, .mp4 for instance.
        rate: frames a second.
        unit: of the pictures' ticks, in seconds.

    Raises:
        UserError: it cannot be written or encoded, or this PyAV has no H.264.
    """
    av = import_av()
    if ENCODER not in av.codecs_available:
        raise UserError(f"this PyAV has no {ENCODER}: pip install --force-reinstall av")
    with write_atomically(path) as temporary:
        try:
            with av.open(f"file:{temporary}", "w") as container:
                writer = VideoEncoder(container, rate, unit)
                yield writer
                writer.finish()
        except av.error.FFmpegError as error:
            if isinstance(error, OSError):  # the disk, which `write_atomically` explains
                raise
            raise UserError(f"{path} cannot be encoded as H.264 ({error.strerror})") from error


def open_camera(device: str) -> VideoReader:
    """Frames as a camera gives them, with its time stamps and without an end.

    Args:
        device: a number, of /dev/video<number>, or a device's path. Linux only.

    Raises:
        VideoError: there is no such camera, or another program uses it.
    """
    path = f"/dev/video{device}" if device.isdigit() else device
    try:
        return VideoReader(path, CAMERA_FORMAT)
    except ValueError as error:  # a wheel for another system does not know the format
        raise UserError("cameras are read by Video4Linux, on Linux: give a recording") from error

"""The live page: NiceGUI around `lednet.demo.labeller`. `page.js` draws in the browser."""

import asyncio
import base64
import contextlib
import secrets
import socket
import tempfile
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

from nicegui import app, events, ui

from lednet.data.image_io import FORMATS
from lednet.demo.guard import Guard
from lednet.demo.labeller import Labeller, Limits, Progress
from lednet.errors import UserError
from lednet.inference.video import VIDEO_SUFFIXES

TITLE = "LEDNet"
STYLE = Path(__file__).with_suffix(".css")
QUIET = "outline no-caps"
"""Of buttons beside the first one."""
FORM_ROOM = 10_000
"""Bytes of a request around the file in it."""


def invitation(limits: Limits) -> str:
    images = ", ".join(FORMATS)
    videos = ", ".join(suffix[1:] for suffix in VIDEO_SUFFIXES)
    return (
        f"{images} up to {limits.pixels / 1e6:g} megapixels; {videos} up to {limits.seconds:g} s "
        f"or {limits.frames:,} frames; files up to {limits.upload / 1e6:g} MB"
    )


class Picture(ui.element, component="page.js"):
    """The image under its classes, the list of them, the camera: what acts in the browser."""


class Session:
    """One open page: its choices, its last image and its video, which nobody else can ask for.

    Args:
        folder: for its files.
        example: an image to try.
    """

    def __init__(self, labeller: Labeller, backend: str, folder: Path, example: Path | None):
        self.labeller, self.folder = labeller, folder
        self.image: tuple[str, bytes] | None = None
        self.opacity = 0.5
        self.progress = Progress()
        self.turn = asyncio.Lock()
        self.video = contextlib.ExitStack()  # whose end removes it
        self.client = ui.context.client
        self.client.on_delete(self.close)
        ui.colors(primary="#1f5fae")
        ui.add_css(STYLE)
        with ui.element("header").classes("top"):
            with ui.element("div").classes("name"):
                ui.label(TITLE).props("role=heading aria-level=1").classes("title")
                ui.label("Every pixel of a street gets a class").classes("muted")
            self.weights = ui.select(
                list(labeller.weights), value=next(iter(labeller.weights)), label="Weights",
                on_change=self.label_again,
            ).props("outlined dense options-dense").classes("choice")  # fmt: skip
            self.backend = ui.select(
                labeller.backends, value=backend, label="Backend", on_change=self.label_again
            ).props("outlined dense options-dense").classes("choice")  # fmt: skip
        with ui.element("div").classes("actions"):
            self.upload = ui.upload(
                auto_upload=True, max_file_size=labeller.limits.upload, max_files=1,
                on_upload=self.take, on_rejected=self.reject,
            ).classes("uploader")  # fmt: skip
            choose = ui.button("Image or video", icon="upload_file").props("no-caps")
            if example:
                ui.button("Example", icon="image", on_click=partial(self.take_file, example)).props(
                    QUIET
                )
            self.camera = ui.button("Webcam", icon="videocam", on_click=self.stop).props(QUIET)
            self.cancel = ui.button("Stop", icon="stop", on_click=self.stop).props(QUIET)
            with ui.element("div").classes("news").props("aria-live=polite"):
                self.news = ui.label().classes("status")
                self.bar = ui.linear_progress(value=0, show_value=False).props("rounded")
                self.trouble = ui.label().classes("trouble").props("role=alert")
        self.picture = Picture()
        self.picture.props["uploader"] = self.upload.id
        self.picture.props["invitation"] = invitation(labeller.limits)
        self.picture.on("opacity", self.keep_opacity)
        self.picture.on("frame", self.take_frame)
        self.picture.on("camera", self.note_camera)
        self.picture.on("trouble", lambda event: self.complain(str(event.args)))
        for button, method in ((choose, "choose"), (self.camera, "toggleCamera")):
            # In the browser: it gives files and cameras only to a click.
            button.on("click", js_handler=f"() => getElement({self.picture.id}).{method}()")
        self.timer = ui.timer(0.25, self.show_progress, active=False)
        self.say("")

    def say(self, sentence: str, trouble: str = "") -> None:
        """Show what goes on, or that nothing does, and what went wrong."""
        for label, text in ((self.news, sentence), (self.trouble, trouble)):
            label.text = text
            label.visible = bool(text)
        self.bar.visible = bool(sentence)
        self.bar.props("indeterminate")
        self.cancel.visible = self.timer.active = False

    def complain(self, sentence: str) -> None:
        self.say("", sentence[:1].upper() + sentence[1:])

    async def work(self, sentence: str, job: Callable[[], Awaitable[None]]) -> None:
        """Do `job` after those before it, saying so; what goes wrong is told."""
        async with self.turn:
            if self.client.is_deleted:
                return
            trouble = "something failed that should not: the server's log says what"
            try:
                if not self.labeller.is_ready(*self.choice):
                    self.say("Preparing {} with {} ...".format(*self.choice))
                    await asyncio.to_thread(self.labeller.prepare, *self.choice)
                self.say(sentence)
                await job()
                trouble = ""
            except UserError as error:
                trouble = str(error)
            finally:
                if not self.client.is_deleted:
                    self.complain(trouble)

    def send(self, method: str, *args: Any) -> None:
        """Call a method of `page.js`, if the page is still open."""
        if not self.client.is_deleted:
            self.picture.run_method(method, *args)

    @property
    def choice(self) -> tuple[str, str]:
        return str(self.weights.value), str(self.backend.value)

    def note_camera(self, event: events.GenericEventArguments) -> None:
        """The camera was started, and takes the image's place, or it was stopped."""
        self.camera.text = "Stop webcam" if event.args else "Webcam"
        if event.args:
            self.image = None

    def keep_opacity(self, event: events.GenericEventArguments) -> None:
        self.opacity = min(max(float(event.args), 0.0), 1.0)

    async def take(self, event: events.UploadEventArguments) -> None:
        """Label what was uploaded, an image or a video by its name."""
        self.upload.reset()
        self.stop()
        file = event.file
        if Path(file.name).suffix.lower() in VIDEO_SUFFIXES:
            self.image, self.progress = None, Progress()
            await self.work(
                f"Labelling {file.name} ...", partial(self.show_video, file, self.progress)
            )
        else:
            self.image = file.name, await file.read()
            await self.label_again()

    async def show_video(self, file: ui.upload.FileUpload, progress: Progress) -> None:
        """Label a video while the bar moves, and let the browser play it.

        Raises:
            UserError: as of `Labeller.label_video`, in terms of the upload's name; or frames are
                missing, after those that are there are shown.
        """
        self.video.close()
        temporary = tempfile.TemporaryDirectory(dir=self.folder, ignore_cleanup_errors=True)
        folder = Path(self.video.enter_context(temporary))
        source = folder / f"upload{Path(file.name).suffix.lower()}"
        await file.save(source)
        self.cancel.visible = self.timer.active = True
        try:
            answer = await asyncio.to_thread(
                self.labeller.label_video, source, *self.choice, self.opacity, progress
            )
        except UserError as error:
            self.video.close()
            raise UserError(str(error).replace(str(source), file.name)) from error
        if not self.client.is_deleted:
            address = f"/{secrets.token_urlsafe(16)}"
            url = app.add_media_file(local_file=folder / "video_overlay.mp4", url_path=address)
            self.video.callback(app.remove_route, url)
            self.send("showVideo", answer | {"url": url, "name": file.name})
        if answer["problem"]:
            raise UserError(answer["problem"].replace(str(source), file.name))

    def show_progress(self) -> None:
        done, total = self.progress.done, self.progress.total
        if total:
            self.bar.props(remove="indeterminate")
            self.bar.value = done / total
        self.news.text = f"{done:,} of {total:,} frames" if total else f"{done:,} frames"

    async def take_file(self, path: Path) -> None:
        self.stop()
        self.image = path.name, path.read_bytes()
        await self.label_again()

    def reject(self) -> None:
        self.complain(
            f"the file is larger than {self.labeller.limits.upload / 1e6:g} MB, the limit here: "
            "give a smaller one"
        )

    async def label_again(self) -> None:
        """Show the image that was given last as the chosen weights and backend label it."""
        if self.image:
            job = partial(self.show_image, *self.image)
            await self.work(f"Labelling {self.image[0]} ...", job)

    async def show_image(self, name: str, data: bytes) -> None:
        answer = await asyncio.to_thread(self.labeller.label_image, data, *self.choice)
        self.send("show", answer | {"name": name})

    async def take_frame(self, event: events.GenericEventArguments) -> None:
        """Label a frame of the camera; the browser sends the next one after the answer."""
        await self.work("", partial(self.show_frame, str(event.args)))

    async def show_frame(self, uri: str) -> None:
        try:
            data = base64.b64decode(uri.partition(",")[2])
            answer = await asyncio.to_thread(
                self.labeller.label_image, data, *self.choice, with_image=False
            )
        except (UserError, ValueError) as error:
            self.send("stopCamera", True)
            raise UserError(f"a frame of the camera was refused: {error}") from error
        self.send("show", answer)

    def stop(self) -> None:
        """Give up the video that is being labelled."""
        self.progress.stop.set()

    def close(self) -> None:
        self.stop()
        self.video.close()


def require_free(host: str, port: int) -> None:
    """
    Raises:
        UserError: the port is taken, or the host is no address of this machine.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, port), family=family).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"cannot serve at {host}, port {port} ({error}): choose another --port or --host"
        ) from error


def serve(
    labeller: Labeller,
    backend: str,
    host: str,
    port: int,
    *,
    example: Path | None = None,
    show: bool = False,
) -> None:
    """Serve the page until the process is told to end.

    Args:
        backend: that is chosen at first.
        example: an image to offer.
        show: open a browser.

    Raises:
        UserError: as `require_free`.
    """
    require_free(host, port)
    temporary = tempfile.TemporaryDirectory(prefix="lednet-", ignore_cleanup_errors=True)
    folder = Path(temporary.name)
    tempfile.tempdir = temporary.name  # of uploads on their way, too
    sessions: set[Session] = set()

    @ui.page("/")
    def page() -> None:
        session = Session(labeller, backend, folder, example)
        sessions.add(session)
        session.client.on_delete(lambda: sessions.discard(session))

    def end() -> None:
        for session in sessions:
            session.stop()
        temporary.cleanup()

    name = f"[{host}]" if ":" in host else host
    app.on_startup(
        lambda: print(f"http://{name}:{port} shows the page; Ctrl-C ends it", flush=True)
    )
    app.on_shutdown(end)
    app.add_middleware(Guard, host=host, max_bytes=labeller.limits.upload + FORM_ROOM)
    ui.run(
        host=host, port=port, title=TITLE, dark=None, show=show, reload=False, tailwind=False,
        show_welcome_message=False, uvicorn_logging_level="error",
    )  # fmt: skip
